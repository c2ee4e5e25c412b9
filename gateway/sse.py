"""Server-sent events: written as they come, kept alive while nothing does, given up when the client has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

KEEPALIVE_S = 10.0
DONE = b"data: [DONE]\n\n"
_KEEPALIVE = b": keepalive\n\n"


def message(data: dict[str, Any], *, event: str | None = None) -> bytes:
    """One event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class EventStream(Response):
    """Sends what `events` yields, and closes it as soon as the client has gone.

    `failed` makes the last event of an error that comes once the stream has begun.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        failed: Callable[[Exception], bytes],
        *,
        keepalive_s: float = KEEPALIVE_S,
    ):
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        self._events = events
        self._failed = failed
        self._keepalive_s = keepalive_s
        self._upcoming: asyncio.Future[bytes | None] | None = None

    async def begun(self, request: Request) -> EventStream:
        """Waits a little for the first event, so that a failure before it can still be answered with a status: it is
        raised here."""
        upcoming = self._next()
        try:
            await while_connected(request, asyncio.wait({upcoming}, timeout=self._keepalive_s))
        except BaseException:
            await self._close()
            raise
        if upcoming.done() and (failure := upcoming.exception()) is not None:
            raise failure
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await while_connected(Request(scope, receive), self._send(send))
        finally:
            await self._close()

    async def _send(self, send: Send) -> None:
        while (event := await self._event()) is not None:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _event(self) -> bytes | None:
        upcoming = self._upcoming or self._next()
        await asyncio.wait({upcoming}, timeout=self._keepalive_s)
        if not upcoming.done():
            return _KEEPALIVE
        self._upcoming = None
        try:
            return upcoming.result()
        except Exception as exc:  # noqa: BLE001 — the headers are out: whatever it is, only an event can tell it
            return self._failed(exc)

    def _next(self) -> asyncio.Future[bytes | None]:
        self._upcoming = asyncio.ensure_future(anext(self._events, None))
        return self._upcoming

    async def _close(self) -> None:
        if self._upcoming is not None:
            await stopped(self._upcoming)
        await self._events.aclose()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; the work is cancelled and `ClientDisconnect` raised once the client, whose body has been
    read, is gone."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        await stopped(working)
        await stopped(leaving)


async def stopped(task: asyncio.Future[Any]) -> None:
    """Cancels the task and waits until it has really ended. Its failure, if any, was somebody else's to see."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
