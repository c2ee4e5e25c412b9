"""What a session's clients send: frames made audio for the intake, and commands answered or passed on."""

from __future__ import annotations

import asyncio
from typing import Never

from dispatchers.interface import Clear, Flush
from gateway.live.codec import Codec, Command, Metrics, Ping, Stop, Unknown
from gateway.live.frames import Frames, Idle, SessionTooLong, UnknownMessage
from gateway.live.hearing import Hearing
from gateway.live.intake import Received
from policy.errors import Invalid
from runtime.errors import StenogateError


class Reader:
    """Reads one socket after another for one session."""

    def __init__(self, codec: Codec, hearing: Hearing, *, idle_s: float):
        self.heard_already = 0  # bytes that a resumed client sends again
        self._codec = codec
        self._hearing = hearing
        self._intake = hearing.intake
        self._record = hearing.record
        self._latency = hearing.latency
        self._idle_s = idle_s
        self._stopped = False
        self._loop = asyncio.get_running_loop()

    async def read(self, frames: Frames) -> Never:
        """Until the socket is `Gone`, or something else is raised that ends the session."""
        while True:
            frame = await self._next(frames)
            if isinstance(frame, bytes):
                await self._put(frame)
            else:
                await self._obey(self._codec.command(frame))

    async def _next(self, frames: Frames) -> str | bytes:
        left = max(0.0, self._hearing.until - self._loop.time())
        try:
            return await frames.receive(None if self._stopped else min(self._idle_s, left))
        except Idle:
            if left <= self._idle_s:
                raise SessionTooLong from None
            raise

    async def _obey(self, command: Command) -> None:
        match command:
            case Flush() | Clear():
                await self._put(command)
            case Stop():
                self._stopped = True
                self._hearing.end(None)
            case Ping() as ping:
                await self._record.say(self._codec.pong(ping, self._intake.taken_ms))
            case Metrics():
                await self._record.say(self._codec.metrics(self._latency, self._intake))
            case Unknown(name):
                await self._complain(UnknownMessage(f"There is no message type `{name}`."))

    async def _put(self, item: Received) -> None:
        if self._stopped:
            await self._complain(Invalid("This came after `stop` and was not accepted."))
            return
        if isinstance(item, bytes) and self.heard_already:
            known = min(self.heard_already, len(item))
            self.heard_already -= known
            item = item[known:]
            if not item:
                return
        await self._intake.put(item)
        if isinstance(item, bytes):
            self._latency.received(self._intake.received_ms, self._loop.time())

    async def _complain(self, error: StenogateError) -> None:
        await self._record.say(self._codec.error(error, fatal=False))
