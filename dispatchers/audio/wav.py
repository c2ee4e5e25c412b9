"""PCM in RIFF/WAVE, as a stream: its sizes are claims, and a live one's are often wrong."""

from __future__ import annotations

import struct
import sys

from dispatchers.audio.demux import Header, Source, Steps
from dispatchers.errors import NotAudio

_CHUNK = struct.Struct("<4sI")
_FORMAT = struct.Struct("<HHIIHH")
_EXTENSIBLE, _SUBFORMAT_AT = 0xFFFE, 24
_CODECS = {
    (1, 8): "pcm_u8",
    (1, 16): "pcm_s16le",
    (1, 24): "pcm_s24le",
    (1, 32): "pcm_s32le",
    (3, 32): "pcm_f32le",
    (6, 8): "pcm_alaw",
    (7, 8): "pcm_mulaw",
}
_ENDLESS = range(0x7FFF_F000, 0x1_0000_0000)
_PIECE = 16 * 1024
_SHORTEST_SAYING = 4
_CHUNKS_MOST = 16
_SAYS_NOTHING = frozenset({b"LIST", b"fact", b"JUNK", b"PAD ", b"PEAK"})


def wav(source: Source) -> Steps:
    """Pieces of whole samples. A length of nothing, or of 2 GiB and more, means: to the end."""
    riff = yield from source.take(12)
    if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
        raise NotAudio("The stream is no WAV.")
    whole = 0  # bytes of one sample of all channels
    while True:
        kind, size = _CHUNK.unpack((yield from source.take(_CHUNK.size)))
        if kind == b"data":
            break
        if kind == b"fmt ":
            header, whole = _header((yield from source.peek(size)))
            yield header
        yield from source.skip(size + size % 2)
    if not whole:
        raise NotAudio("The stream's WAV has no format.")
    yield from _audio(source, whole, sys.maxsize if size == 0 or size in _ENDLESS else size)
    yield from source.drain()  # what follows the audio says nothing


def plain_pcm(content: bytes, rate: int) -> memoryview | None:
    """The samples of a whole, ordinary file of 16-bit mono PCM at this rate. None for anything else, or in any doubt:
    no claim of the header is believed that the file does not bear out."""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        return None
    at, form = 12, b""
    for _ in range(_CHUNKS_MOST):  # hundreds of thousands of empty ones would take their time
        if at + _CHUNK.size > len(content):
            return None
        kind, size = _CHUNK.unpack_from(content, at)
        at += _CHUNK.size
        if kind == b"data":
            whole = form == _FORMAT.pack(1, 1, rate, 2 * rate, 2, 16) and size and size % 2 == 0
            alone = content.find(b"data", at + size) < 0
            return memoryview(content)[at : at + size] if whole and alone and at + size <= len(content) else None
        if kind == b"fmt " and size == _FORMAT.size and not form:
            form = content[at : at + size]
        elif kind not in _SAYS_NOTHING or size < _SHORTEST_SAYING:
            return None
        at += size + size % 2
    return None


def _audio(source: Source, whole: int, left: int) -> Steps:
    """Up to `left` bytes of samples of so many."""
    while left >= whole:
        here = min(len(source.held), left, _PIECE) // whole * whole
        if here:
            left -= here
            yield source.pop(here)
        elif source.ended:
            return
        else:
            yield None


def _header(content: bytes) -> tuple[Header, int]:
    if len(content) < _FORMAT.size:
        raise NotAudio("The stream's WAV header is damaged.")
    tag, channels, rate, _, whole, bits = _FORMAT.unpack_from(content)
    if tag == _EXTENSIBLE:
        tag = int.from_bytes(content[_SUBFORMAT_AT : _SUBFORMAT_AT + 2], "little")
    codec = _CODECS.get((tag, bits))
    if codec is None or whole != channels * bits // 8 or not whole:
        raise NotAudio("The stream's WAV is of a kind that is not supported.")
    return Header(codec, rate, channels), whole
