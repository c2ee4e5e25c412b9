"""The recent past of a stream, addressed by the stream's own sample clock."""

from __future__ import annotations

import numpy as np

from dispatchers.interface import SAMPLE_RATE, Samples


class Tape:
    """Samples `start` to `end` of a stream. Appending and forgetting cost no more than the samples moved; memory is at
    most about twice the most ever kept."""

    def __init__(self) -> None:
        self._store = np.empty(4 * SAMPLE_RATE, np.int16)
        self._first = 0  # where in the store the tape starts
        self.start = 0
        self.end = 0

    def append(self, samples: Samples) -> None:
        held = self.end - self.start
        if self._first + held + len(samples) > len(self._store):
            self._make_room(held, len(samples))
        at = self._first + held
        self._store[at : at + len(samples)] = samples
        self.end += len(samples)

    def forget(self, before: int) -> None:
        """Drops what lies before the sample `before`."""
        before = min(max(before, self.start), self.end)
        self._first += before - self.start
        self.start = before

    def cut(self, start: int, end: int) -> Samples:
        """A copy of the samples from `start` up to `end`, both within the tape."""
        if not self.start <= start <= end <= self.end:
            raise IndexError("these samples are not on the tape")
        at = self._first + start - self.start
        return self._store[at : at + end - start].copy()

    def _make_room(self, held: int, more: int) -> None:
        kept = self._store[self._first : self._first + held]
        needed = held + more
        store = self._store if 2 * needed <= len(self._store) else np.empty(2 * needed, np.int16)
        store[:held] = kept.copy() if store is self._store else kept
        self._store, self._first = store, 0
