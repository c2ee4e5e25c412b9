"""Streams of two channels: what each channel says is what it says alone, whatever becomes of the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatchers.adapters.per_channel import PerChannel
from dispatchers.adapters.segmenting import Segmenting
from dispatchers.audio.decode import load
from dispatchers.audio.live import LiveDecoder, Wire
from dispatchers.audio.resample import Resampler
from dispatchers.audio.vad import SileroVad
from dispatchers.backends.scripted import Scripted
from dispatchers.errors import BackendFailed, UnknownModel, UnsupportedAudio
from dispatchers.interface import (
    Clear,
    Cleared,
    Delta,
    Event,
    Final,
    Flush,
    Flushed,
    Gap,
    Heard,
    Options,
    Partial,
    Pcm,
    Samples,
    SpeechStarted,
    StreamError,
    StreamInput,
    Transcript,
    ignore,
    to_ms,
)

LONG = Path(__file__).parents[2] / "dispatchers/engine/micro/samples/long.wav"
TWO = Options(channels=2)
STEP = 1_600

Part = Samples | Flush | Clear


@pytest.fixture(scope="module")
def vad() -> SileroVad:
    return SileroVad.load()


@pytest.fixture(scope="module")
def conversation() -> Samples:
    """Twelve seconds, shape (length, 2). In each channel there are several utterances; some overlap the other's."""
    speech = load(LONG)
    left, right = speech[: 12 * 16_000], speech[20 * 16_000 : 31 * 16_000]
    return np.stack([left, np.pad(right, (16_000, 0))], axis=1)


async def spoken(parts: Sequence[Part]) -> AsyncIterator[StreamInput]:
    for part in parts:
        yield part if isinstance(part, Flush | Clear) else Pcm(part)


async def hear(within: Any, parts: Sequence[Part], options: Options = TWO) -> list[Event]:
    async with PerChannel(within).stream(spoken(parts), options) as events:
        return [event async for event in events]


def steps(samples: Samples) -> list[Part]:
    return [samples[at : at + STEP] for at in range(0, len(samples), STEP)]


def of_channel(parts: Sequence[Part], channel: int) -> list[Part]:
    return [part if isinstance(part, Flush | Clear) else part[:, channel] for part in parts]


def alone(events: list[Event], channel: int | None) -> list[Event]:
    """What concerns the channel, as if there were no other. None: what concerns the stream as a whole."""
    mine = [event for event in events if getattr(event, "channel", None) == channel]
    numbers: dict[int, int] = {}
    told = []
    for event in mine:
        if isinstance(event, SpeechStarted | Partial | Delta | Final):
            number = numbers.setdefault(event.utterance, len(numbers) + 1)
            told.append(replace(event, utterance=number, channel=None))
        elif isinstance(event, Gap | StreamError):
            told.append(replace(event, channel=None))
        else:
            told.append(event)
    return told


def texts(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Final)]


# --- each channel as alone ----------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(data=st.data())
async def test_a_channel_says_what_it_says_alone(vad: SileroVad, conversation: Samples, data: st.DataObject):
    """Cut anywhere, with commands anywhere: the same texts, times and order in each channel; echoes once."""
    cuts = data.draw(st.lists(st.integers(0, len(conversation)), max_size=25))
    edges = [0, *sorted(cuts), len(conversation)]
    commands = data.draw(st.lists(st.sampled_from([None, None, Flush(), Clear()]), min_size=len(edges)))
    parts: list[Part] = []
    for (start, end), command in zip(pairwise(edges), commands, strict=False):
        parts += [conversation[start:end], *([] if command is None else [command])]
    options = Options(channels=2, words=True, partials=False)
    events = await hear(Segmenting(Scripted(), vad), parts, options)
    for channel in (0, 1):
        said = await hear(Segmenting(Scripted(), vad), of_channel(parts, channel), replace(options, channels=1))
        echoes = [event for event in said if isinstance(event, Flushed | Cleared)]
        assert alone(events, channel) == [event for event in said if event not in echoes]
        assert alone(events, None) == echoes


async def test_deltas_make_the_final_and_no_two_utterances_share_a_number(vad: SileroVad, conversation: Samples):
    events = await hear(Segmenting(Scripted(), vad), steps(conversation))
    started = [event for event in events if isinstance(event, SpeechStarted)]
    finals = [event for event in events if isinstance(event, Final)]
    assert [event.utterance for event in started] == list(range(1, len(started) + 1))
    assert {event.channel for event in finals} == {0, 1}
    assert {(event.utterance, event.channel) for event in started} == {(one.utterance, one.channel) for one in finals}
    assert any(one.start_ms < other.end_ms and other.start_ms < one.end_ms for one, other in pairwise(finals))
    for final in finals:
        deltas = [event for event in events if isinstance(event, Delta) and event.utterance == final.utterance]
        assert "".join(delta.text for delta in deltas) == final.text
        assert {delta.channel for delta in deltas} == {final.channel}
    for channel in (0, 1):
        ends = [final.end_ms for final in finals if final.channel == channel]
        assert ends == sorted(ends)


async def test_one_channel_alone_stays_as_it_was(vad: SileroVad, conversation: Samples):
    events = await hear(Segmenting(Scripted(), vad), of_channel(steps(conversation), 0), Options())
    assert texts(events)
    assert all(getattr(event, "channel", None) is None for event in events)


# --- a recogniser that fails, or waits ----------------------------------------------------------------------------


class Choosy(Scripted):
    """Fails, or waits, on finals of the stream that it heard of first."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__()
        self.streams: list[str] = []
        self.gate = asyncio.Event()
        self.under_way = 0
        self._failure = failure

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        if options.stream not in self.streams:
            self.streams.append(options.stream)
        self.under_way += 1
        try:
            if options.stream == self.streams[0]:
                if self._failure is not None:
                    raise self._failure
                await self.gate.wait()
            return await super().transcribe(audio, options, heard)
        finally:
            self.under_way -= 1


async def test_a_final_that_fails_is_its_channels_gap(vad: SileroVad, conversation: Samples):
    batch = Choosy(BackendFailed())
    events = await hear(Segmenting(batch, vad), steps(conversation))
    assert len(batch.streams) == 2  # to be fair to: one key for each channel
    gaps = [event for event in events if isinstance(event, Gap)]
    errors = [event for event in events if isinstance(event, StreamError)]
    failed = {event.channel for event in gaps}
    assert len(failed) == 1
    assert {event.channel for event in errors} == failed
    assert len(errors) == len(gaps) > 1
    other = 1 - (failed.pop() or 0)
    well = await hear(Segmenting(Scripted(), vad), of_channel(steps(conversation), other), Options())
    assert [event.text for event in events if isinstance(event, Final)] == texts(well)


async def test_a_slow_final_holds_up_no_other_channels(vad: SileroVad, conversation: Samples):
    batch = Choosy()
    options = replace(TWO, partials=False)
    async with PerChannel(Segmenting(batch, vad)).stream(spoken([*steps(conversation), Flush()]), options) as events:
        early = []
        async for event in events:
            early.append(event)
            if len(texts(early)) == 2:
                break
        channels = {event.channel for event in early if isinstance(event, Final)}
        assert len(channels) == 1
        assert not any(isinstance(event, Flushed) for event in early)  # not every channel has answered
        batch.gate.set()
        rest = [event async for event in events]
    assert {event.channel for event in rest if isinstance(event, Final)} == {0, 1}
    assert [event for event in rest if isinstance(event, Flushed)] == [Flushed(to_ms(len(conversation)))]


async def test_a_failure_ends_all_and_is_raised_as_itself(vad: SileroVad, conversation: Samples):
    batch = Choosy(UnknownModel())
    with pytest.raises(UnknownModel):
        await hear(Segmenting(batch, vad), steps(conversation))
    assert batch.under_way == 0


async def test_who_leaves_early_cancels_what_is_asked(vad: SileroVad, conversation: Samples):
    batch = Choosy()
    async with PerChannel(Segmenting(batch, vad)).stream(spoken(steps(conversation)), TWO) as events:
        async for _ in events:
            if batch.under_way:
                break
    assert batch.under_way == 0


# --- the pipe itself ----------------------------------------------------------------------------------------------


class Echo(Scripted):
    """A stream that tells the length of what it hears, piece by piece, once it is let."""

    def __init__(self, let: Callable[[int], asyncio.Event | None], pieces: Callable[[int], int]) -> None:
        super().__init__()
        self.heard = [0, 0]
        self._let = let
        self._pieces = pieces
        self._opened = 0

    @asynccontextmanager
    async def stream(  # type: ignore[override]
        self, audio: AsyncIterator[StreamInput], options: Options
    ) -> AsyncIterator[AsyncIterator[Event]]:
        channel, self._opened = self._opened, self._opened + 1
        yield self._tell(channel, audio)

    async def _tell(self, channel: int, audio: AsyncIterator[StreamInput]) -> AsyncIterator[Event]:
        async for item in audio:
            assert isinstance(item, Pcm)
            if (gate := self._let(channel)) is not None:
                await gate.wait()
            self.heard[channel] += 1
            yield Gap(self.heard[channel], int(item.samples[0]), "echo")
            if self.heard[channel] == self._pieces(channel):
                return


def numbered(count: int) -> list[Part]:
    return [np.full((8, 2), number, np.int16) + np.array([0, 100], np.int16) for number in range(count)]


async def test_the_slowest_channel_sets_the_pace():
    gate, taken = asyncio.Event(), 0

    async def source() -> AsyncIterator[StreamInput]:
        nonlocal taken
        for part in numbered(50):
            taken += 1
            assert isinstance(part, np.ndarray)
            yield Pcm(part)

    echo = Echo(lambda channel: gate if channel else None, lambda _: 1_000)
    async with PerChannel(echo).stream(source(), TWO) as events:
        first = [await anext(events)]
        for _ in range(200):
            await asyncio.sleep(0)
        assert echo.heard[1] == 0
        assert taken <= 3  # one being heard, one that waits, one in hand
        gate.set()
        told = first + [event async for event in events]
    for channel, first_sample in ((0, 0), (1, 100)):
        assert alone(told, channel) == [Gap(number + 1, first_sample + number, "echo") for number in range(50)]


async def test_events_wait_for_who_reads_them():
    taken = 0

    async def source() -> AsyncIterator[StreamInput]:
        nonlocal taken
        for part in numbered(1_000):
            taken += 1
            assert isinstance(part, np.ndarray)
            yield Pcm(part)

    async with PerChannel(Echo(lambda _: None, lambda _: 10_000)).stream(source(), TWO) as events:
        for _ in range(2_000):
            await asyncio.sleep(0)
        assert 0 < taken < 100
        assert len([event async for event in events]) == 2_000


async def test_a_channel_that_ends_early_holds_up_no_other():
    events = await hear(Echo(lambda _: None, lambda channel: 1_000 if channel else 3), numbered(50))
    assert [len(alone(events, channel)) for channel in (0, 1)] == [3, 50]


# --- from the wire ------------------------------------------------------------------------------------------------


def whole(resampler: Resampler, *messages: bytes) -> Samples:
    return np.concatenate([*(resampler.feed(message) for message in messages), resampler.flush()])


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_channels_kept_apart_are_resampled_as_alone(conversation: Samples, rate: int):
    data = conversation[: 2 * rate].tobytes()
    cuts = [0, *sorted(np.random.default_rng(rate).integers(0, len(data), 40)), len(data)]
    messages = [data[start:end] for start, end in pairwise(cuts)]
    both = whole(Resampler(rate, 2, apart=True), *messages)
    assert both.shape[1] == 2
    for channel in (0, 1):
        assert np.array_equal(both[:, channel], whole(Resampler(rate), conversation[: 2 * rate, channel].tobytes()))


async def decoded(wire: Wire, *messages: bytes) -> Samples:
    decoder = await LiveDecoder.open(wire)
    pieces = [samples for message in messages async for samples in decoder.feed(message)]
    pieces += [samples async for samples in decoder.end()]
    return np.concatenate([samples for samples in pieces if len(samples)])


def contained(conversation: Samples, form: str, codec: str, rate: int, layout: str) -> bytes:
    sink: Any = type(
        "Sink", (), {"data": bytearray(), "write": lambda self, data: self.data.extend(data) or len(data)}
    )()
    with av.open(sink, "w", format=form) as container:
        out: Any = container.add_stream(codec, rate=rate)
        out.layout = layout
        frame = av.AudioFrame.from_ndarray(conversation.reshape(1, -1), format="s16", layout="stereo")
        frame.sample_rate = 16_000
        container.mux(out.encode(frame))
        container.mux(out.encode(None))
    return bytes(sink.data)


CONTAINERS = [
    ("wav", "wav", "pcm_s16le", 16_000),
    ("flac", "flac", "flac", 16_000),
    ("flac", "flac", "flac", 48_000),
    ("opus", "webm", "libopus", 48_000),
    ("opus", "ogg", "libopus", 48_000),
    ("mp3", "mp3", "libmp3lame", 44_100),
]


@pytest.mark.parametrize(("encoding", "form", "codec", "rate"), CONTAINERS)
async def test_two_channels_of_a_container_stay_apart(encoding: Any, form: str, codec: str, rate: int):
    """Each has its own tone and no other; cuts change nothing."""
    at = np.arange(2 * 16_000)[:, np.newaxis] / 16_000
    tones = (8_000 * np.sin(2 * np.pi * np.array([440, 1_200]) * at)).astype(np.int16)
    data = contained(tones, form, codec, rate, "stereo")
    wire = Wire.of(encoding, apart=True)
    heard = await decoded(wire, data)
    assert np.array_equal(heard, await decoded(wire, data[:1_000], data[1_000:1_001], data[1_001:]))
    assert abs(len(heard) - len(tones)) < 2_500
    spectrum = np.abs(np.fft.rfft(heard[8_000:24_000], axis=0))
    for channel, (own, other) in enumerate([(440, 1_200), (1_200, 440)]):
        assert spectrum[:, channel].argmax() == own
        assert spectrum[other, channel] < spectrum[own, channel] / 30


@pytest.mark.parametrize(("encoding", "form", "codec", "rate"), CONTAINERS)
async def test_a_container_of_one_channel_cannot_be_kept_apart(
    conversation: Samples, encoding: Any, form: str, codec: str, rate: int
):
    with pytest.raises(UnsupportedAudio, match="this audio has 1"):
        await decoded(Wire.of(encoding, apart=True), contained(conversation[:16_000], form, codec, rate, "mono"))
