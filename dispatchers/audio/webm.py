"""Opus in WebM: RFC 8794 (EBML), RFC 9559 (Matroska)."""

from __future__ import annotations

from collections.abc import Generator

from dispatchers.audio.demux import Header, Source, Steps
from dispatchers.audio.ogg import opus_header
from dispatchers.errors import NotAudio

_EBML = 0x1A45DFA3
_TRACK, _TRACK_NUMBER, _CODEC, _CODEC_PRIVATE = 0xAE, 0xD7, 0x86, 0x63A2
_CLUSTER = 0x1F43B675
_SIMPLE_BLOCK, _BLOCK = 0xA3, 0xA1
_ENTERED = frozenset({0x18538067, 0x1654AE6B, _TRACK, _CLUSTER, 0xA0})  # Segment, Tracks, … BlockGroup
_READ = frozenset({_TRACK_NUMBER, _CODEC, _CODEC_PRIVATE, _SIMPLE_BLOCK, _BLOCK})
_LACING = 0x06


def webm(source: Source) -> Steps:
    """The blocks of the first Opus track. The tree is walked flat: what holds something of interest is entered whatever
    its size (a live recording's is unknown), the rest is passed over."""
    if (yield from _number(source, keep_marker=True)) != _EBML:
        raise NotAudio("The stream is no WebM.")
    yield from source.skip((yield from _size(source)))
    header, number = None, 0
    track: dict[int, bytes] = {}
    while source.held or not source.ended:
        kind, content = yield from _element(source)
        if kind in (_TRACK, _CLUSTER) and header is None:
            header, number = _opus(track), int.from_bytes(track.get(_TRACK_NUMBER, b""), "big")
            if header is not None:
                yield header
            elif kind == _CLUSTER:
                raise NotAudio("The stream has no Opus track.")
            track = {}
        elif kind in (_SIMPLE_BLOCK, _BLOCK):
            if header is not None and (packet := _packet(content, number)):
                yield packet
        else:
            track[kind] = content


def _element(source: Source) -> Generator[None, None, tuple[int, bytes]]:
    """The next that is entered (of which nothing is read) or read."""
    while True:
        kind = yield from _number(source, keep_marker=True)
        if kind in _ENTERED:
            yield from _number(source)
            return kind, b""
        size = yield from _size(source)
        if kind in _READ:
            return kind, (yield from source.take(size))
        yield from source.skip(size)


def _opus(track: dict[int, bytes]) -> Header | None:
    """The header of a track that is Opus."""
    if track.get(_CODEC, b"").rstrip(b"\0") != b"A_OPUS":
        return None
    return opus_header(track.get(_CODEC_PRIVATE, b""))


def _packet(block: bytes, track: int) -> bytes:
    """A block's one packet: a track number, 16 bits of time, flags, the packet. Empty when of another track."""
    length = _length(block[0]) if block else 0
    if len(block) < length + 3 or not length:
        raise NotAudio("The stream has a damaged block.")
    if int.from_bytes(block[:length], "big") ^ 1 << 7 * length != track:
        return b""
    if block[length + 2] & _LACING:
        raise NotAudio("Laced WebM blocks are not supported.")
    return block[length + 3 :]


def _size(source: Source) -> Generator[None, None, int]:
    """An element's, which must be known."""
    size = yield from _number(source)
    if size < 0:
        raise NotAudio("The stream has an element of unknown size.")
    return size


def _number(source: Source, *, keep_marker: bool = False) -> Generator[None, None, int]:
    """A variable-length number (RFC 8794, section 4); -1 where all its bits are ones: unknown."""
    first = (yield from source.peek(1))[0]
    length = _length(first)
    if not length:
        raise NotAudio("The stream is no WebM, or it is damaged.")
    number = int.from_bytes((yield from source.take(length)), "big")
    if keep_marker:
        return number
    number ^= 1 << 7 * length
    return -1 if number == (1 << 7 * length) - 1 else number


def _length(first: int) -> int:
    """Bytes of a number that begins with this one; 0 where no number does."""
    return 9 - first.bit_length() if first else 0
