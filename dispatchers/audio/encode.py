"""Samples into files: wav, flac, mp3, piece by piece, into no more memory than a piece."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np

from dispatchers.interface import SAMPLE_RATE, Samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Form: TypeAlias = Literal["mp3", "wav", "flac"]

MEDIA_TYPES: dict[Form, str] = {"mp3": "audio/mpeg", "wav": "audio/wav", "flac": "audio/flac"}
WAV_HEADER_BYTES = 44
MP3_BITS_PER_S = 64_000

_MOST = 0xFFFF_FFFF
_STREAMINFO = slice(18, 26)  # RFC 9639, section 8.2: rate, channels and bits in 28 bits, then 36 of the samples' number


class Encoder(Protocol):
    """Blocking; for a thread."""

    def feed(self, samples: Samples) -> bytes:
        """What can be given out so far."""
        ...

    def end(self) -> bytes:
        """The rest of the file."""
        ...


def encoder(form: Form, total: int | None = None) -> Encoder:
    """`total` samples will come; None: nobody knows yet, which flac and mp3 allow."""
    if form == "wav":
        if total is None:
            raise ValueError("a wav file begins with its length")
        return _Wav(total)
    return _Compressed(form, total)


def unpacked(flac: bytes, step: int) -> Iterator[Samples]:
    """The samples of a flac file that `encoder` made, in pieces of at least `step`, but for the last. Blocking."""
    import av

    held: list[Samples] = []
    with av.open(io.BytesIO(flac), "r", format="flac") as container:
        for frame in container.decode(audio=0):
            held.append(frame.to_ndarray()[0])
            if sum(map(len, held)) >= step:
                yield np.concatenate(held)
                held = []
    if held:
        yield np.concatenate(held)


class _Wav:
    """RIFF; a length that does not fit in 32 bits is said as the most that does."""

    def __init__(self, total: int):
        data = 2 * total
        form = struct.pack("<IHHIIHH", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
        riff = struct.pack("<4sI4s", b"RIFF", min(_MOST, data + WAV_HEADER_BYTES - 8), b"WAVE")
        self._header = riff + b"fmt " + form + struct.pack("<4sI", b"data", min(_MOST, data))

    def feed(self, samples: Samples) -> bytes:
        header, self._header = self._header, b""
        return header + samples.astype("<i2", copy=False).tobytes()

    def end(self) -> bytes:
        header, self._header = self._header, b""
        return header


class _Compressed:
    """Through FFmpeg, whose muxer cannot go back in what was given out: a flac file's length is put in beforehand."""

    def __init__(self, form: Form, total: int | None):
        import av

        self._sink = _Sink()
        options = {"write_xing": "0"} if form == "mp3" else {}
        self._container: Any = av.open(self._sink, "w", format=form, options=options)
        stream: Any = self._container.add_stream("libmp3lame" if form == "mp3" else form, rate=SAMPLE_RATE)
        stream.layout = "mono"
        if form == "mp3":
            stream.bit_rate = MP3_BITS_PER_S
        self._stream = stream
        self._total = total if form == "flac" else None
        self._frame: Callable[..., Any] = av.AudioFrame.from_ndarray

    def feed(self, samples: Samples) -> bytes:
        if len(samples):
            frame = self._frame(np.ascontiguousarray(samples[np.newaxis]), format="s16", layout="mono")
            frame.sample_rate = SAMPLE_RATE
            self._container.mux(self._stream.encode(frame))
        return self._taken()

    def end(self) -> bytes:
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._taken()

    def _taken(self) -> bytes:
        data = self._sink.taken()
        if self._total is not None and len(data) >= _STREAMINFO.stop:
            (known,) = struct.unpack(">Q", data[_STREAMINFO])
            data[_STREAMINFO] = struct.pack(">Q", known & ~(2**36 - 1) | self._total)
            self._total = None
        return bytes(data)


class _Sink:
    """What the muxer writes to."""

    def __init__(self) -> None:
        self._data = bytearray()

    def write(self, data: bytes) -> int:
        self._data += data
        return len(data)

    def taken(self) -> bytearray:
        data, self._data = self._data, bytearray()
        return data
