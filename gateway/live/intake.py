"""What a live session has received and its recogniser has not yet taken: audio and commands, in their order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

from dispatchers.audio.container import ContainerDecoder
from dispatchers.audio.live import LiveDecoder, Wire
from dispatchers.errors import AudioError
from dispatchers.interface import SAMPLE_RATE, SAMPLES_PER_MS, Clear, Flush, Pcm, Samples, StreamInput, to_ms

AHEAD_MS = 30_000
"""Audio that may wait. When it does, the socket is not read on: the sender feels it as back-pressure."""

MESSAGES_AHEAD = 2_048
_BITE_BYTES = 64 * 1024
_MOST_BYTES_PER_S = 192_000

Received: TypeAlias = bytes | Flush | Clear


@dataclass(frozen=True, slots=True)
class _Anew:
    """A container begins, whose first sound is that of `from_ms`."""

    from_ms: int


class Intake:
    """A bounded queue between one reader of a socket and one recogniser.

    A single message may exceed the bound, so the audio waiting is at most `AHEAD_MS` and one message. What comes is at
    `from_ms` of the session's clock.
    """

    def __init__(self, wire: Wire, from_ms: int = 0):
        self._wire = wire
        self._fixed_bytes_per_s = None if wire.contained else wire.bytes_per_s
        self.received_bytes = 0 if wire.rate is None else from_ms * wire.rate // 1000 * wire.sample_bytes
        self._taken_bytes = self.received_bytes
        self._taken_samples = from_ms * SAMPLES_PER_MS
        self._waiting: deque[Received | _Anew] = deque()
        self._heard_already = 0  # samples
        self._ended = False
        self._filled = asyncio.Event()
        self._room = asyncio.Event()

    @property
    def received_ms(self) -> int:
        """Audio received, on the sender's clock; for a container an estimate."""
        if self._fixed_bytes_per_s is None:
            return self.taken_ms + self.lag_ms
        return self._ms(self.received_bytes)

    @property
    def lag_ms(self) -> int:
        """Audio received and not yet taken."""
        return self._ms(self.received_bytes - self._taken_bytes)

    @property
    def taken_ms(self) -> int:
        """Audio taken, on the session's sample clock."""
        return to_ms(self._taken_samples)

    def beyond(self, ms: int) -> int:
        """How many bytes came beyond `ms` of the sender's clock. Of a container nobody can tell."""
        if self._wire.rate is None:
            return 0
        return max(0, self.received_bytes - ms * self._wire.rate // 1000 * self._wire.sample_bytes)

    async def put(self, item: Received) -> None:
        """Waits while too much is waiting already."""
        while self.lag_ms >= AHEAD_MS or len(self._waiting) >= MESSAGES_AHEAD:
            self._room.clear()
            await self._room.wait()
        if isinstance(item, bytes):
            self.received_bytes += len(item)
        self._waiting.append(item)
        self._filled.set()

    def begin_anew(self, from_ms: int) -> None:
        """The next bytes are those of another container, from `from_ms` on; what was heard is not heard again."""
        self._waiting.append(_Anew(from_ms))
        self._filled.set()

    def end(self) -> None:
        """Nothing more will come; what waits is still handed on."""
        self._ended = True
        self._filled.set()

    async def items(self) -> AsyncIterator[StreamInput]:
        """All that was and will be received, decoded. The resampler's tail comes before a flush and at the end.

        Raises an `AudioError` where it cannot be decoded.
        """
        decoder = await LiveDecoder.open(self._wire)
        while (item := await self._next()) is not None:
            if isinstance(item, bytes) and isinstance(decoder, LiveDecoder) and decoder.plain:
                if len(fresh := self._counted(decoder.take(item))):
                    yield Pcm(fresh)
                continue
            async for samples in _decoded(decoder, item):
                if len(fresh := self._counted(samples)):
                    yield Pcm(fresh)
            if isinstance(item, _Anew):
                decoder = await LiveDecoder.open(self._wire)
                self._heard_already = max(0, self._taken_samples - item.from_ms * SAMPLES_PER_MS)
            elif not isinstance(item, bytes):
                yield item
        async for samples in decoder.end():
            if len(fresh := self._counted(samples)):
                yield Pcm(fresh)

    def _counted(self, samples: Samples) -> Samples:
        """Those that are new."""
        if self._heard_already:
            known = min(self._heard_already, len(samples))
            self._heard_already -= known
            samples = samples[known:]
        self._taken_samples += len(samples)
        return samples

    async def _next(self) -> Received | _Anew | None:
        """The next command, or all the audio before it, in reasonable bites."""
        while not self._waiting:
            if self._ended:
                return None
            self._filled.clear()
            await self._filled.wait()
        item = self._waiting.popleft()
        if isinstance(item, bytes):
            item = self._joined(item)
            self._taken_bytes += len(item)
        self._room.set()
        return item

    def _joined(self, first: bytes) -> bytes:
        """Small messages that wait already cost no more than a large one."""
        parts, size = [first], len(first)
        while self._waiting and isinstance(after := self._waiting[0], bytes) and size + len(after) <= _BITE_BYTES:
            parts.append(after)
            size += len(after)
            self._waiting.popleft()
        return b"".join(parts) if len(parts) > 1 else first

    def _ms(self, size: int) -> int:
        return size * 1000 // self._bytes_per_s

    @property
    def _bytes_per_s(self) -> int:
        """A container's as it was so far, once a second of it is known: within bounds, as it bounds what may wait."""
        if self._fixed_bytes_per_s is not None:
            return self._fixed_bytes_per_s
        if self._taken_samples < SAMPLE_RATE:
            return self._wire.bytes_per_s
        return min(max(1, self._taken_bytes * SAMPLE_RATE // self._taken_samples), _MOST_BYTES_PER_S)


def _decoded(decoder: LiveDecoder | ContainerDecoder, item: Received | _Anew) -> AsyncIterator[Samples]:
    match item:
        case bytes():
            return decoder.feed(item)
        case _Anew():
            return _rest(decoder)
        case _:
            return _flushed(decoder)


async def _flushed(decoder: LiveDecoder | ContainerDecoder) -> AsyncIterator[Samples]:
    yield await decoder.flush()


async def _rest(decoder: LiveDecoder | ContainerDecoder) -> AsyncIterator[Samples]:
    """Of a container that was cut off."""
    with suppress(AudioError):
        async for samples in decoder.end():
            yield samples
