"""Changing hypotheses to firm text: local agreement of two successive ones.

LocalAgreement-2 (Liu, Spanakis and Niehues 2020; used for Whisper by Macháček, Dabre and Bojar 2023): what two
hypotheses in a row begin with is firm. The newest word is held back besides, for its sound may have been cut off.
"""

from __future__ import annotations

import re

_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_UNITS = re.compile(rf"\s?[{_UNSPACED}]|\s?[^\s{_UNSPACED}]+")
"""A word with the space before it, or one sign of a script that is written without spaces."""


def normal(text: str) -> str:
    """Single spaces between words and none around them."""
    return " ".join(text.split())


class Stabiliser:
    """One utterance's text as it firms up. Deltas are append-only; an utterance's first has no leading space."""

    def __init__(self) -> None:
        self._firm = ""
        self._before: list[str] = []

    def partial(self, hypothesis: str) -> tuple[str | None, int, str]:
        """The newly firm text (None if there is none), how many code points are firm in all, and the text to show,
        which begins with what is firm, whatever the hypothesis makes of it now."""
        units = _UNITS.findall(normal(hypothesis))
        agreed = "".join(units[: min(_agreement(self._before, units), max(len(units) - 1, 0))])
        self._before = units
        delta = None
        if len(agreed) > len(self._firm) and agreed.startswith(self._firm):
            delta = agreed[len(self._firm) :]
            self._firm = agreed
        return delta, len(self._firm), self._shown(units)

    def final(self, text: str) -> tuple[str | None, bool]:
        """What is still to be sent of the final `text` (None if nothing), and whether `text` supersedes the deltas
        instead of completing them."""
        text = normal(text)
        if not text.startswith(self._firm):
            return None, True
        return text[len(self._firm) :] or None, False

    def _shown(self, units: list[str]) -> str:
        whole = "".join(units)
        if whole.startswith(self._firm):
            return whole
        return self._firm + "".join(units[len(_UNITS.findall(self._firm)) :])


def _agreement(one: list[str], other: list[str]) -> int:
    """How many units the two begin with in common."""
    for count, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return count
    return min(len(one), len(other))
