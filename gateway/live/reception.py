"""Where a socket becomes a session, or comes back to one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import structlog

from dispatchers.dispatch import Door
from gateway.errors import close_code
from gateway.live.codec import Codec, Resume, Setup
from gateway.live.endings import GOING_AWAY, admitted, reason_of
from gateway.live.frames import Frames, Gone, NotReading, ResumeFailed
from gateway.live.legacy import Legacy, left_behind
from gateway.live.record import wire
from gateway.live.roster import Roster
from gateway.live.seats import SEATS
from gateway.live.session import Session
from policy.errors import Conflict, Invalid, NotFound
from policy.identity import Caller
from runtime.coordination import Coordination
from runtime.errors import StenogateError
from runtime.telemetry import STREAM_RESUMES, STREAMS_ENDED

log = structlog.get_logger()

START_S = 10.0


@dataclass(frozen=True, slots=True)
class House:
    """What every session of a process shares: how long it may hear nothing, how long it waits for a lost client, how
    many there may be. `let_in` is a place for one more."""

    roster: Roster
    door: Door
    coordination: Coordination
    idle_s: float
    resume_s: float
    max_streams: int
    let_in: Callable[[], AbstractContextManager[None]]

    def session(self, codec: Codec, setup: Setup, caller: Caller, legacy: Legacy | None = None) -> Session:
        return Session(
            codec, setup, caller, self.coordination, idle_s=self.idle_s, resume_s=self.resume_s, legacy=legacy
        )


async def converse(
    frames: Frames,
    house: House,
    caller: Caller,
    codec: Codec,
    opening: Setup | Resume | None,
    *,
    seats: ExitStack,
    subprotocol: str | None,
) -> None:
    """Holds one socket from the upgrade to the close. Without an `opening` its first text frame says it. A new session
    takes over the `seats`.

    Raises a `StenogateError` only where the upgrade is still to be refused.
    """
    try:
        if opening is None:
            await frames.accept(subprotocol)
            opening = await _opening(frames, codec, min(START_S, house.idle_s))
            house.roster.refuse_when_draining()
        if isinstance(opening, Resume):
            seats.close()
            found = house.roster.find(opening.token, caller.tenant_id)
            if found is None:
                session = await _inherited(frames, house, caller, codec, opening, seats=seats, subprotocol=subprotocol)
            else:
                session = found
                await _accepted(frames, subprotocol)
                await session.attach(frames, opening)
            STREAM_RESUMES.labels("elsewhere" if found is None else "resumed").inc()
        else:
            for _ in range(1, opening.options.channels):  # each is a stream to the engine
                seats.enter_context(SEATS.seat(house.max_streams))
            session = house.session(codec, opening, caller)
            house.roster.run(session, house.door, seats.pop_all())
            await _introduced(session, frames, None, subprotocol)
        await session.attend(frames)
    except Gone:
        STREAMS_ENDED.labels(codec.name, GOING_AWAY).inc()
    except Exception as exc:  # noqa: BLE001 — the last stop: every failure has a code and reaches its caller
        error = admitted(exc)
        if isinstance(opening, Resume):
            STREAM_RESUMES.labels("failed").inc()
        if not frames.accepted:
            raise error from None
        await _tell(frames, codec, error)
        STREAMS_ENDED.labels(codec.name, GOING_AWAY if frames.gone else close_code(error)).inc()


async def _inherited(
    frames: Frames,
    house: House,
    caller: Caller,
    codec: Codec,
    resume: Resume,
    *,
    seats: ExitStack,
    subprotocol: str | None,
) -> Session:
    """A session that another process had goes on in this one. Raises `ResumeFailed` and, leaving it to be resumed
    again, what a new session is refused with."""
    legacy = await left_behind(house.coordination, caller.tenant_id, codec, resume)
    seats.enter_context(house.let_in())
    session = house.session(codec, codec.reopened(legacy.head.opening), caller, legacy)
    house.roster.run(session, house.door, seats.pop_all())
    try:
        await _introduced(session, frames, resume, subprotocol)
    except (NotFound, Conflict):  # it has ended, or somebody was faster
        raise ResumeFailed from None
    return session


async def _introduced(session: Session, frames: Frames, resume: Resume | None, subprotocol: str | None) -> None:
    """A session gets its first socket here, or none if that cannot be."""
    try:
        await session.opened()
        await _accepted(frames, subprotocol)
        await session.attach(frames, resume)
    except BaseException:
        session.abandon()
        raise


async def _accepted(frames: Frames, subprotocol: str | None) -> None:
    if not frames.accepted:
        await frames.accept(subprotocol)


async def _opening(frames: Frames, codec: Codec, timeout_s: float) -> Setup | Resume:
    frame = await frames.receive(timeout_s)
    if isinstance(frame, bytes):
        raise Invalid("Audio came before `start`, and the address carries no fields of it.")
    return codec.resume(frame) or codec.setup(frame)


async def _tell(frames: Frames, codec: Codec, error: StenogateError) -> None:
    """To a socket without a session."""
    try:
        await frames.send(wire(codec.error(error, fatal=True), 1))
    except NotReading:
        log.info("stream.unread", code=error.code)
    await frames.close(close_code(error), reason_of(error))
