"""Opus in Ogg: RFC 3533 (pages), RFC 7845 (Opus within them)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from dispatchers.audio.demux import LARGEST, Header, Source, Steps
from dispatchers.errors import NotAudio

_PAGE = struct.Struct("<4sBBqIIIB")
_CONTINUED, _FIRST = 1, 2
_FULL_SEGMENT = 255


def ogg(source: Source) -> Steps:
    """The packets of the first Opus stream; a chained one follows with a header of its own. Checksums are not checked:
    what comes over TCP comes whole."""
    chosen: int | None = None
    packets = _Packets()
    while source.held or not source.ended:
        capture, version, flags, _, serial, _, _, segments = _PAGE.unpack((yield from source.take(_PAGE.size)))
        if capture != b"OggS" or version:
            raise NotAudio("The stream is no Ogg, or it is damaged.")
        lacing = yield from source.take(segments)
        body = yield from source.take(sum(lacing))
        if flags & _FIRST and body.startswith(b"OpusHead"):
            chosen, packets = serial, _Packets()
            yield opus_header(body)
        elif serial == chosen:
            yield from packets.of(lacing, body, continued=bool(flags & _CONTINUED))


class _Packets:
    """One stream's, after its header: the first holds tags and is left out."""

    def __init__(self) -> None:
        self._begun = b""  # its end is on a later page
        self._tags = True

    def of(self, lacing: bytes, body: bytes, *, continued: bool) -> Iterator[bytes]:
        """Those that end on this page."""
        begun, at = self._begun if continued else b"", 0
        for length in lacing:
            begun += body[at : at + length]
            at += length
            if length == _FULL_SEGMENT:
                continue
            if begun and not self._tags:
                yield begun
            begun, self._tags = b"", False
        if len(begun) > LARGEST:
            raise NotAudio("The stream has a packet that is too large.")
        self._begun = begun


def opus_header(head: bytes) -> Header:
    """From an `OpusHead` (RFC 7845, section 5.1). Opus always decodes at 48 kHz."""
    if len(head) < 19 or not head.startswith(b"OpusHead") or head[8] >> 4:
        raise NotAudio("The stream's Opus header is damaged.")
    return Header("opus", 48_000, head[9], head, skip=int.from_bytes(head[10:12], "little"))
