"""Any recording, a file or its content in memory, read as mono 16 kHz samples by FFmpeg (through PyAV), piece by piece.

A header is a claim, never trusted: lengths count decoded samples, and memory does not grow with what a file says of
itself. A recording may not refer to anything outside itself: playlists, concatenations and session descriptions are not
among the accepted formats, and no protocol may be opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dispatchers.audio.wav import plain_pcm
from dispatchers.errors import AudioTooLong, AudioTooShort, EmptyAudio, NotAudio, UnsupportedAudio
from dispatchers.interface import SAMPLE_RATE, SAMPLES_PER_MS, Samples

if TYPE_CHECKING:
    from av import AudioFrame, AudioStream
    from av.container import InputContainer

MIN_MS = 100
MAX_CHANNELS = 8
RATES_HZ = range(8_000, 192_001)

_FORMATS = (
    "wav,w64,flac,mp3,ogg,matroska,webm,mov,mp4,m4a,3gp,aac,ac3,aiff,au,amr,amrnb,amrwb,caf,avi,asf,flv,mpegts,mpeg"
)
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}


@dataclass(frozen=True, slots=True)
class Probed:
    """What a recording's header claims; good for choosing a way, not for billing."""

    duration_ms: int | None
    codec: str
    container: str
    channels: int
    sample_rate: int


def probe(recording: Path | bytes) -> Probed:
    """Reads the header only. Blocking. Raises `EmptyAudio`, `NotAudio` or `UnsupportedAudio`."""
    with _opened(recording) as (container, stream):
        return Probed(
            duration_ms=container.duration // 1000 if container.duration is not None else None,
            codec=stream.codec_context.name,
            container=container.format.name,
            channels=stream.channels,
            sample_rate=stream.rate,
        )


def decode(recording: Path | bytes, *, limit_ms: int | None = None) -> Iterator[Samples]:
    """The recording's samples in pieces, as they are decoded. Blocking; memory does not grow with length.

    A file that breaks off gives what could be decoded. Raises `EmptyAudio`, `NotAudio` or `UnsupportedAudio` at the
    first piece, `AudioTooLong` once more than `limit_ms` has been decoded, `AudioTooShort` at the end of less than
    100 ms.
    """
    total = 0
    with _opened(recording) as (container, stream):
        for samples in _resampled(_frames(container, stream)):
            total += len(samples)
            _check_longest(total, limit_ms)
            yield samples
    if total == 0:
        raise NotAudio
    _check_shortest(total)


def load(recording: Path | bytes, *, limit_ms: int | None = None) -> Samples:
    """The whole recording in memory, for short audio. Blocking; raises as `decode` does."""
    return np.concatenate(list(decode(recording, limit_ms=limit_ms)))


def plain(content: bytes, *, limit_ms: int | None = None) -> Samples | None:
    """The samples of a WAV that holds them just as they are wanted, which takes no time; None for anything else, or in
    any doubt. Raises `AudioTooLong` and `AudioTooShort`."""
    pcm = plain_pcm(content, SAMPLE_RATE)
    if pcm is None:
        return None
    samples = np.frombuffer(pcm, np.dtype("<i2"))
    _check_longest(len(samples), limit_ms)
    _check_shortest(len(samples))
    return samples


def spool(recording: Path | bytes, target: Path, *, limit_ms: int | None = None) -> Samples:
    """Decodes to raw samples in `target` and maps them read-only, so that hours of audio cost no memory.

    Blocking; raises as `decode` does, and then leaves no `target` behind.
    """
    try:
        with target.open("wb") as raw:
            for samples in decode(recording, limit_ms=limit_ms):
                raw.write(samples.tobytes())
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return np.memmap(target, dtype=np.int16, mode="r")


@contextmanager
def _opened(recording: Path | bytes) -> Iterator[tuple[InputContainer, AudioStream]]:
    """The container and its first audio stream, both found acceptable. FFmpeg's errors become ours."""
    import av

    with BytesIO(recording) if isinstance(recording, bytes) else recording.open("rb") as file:
        if not file.read(1):
            raise EmptyAudio
        file.seek(0)
        try:
            with av.open(file, "r", options=_OPTIONS) as container:
                if not container.streams.audio:
                    raise NotAudio
                stream = container.streams.audio[0]
                if stream.codec_context is None:
                    raise UnsupportedAudio("The recording uses an unknown codec.")
                _check(stream.channels, stream.rate)
                yield container, stream
        except (av.FFmpegError, ValueError, OverflowError, MemoryError):
            # The cause may quote the file or its path, so it is not chained.
            raise NotAudio from None


def _check_longest(samples: int, limit_ms: int | None) -> None:
    if limit_ms is not None and samples > limit_ms * SAMPLES_PER_MS:
        raise AudioTooLong


def _check_shortest(samples: int) -> None:
    if samples < MIN_MS * SAMPLES_PER_MS:
        raise AudioTooShort


def _check(channels: int, rate: int | None) -> None:
    if not 1 <= channels <= MAX_CHANNELS or rate not in RATES_HZ:
        raise UnsupportedAudio


def _frames(container: InputContainer, stream: AudioStream) -> Iterator[AudioFrame]:
    """Decoded frames up to where the file ends or breaks off; a packet that cannot be decoded is passed over."""
    import av

    with suppress(av.FFmpegError):
        for packet in container.demux(stream):
            with suppress(av.error.InvalidDataError):
                yield from packet.decode()


def _resampled(frames: Iterator[AudioFrame]) -> Iterator[Samples]:
    """One resampler for as long as the frames keep their shape: a recording may change it midway."""
    import av

    shape, resampler = None, None
    for frame in frames:
        found = (frame.format.name, frame.layout.name, frame.sample_rate)
        if resampler is None or found != shape:
            if resampler is not None:
                yield from _pieces(resampler.resample(None))
            _check(frame.layout.nb_channels, frame.sample_rate)
            shape, resampler = found, av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
        yield from _pieces(resampler.resample(frame))
    if resampler is not None:
        yield from _pieces(resampler.resample(None))


def _pieces(frames: list[AudioFrame]) -> Iterator[Samples]:
    for frame in frames:
        if frame.samples:
            yield frame.to_ndarray()[0]
