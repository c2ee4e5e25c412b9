"""One live session: its hearing on one side, on the other whichever socket is attached to it.

The session is a task of its own, which passes events on. Each socket has a reader, which never waits for recognition,
except where 30 s of audio wait already; then it does not read on, which the sender feels as back-pressure. (The
server's own keep-alive must then not count missing pongs: they stand behind the audio.) A socket that is lost leaves
the session waiting for another.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import ExitStack, suppress
from uuid import UUID

from dispatchers.dispatch import Door
from gateway.errors import close_code
from gateway.live.codec import Codec, Resume, Setup, Standing
from gateway.live.endings import GOING_AWAY, admitted, reason_of
from gateway.live.frames import LEFT, Frames, Gone, Message, NotReading, Restarting, ResumeFailed
from gateway.live.hearing import Hearing
from gateway.live.legacy import Legacy
from gateway.live.reader import Reader
from gateway.live.sight import Sight
from policy.errors import TakenOver
from policy.identity import Caller
from runtime.coordination import Coordination
from runtime.errors import StenogateError
from runtime.telemetry import LIVE_STREAMS, STREAMS_ENDED


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
        self._tenant = caller.tenant
        self.token: str | None = None
        self._codec = codec
        self._setup = setup
        self._idle_s = idle_s
        self._resume_s = resume_s
        self._hearing = hearing = Hearing(codec, setup, caller, coordination, resume_s=resume_s, legacy=legacy)
        self._intake = hearing.intake
        self._record = hearing.record
        self._reading = Reader(codec, hearing, idle_s=idle_s)
        self._loop = asyncio.get_running_loop()
        self._refusal: StenogateError | None = None
        self._reader: asyncio.Task[None] | None = None
        self._waiting: asyncio.TimerHandle | None = None  # for a lost client, or for the end of a drain
        self._draining = self._over = False
        self._farewell = (LEFT, "")

    async def run(self, door: Door, seats: ExitStack) -> None:
        """From admission to the last message. `seats` are held until everything is settled."""
        code = LEFT
        try:
            with seats, LIVE_STREAMS.labels(self._codec.name).track_inprogress():
                live = await self._hearing.run(door)
            await self._say(self._codec.closed(live, "stop"))
            await self._close(LEFT)
        except Exception as exc:  # noqa: BLE001 — the last stop: every failure has a code and reaches its caller
            error = admitted(exc)
            if self._hearing.live is None:
                self._refusal = error
                return
            code = close_code(error)
            if self._hearing.keeper is not None and self._hearing.outlives(error):
                await self._hearing.keeper.leave(self._intake.taken_ms)
            await self._tell(error)
        finally:
            self._leave_behind()
        gone = self._record.frames is None or self._record.frames.gone
        STREAMS_ENDED.labels(self._codec.name, GOING_AWAY if gone else code).inc()

    async def opened(self) -> None:
        """Waits for admission. Raises its refusal."""
        await self._hearing.decided.wait()
        if self._refusal is not None:
            raise self._refusal

    async def attach(self, frames: Frames, resume: Resume | None = None) -> None:
        """Gives the session another socket, the very first one with no `resume`. The one before is told.

        Raises `ResumeFailed` and leaves all as it is, or `NotReading`.
        """
        if self._over or (resume is not None and not self._record.has_since(resume.last_seq)):
            raise (self._hearing.ending if resume is None else None) or ResumeFailed()
        self.token = secrets.token_urlsafe(32) if self._resume_s else None
        self._wait(None)
        try:
            await self._dismiss()
            assert self._hearing.live is not None  # noqa: S101 — `opened` was awaited
            from_ms = 0 if resume is None else self._rewound(resume)
            if self._hearing.keeper is not None and self.token is not None:
                await self._hearing.keeper.move(self.token, self._intake.taken_ms)
            accepted_ms = max(self._intake.taken_ms, self._hearing.live.lease.settled_ms)
            standing = Standing(self._idle_s, self.token, resume is not None, from_ms, accepted_ms)
            last_seq = None if resume is None else resume.last_seq
            await self._record.attach(frames, self._codec.ready(self._hearing.live, self._setup, standing), last_seq)
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

    def seen(self) -> Sight | None:
        """What an operator may see of it; None until it is let in."""
        live, connected = self._hearing.live, self._record.frames is not None
        if live is None:
            return None
        return Sight(live.session_id, self._tenant, live.origin, connected, self._intake.taken_ms, self._intake.lag_ms)

    def abandon(self) -> None:
        """There will be no socket."""
        self._hearing.end(None)

    async def drain(self, speak_s: float, reconnect_after_s: float) -> None:
        """Lets the client speak on for so long, and tells it; then the session ends, `RESTARTING`."""
        self._draining = True
        if self._hearing.ended:
            return
        if self._record.frames is None:
            self._hearing.end(Restarting())
            return
        self._wait(speak_s)
        message = self._codec.draining(self.token, speak_s, reconnect_after_s)
        await self._send(message, again=self._codec.warning(Restarting()))

    # --- its life ---

    def _rewound(self, resume: Resume) -> int:
        """From where audio is heard again: what the recogniser has of it is passed over."""
        contained = self._setup.wire.contained
        received_ms = self._intake.taken_ms if contained else self._intake.received_ms
        from_ms = min(max(self._hearing.answered_ms, resume.from_ms or 0), received_ms)
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
        if self._hearing.ended:
            return
        if self._draining:
            self._hearing.end(Restarting())
        elif purpose or not self._resume_s:
            self._hearing.end(None)
        else:
            self._record.frames = None
            self._wait(self._resume_s)

    def _wait(self, seconds: float | None) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = None if seconds is None else self._loop.call_later(seconds, self._lapse)

    def _lapse(self) -> None:
        if not self._hearing.ended:
            self._hearing.end(Restarting() if self._draining else None)

    def _leave_behind(self) -> None:
        self._over, self.token = True, None
        self._wait(None)
        self._hearing.decided.set()
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

    async def _listen(self, frames: Frames) -> None:
        """Reads until the socket is gone, or it is cancelled: an error is told when what was heard is answered."""
        try:
            await self._reading.read(frames)
        except Gone as gone:
            self._lose(purpose=gone.purpose)
        except Exception as exc:  # noqa: BLE001 — not swallowed: it is why the session ends
            self._hearing.end(admitted(exc))
            await asyncio.Event().wait()

    async def _send(self, message: Message, *, again: Message | None = None) -> None:
        try:
            await self._record.say(message, again=again)
        except StenogateError as error:  # it does not read: the record is finished without it
            self._hearing.end(error)
