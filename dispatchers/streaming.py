"""A live stream as the door holds it: what it came to so far, and its events and its meter's in one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeAlias
from uuid import UUID

from dispatchers.interface import Event, Final, Gap, Options, Origin, Used
from dispatchers.meter import Meter
from policy.admission import Lease, Outcome
from policy.policies import Policy
from policy.resolve import Candidate
from policy.sessions import Progress
from runtime.errors import StenogateError

EVENTS_BUFFERED = 256


@dataclass(slots=True)
class Summary:
    """What a live stream came to so far. `coverage`: the share of accepted audio, of all channels, not lost to gaps."""

    channels: int = 1
    accepted_ms: int = 0
    billed_ms: int = 0
    utterances: int = 0
    words: int = 0
    gap_ms: int = 0
    language: str | None = None
    texts: list[str] = field(default_factory=list)

    def progress(self, *, keep_text: bool) -> Progress:
        """For the session's row."""
        text = " ".join(self.texts) if keep_text else None
        return Progress(language=self.language, utterances=self.utterances, words=self.words, text=text)

    @property
    def coverage(self) -> float:
        return 1.0 if self.accepted_ms == 0 else max(0.0, 1.0 - self.gap_ms / (self.channels * self.accepted_ms))

    def note(self, event: Event) -> None:
        match event:
            case Final(text=text, language=language) if text:
                self.utterances += 1
                self.words += len(text.split())
                self.language = language
                self.texts.append(text)
            case Gap(start_ms=start, end_ms=end):
                self.gap_ms += end - start
            case Used(accepted_ms=accepted, billed_ms=billed):
                self.accepted_ms, self.billed_ms = accepted, billed
            case _:
                pass


@dataclass(frozen=True, slots=True)
class Live:
    """An open live stream. `options` are those it really has. `summary` is complete once the door's context has been
    left. `lease` says whether it is ours still."""

    candidate: Candidate
    origin: Origin
    options: Options
    events: AsyncIterator[Event]
    summary: Summary
    lease: Lease

    @property
    def session_id(self) -> UUID:
        return self.lease.session_id

    @property
    def policy(self) -> Policy:
        return self.lease.policy


@dataclass(frozen=True, slots=True)
class Continuation:
    """Where a stream of another process is taken up: the session's `turn` there, the position on its clock from which
    audio comes, how many utterances were announced, and what it came to."""

    session_id: UUID
    turn: int
    from_ms: int
    announced: int
    summary: Summary


Outlives: TypeAlias = Callable[[BaseException], bool]
"""Whether a session is left open, for another process to take up, when this ended its stream here."""


@asynccontextmanager
async def merged(events: AsyncIterator[Event], meter: Meter, summary: Summary) -> AsyncIterator[AsyncIterator[Event]]:
    """The dispatcher's events and the meter's in one iterator, which ends by raising what ended the stream, if any."""
    queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue(EVENTS_BUFFERED)

    async def pump() -> None:
        async for event in events:
            await queue.put(event)
        await queue.put(meter.ended_by)

    async def guarded(work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as error:  # noqa: BLE001 — not swallowed: the consumer of the events raises it
            await queue.put(error)

    async def iterate() -> AsyncIterator[Event]:
        while (item := await queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            summary.note(item)
            yield item

    tasks = [asyncio.create_task(guarded(work)) for work in (pump, lambda: meter.run(queue.put))]
    try:
        yield iterate()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def stream_outcome(summary: Summary, ending: BaseException | None, *, keep_text: bool) -> Outcome:
    return Outcome(
        status="completed" if ending is None else "interrupted",
        code=ending.code if isinstance(ending, StenogateError) else None,
        engine=None,
        language=summary.language,
        utterances=summary.utterances,
        words=summary.words,
        text=summary.progress(keep_text=keep_text).text,
    )
