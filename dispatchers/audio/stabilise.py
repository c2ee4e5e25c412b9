"""Changing hypotheses to firm text: local agreement of successive ones.

LocalAgreement-2 (Liu, Spanakis and Niehues 2020; used for Whisper by Macháček, Dabre and Bojar 2023): what two
hypotheses in a row begin with is firm. The newest word is held back besides, for its sound may have been cut off; and
two words before it, unless a third hypothesis agrees, for a cut-off sound also misleads about what came before it.

Two more rules keep wrong text from firming up. A recogniser guesses on where a cut-off sound leads, and successive
guesses may agree; but it is unsure of them, and what the newest hypothesis is unsure of needs `_ALIKE_IF_UNSURE`
hypotheses alike. And no text is firm before there was time to say it: a recogniser may run ahead of the speaker. What
each rule is worth is in docs/benchmarks.md ("Firm text").

Whoever cannot wait for agreement has what is `overdue` made firm as it stands, at the price of more finals that differ.
A hypothesis does not say when its words were spoken; but a word was not yet spoken where the newest hypothesis without
it ended, so it is no older than that.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import deque
from itertools import accumulate

_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_UNITS = re.compile(rf"\s?[{_UNSPACED}]|\s?[^\s{_UNSPACED}]+")
"""A word with the space before it, or one sign of a script that is written without spaces."""

_SIGN = re.compile(rf"\s?[{_UNSPACED}]")

_UNSURE = 3
"""The newest words, of which all but the last need a third hypothesis."""

_ALIKE_IF_UNSURE = 5

_WORD_MS, _SIGN_MS = 250, 100
"""As fast as text firms up: about the fastest that people go on speaking."""

_LEAD_MS = 500
"""From an utterance's start (pre-roll included) to its first word, and from a word's start until there is enough of
it."""


def normal(text: str) -> str:
    """Single spaces between words and none around them."""
    return " ".join(text.split())


class Stabiliser:
    """One utterance's text as it firms up. Deltas are append-only; an utterance's first has no leading space. Times are
    in ms of any one clock, `start_ms` where the utterance begins."""

    def __init__(self, start_ms: int = 0) -> None:
        self._firm = ""
        self._shown = ""
        self._since: list[int] = []  # after which the unit in this place was spoken
        self._start_ms = self._end_ms = start_ms
        self._before: deque[list[str]] = deque(maxlen=_ALIKE_IF_UNSURE - 1)

    def partial(self, hypothesis: str, end_ms: int, *, unsure: bool = False) -> tuple[str | None, int, str]:
        """A hypothesis of the audio up to `end_ms`, of which the recogniser may be `unsure`: the newly firm text (None
        if there is none), how many code points are firm in all, and the text to show, which begins with what is firm,
        whatever the hypothesis makes of it now."""
        units = _UNITS.findall(normal(hypothesis))
        agreed = "".join(units[: min(self._agreed(units, unsure), _sayable(units, end_ms - self._start_ms))])
        self._before.append(units)
        delta = None
        if len(agreed) > len(self._firm) and agreed.startswith(self._firm):
            delta = agreed[len(self._firm) :]
            self._firm = agreed
        self._since += [self._end_ms] * (len(units) - len(self._since))
        self._end_ms = end_ms
        self._shown = self._begun_with_firm(units)
        return delta, len(self._firm), self._shown

    def overdue(self, until_ms: int) -> str | None:
        """What of the text shown may have been spoken before `until_ms` and is not firm: it is from now on. None if
        there is none."""
        units = _UNITS.findall(self._shown)
        old = "".join(units[: bisect_right(self._since, until_ms)])
        if len(old) <= len(self._firm):
            return None
        delta, self._firm = old[len(self._firm) :], old
        return delta

    def final(self, text: str) -> tuple[str | None, bool]:
        """What is still to be sent of the final `text` (None if nothing), and whether `text` supersedes the deltas
        instead of completing them."""
        text = normal(text)
        if not text.startswith(self._firm):
            return None, True
        return text[len(self._firm) :] or None, False

    def _agreed(self, units: list[str], unsure: bool) -> int:
        """How many units this hypothesis and those before it make firm."""
        if unsure:
            return self._alike(units, _ALIKE_IF_UNSURE, held_back=1)
        return max(self._alike(units, 2, held_back=_UNSURE), self._alike(units, 3, held_back=1))

    def _alike(self, units: list[str], hypotheses: int, *, held_back: int) -> int:
        """How many units so many hypotheses begin with, this one the newest."""
        before = list(self._before)[1 - hypotheses :]
        if len(before) < hypotheses - 1:
            return 0
        return max(0, min(len(units) - held_back, *(_agreement(each, units) for each in before)))

    def _begun_with_firm(self, units: list[str]) -> str:
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


def _sayable(units: list[str], ms: int) -> int:
    """How many units there was time to begin in so many ms of an utterance."""
    needed = accumulate((_SIGN_MS if _SIGN.match(unit) else _WORD_MS for unit in units), initial=_LEAD_MS)
    return bisect_right(list(needed)[1:], ms)
