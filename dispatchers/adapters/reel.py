"""The part of a stream that has not been answered yet, kept so that somebody else can answer it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from dispatchers.interface import Clear, Flush, Pcm, StreamInput


class Reel:
    """Audio and commands in their order, from the sample `start` of the stream to its `end`. It never holds more than
    `most` samples: the oldest go first. A command stays until it is answered."""

    def __init__(self, most: int):
        self._most = most
        self._items: deque[tuple[int, StreamInput]] = deque()  # each with the sample it begins at
        self.start = 0
        self.end = 0

    def keep(self, item: StreamInput) -> None:
        self._items.append((self.end, item))
        if isinstance(item, Pcm):
            self.end += len(item.samples)
            self.forget(self.end - self._most)

    def forget(self, before: int) -> None:
        """Audio before this sample is answered, or will not be."""
        before = min(before, self.end)
        if before <= self.start:
            return
        self.start = before
        commands = deque[tuple[int, StreamInput]]()
        while self._items and _end(*self._items[0]) <= before:
            entry = self._items.popleft()
            if not isinstance(entry[1], Pcm):
                commands.appendleft(entry)
        self._items.extendleft(commands)

    def answered(self, command: type[Flush | Clear]) -> None:
        """The oldest command of this kind is answered, and so is all the audio before it."""
        found = next((entry for entry in self._items if isinstance(entry[1], command)), None)
        if found is not None:
            self._items.remove(found)
            self.forget(found[0])

    def again(self) -> Iterator[StreamInput]:
        """All of it, from `start` on."""
        for at, item in tuple(self._items):
            if isinstance(item, Pcm) and at < self.start:
                yield Pcm(item.samples[self.start - at :])
            else:
                yield item


def _end(at: int, item: StreamInput) -> int:
    return at + len(item.samples) if isinstance(item, Pcm) else at
