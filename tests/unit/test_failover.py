"""A stream goes on with the next recogniser, and nobody can tell by the words.

The audio here is a clock: each sample is the number of its tenth of a second, so a recogniser knows what is spoken in
whatever it is given, and from when on. Words take four tenths; utterances have a pause after them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatchers.adapters import failover as module
from dispatchers.adapters.failover import failover
from dispatchers.adapters.outbox import Outbox
from dispatchers.adapters.per_channel import per_channel
from dispatchers.errors import (
    BackendFailed,
    BackendRefused,
    BackendTimeout,
    BackendUnavailable,
    DispatchError,
    UnsupportedOption,
)
from dispatchers.interface import (
    Clear,
    Cleared,
    Delta,
    Event,
    Final,
    Flush,
    Flushed,
    Gap,
    Options,
    Partial,
    Pcm,
    SpeechStarted,
    StreamError,
    StreamInput,
    VadOptions,
)
from dispatchers.later import later

TENTH = 1_600
WORD = 4
PAUSE = 6

UTTERANCES = (("one", "two", "three"), ("four", "five"), ("six", "seven", "eight", "nine"), ("ten",))
WHOLE = [" ".join(words) for words in UTTERANCES]


def spoken() -> dict[int, tuple[int, str]]:
    """By the tenth in which a word ends: its utterance and itself."""
    at, ends = 2, {}
    for number, words in enumerate(UTTERANCES):
        for word in words:
            at += WORD
            ends[at] = (number, word)
        at += PAUSE
    return ends


SPOKEN = spoken()
LENGTH = max(SPOKEN) + PAUSE + 2
STARTS = {number: min(end for end, (of, _) in SPOKEN.items() if of == number) - WORD for number in range(len(WHOLE))}
ENDS = {number: max(end for end, (of, _) in SPOKEN.items() if of == number) for number in range(len(WHOLE))}

Spelling = Callable[[str], str]


@dataclass
class Hears:
    """A recogniser. It fails before it takes its tenth number `until`. `spelling` is its own; `deaf` hears nothing;
    `late` says its finals only so many tenths after their pause; of commands it `answers` so many, and fails."""

    until: int | None = None
    spelling: Spelling = str
    deaf: bool = False
    late: int = 0
    error: DispatchError = field(default_factory=BackendFailed)
    partials: bool = True
    answers: int | None = None
    heard: list[int] = field(default_factory=list)  # the tenths it was given
    commands: list[StreamInput] = field(default_factory=list)

    def stream(self, audio: AsyncIterator[StreamInput], options: Options) -> AbstractContextManager[object]:
        out = Outbox()
        return out.filled_by(lambda: self._run(audio, out))  # type: ignore[return-value]

    async def _run(self, audio: AsyncIterator[StreamInput], out: Outbox) -> None:
        self._out, self._first = out, None
        self._number, self._open, self._said, self._waiting = 0, None, "", list[tuple[int, Final]]()
        async for item in audio:
            if isinstance(item, Pcm):
                for tenth in item.samples[::TENTH] if len(item.samples) else ():
                    await self._take(int(tenth))
            else:
                self.commands.append(item)
                await self._obey(item)
        await self._end(late=False)
        await self._release(10**9)

    def _ms(self, tenth: int) -> int:
        return 100 * (tenth - (self._first or 0))

    async def _take(self, tenth: int) -> None:
        if self.until is not None and tenth >= self.until:
            raise self.error
        if self._first is None:
            self._first = tenth
        self.heard.append(tenth)
        if self.deaf:
            return
        if self._open is not None and tenth > ENDS[self._open] + 2:
            await self._end()
        for number, start in STARTS.items():
            if tenth == start and self._open is None:
                self._number, self._open, self._said, self._at = self._number + 1, number, "", tenth
                await self._out.put(SpeechStarted(self._number, self._ms(start)))
        if tenth + 1 in SPOKEN and self._open is not None:
            word = self.spelling(SPOKEN[tenth + 1][1])
            more = f" {word}" if self._said else word
            if self.partials:
                before = self._said
                self._said += more
                span = self._ms(self._at), self._ms(tenth + 1)
                await self._out.put(
                    Delta(self._number, more, *span), Partial(self._number, self._said, len(before + more), *span)
                )
            else:
                self._said += more
        await self._release(tenth)

    async def _end(self, *, late: bool = True) -> None:
        if self._open is None:
            return
        end = min(ENDS[self._open] + 1, self.heard[-1] + 1)
        final = Final(self._number, self._said, self._ms(self._at), self._ms(end), "en", 1.0)
        self._open = None
        self._waiting.append((self.heard[-1] + (self.late if late else 0), final))
        await self._release(self.heard[-1])

    async def _release(self, tenth: int) -> None:
        while self._waiting and self._waiting[0][0] <= tenth:
            await self._out.put(self._waiting.pop(0)[1])

    async def _obey(self, command: StreamInput) -> None:
        if self.answers is not None and len(self.commands) > self.answers:
            raise self.error
        now_ms = self._ms(self.heard[-1] + 1) if self.heard else 0
        if isinstance(command, Flush):
            await self._end(late=False)
            await self._release(10**9)
            await self._out.put(Flushed(now_ms))
        else:
            self._open = None
            await self._out.put(Cleared(now_ms))


@dataclass
class Leg:
    dispatcher: Hears
    leave: Callable[[], None] | None = None

    def options(self, asked: Options) -> Options:
        return asked

    def when_withdrawn(self, leave: Callable[[], None]) -> None:
        self.leave = leave


@dataclass
class Way:
    """Through these, each once."""

    recognisers: list[Hears]
    starts: list[int] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)
    leg: Leg | None = None

    def next_leg(self, start_ms: int) -> AbstractContextManager[Leg] | None:
        if len(self.starts) == len(self.recognisers):
            return None
        self.starts.append(start_ms)
        return self._leg(self.recognisers[len(self.starts) - 1])

    @contextmanager
    def _leg(self, recogniser: Hears) -> Iterator[Leg]:
        self.leg = Leg(recogniser)
        try:
            yield self.leg
        except BaseException as error:
            self.outcomes.append(type(error).__name__)
            raise
        self.outcomes.append("completed")


async def talk(*commands: tuple[int, StreamInput], step: int = 1, length: int = LENGTH) -> AsyncIterator[StreamInput]:
    """The tenths in their order, `step` at once, and commands before some of them."""
    for at in range(0, length, step):
        for when, command in commands:
            if at <= when < at + step:
                yield command
        yield Pcm(np.repeat(np.arange(at, min(at + step, length), dtype=np.int16), TENTH))
        await asyncio.sleep(0)


async def heard(way: Way, audio: AsyncIterator[StreamInput], options: Options | None = None) -> list[Event]:
    async with failover(lambda: way, audio, options or Options()) as told:  # type: ignore[arg-type, return-value]
        return [event async for event in told]


def check(events: list[Event]) -> list[Final]:
    """What a listener relies on; the finals."""
    sent: dict[int, str] = {}
    finals: dict[int, Final] = {}
    gone: set[int] = set()
    for event in events:
        match event:
            case SpeechStarted(number):
                assert number == len(sent) + 1
                sent[number] = ""
            case Delta(number, text) | Partial(number, text):
                assert number in sent
                assert number not in finals
                if isinstance(event, Partial):
                    assert text[: event.stable] == sent[number]
                else:
                    sent[number] += text
            case Final(number, text):
                assert number == len(finals) + len(gone) + 1
                assert event.start_ms < event.end_ms or (event.revised and not text)
                assert event.revised or not sent[number] or sent[number] == text
                assert not event.revised or sent[number]
                finals[number] = event
            case Gap():
                gone |= {number for number in sent if number not in finals}
    assert set(finals) | gone == set(sent)
    return list(finals.values())


def texts(events: list[Event]) -> list[str]:
    return [final.text for final in check(events) if final.text]


def spans(events: list[Event]) -> list[tuple[int, int]]:
    return [(event.start_ms, event.end_ms) for event in events if isinstance(event, Final)]


async def test_without_a_failure_nothing_is_different() -> None:
    alone = Hears()
    async with alone.stream(talk(), Options()) as told:  # type: ignore[attr-defined]
        plain = [event async for event in told]
    way = Way([Hears()])
    assert await heard(way, talk()) == plain
    assert way.outcomes == ["completed"]


@given(until=st.integers(0, LENGTH), step=st.integers(1, 7), late=st.integers(0, 12))
@settings(max_examples=60, deadline=None)
async def test_wherever_it_fails_the_words_are_the_same(until: int, step: int, late: int) -> None:
    """No word is lost, none is said twice, and times and numbers go on."""
    undisturbed = await heard(Way([Hears(late=late)]), talk(step=step))
    way = Way([Hears(until=until, late=late), Hears()])
    events = await heard(way, talk(step=step))
    assert texts(events) == WHOLE
    assert spans(events) == spans(undisturbed)
    assert not any(isinstance(event, Final) and event.revised for event in events)
    assert not any(isinstance(event, Gap) for event in events)


@given(failures=st.lists(st.integers(0, LENGTH), max_size=6))
@settings(max_examples=60, deadline=None)
async def test_one_after_the_other(failures: list[int]) -> None:
    way = Way([*(Hears(until=until) for until in failures), Hears()])
    assert texts(await heard(way, talk())) == WHOLE


async def test_what_was_answered_is_not_heard_again() -> None:
    until = ENDS[1] + 5
    one, two = Hears(until=until), Hears()
    way = Way([one, two])
    await heard(way, talk())
    assert way.starts == [0, 100 * (ENDS[1] + 1)]
    assert two.heard[0] == ENDS[1] + 1


async def test_another_spelling_is_a_revision() -> None:
    """What was told is not taken back: the final says that it replaces it."""
    way = Way([Hears(until=STARTS[2] + 2 * WORD + 1), Hears(spelling=str.upper)])
    events = await heard(way, talk())
    finals = check(events)
    assert [final.text for final in finals] == [*WHOLE[:2], *(text.upper() for text in WHOLE[2:])]
    assert [final.revised for final in finals] == [False, False, True, False]


async def test_utterances_under_way_that_the_next_one_takes_for_one() -> None:
    """Two were announced, and their finals awaited; the next recogniser hears one, of both."""

    @dataclass
    class Merging(Hears):
        async def _run(self, audio: AsyncIterator[StreamInput], out: Outbox) -> None:
            async for _ in audio:
                pass
            await out.put(SpeechStarted(1, 0), Delta(1, "one two three four five", 0, 3_000))
            await out.put(Final(1, "one two three four five", 0, 3_000, "en", 1.0))

    way = Way([Hears(until=ENDS[1] + 1, late=100), Merging()])
    finals = check(await heard(way, talk()))
    assert [final.text for final in finals] == ["one two three four five", ""]
    assert [final.revised for final in finals] == [False, True]


async def test_the_next_one_hears_nothing() -> None:
    way = Way([Hears(until=ENDS[0]), Hears(deaf=True)])
    (final,) = check(await heard(way, talk()))
    assert (final.text, final.revised) == ("", True)


async def test_what_the_next_one_hears_later_is_another_utterance() -> None:
    class DullAtFirst(Hears):
        async def _take(self, tenth: int) -> None:
            self.deaf = tenth < STARTS[2]
            await super()._take(tenth)

    way = Way([Hears(until=ENDS[0]), DullAtFirst()])
    finals = check(await heard(way, talk()))
    assert [(final.text, final.revised) for final in finals] == [("", True), (WHOLE[2], False), (WHOLE[3], False)]
    assert finals[0].end_ms == 100 * (ENDS[0] + 1)
    assert finals[1].start_ms == 100 * STARTS[2]


async def test_a_flush_ends_what_the_next_one_does_not_hear() -> None:
    way = Way([Hears(until=ENDS[0]), Hears(deaf=True)])
    events = await heard(way, talk((ENDS[0] + 2, Flush())))
    (final,) = check(events)
    flushed = next(event for event in events if isinstance(event, Flushed))
    assert events.index(final) < events.index(flushed)
    assert (final.text, final.end_ms) == ("", flushed.accepted_ms)


async def test_a_final_without_deltas_is_told_as_the_rest() -> None:
    way = Way([Hears(until=ENDS[0]), Hears(partials=False)])
    events = await heard(way, talk())
    assert texts(events) == WHOLE
    assert "".join(event.text for event in events if isinstance(event, Delta)) == "one two three"


async def test_commands_are_heard_again_until_they_are_answered() -> None:
    one, two = Hears(answers=1), Hears()
    commands = ((ENDS[0] + 1, Flush()), (STARTS[1] + WORD, Flush()))
    events = await heard(Way([one, two]), talk(*commands))
    assert [event.accepted_ms for event in events if isinstance(event, Flushed)] == [
        100 * (when) for when, _ in commands
    ]
    assert two.commands == [Flush()]
    assert texts(events)[0] == WHOLE[0]


async def test_a_clear_ends_what_was_under_way() -> None:
    at = STARTS[1] + WORD + 1
    way = Way([Hears(answers=0), Hears()])
    events = await heard(way, talk((at, Clear())))
    assert way.outcomes == ["BackendFailed", "completed"]
    assert [event.accepted_ms for event in events if isinstance(event, Cleared)] == [100 * at]


async def test_when_nobody_is_left() -> None:
    """What was told stands, the rest is a gap, and why is said."""
    way = Way([Hears(until=STARTS[1] + 2), Hears(until=STARTS[2] + WORD, error=BackendTimeout(retry_after_s=9.0))])
    events: list[Event] = []
    with pytest.raises(BackendUnavailable) as ending:
        async with failover(lambda: way, talk(), Options()) as told:  # type: ignore[arg-type, return-value]
            async for event in told:
                events.append(event)  # noqa: PERF401  those before the failure
    assert texts(events) == WHOLE[:2]
    gap = events[-1]
    assert isinstance(gap, Gap)
    assert (gap.start_ms, gap.reason) == (spans(events)[-1][1], "BACKEND_TIMEOUT")
    assert ending.value.retry_after_s == 9.0
    assert way.outcomes == ["BackendFailed", "BackendTimeout"]


async def test_who_cannot_do_what_is_asked_does_not_end_the_stream() -> None:
    way = Way([Hears(until=STARTS[1] + 2), Hears(until=0, error=UnsupportedOption()), Hears()])
    assert texts(await heard(way, talk())) == WHOLE
    assert way.outcomes == ["BackendFailed", "UnsupportedOption", "completed"]


async def test_when_nobody_can_do_what_is_asked() -> None:
    way = Way([Hears(until=0, error=UnsupportedOption(param=name)) for name in ("prompt", "language")])
    with pytest.raises(UnsupportedOption) as ending:
        await heard(way, talk())
    assert ending.value.param == "prompt"
    way = Way([Hears(until=STARTS[1] + 2), Hears(until=0, error=UnsupportedOption())])
    with pytest.raises(BackendUnavailable):
        await heard(way, talk())


async def test_a_refused_request_is_asked_of_nobody_else() -> None:
    way = Way([Hears(until=3, error=BackendRefused()), Hears()])
    with pytest.raises(BackendRefused):
        await heard(way, talk())
    assert way.starts == [0]


async def test_a_failure_of_the_source_ends_the_stream() -> None:
    async def broken() -> AsyncIterator[StreamInput]:
        yield Pcm(np.zeros(TENTH, np.int16))
        raise BackendFailed("of the source")  # elsewhere, as far as anybody can tell

    way = Way([Hears(), Hears()])
    with pytest.raises(BackendFailed, match="of the source"):
        await heard(way, broken())
    assert way.starts == [0]


async def test_the_listener_is_told_of_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NOTICED_S", 0.02)

    @dataclass
    class Slow(Hears):
        def stream(self, audio: AsyncIterator[StreamInput], options: Options) -> AbstractContextManager[object]:
            return _slowly(super().stream(audio, options))  # type: ignore[return-value, arg-type]

    events = await heard(Way([Hears(until=3), Slow()]), talk())
    assert [(event.code, event.retryable, event.fatal) for event in events if isinstance(event, StreamError)] == [
        ("BACKEND_FAILED", True, False)
    ]
    assert texts(events) == WHOLE
    quick = await heard(Way([Hears(until=3), Hears()]), talk())
    assert not any(isinstance(event, StreamError) for event in quick)


def _slowly(stream: object) -> object:
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def opened() -> AsyncIterator[object]:
        await asyncio.sleep(0.1)
        async with stream as events:  # type: ignore[attr-defined]
            yield events

    return opened()


async def test_a_recogniser_that_may_not_be_used_any_more_is_left() -> None:
    one, two = Hears(), Hears()
    way = Way([one, two])

    async def source() -> AsyncIterator[StreamInput]:
        async for item in talk():
            if isinstance(item, Pcm) and item.samples[0] == STARTS[1] + WORD:
                assert way.leg is not None
                assert way.leg.leave is not None
                way.leg.leave()
                await asyncio.sleep(0.01)
            yield item

    events = await heard(way, source())
    assert texts(events) == WHOLE
    assert way.outcomes == ["Withdrawn", "completed"]


async def test_leaving_early_leaves_nothing_behind() -> None:
    way = Way([Hears(until=5), Hears()])
    before = asyncio.all_tasks()
    async with failover(lambda: way, talk(), Options()) as told:  # type: ignore[arg-type, return-value]
        await anext(told)
    await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == before
    assert way.outcomes[-1] == "CancelledError"


async def test_memory_is_bounded_however_long_it_is_silent() -> None:
    """Of silence half a minute is kept, of speech that does not end what an utterance may have and some more."""
    silent, speaking = Hears(deaf=True), Hears(late=10**6)
    reels = []
    original = module.Reel

    def watched(most: int) -> object:
        reels.append(original(most))
        return reels[-1]

    module.Reel = watched  # type: ignore[assignment, misc]
    try:
        for recogniser in (silent, speaking):
            await heard(Way([recogniser]), talk(step=20, length=4_000), Options(vad=VadOptions(max_utterance_ms=1_000)))
    finally:
        module.Reel = original  # type: ignore[misc]
    assert [(reel.end - reel.start) // 16_000 for reel in reels] == [30, 91]
    assert all(len(reel._items) <= 50 for reel in reels)


async def test_channels_fail_over_each_for_itself() -> None:
    """One of two fails; the other is not disturbed."""
    ways = [Way([Hears(until=STARTS[1] + 3), Hears()]), Way([Hears()])]
    given_out = iter(ways)

    async def stereo() -> AsyncIterator[StreamInput]:
        async for item in talk():
            yield Pcm(np.column_stack([item.samples] * 2)) if isinstance(item, Pcm) else item

    def streams(audio: AsyncIterator[StreamInput], options: Options) -> object:
        return failover(lambda: next(given_out), audio, options)  # type: ignore[arg-type, return-value]

    async with per_channel(streams, stereo(), replace(Options(), channels=2)) as told:  # type: ignore[arg-type]
        events = [event async for event in told]
    for channel in range(2):
        assert [e.text for e in events if isinstance(e, Final) and e.channel == channel] == WHOLE


def test_later_is_what_it_was() -> None:
    """A replayed stream's clock is the whole one's."""
    event = Final(1, "a", 0, 100, "en", 1.0)
    assert later(event, 700, 0) == replace(event, start_ms=700, end_ms=800)
