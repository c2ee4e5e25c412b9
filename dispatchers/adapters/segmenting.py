"""Live streams out of a batch recogniser.

Voice activity cuts the stream into utterances. While one is being heard, all of it so far is transcribed again and
again (a partial); what successive hypotheses agree on goes out as deltas. When it ends it is transcribed once more:
the final. Audio is read on while finals are computed, so a slow one delays no one's ears.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from dispatchers.audio.segment import Ended, Segmenter, Started
from dispatchers.audio.stabilise import Stabiliser, normal
from dispatchers.audio.vad import SileroVad
from dispatchers.errors import AudioError, BackendError
from dispatchers.interface import (
    SAMPLE_RATE,
    SAMPLES_PER_MS,
    Capabilities,
    Clear,
    Cleared,
    Delta,
    Dispatcher,
    Event,
    Final,
    Flush,
    Flushed,
    Gap,
    Heard,
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
    Word,
    ignore,
    to_ms,
)

_EVENTS_WAITING = 64
_FINALS_WAITING = 4
_BITE = SAMPLE_RATE  # samples looked at in one go, however much comes at once

# Radford et al. 2022, section 4.5
_NO_SPEECH = 0.6
_IMPROBABLE = -1.0
_REPETITIVE = 2.4


class Segmenting:
    """A dispatcher that streams by means of `batch`. A partial is due for every `partial_interval_ms` of new speech,
    the first as soon as an utterance is announced; at most one is under way in a stream, and one that fails or comes
    too late is dropped: the final says what is true.

    A final that fails (`BackendError`) is told as a `StreamError` and a `Gap`, and the stream goes on.
    """

    def __init__(self, batch: Dispatcher, vad: SileroVad, *, partial_interval_ms: int = 250):
        self._batch = batch
        self._vad = vad
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
        return _streaming(_Stream(self._batch, self._vad, self._interval, options), audio)

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
class _Utterance:
    """An utterance under way: the task that asks for a hypothesis, and whether its final (or gap) is being told."""

    number: int
    asking: asyncio.Task[None] | None = None
    stabiliser: Stabiliser = field(default_factory=Stabiliser)
    closed: bool = False


class _Stream:
    """The state of one stream."""

    def __init__(self, batch: Dispatcher, vad: SileroVad, interval: int, options: Options):
        self._batch = batch
        self._options = options
        self._interval = interval
        self._vad = vad.stream()
        self._segmenter = Segmenter(options.vad)
        self._events: asyncio.Queue[Event | _Stopped] = asyncio.Queue(_EVENTS_WAITING)
        self._answers: asyncio.Queue[tuple[_Utterance, Ended] | Event | None] = asyncio.Queue(_FINALS_WAITING)
        self._telling = asyncio.Lock()  # one utterance's events go out together
        self._current = _Utterance(0)  # none yet
        self._partial: asyncio.Task[None] | None = None
        self._partial_due = 0  # in samples

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
        if self._options.partials:
            self._ask(tasks)

    async def _act(self, action: Started | Ended) -> None:
        match action:
            case Started(number, start):
                self._current = _Utterance(number)
                self._partial_due = self._segmenter.accepted
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
            async with self._telling:
                utterance.closed = True
            await self._answers.put(Gap(to_ms(dropped.start), to_ms(dropped.end), "cleared"))
        await self._answers.put(Cleared(to_ms(self._segmenter.accepted)))

    def _leave(self) -> _Utterance:
        """The utterance being heard, which is over: a hypothesis still asked for would come too late."""
        utterance = self._current
        if utterance.asking is not None:
            utterance.asking.cancel()
        return utterance

    # --- partials ---

    def _ask(self, tasks: asyncio.TaskGroup) -> None:
        """Has the utterance so far transcribed, if that is due and no such work is under way."""
        busy = self._partial is not None and not self._partial.done()
        if busy or self._segmenter.accepted < self._partial_due:
            return
        heard = self._segmenter.so_far()
        if heard is None:
            return
        self._partial_due = self._segmenter.accepted + self._interval
        self._partial = self._current.asking = tasks.create_task(self._hypothesise(self._current, heard))

    async def _hypothesise(self, utterance: _Utterance, heard: Ended) -> None:
        try:
            transcript = await self._batch.transcribe(heard.audio, replace(self._options, urgency="partial"))
        except (BackendError, AudioError):
            return
        utterance.asking = None  # no longer to be cancelled: what is told is told whole
        text = normal(" ".join(segment.text for segment in transcript.segments if _credible(segment)))
        if not text:
            return
        async with self._telling:
            if utterance.closed:
                return
            delta, stable, shown = utterance.stabiliser.partial(text)
            span = to_ms(heard.start), to_ms(heard.end)
            if delta is not None:
                await self._events.put(Delta(utterance.number, delta, *span))
            await self._events.put(Partial(utterance.number, shown, stable, *span))

    # --- finals ---

    async def _answer(self) -> None:
        """Answers in the order of the audio: finals, and the echoes of commands between them."""
        while (question := await self._answers.get()) is not None:
            match question:
                case (utterance, ended):
                    await self._finish(utterance, ended)
                case event:
                    await self._events.put(event)

    async def _finish(self, utterance: _Utterance, ended: Ended) -> None:
        span = to_ms(ended.start), to_ms(ended.end)
        events: list[Event]
        try:
            transcript = await self._batch.transcribe(ended.audio, replace(self._options, urgency="final"))
        except (BackendError, AudioError) as failure:
            events = [StreamError(failure.code, failure.message, failure.retryable), Gap(*span, failure.code)]
        else:
            events = self._final(utterance, transcript, *span)
        async with self._telling:
            utterance.closed = True
            for event in events:
                await self._events.put(event)

    def _final(self, utterance: _Utterance, transcript: Transcript, start_ms: int, end_ms: int) -> list[Event]:
        segments = [segment for segment in transcript.segments if _credible(segment)]
        doubted = len(segments) < len(transcript.segments)
        text = normal(" ".join(segment.text for segment in segments) if doubted else transcript.text)
        delta, revised = utterance.stabiliser.final(text)
        final = Final(
            utterance.number,
            text,
            start_ms,
            end_ms,
            language=transcript.language,
            confidence=_confidence(segments),
            words=tuple(_shifted(word, start_ms, end_ms) for segment in segments for word in segment.words)
            if self._options.words
            else (),
            revised=revised,
        )
        if delta is None or not self._options.partials:
            return [final]
        return [Delta(utterance.number, delta, start_ms, end_ms), final]


def _credible(segment: Segment) -> bool:
    """False for what Whisper typically makes of silence, and for loops."""
    silent = segment.no_speech_prob > _NO_SPEECH and segment.avg_logprob < _IMPROBABLE
    return not silent and segment.compression_ratio <= _REPETITIVE


def _confidence(segments: list[Segment]) -> float:
    """The words' mean confidence, or the tokens' mean probability where there are no words; 0 for no text."""
    figures = [word.confidence for segment in segments for word in segment.words]
    figures = figures or [math.exp(min(segment.avg_logprob, 0.0)) for segment in segments]
    return float(np.mean(figures)) if figures else 0.0


def _shifted(word: Word, start_ms: int, end_ms: int) -> Word:
    """From the utterance's clock to the stream's, within the utterance."""
    return replace(word, start_ms=min(start_ms + word.start_ms, end_ms), end_ms=min(start_ms + word.end_ms, end_ms))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    failure: BaseException = group
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure
