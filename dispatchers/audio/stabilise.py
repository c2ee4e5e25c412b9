"""Changing hypotheses to firm text: local agreement of successive ones.

LocalAgreement-2 (Liu, Spanakis and Niehues 2020; used for Whisper by Macháček, Dabre and Bojar 2023): what two
hypotheses in a row begin with is firm. The newest word is held back besides, for its sound may have been cut off; and
two words before it, unless a third hypothesis agrees, for a cut-off sound also misleads about what came before it. An
utterance's first words do not wait for the third. Of 101 utterances of the micro model's samples, with a hypothesis
each 300 ms, 3 left their firm text when two always sufficed, and none with this rule; the first words are as early, the
others 0.2 s later on average.
"""

from __future__ import annotations

import re
from collections import deque

_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_UNITS = re.compile(rf"\s?[{_UNSPACED}]|\s?[^\s{_UNSPACED}]+")
"""A word with the space before it, or one sign of a script that is written without spaces."""

_UNSURE = 3
"""The newest words, of which all but the last need a third hypothesis."""


def normal(text: str) -> str:
    """Single spaces between words and none around them."""
    return " ".join(text.split())


class Stabiliser:
    """One utterance's text as it firms up. Deltas are append-only; an utterance's first has no leading space."""

    def __init__(self) -> None:
        self._firm = ""
        self._before: deque[list[str]] = deque(maxlen=2)

    def partial(self, hypothesis: str) -> tuple[str | None, int, str]:
        """The newly firm text (None if there is none), how many code points are firm in all, and the text to show,
        which begins with what is firm, whatever the hypothesis makes of it now."""
        units = _UNITS.findall(normal(hypothesis))
        agreed = "".join(units[: self._agreed(units)])
        self._before.append(units)
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

    def _agreed(self, units: list[str]) -> int:
        """How many units this hypothesis and those before it make firm."""
        counts = [_agreement(before, units) for before in self._before]
        twice = min(counts[-1], len(units) - (_UNSURE if self._firm else 1)) if counts else 0
        thrice = min(*counts, len(units) - 1) if len(counts) == 2 else 0
        return max(twice, thrice, 0)

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
