"""How long a batch gathers: not at all when work is rare, a little when it comes thick and fast."""

from __future__ import annotations

LONGEST_WINDOW_S = 0.02
_SMOOTHING = 0.2
_REST = 10  # windows: a longer pause counts as one of this length, so that a few pieces tell the new rhythm


class Rhythm:
    """The pace at which pieces come, smoothed; times in s on any one clock."""

    def __init__(self) -> None:
        self._last = float("-inf")
        self._gap = LONGEST_WINDOW_S

    def beat(self, now: float) -> None:
        """A piece has come."""
        gap = min(now - self._last, _REST * LONGEST_WINDOW_S)
        self._gap += _SMOOTHING * (gap - self._gap)
        self._last = now

    def window(self, missing: int, now: float) -> float:
        """How long it takes until so many more have come, at most 20 ms; 0 where not even one is expected in that
        time, or none has come for so long."""
        if self._gap >= LONGEST_WINDOW_S or now - self._last >= LONGEST_WINDOW_S:
            return 0.0
        return min(LONGEST_WINDOW_S, missing * self._gap)
