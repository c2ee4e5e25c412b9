"""Live audio in containers: whatever the cuts, whatever the damage."""

import asyncio
import random
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatchers.audio.container import ContainerDecoder
from dispatchers.audio.demux import LARGEST, Demuxer, Header
from dispatchers.audio.flac import flac
from dispatchers.audio.live import LiveDecoder, Wire
from dispatchers.audio.ogg import ogg
from dispatchers.errors import AudioError, NotAudio, UnsupportedAudio
from dispatchers.interface import Samples, to_ms

SECONDS = 3

# encoding, FFmpeg's muxer and codec, Hz, layout, muxer's options
KINDS: dict[str, tuple[str, str, str, int, str, dict[str, str]]] = {
    "webm": ("opus", "webm", "libopus", 48_000, "mono", {"live": "1", "cluster_time_limit": "100"}),
    "webm of known sizes": ("opus", "webm", "libopus", 48_000, "stereo", {}),
    "ogg": ("opus", "ogg", "libopus", 48_000, "mono", {"page_duration": "20000"}),
    "ogg of long pages": ("opus", "ogg", "libopus", 48_000, "stereo", {}),
    "flac": ("flac", "flac", "flac", 16_000, "mono", {}),
    "flac 48 kHz": ("flac", "flac", "flac", 48_000, "stereo", {}),
    "wav": ("wav", "wav", "pcm_s16le", 16_000, "mono", {}),
    "wav 24 bits": ("wav", "wav", "pcm_s24le", 44_100, "stereo", {}),
    "wav floats": ("wav", "wav", "pcm_f32le", 48_000, "mono", {}),
    "wav telephone": ("wav", "wav", "pcm_alaw", 8_000, "mono", {}),
    "mp3": ("mp3", "mp3", "libmp3lame", 44_100, "stereo", {}),
    "mp3 16 kHz": ("mp3", "mp3", "libmp3lame", 16_000, "mono", {}),
}
CODEC_DELAY = {"mp3": 1_200}  # samples of silence an encoder puts in front and nothing takes out


class Unseekable:
    """A live stream's sink, which also writes down how much had come out at each moment of the audio."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> int:
        self.data += data
        return len(data)


def tone(rate: int) -> Samples:
    at = np.arange(rate * SECONDS) / rate
    return (8_000 * np.sin(2 * np.pi * 440 * at) * np.sin(2 * np.pi * 1.5 * at)).astype(np.int16)


@cache
def stream(kind: str) -> tuple[bytes, tuple[tuple[int, int], ...]]:
    """Its bytes, and (ms of audio given to the encoder, bytes that had come out then)."""
    _, form, codec, rate, layout, options = KINDS[kind]
    sink, marks = Unseekable(), []
    with av.open(sink, "w", format=form, options={"flush_packets": "1", **options}) as container:
        out: Any = container.add_stream(codec, rate=rate)
        out.layout = layout
        step = rate // 50
        for at, piece in enumerate(np.split(tone(rate), SECONDS * 50)):
            packed = np.repeat(piece, 2 if layout == "stereo" else 1)[np.newaxis]
            frame = av.AudioFrame.from_ndarray(packed, format="s16", layout=layout)
            frame.sample_rate, frame.pts = rate, at * step
            container.mux(out.encode(frame))
            marks.append(((at + 1) * 20, len(sink.data)))
        container.mux(out.encode(None))
    return bytes(sink.data), tuple(marks)


async def heard(encoding: str, *pieces: bytes) -> Samples:
    decoder, out = ContainerDecoder(encoding), [np.empty(0, np.int16)]
    for piece in pieces:
        out += [samples async for samples in decoder.feed(piece)]
    out += [samples async for samples in decoder.end()]
    return np.concatenate(out)


def cut(data: bytes, *at: int) -> Iterator[bytes]:
    edges = [0, *sorted(place % len(data) for place in at), len(data)]
    return (data[start:end] for start, end in pairwise(edges))


@pytest.mark.parametrize("kind", KINDS)
async def test_what_goes_in_comes_out(kind: str):
    encoding = KINDS[kind][0]
    sound = (await heard(encoding, stream(kind)[0])).astype(float)
    truth = tone(16_000).astype(float)
    delay = CODEC_DELAY.get(encoding, 0)
    assert abs(len(sound) - len(truth)) <= max(delay * 2, 160)
    likeness = [
        float(np.corrcoef(sound[lag : len(truth)], truth[: len(sound[lag : len(truth)])])[0, 1])
        for lag in range(delay + 10)
    ]
    assert max(likeness) > 0.99


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_cuts_change_nothing(kind: str, data: st.DataObject):
    encoding, whole = KINDS[kind][0], stream(kind)[0]
    places = data.draw(st.lists(st.integers(0, len(whole)), max_size=30))
    head = data.draw(st.integers(0, 80))  # byte by byte
    pieces = cut(whole, *places, *range(head))
    assert np.array_equal(asyncio.run(heard(encoding, *pieces)), asyncio.run(heard(encoding, whole)))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(end=st.integers(0, 10**6))
def test_a_truncated_stream_gives_what_it_had(kind: str, end: int):
    encoding, whole = KINDS[kind][0], stream(kind)[0]
    some, everything = (asyncio.run(heard(encoding, data)) for data in (whole[: end % len(whole)], whole))
    assert len(some) <= len(everything)
    sure = max(0, len(some) - 3_200)  # the last frame may be half a frame
    assert np.array_equal(some[:sure], everything[:sure])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(at=st.integers(0, 10**6), length=st.integers(1, 5_000), seed=st.integers(0, 2**32))
def test_garbage_in_the_middle_is_refused_or_heard_but_never_more(kind: str, at: int, length: int, seed: int):
    """Never a hang, no error but ours, and not much more audio than the bytes could hold."""
    encoding, whole = KINDS[kind][0], stream(kind)[0]
    at %= len(whole)
    bad = whole[:at] + random.Random(seed).randbytes(length) + whole[at:]
    try:
        sound = asyncio.run(heard(encoding, *cut(bad, at, at + length)))
    except AudioError as error:
        assert error.code in ("UNDECODABLE", "UNSUPPORTED_AUDIO")
    else:
        assert to_ms(len(sound)) <= SECONDS * 1_000 + 5_000


@pytest.mark.parametrize("encoding", ["opus", "flac", "wav", "mp3"])
@settings(max_examples=40, deadline=None)
@given(data=st.binary(min_size=64, max_size=4_000))
def test_what_is_none_of_it_is_refused(encoding: str, data: bytes):
    with pytest.raises(NotAudio):
        asyncio.run(heard(encoding, data))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_header_alone_is_silence(kind: str):
    encoding, whole = KINDS[kind][0], stream(kind)[0]
    assert len(await heard(encoding, whole[:20])) == 0
    assert len(await heard(encoding)) == 0


PROMPT = [kind for kind in KINDS if kind not in ("webm of known sizes", "ogg of long pages")]  # whose muxer keeps 1 s


@pytest.mark.parametrize("kind", PROMPT)
async def test_audio_comes_out_soon_after_it_went_in(kind: str):
    """What the encoder and the muxer keep counts too, and even so it is within 200 ms."""
    encoding, whole = KINDS[kind][0], stream(kind)[0]
    decoder, out, at, worst = ContainerDecoder(encoding), 0, 0, 0
    for ms, end in stream(kind)[1]:
        async for samples in decoder.feed(whole[at:end]):
            out += len(samples)
        at = end
        worst = max(worst, ms - to_ms(out))
    assert worst <= 200


async def test_a_few_bytes_that_unfold_to_hours_come_a_second_at_a_time():
    quiet = b"\x04"  # an Opus frame of 20 ms, of nothing but its first byte
    head = b"OpusHead\x01\x01\x00\x00\x80\xbb\x00\x00\x00\x00\x00"
    pages = page(2, bytes([len(head)]), head) + page(0, b"\x08", b"OpusTags")
    pages += page(0, b"\x01" * 250, quiet * 250) * 100
    sizes = [len(samples) async for samples in ContainerDecoder("opus").feed(pages)]
    assert len(pages) < 60_000
    assert sum(sizes) > 240 * 16_000
    assert max(sizes) <= 2 * 16_000


def page(flags: int, lacing: bytes, body: bytes, serial: int = 7) -> bytes:
    return (
        b"OggS\0"
        + bytes([flags])
        + bytes(8)
        + serial.to_bytes(4, "little")
        + bytes(8)
        + bytes([len(lacing)])
        + lacing
        + body
    )


def test_a_packet_may_span_pages_and_other_streams_are_left_out():
    head = b"OpusHead\x01\x01\x00\x00\x80\xbb\x00\x00\x00\x00\x00"
    data = page(2, bytes([len(head)]), head) + page(2, b"\x03", b"abc", serial=8) + page(0, b"\x04", b"Tags")
    data += page(0, b"\x02\xff", b"xy" + b"a" * 255) + page(0, b"\x03", b"abc", serial=8) + page(1, b"\x01", b"b")
    found = list(Demuxer(ogg).feed(data))
    assert isinstance(found[0], Header)
    assert found[1:] == [b"xy", b"a" * 255 + b"b"]


def test_memory_is_bounded_where_no_end_is_found():
    demuxer = Demuxer(flac)
    list(demuxer.feed(stream("flac")[0][:5_000]))
    with pytest.raises(NotAudio):
        for _ in range(2 * LARGEST // 65_536):
            list(demuxer.feed(bytes(65_536)))


def test_a_rate_or_channels_out_of_range_are_refused():
    fmt = b"fmt \x10\0\0\0\x01\0\x01\0" + (4_000).to_bytes(4, "little") + bytes(4) + b"\x02\0\x10\0"
    with pytest.raises(UnsupportedAudio):
        asyncio.run(heard("wav", b"RIFF\0\0\0\0WAVE" + fmt + b"data\0\0\0\0" + bytes(100)))


@settings(max_examples=20, deadline=None)
@given(places=st.lists(st.integers(0, 64_000), max_size=20), rate=st.sampled_from([8_000, 16_000, 44_100]))
def test_two_channels_are_mixed_down(places: list[int], rate: int):
    left, right = tone(rate), -tone(rate) // 3
    data = np.stack([left, right], axis=1).tobytes()

    async def mixed() -> Samples:
        decoder = await LiveDecoder.open(Wire("pcm_s16le", rate, 2))
        out = [samples for piece in cut(data, *places) async for samples in decoder.feed(piece)]
        return np.concatenate([*out, *[samples async for samples in decoder.end()]])

    sound = asyncio.run(mixed()).astype(float)
    truth = (left.astype(float) + right) / 2
    if rate == 16_000:
        assert np.abs(sound - truth).max() <= 1
    assert abs(len(sound) - SECONDS * 16_000) <= 1
