"""Sessions: one row for each file, stream and job, open from admission until it ends."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias
from uuid import UUID

from sqlalchemy import Row, text

from policy.errors import Conflict, Invalid, NotFound
from policy.resolve import Decision, Demand
from runtime.database import Transaction

Kind: TypeAlias = Literal["file", "stream", "job"]
Ending: TypeAlias = Literal["completed", "failed", "interrupted", "cancelled"]
Status: TypeAlias = Literal["open", "completed", "failed", "interrupted", "cancelled"]

MAX_LIMIT = 200


@dataclass(frozen=True)
class Session:
    """A session's row. `accepted_ms` is audio taken in and settled, `held_ms` how far money is held: positions on the
    sample clock, which all `channels` share. `billed_ms` counts every channel. `turn`: how often it went over to
    another process."""

    id: UUID
    tenant_id: UUID
    kind: Kind
    status: Status
    code: str | None
    subject: str
    customer: str | None
    metadata: Mapping[str, str]
    request_id: str | None
    policy_version: int
    decision: Decision
    backend: str | None
    engine: str | None
    model: str | None
    language: str | None
    currency: str
    channels: int
    started_at: datetime
    seen_at: datetime
    ended_at: datetime | None
    accepted_ms: int
    billed_ms: int
    held_ms: int
    segments: int
    utterances: int
    words: int
    turn: int
    text: str | None


@dataclass(frozen=True)
class Page:
    """Newest first. `next_cursor` None: there is no more."""

    items: tuple[Session, ...]
    next_cursor: str | None


@dataclass(frozen=True)
class Outcome:
    """How a session ended and what it came to. None: as it was noted before; a `text` that is not kept never was."""

    status: Ending
    engine: str | None = None
    language: str | None = None
    utterances: int | None = None
    words: int | None = None
    text: str | None = None
    code: str | None = None


@dataclass(frozen=True)
class Progress:
    """What a session has come to so far. `text` None: not kept. `code`: why its holder left it open, if he did."""

    language: str | None
    utterances: int
    words: int
    text: str | None
    code: str | None = None


async def open_session(
    tx: Transaction,
    tenant_id: UUID,
    session_id: UUID,
    *,
    subject: str,
    demand: Demand,
    policy_version: int,
    decision: Decision,
    currency: str,
) -> None:
    """Writes the row, open, with nothing accepted."""
    await tx.execute(
        _OPEN,
        {
            "tenant": tenant_id,
            "id": session_id,
            "kind": demand.kind,
            "subject": subject,
            "customer": demand.customer,
            "metadata": json.dumps(dict(demand.metadata)),
            "request_id": demand.request_id or None,
            "policy_version": policy_version,
            "decision": json.dumps(decision.as_json()),
            "currency": currency,
            "channels": demand.channels,
        },
    )


async def locked(tx: Transaction, tenant_id: UUID, session_id: UUID) -> Session:
    """The row, which nobody else changes until the transaction ends. Raises `NotFound`."""
    return _found((await tx.execute(_LOCKED, {"tenant": tenant_id, "id": session_id})).one_or_none())


async def cover(tx: Transaction, tenant_id: UUID, session_id: UUID, held_ms: int) -> None:
    """Notes how far money is held. Raises `Conflict` for a session that is not open."""
    row = await tx.execute(_COVER, {"tenant": tenant_id, "id": session_id, "held_ms": held_ms})
    if row.one_or_none() is None:
        raise Conflict("The session is not open.")


async def touch(tx: Transaction, tenant_id: UUID, session_id: UUID) -> None:
    """Says that an open session is alive, so that it is not taken for one that a crash left."""
    await tx.execute(_TOUCH, {"tenant": tenant_id, "id": session_id})


async def note(tx: Transaction, tenant_id: UUID, session_id: UUID, turn: int, progress: Progress) -> None:
    """Writes down what an open session came to, should nobody be there to end it."""
    await tx.execute(_NOTE, {**vars(progress), "tenant": tenant_id, "id": session_id, "turn": turn})


async def take_over(tx: Transaction, tenant_id: UUID, session_id: UUID, turn: int) -> bool:
    """Makes the next turn of an open session ours. False: it has ended, or its turn is not `turn` any more."""
    row = await tx.execute(_TAKE_OVER, {"tenant": tenant_id, "id": session_id, "turn": turn})
    return row.one_or_none() is not None


async def close_session(
    tx: Transaction, tenant_id: UUID, session_id: UUID, outcome: Outcome, *, turn: int | None = None
) -> bool:
    """Ends an open session. False: it was not open, or not at this `turn` any more, and stays as it is."""
    row = await tx.execute(_CLOSE, {**vars(outcome), "tenant": tenant_id, "id": session_id, "turn": turn})
    return row.one_or_none() is not None


async def get(tx: Transaction, tenant_id: UUID, session_id: UUID) -> Session:
    """One session, with its text where that was kept. Raises `NotFound` (also for another tenant's)."""
    return _found((await tx.execute(_ONE, {"tenant": tenant_id, "id": session_id})).one_or_none())


async def listing(
    tx: Transaction, tenant_id: UUID, *, cursor: str | None = None, limit: int = 50, kind: Kind | None = None
) -> Page:
    """A page of the tenant's sessions, newest first, without their texts. Raises `Invalid`."""
    if not 1 <= limit <= MAX_LIMIT:
        raise Invalid(f"limit is from 1 to {MAX_LIMIT}.", param="limit")
    before_at, before_id = _read_cursor(cursor) if cursor else (None, None)
    values = {"tenant": tenant_id, "kind": kind, "at": before_at, "id": before_id, "limit": limit + 1}
    found = [_session(row) for row in await tx.execute(_LISTING, values)]
    items = tuple(found[:limit])
    return Page(items, _write_cursor(items[-1]) if len(found) > limit else None)


def _write_cursor(last: Session) -> str:
    return base64.urlsafe_b64encode(f"{last.started_at.isoformat()} {last.id.hex}".encode()).decode()


def _read_cursor(cursor: str) -> tuple[datetime, UUID]:
    try:
        moment, _, identifier = base64.b64decode(cursor, altchars=b"-_", validate=True).decode().partition(" ")
        return datetime.fromisoformat(moment).astimezone(UTC), UUID(hex=identifier)
    except (ValueError, OverflowError) as error:  # what base64, UTF-8, dates and UUIDs raise
        raise Invalid("This cursor was not given by a listing of sessions.", param="cursor") from error


def _found(row: Row[Any] | None) -> Session:
    if row is None:
        raise NotFound("There is no such session.")
    return _session(row)


def _session(row: Row[Any]) -> Session:
    stored = {"metadata": json.loads(row.metadata), "decision": Decision.from_json(json.loads(row.decision))}
    return Session(**{**row._mapping, **stored})


_COLUMNS = """
    tenant_id, id, kind, status, code, subject, customer,
    cast(metadata as text) as metadata, request_id, policy_version, cast(decision as text) as decision,
    backend, engine, model, language, currency, channels, started_at, seen_at, ended_at,
    accepted_ms, billed_ms, held_ms, segments, utterances, words, turn
"""
_SELECT = f"select {_COLUMNS}, text from sessions where tenant_id = :tenant and id = :id"  # noqa: S608  constants only
_ONE = text(_SELECT)
_LOCKED = text(f"{_SELECT} for no key update")
_OPEN = text("""
    insert into sessions (tenant_id, id, kind, subject, customer, metadata, request_id, policy_version, decision,
                          currency, channels)
    values (:tenant, :id, :kind, :subject, :customer, cast(:metadata as jsonb), :request_id, :policy_version,
            cast(:decision as jsonb), :currency, :channels)
""")
_COVER = text("""
    update sessions set held_ms = greatest(held_ms, :held_ms), seen_at = now()
    where tenant_id = :tenant and id = :id and status = 'open' returning id
""")
_TOUCH = text("update sessions set seen_at = now() where tenant_id = :tenant and id = :id and status = 'open'")
_NOTE = text("""
    update sessions
    set language = coalesce(:language, language), utterances = :utterances, words = :words, text = :text, code = :code
    where tenant_id = :tenant and id = :id and status = 'open' and turn = :turn
""")
_TAKE_OVER = text("""
    update sessions set turn = turn + 1, code = null, seen_at = now()
    where tenant_id = :tenant and id = :id and status = 'open' and turn = :turn returning id
""")
_CLOSE = text("""
    update sessions
    set status = :status, code = coalesce(:code, code),
        engine = coalesce(:engine, engine), language = coalesce(:language, language),
        utterances = coalesce(:utterances, utterances), words = coalesce(:words, words), text = coalesce(:text, text),
        seen_at = now(), ended_at = now()
    where tenant_id = :tenant and id = :id and status = 'open' and (cast(:turn as int) is null or turn = :turn)
    returning id
""")
_LISTING = text(f"""
    select {_COLUMNS}, null as text from sessions
    where tenant_id = :tenant and (cast(:kind as text) is null or kind = :kind)
      and (cast(:at as timestamptz) is null or (started_at, id) < (cast(:at as timestamptz), cast(:id as uuid)))
    order by started_at desc, id desc limit :limit
""")  # noqa: S608
