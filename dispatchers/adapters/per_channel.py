"""Streams of several channels out of one-channel streams: each channel is a stream of its own, their events are one.

The audio is taken no faster than the slowest channel takes it, and the events no faster than they are read. What
concerns one channel goes out as it comes, with the channel's number; an echo of a command goes out once, when every
channel has answered it. Utterances are counted anew, as they are announced, so that no two have the same number.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TypeAlias

from dispatchers.adapters.outbox import Outbox
from dispatchers.interface import (
    Capabilities,
    Cleared,
    Delta,
    Dispatcher,
    Event,
    Final,
    Flushed,
    Gap,
    Heard,
    Notice,
    Options,
    Origin,
    Partial,
    Pcm,
    Samples,
    SpeechStarted,
    StreamError,
    StreamInput,
    Transcript,
    Used,
    ignore,
)

Stream: TypeAlias = Callable[[AsyncIterator[StreamInput], Options], AbstractAsyncContextManager[AsyncIterator[Event]]]
"""`Dispatcher.stream`."""


class PerChannel:
    """The dispatcher within, which may now also be asked for streams of several `Options.channels`. One stream within
    that fails ends them all, with its failure."""

    def __init__(self, within: Dispatcher):
        self._within = within

    @property
    def capabilities(self) -> Capabilities:
        return self._within.capabilities

    def origin(self, model: str) -> Origin:
        return self._within.origin(model)

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        return await self._within.transcribe(audio, options, heard)

    def stream(
        self, audio: AsyncIterator[StreamInput], options: Options
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        return per_channel(self._within.stream, audio, options)

    async def aclose(self) -> None:
        await self._within.aclose()


def per_channel(
    stream: Stream, audio: AsyncIterator[StreamInput], options: Options
) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
    """The events of as many streams as there are channels."""
    if options.channels == 1:
        return stream(audio, options)
    out = Outbox()
    channels = _Channels(stream, options, out)
    return out.filled_by(lambda: channels.run(audio))


class _Feed:
    """One channel's input: besides what is being heard at most one item waits."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[StreamInput | None] = asyncio.Queue(1)
        self._ended = False

    async def put(self, item: StreamInput | None) -> None:
        """None: nothing more will come."""
        await self._waiting.put(item)

    def __aiter__(self) -> _Feed:
        return self

    async def __anext__(self) -> StreamInput:
        item = None if self._ended else await self._waiting.get()
        if item is None:
            self._ended = True
            raise StopAsyncIteration
        return item


class _Channels:
    """The state of one stream of several channels."""

    def __init__(self, stream: Stream, options: Options, out: Outbox):
        self._stream = stream
        self._options = replace(options, channels=1)
        self._out = out
        self._feeds = [_Feed() for _ in range(options.channels)]
        self._answers = [Counter[type[Event]]() for _ in self._feeds]  # echoes of commands
        self._numbers = [dict[int, int]() for _ in self._feeds]  # of each channel's utterances under way
        self._utterances = 0
        self._notices: set[Notice] = set()

    async def run(self, audio: AsyncIterator[StreamInput]) -> None:
        """Reads the input to its end and has all of it answered."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._split(audio))
            for channel in range(len(self._feeds)):
                tasks.create_task(self._hear(channel))

    async def _split(self, audio: AsyncIterator[StreamInput]) -> None:
        async for item in audio:
            for channel, feed in enumerate(self._feeds):
                await feed.put(Pcm(item.samples[:, channel].copy()) if isinstance(item, Pcm) else item)
        for feed in self._feeds:
            await feed.put(None)

    async def _hear(self, channel: int) -> None:
        feed = self._feeds[channel]
        async with self._stream(feed, self._options) as events:
            async for event in events:
                if (told := self._told(channel, event)) is not None:
                    await self._out.put(told)
        async for _ in feed:  # one that has ended early holds up no other
            pass

    # --- out ---

    def _told(self, channel: int, event: Event) -> Event | None:
        """What becomes of a channel's event. None: it is yet to come from another channel too."""
        match event:
            case Flushed() | Cleared():
                return event if self._all_answered(channel, type(event)) else None
            case SpeechStarted() | Partial() | Delta() | Final():
                number = self._number(channel, event.utterance, over=isinstance(event, Final))
                return replace(event, utterance=number, channel=channel)
            case Gap() | StreamError():
                return replace(event, channel=channel)
            case Notice():
                return event if self._first(event) else None
            case Used():
                return event

    def _first(self, notice: Notice) -> bool:
        """Whether no channel has said so before."""
        known = notice in self._notices
        self._notices.add(notice)
        return not known

    def _all_answered(self, channel: int, kind: type[Event]) -> bool:
        """Whether the others have answered before what this channel answers now."""
        self._answers[channel][kind] += 1
        return all(answers[kind] >= self._answers[channel][kind] for answers in self._answers)

    def _number(self, channel: int, utterance: int, *, over: bool) -> int:
        """An utterance's number in the whole stream. Once it is `over`, nothing comes of it or of one before it."""
        numbers = self._numbers[channel]
        if utterance not in numbers:
            self._utterances += 1
            numbers[utterance] = self._utterances
        number = numbers[utterance]
        if over:
            self._numbers[channel] = {later: known for later, known in numbers.items() if later > utterance}
        return number
