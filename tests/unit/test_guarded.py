"""A relay's slots, deadlines and outcomes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

from dispatchers.adapters.guarded import Guarded, Patience
from dispatchers.adapters.tallied import Tallied, Tally
from dispatchers.backends.scripted import Scripted
from dispatchers.errors import (
    AudioError,
    BackendFailed,
    BackendTimeout,
    BackendUnavailable,
    BadAnswer,
    DispatchError,
    Overloaded,
)
from dispatchers.health import Breaker, Limits
from dispatchers.interface import Capabilities, Event, Final, Flush, Flushed, Options, Pcm, Samples, StreamInput

SECOND = np.zeros(16_000, np.int16)


@dataclass
class Live(Scripted):
    """A recogniser that takes a stream as its `script` says: `takes` so many items, then does the last thing."""

    takes: int = 1_000
    then: str = "end"
    opening_s: float = 0.0
    taken: list[StreamInput] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(stream=True, least_billed_ms=10_000)

    @asynccontextmanager
    async def stream(self, audio: AsyncIterator[StreamInput], options: Options) -> AsyncIterator[AsyncIterator[Event]]:
        await asyncio.sleep(self.opening_s)
        yield self._events(audio)

    async def _events(self, audio: AsyncIterator[StreamInput]) -> AsyncIterator[Event]:
        async for item in audio:
            self.taken.append(item)
            if len(self.taken) == self.takes:
                break
            if isinstance(item, Flush) and self.then != "no answer":
                yield Flushed(0)
        match self.then:
            case "hang":
                await asyncio.Event().wait()
            case "fail":
                raise BackendFailed
            case "fault":
                raise KeyError("said-secret")
        yield Final(1, "a", 0, 100, "en", 1.0)


async def audio(*items: StreamInput, hold: bool = False) -> AsyncIterator[StreamInput]:
    for item in items:
        yield item
    if hold:
        await asyncio.Event().wait()


async def hear(guarded: Guarded, source: AsyncIterator[StreamInput]) -> list[Event]:
    async with guarded.stream(source, Options()) as events:
        return [event async for event in events]


async def test_no_slot_leaks_however_calls_end() -> None:
    """1,000 calls, most of them cancelled at some moment, some failing."""
    dice = random.Random(4)
    breaker = Breaker("relay")
    guarded = Guarded(Scripted(delay_s=0.002), breaker, requests=8, streams=8)
    failing = Guarded(Scripted(fail=AudioError), breaker, requests=8)

    async def call() -> None:
        kind = dice.random()
        if kind < 0.3:
            await hear(Guarded(Live(then="hang", takes=2), breaker, streams=8), audio(Pcm(SECOND), Pcm(SECOND)))
        await (guarded if kind < 0.8 else failing).transcribe(SECOND, Options())

    async def cancelled() -> None:
        task = asyncio.create_task(call())
        await asyncio.sleep(dice.random() * 0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    for _ in range(100):
        await asyncio.gather(*(cancelled() for _ in range(10)))
    assert (guarded._requests.taken, failing._requests.taken) == (0, 0)
    assert breaker.state == "closed"
    await asyncio.gather(*(guarded.transcribe(SECOND, Options()) for _ in range(8)))


async def test_so_many_at_once_and_no_more() -> None:
    guarded = Guarded(Scripted(delay_s=0.05), Breaker("relay"), requests=2)
    outcomes = await asyncio.gather(*(guarded.transcribe(SECOND, Options()) for _ in range(3)), return_exceptions=True)
    assert sum(isinstance(outcome, Overloaded) for outcome in outcomes) == 1


async def test_a_recording_has_a_deadline() -> None:
    patience = Patience(base_s=0.05, per_audio_s=0.0)
    guarded = Guarded(Scripted(delay_s=30), Breaker("relay"), patience=patience)
    with pytest.raises(BackendTimeout):
        await guarded.transcribe(SECOND, Options())


@pytest.mark.parametrize(
    ("live", "source", "error"),
    [
        (Live(opening_s=30), (Pcm(SECOND),), BackendTimeout),
        (Live(takes=1, then="hang"), (Pcm(SECOND), Pcm(SECOND)), BackendTimeout),
        (Live(then="no answer"), (Pcm(SECOND), Flush()), BackendTimeout),
        (Live(then="fail", takes=1), (Pcm(SECOND),), BackendFailed),
        (Live(then="fault", takes=1), (Pcm(SECOND),), BackendFailed),
    ],
    ids=["does not open", "does not take audio", "does not answer", "fails", "has a fault"],
)
async def test_a_stream_that_does_not_get_on(
    live: Live, source: tuple[StreamInput, ...], error: type[DispatchError]
) -> None:
    breaker = Breaker("relay")
    guarded = Guarded(live, breaker, patience=Patience(open_s=0.1, idle_s=0.1))
    with pytest.raises(error) as failure:
        await hear(guarded, audio(*source, hold=True))
    assert "secret" not in str(failure.value)
    assert breaker._failed_in_a_row == 1


async def test_silence_is_no_idleness() -> None:
    guarded = Guarded(Live(), Breaker("relay"), patience=Patience(idle_s=0.05))

    async def quiet() -> AsyncIterator[StreamInput]:
        yield Pcm(SECOND)
        await asyncio.sleep(0.2)

    assert [type(event) for event in await hear(guarded, quiet())] == [Final]


async def test_what_comes_in_with_the_audio_is_not_its_fault() -> None:
    breaker = Breaker("relay")

    async def broken() -> AsyncIterator[StreamInput]:
        yield Pcm(SECOND)
        raise ValueError("the caller's")

    with pytest.raises(ValueError, match="the caller's"):
        await hear(Guarded(Live(), breaker), broken())
    assert breaker._failed_in_a_row == 0


async def test_a_stream_that_decides_does_not_keep_others_out() -> None:
    breaker = Breaker("relay", Limits(open_s=0.01))
    for _ in range(5):
        with pytest.raises(BackendFailed), breaker.attempt():
            raise BackendFailed
    await asyncio.sleep(0.02)
    assert breaker.state == "half_open"
    guarded = Guarded(Live(), breaker, patience=Patience(open_s=0.02))
    async with guarded.stream(audio(Pcm(SECOND), hold=True), Options()):
        assert not breaker.up
        await asyncio.sleep(0.1)
        assert breaker.state == "closed"


# --- probes ---


async def test_what_can_be_asked_for_free_is() -> None:
    @dataclass
    class Well(Live):
        asked: int = 0

        async def probe(self) -> None:
            self.asked += 1

    breaker = Breaker("relay", Limits(in_a_row=1, open_s=0.01))
    with pytest.raises(BackendFailed), breaker.attempt():
        raise BackendFailed
    await asyncio.sleep(0.02)
    assert breaker.state == "half_open"
    assert not await Guarded(Live(), breaker).probe()
    assert breaker.state == "half_open"
    assert await Guarded(well := Well(), breaker).probe()
    assert (breaker.state, well.asked) == ("closed", 1)


# --- what is charged for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fail", "charged_ms"), [(None, 10_000), (BackendUnavailable, 0), (BadAnswer, 10_000), (BackendTimeout, 10_000)]
)
async def test_what_a_provider_charges_for(fail: type[DispatchError] | None, charged_ms: int) -> None:
    class Dear(Scripted):
        @property
        def capabilities(self) -> Capabilities:
            return Capabilities(least_billed_ms=10_000)

    tally = Tally()
    tallied = Tallied(Dear(fail=fail), tally)
    await asyncio.gather(tallied.transcribe(SECOND, Options()), return_exceptions=True)
    assert (tally.audio_ms, tally.charged_ms) == (1_000, charged_ms)


async def test_a_stream_is_charged_for_as_it_is_taken() -> None:
    tally = Tally()
    stereo: Samples = np.zeros((16_000, 2), np.int16)
    async with Tallied(Live(), tally).stream(audio(Pcm(SECOND), Flush(), Pcm(stereo)), Options()) as events:
        assert [type(event) async for event in events] == [Flushed, Final]
    assert (tally.audio_ms, tally.charged_ms) == (3_000, 3_000)
