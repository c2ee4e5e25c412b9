"""A live stream that outlives its recogniser.

What has no final yet is kept. When the recogniser fails in a way that another need not, the next one hears that again,
commands included, and then goes on with what comes. The listener sees one stream: one clock, utterances counted on,
and nothing taken back. An utterance that was under way keeps its number and the text that was told of it: what the
next one makes of it continues that where it agrees, else its final is `revised`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import Protocol

from dispatchers.adapters.outbox import Outbox
from dispatchers.adapters.reel import Reel
from dispatchers.errors import BackendTimeout, BackendUnavailable, DispatchError, OptionError, Withdrawn
from dispatchers.interface import (
    SAMPLE_RATE,
    SAMPLES_PER_MS,
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
    SpeechStarted,
    StreamError,
    StreamInput,
    to_ms,
)
from dispatchers.later import later

QUIET = 30 * SAMPLE_RATE
"""As much is kept of audio in which nothing was announced: longer than any recogniser takes to announce it."""
LATE = 90 * SAMPLE_RATE
"""Kept besides the longest utterance: what is spoken while its final is awaited."""
NOTICED_S = 1.0
"""The listener is told of what takes longer."""


class Leg(Protocol):
    """One recogniser's part of a stream."""

    @property
    def dispatcher(self) -> Dispatcher: ...

    def options(self, asked: Options) -> Options:
        """What this recogniser can be asked of it."""
        ...

    def when_withdrawn(self, leave: Callable[[], None]) -> None:
        """`leave` is to be called when it must not go on with this recogniser."""
        ...


class Way(Protocol):
    """A stream's, through those who may take it up."""

    def next_leg(self, start_ms: int) -> AbstractContextManager[Leg] | None:
        """The one to ask now, for audio from here on the stream's clock; what ends the block is how it went. None:
        nobody is left to ask."""
        ...


def failover(
    way: Callable[[], Way], audio: AsyncIterator[StreamInput], options: Options
) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
    """A stream of one channel, by whoever is on its `way`. When nobody is left, what was told stands, the rest is a
    `Gap`, and the events end with `BackendUnavailable`; where nobody can do what is asked, with the `OptionError`."""
    out = Outbox()
    return out.filled_by(_Stream(way(), options, out, _Source(audio)).run)


class _Source:
    """Input that whoever reads it may leave: an item that somebody waited for goes to the next one."""

    def __init__(self, audio: AsyncIterator[StreamInput]):
        self._audio = audio
        self._coming: asyncio.Task[StreamInput | None] | None = None
        self.broken = False

    async def next(self) -> StreamInput | None:
        """None: there is no more."""
        if self._coming is None:
            self._coming = asyncio.create_task(self._pull())
        await asyncio.wait({self._coming})
        coming, self._coming = self._coming, None
        return coming.result()

    async def leave(self) -> None:
        if self._coming is not None:
            self._coming.cancel()
            await asyncio.wait({self._coming})

    async def _pull(self) -> StreamInput | None:
        try:
            return await anext(self._audio, None)
        except Exception:
            self.broken = True
            raise


@dataclass(slots=True)
class _Told:
    """An utterance under way. `text` is what its deltas come to; `heard` what those of the present leg do."""

    start_ms: int
    text: str = ""
    heard: str = ""


class _Stream:
    """The state of one stream."""

    def __init__(self, way: Way, options: Options, out: Outbox, source: _Source):
        self._way = way
        self._options = options
        self._out = out
        self._source = source
        self._ended = False  # the source
        self._reel = Reel(LATE + options.vad.max_utterance_ms * SAMPLES_PER_MS)
        self._count = 0
        self._open: dict[int, _Told] = {}
        self._numbers: dict[int, int] = {}  # of the leg's utterances in the stream
        self._orphans: deque[int] = deque()  # of former legs, not taken up yet
        self._left_ms = 0  # no orphan reaches further
        self._failure: DispatchError | None = None
        self._telling: asyncio.Task[None] | None = None  # of it

    async def run(self) -> None:
        """Until all of the audio is answered, by whomever."""
        try:
            while (leg := self._way.next_leg(to_ms(self._reel.start))) is not None:
                if await self._over_with(leg):
                    return
            await self._lose(self._failure)
        finally:
            self._no_telling()
            await self._source.leave()

    async def _over_with(self, leg: AbstractContextManager[Leg]) -> bool:
        """One recogniser's part. False: it failed, and another is to go on."""
        try:
            with leg as one:
                await self._heard_by(one, to_ms(self._reel.start))
        except DispatchError as error:
            if not error.elsewhere or self._source.broken:
                raise
            await self._left(error)
            return False
        await self._close(self._open)
        return True

    async def _heard_by(self, leg: Leg, start_ms: int) -> None:
        try:
            async with asyncio.timeout(None) as term:
                leg.when_withdrawn(lambda: term.reschedule(0.0))
                async with leg.dispatcher.stream(self._input(), leg.options(self._options)) as events:
                    self._no_telling()
                    async for event in events:
                        await self._tell(later(event, start_ms, 0))
        except TimeoutError as error:
            raise (Withdrawn if term.expired() else BackendTimeout) from error

    async def _input(self) -> AsyncIterator[StreamInput]:
        """What is not answered, then what comes."""
        for kept in self._reel.again():
            yield kept
        while (item := await self._source.next()) is not None:
            self._reel.keep(item)
            if not self._open:
                self._reel.forget(self._reel.end - QUIET)
            yield item

    # --- from leg to leg ---

    async def _left(self, error: DispatchError) -> None:
        """What it had under way waits for the next one."""
        if self._failure is None or not isinstance(error, OptionError):  # who cannot do it has not failed
            self._failure = error
        self._numbers.clear()
        self._orphans, self._left_ms = deque(sorted(self._open)), to_ms(self._reel.end)
        for told in self._open.values():
            told.heard = ""
        start_ms = to_ms(self._reel.start)
        if self._open and (first_ms := min(told.start_ms for told in self._open.values())) < start_ms:
            await self._out.put(Gap(first_ms, start_ms, error.code))
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell_of(error))

    async def _tell_of(self, error: DispatchError) -> None:
        await asyncio.sleep(0.0 if isinstance(error, BackendTimeout) else NOTICED_S)
        await self._out.put(StreamError(error.code, _DELAYED, retryable=True))

    def _no_telling(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None

    async def _lose(self, error: DispatchError | None) -> None:
        error = error or BackendUnavailable()
        if self._reel.end > self._reel.start:
            await self._out.put(Gap(to_ms(self._reel.start), to_ms(self._reel.end), error.code))
        if isinstance(error, OptionError):
            raise error
        raise BackendUnavailable(error.message, retry_after_s=error.retry_after_s) from error

    # --- what is told ---

    async def _tell(self, event: Event) -> None:
        match event:
            case SpeechStarted():
                await self._announce(event)
            case Partial() | Delta() | Final():
                await self._tell_text(event)
            case Gap(start_ms=start_ms, end_ms=end_ms):
                self._drop(start_ms, end_ms)
                await self._answered(end_ms, event)
            case Flushed(accepted_ms=accepted_ms):
                await self._close(self._orphans_before(accepted_ms), accepted_ms)
                self._reel.answered(Flush)
                await self._out.put(event)
            case Cleared(accepted_ms=accepted_ms):
                self._drop(0, accepted_ms)
                self._reel.answered(Clear)
                await self._out.put(event)
            case _:
                await self._out.put(event)

    async def _tell_text(self, event: Partial | Delta | Final) -> None:
        number = self._numbers.get(event.utterance)
        if number is None:
            return  # it was never announced
        told, event = self._open[number], replace(event, utterance=number)
        match event:
            case Partial():
                if event.text.startswith(told.text):
                    await self._out.put(replace(event, stable=len(told.text)))
            case Delta():
                await self._go_on(event, told)
            case Final():
                del self._open[number]
                await self._finish(event, told)

    async def _announce(self, event: SpeechStarted) -> None:
        if event.start_ms >= self._left_ms:
            await self._close(self._orphans, self._left_ms)
        if self._orphans:
            self._numbers[event.utterance] = self._orphans.popleft()
            return
        self._count += 1
        self._numbers[event.utterance] = self._count
        self._open[self._count] = _Told(event.start_ms)
        await self._out.put(replace(event, utterance=self._count))

    async def _go_on(self, event: Delta, told: _Told) -> None:
        told.heard += event.text
        if told.heard.startswith(told.text) and (more := told.heard[len(told.text) :]):
            told.text = told.heard
            await self._out.put(replace(event, text=more))

    async def _finish(self, event: Final, told: _Told) -> None:
        if told.start_ms < event.end_ms:
            event = replace(event, start_ms=told.start_ms)
        if told.text:
            agrees = event.text.startswith(told.text)  # to the sign
            if agrees and (more := event.text[len(told.text) :]):
                await self._out.put(Delta(event.utterance, more, event.start_ms, event.end_ms))
            event = replace(event, revised=not agrees)
        await self._answered(event.end_ms, event)
        await self._close(self._orphans_before(event.end_ms), event.end_ms)

    def _orphans_before(self, end_ms: int) -> list[int]:
        return [number for number in self._orphans if self._open[number].start_ms < end_ms]

    async def _answered(self, until_ms: int, event: Event) -> None:
        self._reel.forget(until_ms * SAMPLES_PER_MS)
        await self._out.put(event)

    async def _close(self, numbers: Iterable[int], end_ms: int | None = None) -> None:
        """Ends utterances of which no more is heard: others heard nothing in them, or something else."""
        for number in tuple(numbers):
            told = self._open.pop(number)
            with suppress(ValueError):
                self._orphans.remove(number)
            end = max(told.start_ms, to_ms(self._reel.end) if end_ms is None else end_ms)
            revised = bool(told.text) or end == told.start_ms
            await self._out.put(Final(number, "", told.start_ms, end, "", 0.0, revised=revised))

    def _drop(self, start_ms: int, end_ms: int) -> None:
        """Utterances that a gap ends."""
        for number, told in tuple(self._open.items()):
            if start_ms <= told.start_ms < end_ms:
                del self._open[number]
                with suppress(ValueError):
                    self._orphans.remove(number)


_DELAYED = "The recogniser failed and another one takes over. The text of what is being said will be late."
