"""What every dispatcher keeps, whatever it is made of."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from dispatchers.errors import UnknownModel
from dispatchers.interface import (
    Clear,
    Cleared,
    Delta,
    Dispatcher,
    Event,
    Final,
    Flush,
    Flushed,
    Gap,
    Options,
    Partial,
    Pcm,
    Samples,
    Segment,
    SpeechStarted,
    StreamInput,
    to_ms,
)

DURATION_MS = 7_000
QUARTERS = 4


async def live(*parts: Samples | Flush | Clear) -> AsyncIterator[StreamInput]:
    """100 ms at a time, with time between for other work: faster than life, not all at once."""
    for part in parts:
        if isinstance(part, Flush | Clear):
            yield part
            continue
        for at in range(0, len(part), 1_600):
            yield Pcm(part[at : at + 1_600])
            await asyncio.sleep(0.005)


async def heard_from(dispatcher: Dispatcher, options: Options, *parts: Samples | Flush | Clear) -> list[Event]:
    if not dispatcher.capabilities.stream:
        pytest.skip("batch only, and says so")
    async with dispatcher.stream(live(*parts), options) as events:
        return [event async for event in events]


def check_order(events: list[Event]) -> dict[int, Final]:
    """The order of events that the stream protocol promises; the finals by utterance."""
    started: dict[int, SpeechStarted] = {}
    sent: dict[int, str] = {}
    finals: dict[int, Final] = {}
    for event in events:
        match event:
            case SpeechStarted(number):
                assert number == len(started) + 1
                started[number] = event
                sent[number] = ""
            case Delta(number, text):
                assert number in started
                assert number not in finals
                assert text
                assert bool(sent[number]) == text.startswith(" ")
                sent[number] += text
            case Partial(number, text, stable):
                assert number in started
                assert number not in finals
                assert text[:stable] == sent[number]
            case Final(number, text):
                assert number == len(finals) + 1
                assert started[number].start_ms == event.start_ms < event.end_ms
                assert event.revised or not sent[number] or sent[number] == text
                finals[number] = event
    assert finals.keys() == started.keys()
    return finals


async def test_it_transcribes_and_names_its_origin(dispatcher: Dispatcher, speech: Samples):
    transcript = await dispatcher.transcribe(speech, Options())
    assert transcript.text.strip()
    assert transcript.duration_ms == DURATION_MS
    assert transcript.origin.backend
    assert transcript.origin.engine
    assert transcript.origin.model in dispatcher.capabilities.models
    assert len(transcript.language) == 2


async def test_it_says_beforehand_who_will_recognise(dispatcher: Dispatcher, speech: Samples):
    for model in ("", *dispatcher.capabilities.models):
        promised = dispatcher.origin(model)
        assert promised.model == model or not model
        assert (await dispatcher.transcribe(speech[:32_000], Options(model=model))).origin == promised
    with pytest.raises(UnknownModel):
        dispatcher.origin("no-such-model")


async def test_segments_come_in_order_as_they_are_heard(dispatcher: Dispatcher, speech: Samples):
    heard: list[Segment] = []
    transcript = await dispatcher.transcribe(speech, Options(), heard.append)
    assert tuple(heard) == transcript.segments
    assert transcript.segments
    edges = [edge for segment in heard for edge in (segment.start_ms, segment.end_ms)]
    assert edges == sorted(edges)
    assert edges[0] >= 0
    assert edges[-1] <= DURATION_MS
    assert " ".join(segment.text for segment in heard).split() == transcript.text.split()
    assert all(segment.text == segment.text.strip() for segment in heard)


async def test_words_come_when_asked_for(dispatcher: Dispatcher, speech: Samples):
    assert not any(segment.words for segment in (await dispatcher.transcribe(speech, Options())).segments)
    if not dispatcher.capabilities.words:
        pytest.skip("no word times, and says so")
    transcript = await dispatcher.transcribe(speech, Options(words=True))
    words = [word for segment in transcript.segments for word in segment.words]
    assert " ".join(word.text for word in words).split() == transcript.text.split()
    assert all(0 <= word.start_ms <= word.end_ms <= DURATION_MS for word in words)
    assert all(0 <= word.confidence <= 1 for word in words)
    assert [word.start_ms for word in words] == sorted(word.start_ms for word in words)


async def test_an_unknown_model_is_refused(dispatcher: Dispatcher, speech: Samples):
    with pytest.raises(UnknownModel):
        await dispatcher.transcribe(speech, Options(model="no-such-model"))


async def test_its_models_are_known_to_it(dispatcher: Dispatcher, speech: Samples):
    first, *_ = dispatcher.capabilities.models
    assert (await dispatcher.transcribe(speech[:32_000], Options(model=first))).origin.model == first


async def test_many_at_once(dispatcher: Dispatcher, speech: Samples):
    alone = [(await dispatcher.transcribe(part, Options())).text for part in np.array_split(speech, QUARTERS)]
    at_once = await asyncio.gather(*(dispatcher.transcribe(part, Options()) for part in np.array_split(speech, 4)))
    assert [transcript.text for transcript in at_once] == alone


async def test_a_cancelled_transcription_leaves_it_working(dispatcher: Dispatcher, speech: Samples):
    asked = asyncio.create_task(dispatcher.transcribe(speech, Options()))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert (await dispatcher.transcribe(speech, Options())).text


async def test_a_stream_keeps_the_order(dispatcher: Dispatcher, speech: Samples):
    events = await heard_from(dispatcher, Options(words=True), speech)
    finals = check_order(events)
    assert len(finals) >= 2
    assert all(final.text for final in finals.values())
    for final in finals.values():
        assert final.end_ms <= DURATION_MS
        assert 0 <= final.confidence <= 1
        assert [word.text for word in final.words] == final.text.split()
        assert all(final.start_ms <= word.start_ms <= word.end_ms <= final.end_ms for word in final.words)
    assert any(isinstance(event, Delta) for event in events)


async def test_a_stream_hears_what_is_said(dispatcher: Dispatcher, speech: Samples):
    finals = check_order(await heard_from(dispatcher, Options(), speech[: 6_300 * 16]))
    if dispatcher.capabilities.models[0] == "micro":
        text = " ".join(final.text for final in finals.values())
        assert text == "where is the hospital please update my project before sunday"
    assert finals[1].start_ms <= 500
    assert 1_700 <= finals[1].end_ms <= 2_200


async def test_a_stream_without_partials(dispatcher: Dispatcher, speech: Samples):
    events = await heard_from(dispatcher, Options(partials=False), speech)
    assert {type(event) for event in events} == {SpeechStarted, Final}
    check_order(events)


async def test_a_flush_is_answered_by_its_final(dispatcher: Dispatcher, speech: Samples):
    middle = 1_500 * 16
    events = await heard_from(dispatcher, Options(), speech[:middle], Flush(), speech[middle : 2 * middle], Flush())
    check_order([event for event in events if not isinstance(event, Flushed)])
    first = events.index(Flushed(1_500))
    assert isinstance(events[first - 1], Final)
    assert events[-1] == Flushed(3_000)


async def test_a_clear_drops_what_is_being_heard(dispatcher: Dispatcher, speech: Samples):
    middle = 1_500 * 16
    events = await heard_from(dispatcher, Options(), speech[:middle], Clear(), np.zeros(8_000, np.int16))
    assert not any(isinstance(event, Final) for event in events)
    assert [type(event) for event in events[-2:]] == [Gap, Cleared]


async def test_nothing_said_is_nothing_heard(dispatcher: Dispatcher):
    assert await heard_from(dispatcher, Options()) == []
    assert await heard_from(dispatcher, Options(), np.zeros(16_000, np.int16)) == []


async def test_a_stream_of_an_unknown_model_is_refused(dispatcher: Dispatcher, speech: Samples):
    if not dispatcher.capabilities.stream:
        pytest.skip("batch only, and says so")
    with pytest.raises(UnknownModel):
        await heard_from(dispatcher, Options(model="no-such-model"), speech)


async def test_leaving_a_stream_early_leaves_no_task(dispatcher: Dispatcher, speech: Samples):
    if not dispatcher.capabilities.stream:
        pytest.skip("batch only, and says so")
    before = asyncio.all_tasks()
    async with dispatcher.stream(live(speech), Options()) as events:
        assert isinstance(await anext(events), SpeechStarted)
    assert asyncio.all_tasks() <= before
    assert check_order(await heard_from(dispatcher, Options(), speech[: 3_000 * 16]))


async def test_streams_share_a_dispatcher(dispatcher: Dispatcher, speech: Samples):
    quiet = replace(Options(), partials=False)
    alone = check_order(await heard_from(dispatcher, quiet, speech))
    at_once = await asyncio.gather(*(heard_from(dispatcher, quiet, speech) for _ in range(3)))
    assert [check_order(events) for events in at_once] == [alone] * 3


async def test_translation_is_told_from_transcription(dispatcher: Dispatcher, speech: Samples):
    if not dispatcher.capabilities.translate:
        pytest.skip("does not translate, and says so")
    transcript = await dispatcher.transcribe(speech[:48_000], Options(task="translate"))
    assert transcript.task == "translate"
    assert to_ms(48_000) == transcript.duration_ms
