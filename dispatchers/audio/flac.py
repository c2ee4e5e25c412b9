"""Native FLAC: RFC 9639."""

from __future__ import annotations

from collections.abc import Generator

from dispatchers.audio.demux import LARGEST, Header, Source, Steps
from dispatchers.errors import NotAudio

_STREAMINFO_BYTES = 34
_LONGEST_FRAME_HEADER = 16
_SYNCS = (b"\xff\xf8", b"\xff\xf9")  # blocks of one size; of several


def flac(source: Source) -> Steps:
    """Whole frames. A frame does not tell its length: it ends where a header begins whose checksum is right and whose
    number is the next one. So a frame comes out when the next one begins, or the stream ends."""
    if (yield from source.take(4)) != b"fLaC":
        raise NotAudio("The stream is no FLAC.")
    yield from _metadata(source)
    head = yield from source.peek(_LONGEST_FRAME_HEADER)
    following = _following(head)
    if following is None:
        raise NotAudio("The stream's FLAC is damaged.")
    searched = 2
    while True:
        at = source.held.find(head[:2], searched)
        enough = at >= 0 and len(source.held) >= at + _LONGEST_FRAME_HEADER
        if not enough:
            searched = at if at >= 0 else max(2, len(source.held) - 1)
            if source.ended:
                break
            if searched > LARGEST:
                raise NotAudio("The stream's FLAC is damaged.")
            yield None
            continue
        found = bytes(source.held[at : at + _LONGEST_FRAME_HEADER])
        searched = at + 1
        after = _following(found)
        if after is not None and _number(found)[0] == following:
            yield source.pop(at)
            following, searched = after, 2
    yield source.pop(LARGEST)


def _metadata(source: Source) -> Generator[Header | None, None, None]:
    """The header, from the first block; the other blocks (tags, pictures) are passed over."""
    last, first = False, True
    while not last:
        block = yield from source.take(4)
        last, kind, size = bool(block[0] & 0x80), block[0] & 0x7F, int.from_bytes(block[1:], "big")
        if not first:
            yield from source.skip(size)
            continue
        if kind != 0 or size != _STREAMINFO_BYTES:
            raise NotAudio("The stream's FLAC header is damaged.")
        info = yield from source.take(size)
        packed = int.from_bytes(info[10:14], "big")  # 20 bits of rate, 3 of channels less one, …
        yield Header("flac", packed >> 12, (packed >> 9 & 7) + 1, info)
        first = False


def _following(head: bytes) -> int | None:
    """The number of the frame or sample that follows the frame with this header; None where it is no header."""
    if head[:2] not in _SYNCS or head[3] & 1:
        return None
    number, at = _number(head)
    size_code, rate_code = head[2] >> 4, head[2] & 0x0F
    if at == 0 or size_code == 0 or rate_code == 0x0F:
        return None
    size_bytes = {6: 1, 7: 2}.get(size_code, 0)
    explicit = int.from_bytes(head[at : at + size_bytes], "big") + 1
    at += size_bytes + {0x0C: 1, 0x0D: 2, 0x0E: 2}.get(rate_code, 0)
    if at >= len(head) or _crc8(head[:at]) != head[at]:
        return None
    if head[:2] == _SYNCS[0]:
        return number + 1
    if size_bytes:
        return number + explicit
    return number + (192 if size_code == 1 else 576 << size_code - 2 if size_code < 6 else 256 << size_code - 8)


def _number(head: bytes) -> tuple[int, int]:
    """The coded number, and where it ends; an end of 0 where it is none. UTF-8's scheme, up to 36 bits."""
    first = head[4]
    ones = 8 - (first ^ 0xFF).bit_length()
    if ones in (1, 8):
        return 0, 0
    number = first & (0x7F >> ones)
    end = 4 + max(1, ones)
    for byte in head[5:end]:
        if byte >> 6 != 0b10:
            return 0, 0
        number = number << 6 | byte & 0x3F
    return number, end


def _crc8(data: bytes) -> int:
    """RFC 9639, section 9.1.8."""
    crc = 0
    for byte in data:
        crc = _CRC8[crc ^ byte]
    return crc


def _crc8_table() -> bytes:
    """x⁸ + x² + x + 1."""
    table = bytearray()
    for crc in range(256):
        for _ in range(8):
            crc = (crc << 1 ^ 0x107) if crc & 0x80 else crc << 1  # noqa: PLW2901  shifted in place, bit by bit
        table.append(crc)
    return bytes(table)


_CRC8 = _crc8_table()
