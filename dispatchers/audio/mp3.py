"""MP3: ISO/IEC 11172-3 and 13818-3, behind an ID3v2 tag or without."""

from __future__ import annotations

from dispatchers.audio.demux import Header, Source, Steps
from dispatchers.errors import NotAudio

_BITRATES = {
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES_HZ = (44_100, 48_000, 32_000)
_TAIL = (b"TAG", b"APE")  # tags at a recording's end


def mp3(source: Source) -> Steps:
    """Whole frames of layer III, one after the other without anything between them."""
    head = yield from source.peek(10)
    while head[:3] == b"ID3":
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        yield from source.skip(10 + size)
        head = yield from source.peek(10)
    told = False
    while source.held or not source.ended:
        head = yield from source.peek(4)
        if head[:3] in _TAIL:
            break
        header, size = _frame(head)
        if not told:
            yield header
            told = True
        yield (yield from source.take(size))
    yield from source.drain()


def _frame(head: bytes) -> tuple[Header, int]:
    """What a frame's first 4 bytes say (11172-3, section 2.4.1.3), and its size in bytes."""
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5; 1: layer III
    bitrate, rate = head[2] >> 4, head[2] >> 2 & 3
    if head[0] != 0xFF or head[1] >> 5 != 7 or version == 1 or layer != 1 or bitrate in (0, 15) or rate == 3:
        raise NotAudio("The stream is no MP3, or it is damaged.")
    first = version == 3
    hz = _RATES_HZ[rate] // {3: 1, 2: 2, 0: 4}[version]
    kbps = _BITRATES[1 if first else 2][bitrate]
    size = (144 if first else 72) * kbps * 1000 // hz + (head[2] >> 1 & 1)
    return Header("mp3", hz, 1 if head[3] >> 6 == 3 else 2), size
