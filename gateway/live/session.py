"""One live session: the door on one side, on the other whichever socket is attached to it.

The session is a task of its own, which passes events on. Each socket has a reader, which never waits for recognition,
except where 30 s of audio wait already; then it does not read on, which the sender feels as back-pressure. (The
server's own keep-alive must then not count missing pongs: they stand behind the audio.) A socket that is lost leaves
the session waiting for another; whatever ends the session ends its input only: what was heard is still transcribed,
told and settled, within a deadline; then comes the reason.
"""

from __future__ import annotations

import asyncio
import secrets
import traceback
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, suppress
from functools import partial
from uuid import UUID

import structlog

from dispatchers.audio.segment import TAIL
from dispatchers.audio.vad import FRAME
from dispatchers.dispatch import Door, Live
from dispatchers.errors import AudioError, BackendTimeout
from dispatchers.interface import SAMPLES_PER_MS, Event, Final, Gap, Pcm, StreamInput, to_ms
from gateway.errors import close_code, known
from gateway.live.codec import Codec, Resume, Setup, Standing
from gateway.live.frames import LEFT, Frames, Gone, Message, NotReading, Restarting, ResumeFailed, SessionTooLong
from gateway.live.intake import Intake
from gateway.live.latency import Latency
from gateway.live.legacy import Keeper, Legacy
from gateway.live.reader import Reader
from gateway.live.record import Before, Record
from policy.errors import TakenOver
from policy.identity import Caller
from runtime.coordination import Coordination
from runtime.errors import StenogateError
from runtime.telemetry import (
    FINAL_SECONDS,
    FIRST_PARTIAL_SECONDS,
    LIVE_STREAMS,
    STREAM_SECONDS,
    STREAMS_ENDED,
    UNTOLD_PARTIALS,
    UTTERANCES,
)

log = structlog.get_logger()

GOING_AWAY = 1001
OUR_FAULT = 1011
DRAIN_S = 120.0


class Session:
    """An opened session's state. `resume_s` is how long it waits for a lost client; 0: not at all. `legacy`: it was
    another process's."""

    def __init__(
        self,
        codec: Codec,
        setup: Setup,
        caller: Caller,
        coordination: Coordination,
        *,
        idle_s: float,
        resume_s: float,
        legacy: Legacy | None = None,
    ):
        self.tenant_id: UUID = caller.tenant_id
        self.token: str | None = None
        self._caller = caller
        self._codec = codec
        self._setup = setup
        self._idle_s = idle_s
        self._resume_s = resume_s
        self._coordination = coordination
        self._legacy = legacy
        self._keeper: Keeper | None = None
        self._answered_ms = 0 if legacy is None else legacy.from_ms
        self._record = Record(keep=resume_s > 0)
        if legacy is not None:
            self._record.go_on(legacy.last_seq, [entry.message for entry in legacy.missed])
        self._intake = Intake(setup.wire, self._answered_ms)
        self._latency = Latency()
        self._reading = Reader(
            codec, self._intake, self._record, self._latency, idle_s=idle_s, stop=lambda: self._end(None)
        )
        self._loop = asyncio.get_running_loop()
        self._live: Live | None = None
        self._refusal: StenogateError | None = None
        self._decided = asyncio.Event()  # whether this session was let in, and how long it may be
        self._longest_ms = 0
        self._deadline: asyncio.Timeout | None = None
        self._reader: asyncio.Task[None] | None = None
        self._waiting: asyncio.TimerHandle | None = None  # for a lost client, or for the end of a drain
        self._draining = self._ended = self._over = False
        self._ending: StenogateError | None = None
        self._farewell = (LEFT, "")

    async def run(self, door: Door, seats: ExitStack) -> None:
        """From admission to the last message. `seats` are held until everything is settled."""
        code = LEFT
        try:
            with seats, LIVE_STREAMS.labels(self._codec.name).track_inprogress():
                live = await self._recognise(door)
            await self._say(self._codec.closed(live, "stop"))
            await self._close(LEFT)
        except Exception as exc:  # noqa: BLE001 — the last stop: every failure has a code and reaches its caller
            error = admitted(exc)
            if self._live is None:
                self._refusal = error
                return
            code = close_code(error)
            if self._keeper is not None and self._outlives(error):
                await self._keeper.leave(self._intake.taken_ms)
            await self._tell(error)
        finally:
            self._leave_behind()
        gone = self._record.frames is None or self._record.frames.gone
        STREAMS_ENDED.labels(self._codec.name, GOING_AWAY if gone else code).inc()

    async def opened(self) -> None:
        """Waits for admission. Raises its refusal."""
        await self._decided.wait()
        if self._refusal is not None:
            raise self._refusal

    async def attach(self, frames: Frames, resume: Resume | None = None) -> None:
        """Gives the session another socket, the very first one with no `resume`. The one before is told.

        Raises `ResumeFailed` and leaves all as it is, or `NotReading`.
        """
        if self._over or (resume is not None and not self._record.has_since(resume.last_seq)):
            raise (self._ending if resume is None else None) or ResumeFailed()
        self.token = secrets.token_urlsafe(32) if self._resume_s else None
        self._wait(None)
        try:
            await self._dismiss()
            assert self._live is not None  # noqa: S101 — `opened` was awaited
            from_ms = 0 if resume is None else self._rewound(resume)
            if self._keeper is not None and self.token is not None:
                await self._keeper.move(self.token, self._intake.taken_ms)
            accepted_ms = max(self._intake.taken_ms, self._live.lease.settled_ms)
            standing = Standing(self._idle_s, self.token, resume is not None, from_ms, accepted_ms)
            last_seq = None if resume is None else resume.last_seq
            await self._record.attach(frames, self._codec.ready(self._live, self._setup, standing), last_seq)
        except BaseException:
            self._lose(purpose=False)
            raise

    async def attend(self, frames: Frames) -> None:
        """Reads the attached socket until it is gone, another takes its place, or the session is over."""
        if self._over:  # since it was attached
            await frames.close(*self._farewell)
        if self._over or self._record.frames is not frames:
            return
        self._reader = reader = asyncio.create_task(self._listen(frames))
        try:
            await frames.left.wait()
        finally:
            reader.cancel()
            if self._record.frames is frames and not self._over:
                self._lose(purpose=False)

    def abandon(self) -> None:
        """There will be no socket."""
        self._end(None)

    async def drain(self, speak_s: float, reconnect_after_s: float) -> None:
        """Lets the client speak on for so long, and tells it; then the session ends, `RESTARTING`."""
        self._draining = True
        if self._ended:
            return
        if self._record.frames is None:
            self._end(Restarting())
            return
        self._wait(speak_s)
        message = self._codec.draining(self.token, speak_s, reconnect_after_s)
        await self._send(message, again=self._codec.warning(Restarting()))

    # --- its life ---

    async def _recognise(self, door: Door) -> Live:
        from_ms = self._answered_ms
        try:
            async with self._admitted(door) as live, self._kept(live):
                structlog.contextvars.bind_contextvars(session_id=str(live.session_id))
                self._live = live
                self._longest_ms = max(0, live.policy.body.max_stream_ms - from_ms)
                self._reading.until = self._loop.time() + self._longest_ms / 1000
                self._decided.set()
                await self._pass_on(live)
                if self._ending is not None:
                    raise self._ending
        finally:
            STREAM_SECONDS.labels(self._codec.name).inc((self._intake.taken_ms - from_ms) / 1000)
        return live

    def _admitted(self, door: Door) -> AbstractAsyncContextManager[Live]:
        setup, hang_up = self._setup, self._intake.end
        if self._legacy is None:
            return door.stream(
                self._caller, setup.demand, setup.options, self._audio(), hang_up=hang_up, outlives=self._outlives
            )
        return door.resumed(
            self._caller,
            self._legacy.continuation(),
            setup.options,
            self._audio(),
            hang_up=hang_up,
            outlives=self._outlives,
        )

    @asynccontextmanager
    async def _kept(self, live: Live) -> AsyncIterator[None]:
        """What a successor needs is kept meanwhile, and forgotten when there can be none. Where no transcript may be
        kept, neither is this."""
        if not self._resume_s or not live.policy.body.keep_transcripts:
            yield
            return
        self._keeper = keeper = Keeper.of(
            self._coordination, live.lease, self._codec.opening(), self._legacy, window_s=self._resume_s
        )
        watch = asyncio.create_task(self._watch(keeper, live))
        try:
            yield
        except BaseException as ending:
            if not self._outlives(ending):
                self._keeper = None
                await keeper.close()
            raise
        else:
            self._keeper = None
            await keeper.close()
        finally:
            watch.cancel()

    async def _watch(self, keeper: Keeper, live: Live) -> None:
        try:
            await keeper.watch(live.lease.check)
        except TakenOver as error:  # nobody hears us any more
            self._end(error)
            if self._deadline is not None:
                self._deadline.reschedule(self._loop.time())

    def _outlives(self, ending: BaseException) -> bool:
        """Whether another process may go on with what this has ended: a deploy, or our own fault."""
        if self._keeper is None or self._keeper.away:
            return False
        if isinstance(ending, Exception) and not isinstance(ending, Restarting):
            return close_code(known(ending)) == OUR_FAULT
        return self._keeper.shared

    def _rewound(self, resume: Resume) -> int:
        """From where audio is heard again: what the recogniser has of it is passed over."""
        contained = self._setup.wire.contained
        received_ms = self._intake.taken_ms if contained else self._intake.received_ms
        from_ms = min(max(self._answered_ms, resume.from_ms or 0), received_ms)
        if contained:
            self._intake.begin_anew(from_ms)
        else:
            self._reading.heard_already = self._intake.beyond(from_ms)
        return from_ms

    async def _dismiss(self) -> None:
        """The socket before, if any, is told and read no further: nothing of it can come any more."""
        former, reader = self._record.frames, self._reader
        if reader is not None:
            reader.cancel()
            await asyncio.wait({reader})
        if former is None:
            return
        former.give_up()
        if not former.gone:
            error = TakenOver()
            with suppress(NotReading):
                await self._record.say(self._codec.error(error, fatal=True), again=self._codec.warning(error))
            self._record.frames = None
            await former.close(close_code(error), error.code)
        self._record.frames = None
        former.left.set()

    def _lose(self, *, purpose: bool) -> None:
        """The socket is gone. Without one, the session waits for another; not if its client has had enough of it."""
        if self._ended:
            return
        if self._draining:
            self._end(Restarting())
        elif purpose or not self._resume_s:
            self._end(None)
        else:
            self._record.frames = None
            self._wait(self._resume_s)

    def _wait(self, seconds: float | None) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = None if seconds is None else self._loop.call_later(seconds, self._lapse)

    def _lapse(self) -> None:
        if not self._ended:
            self._end(Restarting() if self._draining else None)

    def _leave_behind(self) -> None:
        self._over, self.token = True, None
        self._wait(None)
        self._decided.set()
        if self._reader is not None:
            self._reader.cancel()
        if self._record.frames is not None:
            self._record.frames.left.set()

    async def _say(self, message: Message) -> None:
        with suppress(NotReading):
            await self._record.say(message)

    async def _tell(self, error: StenogateError) -> None:
        message = self._codec.error(error, fatal=True)
        with suppress(NotReading):
            await self._record.say(message, again=self._codec.warning(error))
        await self._close(close_code(error), reason_of(error))

    async def _close(self, code: int, reason: str = "") -> None:
        self._farewell = (code, reason)
        if self._record.frames is not None:
            await self._record.frames.close(code, reason)

    # --- in ---

    async def _listen(self, frames: Frames) -> None:
        """Reads until the socket is gone, or it is cancelled: an error is told when what was heard is answered."""
        try:
            await self._reading.read(frames)
        except Gone as gone:
            self._lose(purpose=gone.purpose)
        except Exception as exc:  # noqa: BLE001 — not swallowed: it is why the session ends
            self._end(admitted(exc))
            await asyncio.Event().wait()

    def _end(self, reason: StenogateError | None) -> None:
        """No more input. The first reason counts; what was heard has `DRAIN_S` to become text."""
        if self._over:
            return
        self._ended = True
        self._ending = self._ending or reason
        self._intake.end()
        if self._deadline is not None and self._deadline.when() is None:
            self._deadline.reschedule(self._loop.time() + DRAIN_S)

    async def _audio(self) -> AsyncIterator[StreamInput]:
        """What the recogniser pulls: everything received, up to the longest session."""
        await self._decided.wait()
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
            async with asyncio.timeout(DRAIN_S if self._ended else None) as self._deadline:
                async for event in live.events:
                    if self._is_cut_off(event):
                        continue
                    self._note(event)
                    await self._pass(event)
        except TimeoutError:
            raise (self._ending if isinstance(self._ending, TakenOver) else None) or BackendTimeout() from None
        except Exception as exc:  # noqa: BLE001 — inside the door it must be one of ours, which it records
            raise admitted(exc) from None
        finally:
            self._ended, self._deadline = True, None

    async def _pass(self, event: Event) -> None:
        message = self._codec.event(event)
        if message is None:
            return
        before = None
        if self._keeper is not None:
            before = partial(self._keeper.note, event, message, self._intake.taken_ms)
        await self._send(message, before=before)

    def _is_cut_off(self, event: Event) -> bool:
        """An utterance that ended only because we leave. Whoever goes on with the session hears it whole, so the client
        hears nothing of it from us; its text is in the session's row, should nobody go on."""
        if not isinstance(event, Final) or not isinstance(self._ending, Restarting) or not self._outlives(self._ending):
            return False
        after_ms = self._intake.taken_ms - event.end_ms
        return after_ms < self._setup.options.vad.silence_ms - to_ms(TAIL - FRAME)

    async def _send(self, message: Message, *, again: Message | None = None, before: Before | None = None) -> None:
        try:
            await self._record.say(message, again=again, before=before)
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
            UNTOLD_PARTIALS.labels("coalesced").inc(event.coalesced)
            UNTOLD_PARTIALS.labels("dropped").inc(event.dropped)
        if isinstance(event, Final | Gap):
            self._answered_ms = max(self._answered_ms, event.end_ms)


def reason_of(error: StenogateError) -> str:
    """Of a close: the seconds to wait where they are known, else the code."""
    return str(error.retry_after_s) if error.retry_after_s is not None else error.code


def admitted(exc: Exception) -> StenogateError:
    """The failure as one of ours. What nobody foresaw is logged by kind and place: its message may quote a text."""
    error = known(exc)
    if error is not exc:
        frames = traceback.extract_tb(exc.__traceback__)[-5:]
        log.error(
            "stream.failed", error=type(exc).__name__, at=[f"{frame.filename}:{frame.lineno}" for frame in frames]
        )
    return error
