"""Where a socket becomes a session, or comes back to one."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import structlog

from dispatchers.dispatch import Door
from gateway.errors import close_code
from gateway.live.codec import Codec, Resume, Setup
from gateway.live.frames import Frames, Gone, NotReading
from gateway.live.record import wire
from gateway.live.roster import Roster
from gateway.live.session import GOING_AWAY, SEATS, Session, admitted, reason_of
from policy.errors import Invalid
from policy.identity import Caller
from runtime.errors import StenogateError
from runtime.telemetry import STREAM_RESUMES, STREAMS_ENDED

log = structlog.get_logger()

START_S = 10.0


@dataclass(frozen=True, slots=True)
class House:
    """What every session of a process shares: how long it may hear nothing, how long it waits for a lost client, how
    many there may be."""

    roster: Roster
    door: Door
    idle_s: float
    resume_s: float
    max_streams: int


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
            session = house.roster.find(opening.token, caller.tenant_id)
            seats.close()
            await _accepted(frames, subprotocol)
            await session.attach(frames, opening.last_seq)
            STREAM_RESUMES.labels("resumed").inc()
        else:
            for _ in range(1, opening.options.channels):  # each is a stream to the engine
                seats.enter_context(SEATS.seat(house.max_streams))
            session = Session(codec, opening, caller, idle_s=house.idle_s, resume_s=house.resume_s)
            house.roster.run(session, house.door, seats.pop_all())
            await _introduced(session, frames, subprotocol)
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


async def _introduced(session: Session, frames: Frames, subprotocol: str | None) -> None:
    """A new session gets its first socket, or none if that cannot be."""
    try:
        await session.opened()
        await _accepted(frames, subprotocol)
        await session.attach(frames)
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
