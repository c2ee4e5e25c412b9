"""Live streams out of a batch recogniser.

Voice activity cuts the stream into utterances. While one is being heard, all of it so far is transcribed again and
again (a partial); what successive hypotheses agree on goes out as deltas. When it ends it is transcribed once more:
the final. Audio is read on while finals are computed, so a slow one delays no one's ears.

The final does not wait for the end: after a short silence (`TAIL`), when its audio is what it will be if nobody goes on
speaking, it is begun (the early final), and its answer waits for the end instead. Speech drops it. A partial's answer
never serves as the final, though some cover the same speech: a partial is searched less thoroughly (beam 1), which
tripled the micro model's word error where it was tried (2.9 % against 1.0 % of 210 words). Nor would it save much, as
no partial is due in silence.

A partial that waits in a recogniser's queue grows stale there. So where only the newest may wait (`latest_wins`), the
next one that is due takes its place. With an engine of 75 ms a partial and 160 ms a final, on two workers, the text
told was at most 0.35 s old (p95) at 24 streams instead of 0.68, and 0.39 instead of 1.40 at 40, for the same number of
recognitions and the same finals. To let one wait behind a running one, too, gained nothing more, and had a slow engine
(0.45 s a partial) do 2.5 times the partials.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from uuid import uuid4

from dispatchers.adapters.cadence import Cadence
from dispatchers.adapters.credence import Memory
from dispatchers.adapters.floor import Floor, Speaker
from dispatchers.adapters.outbox import Outbox
from dispatchers.adapters.telling import Telling
from dispatchers.adapters.utterance import Utterance
from dispatchers.audio.segment import Ended, Segmenter, Started
from dispatchers.audio.vad import SileroVad
from dispatchers.errors import AudioError, BackendError, BackendUnavailable, Superseded
from dispatchers.interface import (
    SAMPLE_RATE,
    Capabilities,
    Clear,
    Cleared,
    Dispatcher,
    Event,
    Flush,
    Flushed,
    Gap,
    Heard,
    Notice,
    Options,
    Origin,
    Pcm,
    Samples,
    StreamError,
    StreamInput,
    Transcript,
    ignore,
    to_ms,
)
from runtime.errors import StenogateError
from runtime.telemetry import SPEAKERS_LIMITED

AWAY = "The recogniser is being started again. The text of this utterance will be late."

_FINALS_WAITING = 4
_LIMITED = Notice(
    "SPEAKERS_LIMITED", "More speak at once than may. What is said now comes in finals only, until a place is free."
)
_ASKED_AT_ONCE = 2  # partials of one stream; the older waits, and the newer takes its place or is refused
_BITE = SAMPLE_RATE  # samples looked at in one go, however much comes at once


class Segmenting:
    """A dispatcher that streams by means of `batch`. When a partial is asked for is `Cadence`'s to say; one that fails
    or comes too late is dropped: the final says what is true. Where more speak at once than may (`most_speaking` in
    all, None: any number; `Options.max_speaking` of one share), those who began last get their finals only, and a
    `Notice`, until a place is free.

    A final that fails (`BackendError`) is told as a `StreamError` and a `Gap`, and the stream goes on, unless it is to
    `give_up`. Where the
    recogniser is `away`, an utterance under way is told so, once and without a gap: its final will be late.
    """

    def __init__(
        self,
        batch: Dispatcher,
        vad: SileroVad,
        *,
        most_speaking: int | None = None,
        away: Callable[[], bool] = lambda: False,
    ):
        self._batch = batch
        self._vad = vad
        self._floor = Floor(most_speaking)
        self._away = away

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
        out = Outbox()
        stream = _Stream(self._batch, self._vad, self._floor, options, out, away=self._away)
        return out.filled_by(lambda: stream.run(audio))

    async def aclose(self) -> None:
        await self._batch.aclose()


@dataclass(eq=False, slots=True)
class _Heard(Utterance):
    """An utterance under way, and its early final."""

    early: _Early | None = None
    warned: bool = False


@dataclass(frozen=True, slots=True)
class _Early:
    """A final begun before its utterance has ended; good if that ends at this sample. None: it failed."""

    end: int
    answer: asyncio.Task[Transcript | None]


class _Stream:
    """The state of one stream."""

    def __init__(
        self,
        batch: Dispatcher,
        vad: SileroVad,
        floor: Floor,
        options: Options,
        out: Outbox,
        *,
        away: Callable[[], bool],
    ):
        self._batch = batch
        self._away = away
        self._options = options
        self._out = out
        self._speaker = Speaker(floor, options.share, options.max_speaking)
        self._limit_told = False
        self._vad = vad.stream()
        self._segmenter = Segmenter(options.vad)
        self._answers: asyncio.Queue[tuple[_Heard, Ended] | Event | None] = asyncio.Queue(_FINALS_WAITING)
        self._telling = Telling(out, options.max_delay_ms)
        self._current = _Heard(0)  # none yet
        self._latest_wins = batch.capabilities.latest_wins
        self._asked: set[asyncio.Task[None]] = set()  # hypotheses of the current utterance
        self._cadence = Cadence(options.partial_interval_ms, asyncio.get_running_loop().time)
        self._memory = Memory(options)

    async def run(self, audio: AsyncIterator[StreamInput]) -> None:
        """Reads the input to its end and answers all of it."""
        with self._speaker:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._answer())
                await self._listen(audio, tasks)

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
        await self._telling.hurry(to_ms(self._segmenter.accepted))

    async def _act(self, action: Started | Ended) -> None:
        match action:
            case Started(number, start):
                self._current = _Heard(number, to_ms(start), self._memory.unsure_below)
                self._cadence.restart()
                await self._telling.begin(self._current)
                await self._take_place()
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
            await self._telling.end(utterance)
            await self._answers.put(Gap(to_ms(dropped.start), to_ms(dropped.end), "cleared"))
        await self._answers.put(Cleared(to_ms(self._segmenter.accepted)))

    def _leave(self) -> _Heard:
        """The utterance being heard, which is over: a hypothesis still asked for would come too late."""
        self._drop_partial(self._current)
        self._speaker.leave()
        return self._current

    # --- partials ---

    async def _take_place(self) -> None:
        """A place among those who speak; who wants no partials needs none."""
        if not self._options.partials or self._speaker.take_place():
            return
        SPEAKERS_LIMITED.inc()
        if not self._limit_told:
            self._limit_told = True
            await self._out.put(_LIMITED)

    def _ask(self, tasks: asyncio.TaskGroup) -> None:
        """Has the utterance so far transcribed, if that is due and this stream may ask for it."""
        if not self._options.partials or not self._cadence.due(self._segmenter.voiced_until):
            return
        if not self._may_ask():
            self._current.coalesced += 1
        elif self._speaker.take_place() and (heard := self._segmenter.so_far()) is not None:
            if not self._asked:
                self._cadence.begin()
            task = tasks.create_task(self._hypothesise(self._current, heard))
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)

    def _may_ask(self) -> bool:
        """While one is under way, only a recogniser that lets a newer one take its place in the queue."""
        if self._asked:
            return self._latest_wins and len(self._asked) < _ASKED_AT_ONCE
        return not self._cadence.resting

    async def _hypothesise(self, utterance: _Heard, heard: Ended) -> None:
        try:
            transcript = await self._batch.transcribe(heard.audio, self._memory.options("partial"))
        except Superseded:
            utterance.coalesced += 1
        except (BackendError, AudioError) as error:
            self._cadence.rest()
            utterance.dropped += 1
            await self._warn(self._current, error)
        else:
            self._cadence.rest()
            self._asked.clear()  # no longer to be cancelled: what is told is told whole
            await self._suppose(utterance, heard, transcript)

    async def _suppose(self, utterance: _Heard, heard: Ended, transcript: Transcript) -> None:
        await self._telling.suppose(utterance, transcript, *_span(heard))
        await self._telling.hurry(to_ms(self._segmenter.accepted))

    def _drop_partial(self, utterance: _Heard) -> None:
        if self._asked:
            self._cadence.rest()
            utterance.dropped += 1
        for task in self._asked:
            task.cancel()
        self._asked.clear()

    async def _warn(self, utterance: _Heard, error: StenogateError) -> None:
        """Tells, once, that the recogniser is away, if it is that."""
        if isinstance(error, BackendUnavailable) and not utterance.warned:
            utterance.warned = True
            await self._out.put(StreamError(error.code, error.message, error.retryable))

    # --- finals ---

    async def _answer(self) -> None:
        """Answers in the order of the audio: finals, and the echoes of commands between them."""
        while (question := await self._answers.get()) is not None:
            match question:
                case (utterance, ended):
                    await self._finish(utterance, ended)
                case event:
                    await self._out.put(event)

    async def _recognise(self, heard: Ended) -> Transcript | None:
        """None where the recogniser failed."""
        try:
            return await self._batch.transcribe(heard.audio, self._memory.options("final"))
        except (BackendError, AudioError) as error:
            await self._warn(self._current, error)
            return None

    def _begin_final(self, tasks: asyncio.TaskGroup) -> None:
        """Begins the final of an utterance that seems to be over, unless that has been done."""
        utterance, heard = self._current, self._segmenter.so_far()
        if heard is None or (utterance.early is not None and utterance.early.end == heard.end):
            return
        self._drop_early(utterance)
        self._drop_partial(utterance)
        answer = tasks.create_task(self._recognise(heard))
        utterance.early = _Early(heard.end, answer)
        if self._speaker.has_place:
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
        options, span = self._options, _span(ended)
        if self._away():
            if options.give_up:
                raise BackendUnavailable
            await self._warn(utterance, BackendUnavailable(AWAY))
        try:
            transcript = await self._last_word(utterance, ended)
        except (BackendError, AudioError) as failure:
            if options.give_up and failure.elsewhere:
                raise
            lost = StreamError(failure.code, failure.message, failure.retryable), Gap(*span, failure.code)
            await self._telling.end(utterance, lambda: lost)
        else:
            self._memory.note(transcript)
            await self._telling.end(
                utterance,
                lambda: utterance.final(transcript, *span, words=options.words, deltas=options.partials),
            )

    async def _last_word(self, utterance: _Heard, ended: Ended) -> Transcript:
        """The early final, if it heard the same audio and did not fail. Raises what the recogniser raises."""
        if utterance.early is not None and utterance.early.end == ended.end:
            transcript = await utterance.early.answer
            if transcript is not None:
                return transcript
        self._drop_early(utterance)
        return await self._batch.transcribe(ended.audio, self._memory.options("final"))


def _span(heard: Ended) -> tuple[int, int]:
    return to_ms(heard.start), to_ms(heard.end)
