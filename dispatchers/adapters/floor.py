"""Who may be transcribed as they speak: so many speakers at once. Streams may be many; few of them speak at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from runtime.telemetry import SPEAKERS


class FloorTaken(Exception):
    """As many speak already as may."""


class Floor:
    """Of one process: `limit` speakers at once in all (None: any number), and so many of each share as it is told."""

    def __init__(self, limit: int | None = None):
        self._limit = limit
        self._speaking: Counter[str] = Counter()

    @contextmanager
    def place(self, share: str, limit: int | None) -> Iterator[None]:
        """A place for one speaker of this share, which may have `limit`. Raises `FloorTaken`."""
        if _full(self._speaking.total(), self._limit) or _full(self._speaking[share], limit):
            raise FloorTaken
        self._speaking[share] += 1
        try:
            with SPEAKERS.track_inprogress():
                yield
        finally:
            self._speaking[share] -= 1
            if not self._speaking[share]:
                del self._speaking[share]


class Speaker:
    """One stream of a share, which may have `limit` speakers. To be entered: nothing it leaves keeps a place."""

    def __init__(self, floor: Floor, share: str, limit: int | None):
        self._floor = floor
        self._share = share
        self._limit = limit
        self._held = ExitStack()
        self.has_place = False

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def take_place(self) -> bool:
        """Whether it has one, or gets one now."""
        if not self.has_place:
            try:
                self._held.enter_context(self._floor.place(self._share, self._limit))
            except FloorTaken:
                return False
            self.has_place = True
        return True

    def leave(self) -> None:
        """It has finished speaking."""
        self._held.close()
        self.has_place = False


def _full(taken: int, limit: int | None) -> bool:
    return limit is not None and taken >= limit
