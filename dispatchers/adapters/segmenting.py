"""Live streams out of a batch recogniser.

Voice activity cuts the stream into utterances. While one is being heard, all of it so far is transcribed again and
again (a partial); what successive hypotheses agree on goes out as deltas. When it ends it is transcribed once more:
the final. Audio is read on while finals are computed, so a slow one delays no one's ears.

The final does not wait for the end: after a short silence (`TAIL`), when its audio is what it will be if nobody goes on
speaking, it is begun (the early final), and its answer waits for the end instead. Speech drops it. A partial's answer
never serves as the final, though some cover the same speech: a partial is searched less thoroughly (beam 1), which
tripled the micro model's word error where it was tried (2.9 % against 1.0 % of 210 words). Nor would it save much, as
no partial is due in silence.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from uuid import uuid4

from dispatchers.adapters.credence import Memory
from dispatchers.adapters.utterance import Utterance
from dispatchers.audio.segment import Ended, Segmenter, Started
from dispatchers.audio.vad import SileroVad
from dispatchers.errors import AudioError, BackendError, BackendUnavailable
from dispatchers.interface import (
    SAMPLE_RATE,
    SAMPLES_PER_MS,
    Capabilities,
    Clear,
    Cleared,
    Dispatcher,
    Event,
    Flush,
    Flushed,
    Gap,
    Heard,
    Options,
    Origin,
    Pcm,
    Samples,
    SpeechStarted,
    StreamError,
    StreamInput,
    Transcript,
    Urgency,
    ignore,
    to_ms,
)

AWAY = "The recogniser is being started again. The text of this utterance will be late."

_EVENTS_WAITING = 64
_FINALS_WAITING = 4
_BITE = SAMPLE_RATE  # samples looked at in one go, however much comes at once


class Segmenting:
    """A dispatcher that streams by means of `batch`. A partial is due for every `partial_interval_ms` of new speech,
    the first as soon as an utterance is announced; at most one is under way in a stream, after which it rests for as
    long as that took, so that a busy engine is asked less often. One that fails or comes too late is dropped: the final
    says what is true.

    A final that fails (`BackendError`) is told as a `StreamError` and a `Gap`, and the stream goes on. Where the
    recogniser is `away`, an utterance under way is told so, once and without a gap: its final will be late.
    """

    def __init__(
        self,
        batch: Dispatcher,
        vad: SileroVad,
        *,
        partial_interval_ms: int = 250,
        away: Callable[[], bool] = lambda: False,
    ):
        self._batch = batch
        self._vad = vad
        self._away = away
        self._interval = partial_interval_ms * SAMPLES_PER_MS

    @property
    def capabilities(self) -> Capabilities:
        return replace(self._batch.capabilities, stream=True, partials=True)

    def origin(self, model: str) -> Origin:
        return self._batch.origin(model)

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        return await self._batch.transcribe(audio, options, heard)

    def stream(
        self, audio: AsyncIterator[StreamInput], options: Options
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        options = replace(options, stream=uuid4().hex)
        return _streaming(_Stream(self._batch, self._vad, self._interval, options, self._away), audio)

    async def aclose(self) -> None:
        await self._batch.aclose()


@dataclass(frozen=True, slots=True)
class _Stopped:
    """The last thing in the queue of events: the stream's end, or what ended it."""

    failure: BaseException | None = None


@asynccontextmanager
async def _streaming(stream: _Stream, audio: AsyncIterator[StreamInput]) -> AsyncIterator[AsyncIterator[Event]]:
    """Everything a stream runs lives in one task, which ends before this does. Its failure is raised where the events
    are read, as itself, so it never cancels the reader or comes wrapped in a group."""
    task = asyncio.create_task(stream.run(audio))
    events = stream.read()
    try:
        yield events
    finally:
        task.cancel()
        await asyncio.wait({task})
        await events.aclose()


@dataclass(slots=True)
class _Heard(Utterance):
    """An utterance under way: the task that asks for a hypothesis, and the early final."""

    asking: asyncio.Task[None] | None = None
    early: _Early | None = None
    warned: bool = False


@dataclass(frozen=True, slots=True)
class _Early:
    """A final begun before its utterance has ended; good if that ends at this sample. None: it failed."""

    end: int
    answer: asyncio.Task[Transcript | None]


class _Stream:
    """The state of one stream."""

    def __init__(self, batch: Dispatcher, vad: SileroVad, interval: int, options: Options, away: Callable[[], bool]):
        self._batch = batch
        self._away = away
        self._options = options
        self._interval = interval
        self._vad = vad.stream()
        self._segmenter = Segmenter(options.vad)
        self._events: asyncio.Queue[Event | _Stopped] = asyncio.Queue(_EVENTS_WAITING)
        self._answers: asyncio.Queue[tuple[_Heard, Ended] | Event | None] = asyncio.Queue(_FINALS_WAITING)
        self._telling = asyncio.Lock()  # one utterance's events go out together
        self._current = _Heard(0)  # none yet
        self._partial: asyncio.Task[None] | None = None
        self._partial_due = 0  # in samples
        self._rest_until = 0.0  # on the loop's clock
        self._memory = Memory()

    async def run(self, audio: AsyncIterator[StreamInput]) -> None:
        """Reads the input to its end, answers all of it, and says how that went to whoever reads the events."""
        stopped = _Stopped()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._answer())
                await self._listen(audio, tasks)
        except BaseExceptionGroup as group:
            stopped = _Stopped(_first(group))
        await self._events.put(stopped)

    async def read(self) -> AsyncGenerator[Event, None]:
        while not isinstance(event := await self._events.get(), _Stopped):
            yield event
        if event.failure is not None:
            raise event.failure

    # --- hearing ---

    async def _listen(self, audio: AsyncIterator[StreamInput], tasks: asyncio.TaskGroup) -> None:
        async for item in audio:
            match item:
                case Pcm(samples):
                    for at in range(0, len(samples), _BITE):
                        await self._hear(samples[at : at + _BITE], tasks)
                case Flush():
                    await self._flush()
                    await self._answers.put(Flushed(to_ms(self._segmenter.accepted)))
                case Clear():
                    await self._clear()
        await self._flush()
        await self._answers.put(None)

    async def _hear(self, samples: Samples, tasks: asyncio.TaskGroup) -> None:
        probabilities = await self._vad.feed(samples)
        for action in self._segmenter.feed(samples, probabilities):
            await self._act(action)
        if self._segmenter.voiced_until and self._away():
            await self._warn(self._current, BackendUnavailable(AWAY))
        if self._segmenter.lulled:
            self._begin_final(tasks)
        elif self._segmenter.voiced_until:
            self._drop_early(self._current)
            self._ask(tasks)

    async def _act(self, action: Started | Ended) -> None:
        match action:
            case Started(number, start):
                self._current = _Heard(number)
                self._partial_due, self._rest_until = 0, 0.0
                await self._events.put(SpeechStarted(number, to_ms(start)))
            case Ended():
                await self._answers.put((self._leave(), action))

    async def _flush(self) -> None:
        for action in self._segmenter.flush():
            await self._act(action)

    async def _clear(self) -> None:
        dropped = self._segmenter.clear()
        if dropped is not None:
            utterance = self._leave()
            self._drop_early(utterance)
            async with self._telling:
                utterance.closed = True
            await self._answers.put(Gap(to_ms(dropped.start), to_ms(dropped.end), "cleared"))
        await self._answers.put(Cleared(to_ms(self._segmenter.accepted)))

    def _leave(self) -> _Heard:
        """The utterance being heard, which is over: a hypothesis still asked for would come too late."""
        self._drop_partial(self._current)
        return self._current

    # --- partials ---

    def _ask(self, tasks: asyncio.TaskGroup) -> None:
        """Has the utterance so far transcribed, if that is due and this stream may ask for it."""
        if not self._options.partials or self._segmenter.voiced_until < self._partial_due:
            return
        self._partial_due = self._segmenter.voiced_until + self._interval
        busy = self._partial is not None and not self._partial.done()
        if busy or asyncio.get_running_loop().time() < self._rest_until:
            self._current.coalesced += 1
        elif (heard := self._segmenter.so_far()) is not None:
            self._partial = self._current.asking = tasks.create_task(self._hypothesise(self._current, heard))

    async def _hypothesise(self, utterance: _Heard, heard: Ended) -> None:
        clock = asyncio.get_running_loop().time
        begun = clock()
        try:
            transcript = await self._recognise(heard, "partial")
        finally:
            self._rest_until = 2 * clock() - begun
        utterance.asking = None  # no longer to be cancelled: what is told is told whole
        if transcript is None:
            utterance.dropped += 1
        else:
            await self._suppose(utterance, heard, transcript)

    def _drop_partial(self, utterance: _Heard) -> None:
        if utterance.asking is not None:
            utterance.asking.cancel()
            utterance.asking = None
            utterance.dropped += 1

    async def _suppose(self, utterance: _Heard, heard: Ended, transcript: Transcript) -> None:
        """Tells a hypothesis, unless the utterance is over."""
        async with self._telling:
            if not utterance.closed:
                await self._tell(utterance.hypothesis(transcript, *_span(heard)))

    async def _recognise(self, heard: Ended, urgency: Urgency) -> Transcript | None:
        """None where the recogniser failed."""
        try:
            return await self._batch.transcribe(heard.audio, self._memory.options(self._options, urgency))
        except BackendUnavailable as away:
            await self._warn(self._current, away)
            return None
        except (BackendError, AudioError):
            return None

    async def _warn(self, utterance: _Heard, away: BackendUnavailable) -> None:
        if not utterance.warned:
            utterance.warned = True
            await self._events.put(StreamError(away.code, away.message, away.retryable))

    # --- finals ---

    async def _answer(self) -> None:
        """Answers in the order of the audio: finals, and the echoes of commands between them."""
        while (question := await self._answers.get()) is not None:
            match question:
                case (utterance, ended):
                    await self._finish(utterance, ended)
                case event:
                    await self._events.put(event)

    def _begin_final(self, tasks: asyncio.TaskGroup) -> None:
        """Begins the final of an utterance that seems to be over, unless that has been done."""
        utterance, heard = self._current, self._segmenter.so_far()
        if heard is None or (utterance.early is not None and utterance.early.end == heard.end):
            return
        self._drop_early(utterance)
        self._drop_partial(utterance)
        answer = tasks.create_task(self._recognise(heard, "final"))
        utterance.early = _Early(heard.end, answer)
        if self._options.partials:
            tasks.create_task(self._anticipate(utterance, heard, answer))

    async def _anticipate(self, utterance: _Heard, heard: Ended, answer: asyncio.Task[Transcript | None]) -> None:
        """Until the end has come, an early final is the best hypothesis."""
        await asyncio.wait({answer})
        still_good = utterance is self._current and self._segmenter.lulled
        if still_good and not answer.cancelled() and answer.exception() is None and (found := answer.result()):
            await self._suppose(utterance, heard, found)

    def _drop_early(self, utterance: _Heard) -> None:
        if utterance.early is not None:
            utterance.early.answer.cancel()
            utterance.early = None

    async def _finish(self, utterance: _Heard, ended: Ended) -> None:
        events: list[Event]
        if self._away():
            await self._warn(utterance, BackendUnavailable(AWAY))
        try:
            transcript = await self._last_word(utterance, ended)
        except (BackendError, AudioError) as failure:
            events = [
                StreamError(failure.code, failure.message, failure.retryable),
                Gap(*_span(ended), failure.code),
            ]
        else:
            self._memory.note(transcript)
            options = self._options
            events = utterance.final(transcript, *_span(ended), words=options.words, deltas=options.partials)
        async with self._telling:
            utterance.closed = True
            await self._tell(events)

    async def _last_word(self, utterance: _Heard, ended: Ended) -> Transcript:
        """The early final, if it heard the same audio and did not fail. Raises what the recogniser raises."""
        if utterance.early is not None and utterance.early.end == ended.end:
            transcript = await utterance.early.answer
            if transcript is not None:
                return transcript
        self._drop_early(utterance)
        return await self._batch.transcribe(ended.audio, self._memory.options(self._options, "final"))

    async def _tell(self, events: list[Event]) -> None:
        for event in events:
            await self._events.put(event)


def _span(heard: Ended) -> tuple[int, int]:
    return to_ms(heard.start), to_ms(heard.end)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    failure: BaseException = group
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure
