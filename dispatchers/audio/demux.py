"""Live audio in a container, taken apart as it comes: bytes in strings of any length, whole packets out.

Each format is a generator that reads from a `Source` and yields what it finds: the `Header` once, then packets. It
yields None where it needs bytes that have not come yet, and is resumed when they have. So a packet comes out with its
last byte, nothing blocks, and memory is bounded by the largest element that a format may have. FFmpeg's own demuxers
are no help here: they wait for large reads and, for FLAC, for ten frames.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from dispatchers.errors import NotAudio

LARGEST = 1 << 20
"""Bytes that one element (a packet, a page, a header) may have."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a decoder must be told: FFmpeg's name of the codec, its extradata, and what extradata does not say.
    `skip` is how many samples at `rate` at the start are no audio."""

    codec: str
    rate: int
    channels: int
    extradata: bytes = b""
    skip: int = 0


Found: TypeAlias = Header | bytes
Steps: TypeAlias = Generator[Found | None, None, None]
Wait: TypeAlias = Generator[None, None, bytes]
Format: TypeAlias = Callable[["Source"], Steps]


class Source:
    """The bytes that have come and have not been read."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self.ended = False

    def add(self, data: bytes) -> None:
        self._bytes += data

    @property
    def held(self) -> bytearray:
        """To be looked at only."""
        return self._bytes

    def take(self, size: int) -> Wait:
        """The next `size` bytes. The end before them ends the stream quietly: it was cut off."""
        yield from self.peek(size)
        return self.pop(size)

    def peek(self, size: int) -> Wait:
        """The same, left in place."""
        if size > LARGEST:
            raise NotAudio("The stream has an element that is too large.")
        while len(self._bytes) < size:
            if self.ended:
                raise CutOff
            yield None
        return bytes(self._bytes[:size])

    def pop(self, size: int) -> bytes:
        """Bytes that have come, at most `size`."""
        data = bytes(self._bytes[:size])
        del self._bytes[: len(data)]
        return data

    def skip(self, size: int) -> Generator[None, None, None]:
        """Leaves out the next `size` bytes, without holding them."""
        while size := size - len(self.pop(size)):
            if self.ended:
                raise CutOff
            yield None

    def drain(self) -> Generator[None, None, None]:
        """Leaves out all that is still to come."""
        while not self.ended:
            self._bytes.clear()
            yield None


class CutOff(Exception):
    """The stream ended within an element."""


class Demuxer:
    """One stream's."""

    def __init__(self, form: Format):
        self._source = Source()
        self._steps = form(self._source)

    def feed(self, data: bytes) -> Iterator[Found]:
        """All that `data` completes, as it is asked for; must be read to its end. Raises `NotAudio`."""
        self._source.add(data)
        return self._found()

    def end(self) -> Iterator[Found]:
        """What could only be told by the stream's end."""
        self._source.ended = True
        return self._found()

    def _found(self) -> Iterator[Found]:
        try:
            for step in self._steps:
                if step is None:
                    return
                yield step
        except CutOff:
            return
