"""A stream's events on their way out, and the task that makes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from dispatchers.interface import Event

_WAITING = 64


@dataclass(frozen=True, slots=True)
class _Stopped:
    """The last thing in the box: the stream's end, or what ended it."""

    failure: BaseException | None = None


class Outbox:
    """Bounded: who puts waits for who reads."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Event | _Stopped] = asyncio.Queue(_WAITING)

    async def put(self, *events: Event) -> None:
        for event in events:
            await self._events.put(event)

    async def read(self) -> AsyncGenerator[Event, None]:
        """To the end. Raises what ended it."""
        while not isinstance(event := await self._events.get(), _Stopped):
            yield event
        if event.failure is not None:
            raise event.failure

    @asynccontextmanager
    async def filled_by(self, work: Callable[[], Awaitable[None]]) -> AsyncIterator[AsyncIterator[Event]]:
        """The events that `work` puts. It runs in one task, which ends before this does; its failure is raised where
        the events are read, as itself, so it never cancels the reader or comes wrapped in a group."""
        task = asyncio.create_task(self._fill(work))
        events = self.read()
        try:
            yield events
        finally:
            task.cancel()
            await asyncio.wait({task})
            await events.aclose()

    async def _fill(self, work: Callable[[], Awaitable[None]]) -> None:
        stopped = _Stopped()
        try:
            await work()
        except (Exception, BaseExceptionGroup) as failure:  # noqa: BLE001 — not swallowed: the reader raises it
            stopped = _Stopped(_first(failure))
        await self._events.put(stopped)


def _first(failure: BaseException) -> BaseException:
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure
