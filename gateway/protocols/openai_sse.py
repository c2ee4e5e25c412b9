"""A transcription as OpenAI's event stream: deltas that concatenate to the text, then the text, then `[DONE]`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

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
        self._said = ""

    def delta(self, text: str) -> bytes:
        piece = f" {text}" if _spaced(self._said, text) else text
        self._said += piece
        return message({"type": "transcript.text.delta", "delta": piece})

    def end(self, transcript: Transcript, beside: Mapping[str, object]) -> list[bytes]:
        events = []
        if transcript.text.startswith(self._said) and (rest := transcript.text[len(self._said) :]):
            events.append(message({"type": "transcript.text.delta", "delta": rest}))
        done = {"type": "transcript.text.done", "text": transcript.text, "usage": usage(transcript.duration_ms)}
        return [*events, message(done | {"stenogate": dict(beside)}), DONE]


_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uff00-\uffef]")
"""Scripts written without spaces: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""


def _spaced(before: str, after: str) -> bool:
    """Whether a space stands between two segments of a text."""
    return before != "" and after != "" and not (_UNSPACED.match(before[-1]) or _UNSPACED.match(after[0]))
