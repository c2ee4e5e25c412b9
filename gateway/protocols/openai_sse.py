"""A transcription as OpenAI's event stream: deltas that concatenate to the text, then the text, then `[DONE]`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

from dispatchers.deltas import Deltas
from dispatchers.formats import usage
from dispatchers.interface import Heard, Segment, Transcript
from gateway.errors import known, openai_json
from gateway.sse import DONE, message, stopped

Told = tuple[Transcript, Mapping[str, object]]
"""A transcript, and what is told beside it: who recognised it and what it cost."""


async def as_it_is_heard(work: Callable[[Heard], Awaitable[Told]]) -> AsyncGenerator[bytes, None]:
    """The events of a recognition that this runs, and cancels when it is closed early."""
    heard: asyncio.Queue[Segment | None] = asyncio.Queue()  # grows to one short recording's transcript at most
    working = asyncio.ensure_future(work(heard.put_nowait))
    working.add_done_callback(lambda _: heard.put_nowait(None))
    telling = _Telling()
    try:
        while (segment := await heard.get()) is not None:
            yield telling.delta(segment.text)
        for event in telling.end(*working.result()):
            yield event
    finally:
        await stopped(working)


async def all_at_once(work: Callable[[], Awaitable[Told]]) -> AsyncGenerator[bytes, None]:
    """The events of a transcript that is waited for."""
    transcript, beside = await work()
    telling = _Telling()
    for segment in transcript.segments:
        yield telling.delta(segment.text)
    for event in telling.end(transcript, beside):
        yield event


def failed(exc: Exception) -> bytes:
    """A failure after the headers: the one event that makes OpenAI's clients raise."""
    return message({"error": openai_json(known(exc))})


class _Telling:
    """What the deltas have said so far."""

    def __init__(self) -> None:
        self._deltas = Deltas()

    def delta(self, text: str) -> bytes:
        return message({"type": "transcript.text.delta", "delta": self._deltas.add(text)})

    def end(self, transcript: Transcript, beside: Mapping[str, object]) -> list[bytes]:
        rest = self._deltas.rest(transcript.text)
        events = [message({"type": "transcript.text.delta", "delta": rest})] if rest else []
        done = {"type": "transcript.text.done", "text": transcript.text, "usage": usage(transcript.duration_ms)}
        return [*events, message(done | {"stenogate": dict(beside)}), DONE]
