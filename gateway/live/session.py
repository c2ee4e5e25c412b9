"""One live session: a socket on one side, the door on the other.

Two tasks share it. One reads the socket and never waits for recognition, except where 30 s of audio wait already; then
it does not read on, which the sender feels as back-pressure. (The server's own keep-alive must then not count missing
pongs: they stand behind the audio.) The other passes events on. Whatever ends a session ends its input only: what was
heard is still transcribed, told and settled, within a deadline; then comes the reason.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import structlog

from dispatchers.dispatch import Door, Live
from dispatchers.errors import AudioError, BackendTimeout, Overloaded
from dispatchers.interface import SAMPLES_PER_MS, Clear, Event, Final, Flush, Pcm, StreamInput
from gateway.errors import close_code, known
from gateway.live.codec import Codec, Metrics, Ping, Setup, Stop, Unknown
from gateway.live.frames import Frames, Gone, Idle, Message, SessionTooLong, UnknownMessage
from gateway.live.intake import Intake, Received
from gateway.live.latency import Latency
from policy.errors import Invalid
from policy.identity import Caller
from runtime.errors import StenogateError
from runtime.telemetry import (
    FINAL_SECONDS,
    FIRST_PARTIAL_SECONDS,
    LIVE_STREAMS,
    STREAM_SECONDS,
    STREAMS_ENDED,
    UTTERANCES,
)

log = structlog.get_logger()

NORMAL, GOING_AWAY = 1000, 1001
START_S = 10.0
DRAIN_S = 120.0
FULL_RETRY_S = 5


class Seats:
    """How many live sessions this process holds."""

    def __init__(self) -> None:
        self.taken = 0

    @contextmanager
    def seat(self, limit: int) -> Iterator[None]:
        """Raises `Overloaded` when all are taken."""
        if self.taken >= limit:
            raise Overloaded(retry_after_s=FULL_RETRY_S)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


SEATS = Seats()


async def converse(
    frames: Frames,
    door: Door,
    caller: Caller,
    codec: Codec,
    setup: Setup | None,
    *,
    subprotocol: str | None,
    idle_s: float,
) -> None:
    """Holds one session from the upgrade to the close. Without a `setup` its first text frame says it.

    Raises a `StenogateError` only where the upgrade is still to be refused.
    """
    code = NORMAL
    try:
        if setup is None:
            await frames.accept(subprotocol)
            setup = await _opening(frames, codec, min(START_S, idle_s))
        with LIVE_STREAMS.labels(codec.name).track_inprogress():
            await Session(frames, codec, setup, idle_s).run(door, caller, subprotocol)
    except Gone:
        code = GOING_AWAY
    except Exception as exc:  # noqa: BLE001 — the last stop: every failure has a code and reaches its caller
        error = _admitted(exc)
        if not frames.accepted:
            raise error from None
        code = close_code(error)
        await _tell(frames, codec, error)
    STREAMS_ENDED.labels(codec.name, GOING_AWAY if frames.gone else code).inc()


class Session:
    """An opened session's state."""

    def __init__(self, frames: Frames, codec: Codec, setup: Setup, idle_s: float):
        self._frames = frames
        self._codec = codec
        self._setup = setup
        self._idle_s = idle_s
        self._intake = Intake(setup.wire)
        self._latency = Latency()
        self._loop = asyncio.get_running_loop()
        self._longest_ms = 0
        self._known = asyncio.Event()  # how long this session may be
        self._deadline = asyncio.timeout(None)
        self._stopped = False
        self._ending: StenogateError | None = None

    async def run(self, door: Door, caller: Caller, subprotocol: str | None) -> None:
        """From admission to `closed`. Raises what ended the session otherwise."""
        try:
            live = await self._recognise(door, caller, subprotocol)
        finally:
            STREAM_SECONDS.labels(self._codec.name).inc(self._intake.taken_ms / 1000)
        await self._frames.say(self._codec.closed(live, "stop"))
        await self._frames.close(NORMAL)

    async def _recognise(self, door: Door, caller: Caller, subprotocol: str | None) -> Live:
        setup = self._setup
        async with door.stream(caller, setup.demand, setup.options, self._audio(), hang_up=self._intake.end) as live:
            structlog.contextvars.bind_contextvars(session_id=str(live.session_id))
            if not self._frames.accepted:
                await self._frames.accept(subprotocol)
            await self._frames.say(self._codec.ready(live, setup, self._idle_s))
            self._longest_ms = live.policy.body.max_stream_ms
            self._known.set()
            reader = asyncio.create_task(self._listen())
            try:
                await self._pass_on(live)
            finally:
                reader.cancel()
                await asyncio.wait({reader})
            if self._ending is not None:
                raise self._ending
        return live

    # --- in ---

    async def _listen(self) -> None:
        """Reads until the session ends or something ends its input."""
        until = self._loop.time() + self._longest_ms / 1000
        try:
            while True:
                await self._take(await self._next(until))
        except Gone:  # an end of the input like another
            self._end(None)
        except Exception as exc:  # noqa: BLE001 — not swallowed: raised once what was heard is answered
            self._end(_admitted(exc))

    async def _next(self, until: float) -> str | bytes:
        left = max(0.0, until - self._loop.time())
        try:
            return await self._frames.receive(None if self._stopped else min(self._idle_s, left))
        except Idle:
            if left <= self._idle_s:
                raise SessionTooLong from None
            raise

    async def _take(self, frame: str | bytes) -> None:
        command = frame if isinstance(frame, bytes) else self._codec.command(frame)
        match command:
            case bytes() | Flush() | Clear():
                await self._put(command)
            case Stop():
                self._stopped = True
                self._end(None)
            case Ping() as ping:
                await self._frames.say(self._codec.pong(ping, self._intake.taken_ms))
            case Metrics():
                await self._frames.say(self._codec.metrics(self._latency, self._intake))
            case Unknown(name):
                await self._complain(UnknownMessage(f"There is no message type `{name}`."))

    async def _put(self, item: Received) -> None:
        if self._stopped:
            await self._complain(Invalid("This came after `stop` and was not accepted."))
            return
        await self._intake.put(item)
        if isinstance(item, bytes):
            self._latency.received(self._intake.received_ms, self._loop.time())

    async def _complain(self, error: StenogateError) -> None:
        await self._frames.say(self._codec.error(error, fatal=False))

    def _end(self, reason: StenogateError | None) -> None:
        """No more input. The first reason counts; what was heard has `DRAIN_S` to become text."""
        self._ending = self._ending or reason
        self._intake.end()
        if self._deadline.when() is None:
            self._deadline.reschedule(self._loop.time() + DRAIN_S)

    async def _audio(self) -> AsyncIterator[StreamInput]:
        """What the recogniser pulls: everything received, up to the longest session."""
        await self._known.wait()
        try:
            async for item in self._within(self._longest_ms * SAMPLES_PER_MS):
                yield item
        except AudioError as error:  # what could be decoded before is answered
            self._end(error)

    async def _within(self, room: int) -> AsyncIterator[StreamInput]:
        """What was received, up to so many samples."""
        async for item in self._intake.items():
            if not isinstance(item, Pcm):
                yield item
                continue
            if room:
                yield Pcm(item.samples[:room])
            if len(item.samples) > room:
                self._end(SessionTooLong())
                return
            room -= len(item.samples)

    # --- out ---

    async def _pass_on(self, live: Live) -> None:
        """Every event to its end. Raises `BackendTimeout` when the end does not come."""
        try:
            async with self._deadline:
                async for event in live.events:
                    self._note(event)
                    message = self._codec.event(event)
                    if message is not None:
                        await self._send(message)
        except TimeoutError:
            raise BackendTimeout from None
        except Exception as exc:  # noqa: BLE001 — inside the door it must be one of ours, which it records
            raise _admitted(exc) from None

    async def _send(self, message: Message) -> None:
        try:
            await self._frames.say(message)
        except StenogateError as error:  # it does not read: the record is finished without it
            self._end(error)

    def _note(self, event: Event) -> None:
        match self._latency.note(event, self._loop.time()):
            case "first_partial", ms:
                FIRST_PARTIAL_SECONDS.observe(ms / 1000)
            case "final", ms:
                FINAL_SECONDS.observe(ms / 1000)
        if isinstance(event, Final):
            UTTERANCES.inc()


async def _opening(frames: Frames, codec: Codec, timeout_s: float) -> Setup:
    frame = await frames.receive(timeout_s)
    if isinstance(frame, bytes):
        raise Invalid("Audio came before `start`, and the address carries no fields of it.")
    return codec.setup(frame)


async def _tell(frames: Frames, codec: Codec, error: StenogateError) -> None:
    try:
        await frames.say(codec.error(error, fatal=True))
    except StenogateError:
        log.info("stream.unread", code=error.code)
    reason = str(error.retry_after_s) if error.retry_after_s is not None else error.code
    await frames.close(close_code(error), reason)


def _admitted(exc: Exception) -> StenogateError:
    """The failure as one of ours. What nobody foresaw is logged by kind and place: its message may quote a text."""
    error = known(exc)
    if error is not exc:
        frames = traceback.extract_tb(exc.__traceback__)[-5:]
        log.error(
            "stream.failed", error=type(exc).__name__, at=[f"{frame.filename}:{frame.lineno}" for frame in frames]
        )
    return error
