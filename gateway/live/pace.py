"""How fast one client's frames are taken, whatever their size."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

BURST_S = 2.0


class Pace:
    """So many a second in the long run, `BURST_S` seconds' worth at once. Who is faster is made to wait, not refused:
    what is not read yet, TCP holds back at its sender."""

    def __init__(self, per_s: int, clock: Callable[[], float] | None = None):
        self._clock = clock or asyncio.get_running_loop().time
        self._each_s = 1 / per_s
        self._due = self._clock() - BURST_S

    def wait_s(self) -> float:
        """Counts one frame, and says how long to wait before it is taken."""
        now = self._clock()
        self._due = max(self._due, now - BURST_S) + self._each_s
        return max(0.0, self._due - now)
