"""Live audio in the encodings that a caller's socket carries, made samples at 16 kHz."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dispatchers.audio.container import ContainerDecoder
from dispatchers.audio.resample import Resampler
from dispatchers.interface import SAMPLE_RATE, Samples

Encoding: TypeAlias = Literal["pcm_s16le", "mulaw", "alaw", "opus", "flac", "wav", "mp3"]
Channels: TypeAlias = Literal[1, 2]

_TELEPHONE_RATE = 8_000
_CONTAINER_BYTES_PER_S: dict[str, int] = {"opus": 4_000, "flac": 40_000, "wav": 64_000, "mp3": 8_000}


@dataclass(frozen=True, slots=True)
class Wire:
    """How audio comes in: samples per second and channels, which are None for a container: its header tells them.
    Two channels are mixed down, or kept `apart`: then there must be two."""

    encoding: Encoding
    rate: int | None
    channels: Channels | None = 1
    apart: bool = False

    @property
    def contained(self) -> bool:
        return self.rate is None

    @property
    def transcribed(self) -> int:
        """How many channels there are to be recognised."""
        return 2 if self.apart else 1

    @property
    def sample_bytes(self) -> int:
        """Of all channels; of no meaning for a container."""
        return (2 if self.encoding == "pcm_s16le" else 1) * (self.channels or 1)

    @property
    def bytes_per_s(self) -> int:
        """For a container what is usual for speech."""
        if self.rate is None:
            return _CONTAINER_BYTES_PER_S[self.encoding]
        return self.rate * self.sample_bytes

    @classmethod
    def of(cls, encoding: Encoding, rate: int | None = None, channels: Channels = 1, *, apart: bool = False) -> Wire:
        """With the encoding's own rate where none is given, and neither rate nor channels for a container."""
        if encoding in _CONTAINER_BYTES_PER_S:
            return cls(encoding, None, None, apart)
        return cls(encoding, rate or cls.default_rate(encoding), channels, apart)

    @classmethod
    def default_rate(cls, encoding: Encoding) -> int:
        return SAMPLE_RATE if encoding == "pcm_s16le" else _TELEPHONE_RATE


class LiveDecoder:
    """Fed one stream's bytes in strings of any length. A sample cut in two waits for its other half, across flushes
    too. What costs anything is done in a thread."""

    def __init__(self, wire: Wire, resampler: Resampler):
        self._wire = wire
        self._resampler = resampler
        self._half = b""
        self.plain = wire in _PLAIN

    @classmethod
    async def open(cls, wire: Wire) -> LiveDecoder | ContainerDecoder:
        """Raises `UnsupportedAudio` for a rate that is none."""
        if wire.rate is None:
            return ContainerDecoder(wire.encoding, apart=wire.apart)
        return cls(wire, await asyncio.to_thread(Resampler, wire.rate, wire.channels or 1, apart=wire.apart))

    async def feed(self, data: bytes) -> AsyncIterator[Samples]:
        """What can be given out so far."""
        yield self.take(data) if self.plain else await asyncio.to_thread(self._convert, self._whole(data))

    def take(self, data: bytes) -> Samples:
        """The same at once, where it is `plain`."""
        return self._resampler.feed(self._whole(data))

    async def flush(self) -> Samples:
        """What the resampling filter still holds."""
        if self.plain:
            return self._resampler.flush()
        return await asyncio.to_thread(self._resampler.flush)

    async def end(self) -> AsyncIterator[Samples]:
        """The same at the end of the audio."""
        yield await self.flush()

    def _whole(self, data: bytes) -> bytes:
        data = self._half + data
        whole = len(data) - len(data) % self._wire.sample_bytes
        self._half = data[whole:]
        return data[:whole]

    def _convert(self, data: bytes) -> Samples:
        match self._wire.encoding:
            case "mulaw":
                data = MULAW[np.frombuffer(data, np.uint8)].tobytes()
            case "alaw":
                data = ALAW[np.frombuffer(data, np.uint8)].tobytes()
            case "pcm_s16le":
                pass
        return self._resampler.feed(data)


def _mulaw() -> NDArray[np.int16]:
    """ITU-T G.711, table 2: inverted bits; sign, 3 bits of exponent, 4 of mantissa; a bias of 132."""
    code = ~np.arange(256) & 0xFF
    magnitude = (((code & 0x0F) << 3) + 0x84 << ((code & 0x70) >> 4)) - 0x84
    return np.where(code & 0x80, -magnitude, magnitude).astype("<i2")


def _alaw() -> NDArray[np.int16]:
    """ITU-T G.711, table 1: every other bit inverted; the lowest two segments are of one step size."""
    code = np.arange(256) ^ 0x55
    segment = (code & 0x70) >> 4
    step = ((code & 0x0F) << 4) + 8
    magnitude = np.where(segment == 0, step, step + 0x100 << np.maximum(segment - 1, 0))
    return np.where(code & 0x80, magnitude, -magnitude).astype("<i2")


MULAW = _mulaw()
"""The sample of each of the 256 μ-law bytes."""

ALAW = _alaw()
"""The sample of each of the 256 A-law bytes."""

_PLAIN = (Wire("pcm_s16le", SAMPLE_RATE), Wire("pcm_s16le", SAMPLE_RATE, 2, apart=True))
"""What comes as it is wanted."""
