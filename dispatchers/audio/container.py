"""Live audio in a container, decoded as it comes (`dispatchers.audio.demux`) by FFmpeg's codecs (through PyAV).

No FFmpeg demuxer sees what a caller sends, and of the codecs only those of `live.Encoding`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, cast

import numpy as np

from dispatchers.audio.decode import MAX_CHANNELS, RATES_HZ
from dispatchers.audio.demux import Demuxer, Format, Found, Header, Source, Steps
from dispatchers.audio.flac import flac
from dispatchers.audio.mp3 import mp3
from dispatchers.audio.ogg import ogg
from dispatchers.audio.resample import converter, shaped
from dispatchers.audio.wav import wav
from dispatchers.audio.webm import webm
from dispatchers.errors import NotAudio, UnsupportedAudio
from dispatchers.interface import SAMPLE_RATE, Samples

if TYPE_CHECKING:
    from av import AudioCodecContext, AudioFrame, AudioResampler

_BITE = SAMPLE_RATE  # samples decoded in one go, however many a few bytes unfold to
_PATIENCE = 8  # packets in a row that may be undecodable: an MP3 cut out of another begins with some
_NOTHING: Samples = np.empty(0, np.int16)


class ContainerDecoder:
    """One stream's. What costs anything is done in a thread, up to a second of audio at a time."""

    def __init__(self, encoding: str, *, apart: bool = False):
        self._demuxer = Demuxer(_FORMATS[encoding])
        self._apart = apart
        self._codec: _Codec | None = None

    async def feed(self, data: bytes) -> AsyncIterator[Samples]:
        """All that `data` completes. Raises `NotAudio` or `UnsupportedAudio`, after which the stream is over."""
        async for samples in self._pieces(self._decoded(self._demuxer.feed(data))):
            yield samples

    async def flush(self) -> Samples:
        """Nothing: the few ms that codec and filter hold belong to the sound that follows."""
        return _NOTHING

    async def end(self) -> AsyncIterator[Samples]:
        """What only the stream's end completes. Raises as `feed` does."""
        async for samples in self._pieces(self._last()):
            yield samples

    async def _pieces(self, decoded: Iterator[Samples]) -> AsyncIterator[Samples]:
        while len(samples := await asyncio.to_thread(_bite, decoded)):
            yield samples

    def _decoded(self, found: Iterator[Found]) -> Iterator[Samples]:
        for item in found:
            if isinstance(item, Header):
                if self._codec is not None:
                    yield from self._codec.decode(None)
                self._codec = _Codec(item, apart=self._apart)
            elif self._codec is not None:
                yield from self._codec.decode(item)

    def _last(self) -> Iterator[Samples]:
        yield from self._decoded(self._demuxer.end())
        if self._codec is not None:
            yield from self._codec.decode(None)


class _Codec:
    """Packets to samples at 16 kHz, mono or of two channels kept `apart`."""

    def __init__(self, header: Header, *, apart: bool):
        import av

        self._apart = apart
        self._check(header.channels, header.rate)
        self._context = cast("AudioCodecContext", av.CodecContext.create(header.codec, "r"))
        self._context.thread_count = 1
        if header.extradata:
            self._context.extradata = header.extradata
        else:
            self._context.sample_rate = header.rate
            self._context.layout = _LAYOUTS[header.channels]
        self._resampler: AudioResampler | None = None
        self._shape: tuple[str, str, int] | None = None
        self._skip = header.skip * SAMPLE_RATE // header.rate
        self._undecodable = 0

    def decode(self, packet: bytes | None) -> Iterator[Samples]:
        """None ends the audio: codec and filter give what they hold."""
        import av

        try:
            frames = self._context.decode(None if packet is None else av.Packet(packet))
        except (av.FFmpegError, ValueError, MemoryError):
            self._undecodable += 1
            if self._undecodable > _PATIENCE:
                raise NotAudio("The stream is damaged: its audio cannot be decoded.") from None
            frames = []
        else:
            self._undecodable = 0
        for frame in frames:
            yield from self._resampled(frame)
        if packet is None and self._resampler is not None:
            yield from self._samples(self._resampler.resample(None))
            self._resampler = None

    def _resampled(self, frame: AudioFrame) -> Iterator[Samples]:
        """One filter for as long as the frames keep their shape."""
        shape = (frame.format.name, frame.layout.name, frame.sample_rate)
        if self._resampler is None or shape != self._shape:
            self._check(frame.layout.nb_channels, frame.sample_rate)
            if self._resampler is not None:
                yield from self._samples(self._resampler.resample(None))
            self._shape, self._resampler = shape, converter(self._channels)
        yield from self._samples(self._resampler.resample(frame))

    def _samples(self, frames: list[AudioFrame]) -> Iterator[Samples]:
        for frame in frames:
            samples = shaped(frame.to_ndarray()[0], self._channels)[self._skip :]
            self._skip = max(0, self._skip - frame.samples)
            if len(samples):
                yield samples

    @property
    def _channels(self) -> int:
        return 2 if self._apart else 1

    def _check(self, channels: int, rate: int) -> None:
        if not 1 <= channels <= MAX_CHANNELS or rate not in RATES_HZ:
            raise UnsupportedAudio
        if self._apart and channels != 2:
            raise UnsupportedAudio(f"Only two channels can be transcribed each for itself; this audio has {channels}.")


def _bite(decoded: Iterator[Samples]) -> Samples:
    """The next second, or all there is; empty at the end."""
    parts, size = list[Samples](), 0
    for samples in decoded:
        parts.append(samples)
        size += len(samples)
        if size >= _BITE:
            break
    return np.concatenate(parts) if parts else _NOTHING


def _opus(source: Source) -> Steps:
    """In Ogg, or else in WebM."""
    first = yield from source.peek(4)
    yield from ogg(source) if first == b"OggS" else webm(source)


_FORMATS: dict[str, Format] = {"opus": _opus, "flac": flac, "wav": wav, "mp3": mp3}
_LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
