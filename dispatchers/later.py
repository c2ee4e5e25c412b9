"""A stream that goes on where another one ended: its events on the clock, and with the numbers, of the whole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TypeVar

from dispatchers.interface import Cleared, Delta, Event, Final, Flushed, Gap, Partial, SpeechStarted

Heard = TypeVar("Heard", Partial, Delta, Final)


def continued(events: AsyncIterator[Event], from_ms: int, utterances: int) -> AsyncIterator[Event]:
    """The events of audio that begins at `from_ms`, after so many utterances."""
    return _moved(events, from_ms, utterances) if from_ms or utterances else events


async def _moved(events: AsyncIterator[Event], from_ms: int, utterances: int) -> AsyncIterator[Event]:
    async for event in events:
        yield later(event, from_ms, utterances)


def later(event: Event, ms: int, utterances: int) -> Event:
    """The event, so much later and so many utterances on."""
    match event:
        case SpeechStarted():
            return replace(event, utterance=event.utterance + utterances, start_ms=event.start_ms + ms)
        case Final():
            words = tuple(replace(word, start_ms=word.start_ms + ms, end_ms=word.end_ms + ms) for word in event.words)
            return _heard(replace(event, words=words), ms, utterances)
        case Partial():
            return _heard(event, ms, utterances)
        case Delta():
            return _heard(event, ms, utterances)
        case Gap():
            return replace(event, start_ms=event.start_ms + ms, end_ms=event.end_ms + ms)
        case Flushed() | Cleared():
            return replace(event, accepted_ms=event.accepted_ms + ms)
        case _:
            return event


def _heard(event: Heard, ms: int, utterances: int) -> Heard:
    return replace(
        event,
        utterance=event.utterance + utterances,
        start_ms=event.start_ms + ms,
        end_ms=event.end_ms + ms,
    )
