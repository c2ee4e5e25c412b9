"""How long a batch gathers: not at all when work is rare, a little when it comes thick and fast."""

from __future__ import annotations

LONGEST_WINDOW_S = 0.02
_SMOOTHING = 0.2
_REST = 10  # windows: a longer pause counts as one of this length, so that a few pieces tell the new rhythm
_LONGEST_REFRAIN_S = 2.0


class Rhythm:
    """The pace at which pieces come, smoothed; times in s on any one clock."""

    def __init__(self) -> None:
        self._last = float("-inf")
        self._gap = LONGEST_WINDOW_S
        self._refrain_s = 0.0
        self._refrain_until = float("-inf")

    def beat(self, now: float) -> None:
        """A piece has come."""
        gap = min(now - self._last, _REST * LONGEST_WINDOW_S)
        self._gap += _SMOOTHING * (gap - self._gap)
        self._last = now

    def gathered(self, now: float, *, company: bool) -> None:
        """A window is over. After one in vain there is none for a while, each time for longer: a single caller whose
        pieces follow each other closely never has company."""
        self._refrain_s = 0.0 if company else min(max(2 * self._refrain_s, LONGEST_WINDOW_S), _LONGEST_REFRAIN_S)
        self._refrain_until = now + self._refrain_s

    def window(self, missing: int, now: float) -> float:
        """How long it takes until so many more have come, at most 20 ms; 0 where not even one is expected in that
        time, none has come for so long, or it was waited for in vain lately."""
        if self._gap >= LONGEST_WINDOW_S or now - self._last >= LONGEST_WINDOW_S or now < self._refrain_until:
            return 0.0
        return min(LONGEST_WINDOW_S, missing * self._gap)
