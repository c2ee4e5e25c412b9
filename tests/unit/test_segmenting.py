"""A stream made of a batch recogniser: what is said, in which order, and what happens when something goes wrong."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dispatchers.adapters.segmenting import Segmenting
from dispatchers.audio.decode import load
from dispatchers.audio.vad import SileroVad
from dispatchers.backends.scripted import Scripted
from dispatchers.engine.scheduler import Scheduler, Seat
from dispatchers.errors import BackendFailed, UnknownModel, UnsupportedOption
from dispatchers.interface import (
    Capabilities,
    Clear,
    Cleared,
    Delta,
    Event,
    Final,
    Flush,
    Flushed,
    Gap,
    Heard,
    Notice,
    Options,
    Origin,
    Partial,
    Pcm,
    Samples,
    Segment,
    SpeechStarted,
    StreamError,
    StreamInput,
    Transcript,
    VadOptions,
    ignore,
    to_ms,
)

LONG = Path(__file__).parents[2] / "dispatchers/engine/micro/samples/long.wav"
FIRST_SPOKEN_MS, FIRST_DONE_MS, SECOND_SPOKEN_MS, SECOND_DONE_MS = 500, 1_730, 3_140, 5_930
MID_FIRST = 1_300 * 16
CHUNK = 1_600


async def until(happened: Callable[[], bool]) -> None:
    while not happened():  # noqa: ASYNC110 - what is waited for knows no event
        await asyncio.sleep(0.001)


class Asked(Scripted):
    """The scripted recogniser, its requests written down and held back or answered otherwise on demand."""

    def __init__(self, answer: Callable[[Samples, Options], str | tuple[Segment, ...]] | None = None):
        super().__init__()
        self.requests: list[Options] = []
        self.cancelled: list[Options] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.at_once: dict[str, int] = {"partial": 0, "final": 0}
        self.most_at_once = dict(self.at_once)
        self._answer = answer

    def hold(self, urgency: str) -> asyncio.Event:
        return self.gates.setdefault(urgency, asyncio.Event())

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        kind = options.urgency
        self.requests.append(options)
        self.at_once[kind] += 1
        self.most_at_once[kind] = max(self.most_at_once[kind], self.at_once[kind])
        try:
            if kind in self.gates:
                await self.gates[kind].wait()
            if self._answer is None:
                return await super().transcribe(audio, options, heard)
            said = self._answer(audio, options)
        except asyncio.CancelledError:
            self.cancelled.append(options)
            raise
        finally:
            self.at_once[kind] -= 1
        segments = (Segment(0, to_ms(len(audio)), said),) if isinstance(said, str) else said
        text = " ".join(segment.text for segment in segments)
        return Transcript(text, "en", to_ms(len(audio)), segments, Origin("scripted", "scripted", "scripted"))

    async def idle(self) -> None:
        """Until nothing that may go on is being transcribed."""
        await asyncio.sleep(0.002)
        await until(lambda: not any(count for kind, count in self.at_once.items() if kind not in self.gates))


@pytest.fixture(scope="module")
def vad() -> SileroVad:
    return SileroVad.load()


@pytest.fixture(scope="module")
def speech() -> Samples:
    return load(LONG)


async def talk(batch: Asked | None, *parts: Samples | Flush | Clear) -> AsyncIterator[StreamInput]:
    """100 ms at a time; given the recogniser, as a slow speaker, who lets each answer come first."""
    for part in parts:
        if isinstance(part, Flush | Clear):
            yield part
            continue
        for at in range(0, len(part), CHUNK):
            yield Pcm(part[at : at + CHUNK])
            if batch is not None:
                await batch.idle()


async def hear(
    vad: SileroVad, batch: Asked, *parts: Samples | Flush | Clear, options: Options | None = None
) -> list[Event]:
    adapter = Segmenting(batch, vad)
    async with adapter.stream(talk(batch, *parts), options or Options()) as events:
        said = [event async for event in events]
    await adapter.aclose()
    return said


def of(events: list[Event], *kinds: type) -> list[Event]:
    return [event for event in events if isinstance(event, kinds)]


async def test_an_utterance_in_full(vad: SileroVad, speech: Samples):
    events = await hear(vad, Asked(), speech[: 3_000 * 16], options=Options(words=True))
    started, *middle, final = events
    assert isinstance(started, SpeechStarted)
    assert 0 <= started.start_ms <= FIRST_SPOKEN_MS
    assert isinstance(final, Final)
    assert (final.utterance, final.start_ms, final.revised) == (1, started.start_ms, False)
    assert FIRST_DONE_MS <= final.end_ms <= FIRST_DONE_MS + 400
    assert final.text == "the quick brown fox"[: len(final.text)]
    assert [word.text for word in final.words] == final.text.split()
    assert final.words[0].start_ms == final.start_ms
    assert final.words[-1].end_ms <= final.end_ms
    assert {type(event) for event in middle} == {Partial, Delta}
    assert "".join(event.text for event in middle if isinstance(event, Delta)) == final.text


async def test_partials_begin_with_the_deltas(vad: SileroVad, speech: Samples):
    batch = Asked()
    events = await hear(vad, batch, speech[: 12_500 * 16])
    assert len(of(events, Final)) >= 3
    sent: dict[int, str] = {}
    for event in events:
        if isinstance(event, Delta):
            sent[event.utterance] = sent.get(event.utterance, "") + event.text
        elif isinstance(event, Partial):
            assert event.text[: event.stable] == sent.get(event.utterance, "")
        elif isinstance(event, Final):
            assert event.text == sent[event.utterance]
    numbers = [event.utterance for event in of(events, Final)]
    assert numbers == [event.utterance for event in of(events, SpeechStarted)] == list(range(1, len(numbers) + 1))
    assert {options.urgency for options in batch.requests} == {"partial", "final"}


async def test_the_first_partial_is_asked_for_within_half_a_second_of_speech(vad: SileroVad, speech: Samples):
    batch = Asked()
    fed = 0

    async def until_asked() -> AsyncIterator[StreamInput]:
        nonlocal fed
        async for item in talk(batch, speech[: 3_000 * 16]):
            if not batch.requests and isinstance(item, Pcm):
                fed += len(item.samples)
            yield item

    async with Segmenting(batch, vad).stream(until_asked(), Options()) as events:
        assert [event async for event in events]
    assert to_ms(fed) <= FIRST_SPOKEN_MS + 400


async def test_without_partials_there_are_no_deltas_either(vad: SileroVad, speech: Samples):
    batch = Asked()
    events = await hear(vad, batch, speech[: 6_900 * 16], options=Options(partials=False))
    assert {type(event) for event in events} == {SpeechStarted, Final}
    assert {options.urgency for options in batch.requests} == {"final"}


async def test_flush_answers_at_once_and_loses_nothing(vad: SileroVad, speech: Samples):
    events = await hear(vad, Asked(), speech[:MID_FIRST], Flush(), np.zeros(16_000, np.int16), Flush())
    final, flushed, again = of(events, Final, Flushed)
    assert isinstance(final, Final)
    assert final.end_ms == to_ms(MID_FIRST)
    assert flushed == Flushed(to_ms(MID_FIRST))
    assert again == Flushed(to_ms(MID_FIRST) + 1_000)


async def test_the_end_of_input_finishes_the_tail(vad: SileroVad, speech: Samples):
    events = await hear(vad, Asked(), speech[: MID_FIRST + 77])
    assert isinstance(events[-1], Final)
    assert events[-1].end_ms == to_ms(MID_FIRST + 77)


async def test_clear_drops_the_utterance_and_says_so(vad: SileroVad, speech: Samples):
    events = await hear(vad, Asked(), speech[:MID_FIRST], Clear(), np.zeros(16_000, np.int16), Clear())
    started, *_, gap, cleared, again = events
    assert isinstance(started, SpeechStarted)
    assert gap == Gap(started.start_ms, to_ms(MID_FIRST), "cleared")
    assert cleared == Cleared(to_ms(MID_FIRST))
    assert again == Cleared(to_ms(MID_FIRST) + 1_000)
    assert not of(events, Final)


async def test_silence_and_nothing_say_nothing(vad: SileroVad):
    assert await hear(vad, Asked()) == []
    assert await hear(vad, Asked(), np.zeros(32_000, np.int16)) == []
    assert await hear(vad, Asked(), np.empty(0, np.int16), Flush()) == [Flushed(0)]


async def test_a_failed_final_is_a_gap_and_the_stream_goes_on(vad: SileroVad, speech: Samples):
    finals = 0

    def answer(_: Samples, options: Options) -> str:
        nonlocal finals
        finals += options.urgency == "final"
        if options.urgency == "final" and finals <= 2:  # the early one, and the one at the end
            raise BackendFailed
        return "well said"

    events = await hear(vad, Asked(answer), speech[: 6_900 * 16])
    error, gap, final, *_ = of(events, StreamError, Gap, Final)
    assert isinstance(error, StreamError)
    assert (error.code, error.retryable, error.fatal) == ("BACKEND_FAILED", True, False)
    assert isinstance(gap, Gap)
    assert gap.start_ms <= FIRST_SPOKEN_MS < FIRST_DONE_MS <= gap.end_ms
    assert isinstance(final, Final)
    assert (final.utterance, final.text) == (2, "well said")


async def test_failed_partials_cost_nothing(vad: SileroVad, speech: Samples):
    def answer(_: Samples, options: Options) -> str:
        if options.urgency == "partial":
            raise BackendFailed
        return "well said"

    events = await hear(vad, Asked(answer), speech[: 3_000 * 16])
    started, early, delta, final = events
    assert (type(started), type(early), type(delta)) == (SpeechStarted, Partial, Delta)
    assert isinstance(final, Final)
    assert final.dropped >= 3


async def test_a_wrong_option_ends_the_stream_as_itself(vad: SileroVad, speech: Samples):
    def answer(_: Samples, __: Options) -> str:
        raise UnsupportedOption

    with pytest.raises(UnsupportedOption):
        await hear(vad, Asked(answer), speech[: 3_000 * 16])
    with pytest.raises(UnknownModel):
        await hear(vad, Asked(), speech[: 3_000 * 16], options=Options(model="none"))


async def test_the_speakers_own_failure_ends_the_stream_as_itself(vad: SileroVad, speech: Samples):
    async def lost() -> AsyncIterator[StreamInput]:
        yield Pcm(speech[:MID_FIRST])
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        async with Segmenting(Asked(), vad).stream(lost(), Options()) as events:
            assert [event async for event in events]


async def test_a_final_that_leaves_the_deltas_is_revised(vad: SileroVad, speech: Samples):
    events = await hear(
        vad,
        Asked(lambda _, options: "one two three" if options.urgency == "partial" else "three two one"),
        speech[: 3_000 * 16],
    )
    assert [event.text for event in of(events, Delta)] == ["one two"], "there was no time to say all of it"
    assert isinstance(events[-1], Final)
    assert (events[-1].text, events[-1].revised) == ("three two one", True)


async def test_what_the_recogniser_is_unsure_of_is_firm_later(vad: SileroVad, speech: Samples):
    def first_delta(events: list[Event]) -> int:
        return next(number for number, event in enumerate(of(events, Partial, Delta)) if isinstance(event, Delta))

    sure, unsure = [
        await hear(vad, Asked(lambda *_: (Segment(0, 500, "we are here now", avg_logprob=lp),)), speech[: 3_000 * 16])  # noqa: B023
        for lp in (-0.1, -0.3)
    ]
    assert first_delta(sure) < first_delta(unsure)
    for events in (sure, unsure):
        assert "".join(event.text for event in events if isinstance(event, Delta)) == "we are here now"


@pytest.mark.parametrize(
    "doubtful",
    [
        Segment(0, 500, "Thanks for watching", no_speech_prob=0.9, avg_logprob=-1.5),
        Segment(0, 500, "no no no no no no", compression_ratio=2.5),
    ],
)
async def test_what_whisper_makes_of_silence_is_dropped(vad: SileroVad, speech: Samples, doubtful: Segment):
    sure = Segment(500, 900, "we are here", no_speech_prob=0.9, avg_logprob=-0.5)
    events = await hear(vad, Asked(lambda *_: (doubtful, sure)), speech[: 3_000 * 16])
    assert {event.text for event in of(events, Partial, Final)} == {"we are here"}
    (final,) = of(await hear(vad, Asked(lambda *_: (doubtful,)), speech[: 3_000 * 16]), Final, Partial, Delta)
    assert isinstance(final, Final)
    assert (final.text, final.confidence) == ("", 0.0)


async def test_listening_goes_on_while_a_final_is_slow(vad: SileroVad, speech: Samples):
    batch = Asked()
    gate = batch.hold("final")
    seen: list[Event] = []
    async with Segmenting(batch, vad).stream(talk(batch, speech[: 6_900 * 16]), Options()) as events:
        async for event in events:
            seen.append(event)
            if isinstance(event, Partial) and event.utterance == 2 and not gate.is_set():
                assert not of(seen, Final)
                gate.set()
    assert [event.utterance for event in of(seen, Final)][:2] == [1, 2]


async def test_a_slow_partial_holds_nothing_up_and_is_never_doubled(vad: SileroVad, speech: Samples):
    batch = Asked()
    batch.hold("partial")
    events = await hear(vad, batch, speech[: 6_900 * 16])
    assert len(of(events, Final)) >= 2
    assert {event.end_ms for event in of(events, Partial)} <= {event.end_ms for event in of(events, Final)}
    assert batch.most_at_once == {"partial": 1, "final": 1}
    assert {options.urgency for options in batch.cancelled} == {"partial"}


class Stubborn(Asked):
    """Cannot be stopped once it has begun on a partial, and answers when allowed to."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = asyncio.Event()

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        if options.urgency == "partial":
            with suppress(asyncio.CancelledError):
                await self.allowed.wait()
            await self.allowed.wait()
        return await super().transcribe(audio, options, heard)


async def test_a_partial_that_comes_after_its_final_is_not_told(vad: SileroVad, speech: Samples):
    batch = Stubborn()
    seen: list[Event] = []
    async with Segmenting(batch, vad).stream(talk(batch, speech[: 3_000 * 16]), Options()) as events:
        async for event in events:
            seen.append(event)
            if isinstance(event, Final):
                batch.allowed.set()
    assert [type(event) for event in seen] == [SpeechStarted, Partial, Delta, Final]
    assert isinstance(seen[1], Partial)
    assert seen[1].end_ms == seen[3].end_ms, "the early final is a hypothesis; the late partial is none"
    assert "partial" in {options.urgency for options in batch.requests}


async def test_a_reader_who_stops_stops_the_speaker(vad: SileroVad, speech: Samples):
    batch = Asked()
    batch.hold("final")
    taken = 0

    async def counted() -> AsyncIterator[StreamInput]:
        nonlocal taken
        async for item in talk(None, speech):
            taken += 1
            yield item

    async with Segmenting(batch, vad).stream(counted(), Options(partials=False)):
        before = -1
        while taken != before:
            before = taken
            await asyncio.sleep(0.3)
    assert 0 < taken < len(speech) // CHUNK


async def test_leaving_early_leaves_nothing_behind(vad: SileroVad, speech: Samples):
    batch = Asked()
    batch.hold("final")
    before = asyncio.all_tasks()
    async with Segmenting(batch, vad).stream(talk(None, speech[: 6_900 * 16]), Options(partials=False)) as events:
        assert isinstance(await anext(events), SpeechStarted)
        await until(lambda: bool(batch.requests))
    assert asyncio.all_tasks() == before
    assert {options.urgency for options in batch.cancelled} == {"final"}


async def test_a_cancelled_reader_leaves_nothing_behind(vad: SileroVad, speech: Samples):
    batch = Asked()
    batch.hold("final")
    before = asyncio.all_tasks()
    reader = asyncio.create_task(hear(vad, batch, speech[: 3_000 * 16]))
    await until(lambda: any(options.urgency == "final" for options in batch.requests))
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert asyncio.all_tasks() == before


async def test_options_go_through_unchanged(vad: SileroVad, speech: Samples):
    options = Options(language="en", prompt="names", share="t1", words=True)
    batch = Asked()
    await hear(vad, batch, speech[: 3_000 * 16], options=options)
    finals = [asked for asked in batch.requests if asked.urgency == "final"]
    await hear(vad, batch, speech[: 3_000 * 16], options=options)
    assert {replace(asked, urgency="batch", stream="") for asked in finals} == {options}
    partials = [asked for asked in batch.requests if asked.urgency == "partial"]
    assert {replace(asked, urgency="batch", words=True, stream="") for asked in partials} == {options}
    assert not any(asked.words for asked in partials)
    assert len({asked.stream for asked in batch.requests} - {""}) == 2, "one key for each of the two streams"


async def test_the_final_is_begun_before_the_end_and_only_once(vad: SileroVad, speech: Samples):
    batch = Asked()
    asked_at: list[int] = []
    fed = 0

    async def fed_slowly() -> AsyncIterator[StreamInput]:
        nonlocal fed
        async for item in talk(batch, speech[: 2_900 * 16]):
            if not asked_at and any(options.urgency == "final" for options in batch.requests):
                asked_at.append(to_ms(fed))
            fed += len(item.samples) if isinstance(item, Pcm) else 0
            yield item

    async with Segmenting(batch, vad).stream(fed_slowly(), Options()) as events:
        *_, final = [event async for event in events]
    assert isinstance(final, Final)
    assert [options.urgency for options in batch.requests].count("final") == 1
    assert asked_at[0] < FIRST_DONE_MS + Options().vad.silence_ms, "begun while the silence is still counted"
    assert batch.requests[-1].urgency == "final", "no partial after it"


async def test_speech_drops_the_early_final(vad: SileroVad, speech: Samples):
    """The pause after the first phrase begins a final, and is too short here to end the utterance."""
    batch = Asked()
    batch.hold("final")

    async def let_go_at_the_end() -> AsyncIterator[StreamInput]:
        async for item in talk(batch, speech[: 6_400 * 16]):
            yield item
        batch.gates["final"].set()

    options = Options(vad=VadOptions(silence_ms=1_700))
    async with Segmenting(batch, vad).stream(let_go_at_the_end(), options) as events:
        (final,) = of([event async for event in events], Final)
    assert isinstance(final, Final)
    assert final.start_ms < FIRST_SPOKEN_MS
    assert final.end_ms > SECOND_DONE_MS
    assert {options.urgency for options in batch.cancelled} == {"final"}


async def test_a_flush_in_the_pause_takes_the_early_final(vad: SileroVad, speech: Samples):
    batch = Asked()
    events = await hear(vad, batch, speech[: 2_000 * 16], Flush())
    assert isinstance(of(events, Final)[0], Final)
    assert [options.urgency for options in batch.requests].count("final") == 1


async def test_a_busy_recogniser_is_asked_less_often_and_the_final_says_so(vad: SileroVad, speech: Samples):
    batch = Asked()
    batch.hold("partial")
    (final, *_) = of(await hear(vad, batch, speech[: 3_000 * 16]), Final)
    assert isinstance(final, Final)
    assert [options.urgency for options in batch.requests].count("partial") == 1
    assert final.coalesced >= 3
    assert final.dropped == 1


async def test_what_was_said_and_its_language_are_remembered(vad: SileroVad, speech: Samples):
    batch = Asked(lambda *_: "we are here now")
    await hear(vad, batch, speech[: 9_800 * 16])
    assert batch.requests[0].context == ""
    assert batch.requests[0].language is None
    last = batch.requests[-1]
    assert last.language == "en"
    assert last.context.startswith("we are here now we are here now")
    given = Asked(lambda *_: "we are here now")
    await hear(vad, given, speech[: 9_800 * 16], options=Options(language="de"))
    assert {options.language for options in given.requests} == {"de"}


@pytest.mark.parametrize(
    "doubtful",
    [
        Segment(0, 500, "Thanks for watching", no_speech_prob=0.9, avg_logprob=-1.5),
        Segment(0, 500, "no no no no no no", compression_ratio=2.5),
        Segment(0, 500, "a wild guess", temperature=0.8),
    ],
)
async def test_what_was_doubted_is_not_remembered(vad: SileroVad, speech: Samples, doubtful: Segment):
    batch = Asked(lambda *_: (doubtful,))
    await hear(vad, batch, speech[: 9_800 * 16])
    assert {(options.context, options.language) for options in batch.requests} == {("", None)}


async def test_partials_come_as_often_as_asked(vad: SileroVad, speech: Samples):
    due: list[int] = []
    for interval_ms in (100, 300, 1_000):
        batch = Asked()
        options = Options(partial_interval_ms=interval_ms)
        (final, *_) = of(await hear(vad, batch, speech[: 3_000 * 16], options=options), Final)
        assert isinstance(final, Final)
        due.append([asked.urgency for asked in batch.requests].count("partial") + final.coalesced)
    often, less, seldom = due
    assert often > less > seldom >= 1
    assert seldom <= 2, "there are 1.2 s of speech"


def never_the_same(samples: Samples, _: Options) -> str:
    """A word for each 200 ms, another one each time, so that no two hypotheses agree."""
    return " ".join(f"word{len(samples)}" for _ in range(len(samples) // 3_200))


async def delayed(vad: SileroVad, speech: Samples, options: Options) -> list[tuple[int, Event]]:
    """Every event with the time of the audio fed before it came."""
    batch = Asked(never_the_same)
    fed, came = 0, list[tuple[int, Event]]()

    async def counted() -> AsyncIterator[StreamInput]:
        nonlocal fed
        async for item in talk(batch, speech):
            fed += to_ms(len(item.samples)) if isinstance(item, Pcm) else 0
            yield item

    async with Segmenting(batch, vad).stream(counted(), options) as events:
        async for event in events:
            came.append((fed, event))
    return came


async def test_no_word_waits_longer_than_it_may(vad: SileroVad, speech: Samples):
    passage = speech[3_000 * 16 : 6_900 * 16]
    *_, last_words, end = [event for _, event in await delayed(vad, passage, Options())]
    assert isinstance(last_words, Delta)
    assert isinstance(end, Final)
    assert last_words.text == end.text, "without agreement all of it waits for the final"
    came = await delayed(vad, passage, Options(max_delay_ms=700))
    (final,) = of([event for _, event in came], Final)
    assert isinstance(final, Final)
    assert final.revised
    words, seen = 0, list[tuple[int, int]]()  # when a partial first had so many words
    start_ms = final.start_ms
    for at, event in came:
        if isinstance(event, Delta):
            words += len(event.text.split())
        elif isinstance(event, Partial):
            seen.append((at, len(event.text.split())))
        late = max((count for since, count in seen if since <= at - 700 - 2 * to_ms(CHUNK)), default=0)
        assert words >= late or isinstance(event, Final)
    assert words >= 5
    first = next(at for at, event in came if isinstance(event, Delta))
    assert start_ms + 700 <= first <= start_ms + 700 + 2 * to_ms(CHUNK)


async def test_a_late_final_does_not_keep_words_back(vad: SileroVad, speech: Samples):
    """Here the next utterance has begun before the words of the first are old enough."""
    batch = Asked(never_the_same)
    batch.hold("final")
    told = list[Event]()
    before_finals = list[Event]()

    async def finals_at_last() -> AsyncIterator[StreamInput]:
        async for item in talk(batch, speech[: 5_000 * 16]):
            yield item
        before_finals.extend(told)
        batch.gates["final"].set()

    async with Segmenting(batch, vad).stream(finals_at_last(), Options(max_delay_ms=2_800)) as events:
        async for event in events:
            told.append(event)
    assert len(of(before_finals, SpeechStarted)) == 2
    assert not of(before_finals, Final)
    shown = [event.text for event in before_finals if isinstance(event, Partial) and event.utterance == 1][-1]
    firm = "".join(event.text for event in before_finals if isinstance(event, Delta) and event.utterance == 1)
    assert len(firm.split()) == len(shown.split()) > 3


async def test_partials_of_one_model_and_finals_of_another(vad: SileroVad, speech: Samples):
    batch = Asked(lambda *_: "we are here now")
    await hear(vad, batch, speech[: 3_000 * 16], options=Options(model="large", partial_model="small"))
    assert {(asked.urgency, asked.model) for asked in batch.requests} == {("partial", "small"), ("final", "large")}
    same = Asked(lambda *_: "we are here now")
    await hear(vad, same, speech[: 3_000 * 16], options=Options(model="large"))
    assert {asked.model for asked in same.requests} == {"large"}


class Queued(Asked):
    """Runs on a real scheduler of one worker."""

    def __init__(self, scheduler: Scheduler):
        super().__init__(lambda *_: "we are here now")
        self.scheduler = scheduler
        self.ran: list[tuple[str, int]] = []

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, latest_wins=True)

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        def work(_: Seat) -> None:
            self.ran.append((options.urgency, len(audio)))

        await self.scheduler.seat(work, urgency=options.urgency, stream=options.stream)
        return await super().transcribe(audio, options, heard)


async def test_while_a_partial_waits_the_newest_takes_its_place(vad: SileroVad, speech: Samples):
    scheduler = Scheduler(workers=1, queue_limit=8)
    batch, free = Queued(scheduler), threading.Event()
    busy = asyncio.create_task(scheduler.run(free.wait, 30))

    async def while_busy() -> AsyncIterator[StreamInput]:
        for at in range(0, MID_FIRST, CHUNK):
            yield Pcm(speech[at : at + CHUNK])
            await asyncio.sleep(0.005)
        assert scheduler.waiting == 1
        free.set()
        await until(lambda: bool(batch.requests))
        yield Pcm(speech[MID_FIRST : 3_000 * 16])

    async with Segmenting(batch, vad).stream(while_busy(), Options(partial_interval_ms=100)) as events:
        (final, *_) = of([event async for event in events], Final)
    await busy
    await scheduler.aclose()
    (kind, samples), *_ = batch.ran
    assert kind == "partial"
    assert samples > MID_FIRST - FIRST_SPOKEN_MS * 16, "the newest that was asked for, and no older one"
    assert isinstance(final, Final)
    assert final.coalesced >= 2


# --- speakers at once ---


async def until_speech(speech: Samples, go_on: asyncio.Event) -> AsyncIterator[StreamInput]:
    """Begins to speak, and pauses there until it may go on."""
    yield Pcm(speech[:MID_FIRST])
    await go_on.wait()
    for at in range(MID_FIRST, 3_000 * 16, CHUNK):
        yield Pcm(speech[at : at + CHUNK])


@pytest.mark.parametrize(
    ("limits", "other_share", "limited"),
    [((1, None), "t2", True), ((None, 1), "t1", True), ((None, 1), "t2", False), ((2, 2), "t1", False)],
)
async def test_so_many_are_transcribed_as_they_speak(
    vad: SileroVad, speech: Samples, limits: tuple[int | None, int | None], other_share: str, limited: bool
):
    most, of_a_share = limits
    adapter = Segmenting(Asked(lambda *_: "we are here now"), vad, most_speaking=most)
    go_on = asyncio.Event()
    options = Options(share="t1", max_speaking=of_a_share)
    async with adapter.stream(until_speech(speech, go_on), options) as first:
        assert isinstance(await anext(first), SpeechStarted)
        others = replace(options, share=other_share)
        async with adapter.stream(talk(None, speech[: 6_900 * 16]), others) as second:
            told = [event async for event in second]
        go_on.set()
        assert of([event async for event in first], Partial)
    notices = [event.code for event in told if isinstance(event, Notice)]
    assert notices == (["SPEAKERS_LIMITED"] if limited else [])
    assert bool(of(told, Partial)) is not limited
    finals = of(told, Final)
    assert len(finals) >= 2
    said = "".join(event.text for event in told if isinstance(event, Delta))
    assert said == "".join(event.text for event in finals if isinstance(event, Final)), "no word is lost"


async def test_a_place_is_free_again_when_its_speaker_has_finished_or_gone(vad: SileroVad, speech: Samples):
    adapter = Segmenting(Asked(lambda *_: "we are here now"), vad, most_speaking=1)
    for _ in range(2):
        async with adapter.stream(until_speech(speech, asyncio.Event()), Options()) as gone:
            await anext(gone)
    async with adapter.stream(talk(None, speech[:MID_FIRST], Clear(), speech[:MID_FIRST]), Options()) as events:
        assert not of([event async for event in events], Notice)
    async with adapter.stream(talk(None, speech[: 3_000 * 16]), Options()) as events:
        assert not of([event async for event in events], Notice)


async def test_a_pause_makes_room_for_others(vad: SileroVad, speech: Samples):
    batch = Asked(lambda *_: "we are here now")
    adapter = Segmenting(batch, vad, most_speaking=1)
    go_on = asyncio.Event()

    async def with_a_pause() -> AsyncIterator[StreamInput]:
        async for item in talk(batch, speech[: 2_600 * 16]):
            yield item
        await go_on.wait()
        async for item in talk(batch, speech[2_600 * 16 : 6_900 * 16]):
            yield item

    async with adapter.stream(with_a_pause(), Options()) as first:
        while not isinstance(await anext(first), Final):
            pass
        async with adapter.stream(until_speech(speech, asyncio.Event()), Options()) as second:
            begun = [await anext(second), await anext(second)]
            assert [type(event) for event in begun] == [SpeechStarted, Partial]
            go_on.set()
            assert len(of([event async for event in first], Notice)) == 1, "now the first one speaks beyond the limit"


async def test_who_gets_a_place_late_gets_partials_from_then_on(vad: SileroVad, speech: Samples):
    batch = Asked(lambda *_: "we are here now")
    adapter = Segmenting(batch, vad, most_speaking=1)
    go_on, second_speaks = asyncio.Event(), asyncio.Event()

    async def second_speaker() -> AsyncIterator[StreamInput]:
        yield Pcm(speech[3_000 * 16 : 4_000 * 16])
        second_speaks.set()
        await go_on.wait()
        async for item in talk(batch, speech[4_000 * 16 : 6_900 * 16]):
            yield item

    async with AsyncExitStack() as speaking:
        await anext(await speaking.enter_async_context(adapter.stream(until_speech(speech, go_on), Options())))
        async with adapter.stream(second_speaker(), Options()) as second:
            told = [await anext(second), await anext(second)]
            assert [type(event) for event in told] == [SpeechStarted, Notice]
            await second_speaks.wait()
            assert len({asked.stream for asked in batch.requests}) == 1, "the first speaker's"
            await speaking.aclose()
            go_on.set()
            told += [event async for event in second]
    assert len(of(told, Partial)) >= 3
    assert len(of(told, Notice)) == 1


async def test_who_wants_no_partials_takes_no_place(vad: SileroVad, speech: Samples):
    adapter = Segmenting(Asked(lambda *_: "we are here now"), vad, most_speaking=1)
    async with adapter.stream(until_speech(speech, asyncio.Event()), Options(partials=False)) as quiet:
        await anext(quiet)
        async with adapter.stream(talk(None, speech[: 3_000 * 16]), Options()) as events:
            assert not of([event async for event in events], Notice)
