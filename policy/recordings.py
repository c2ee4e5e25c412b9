"""What sessions keep of their audio: one recording each, in parts, until its time is over.

A part's row is written before its blob and removed after it, so there is no audio that no row accounts for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeAlias
from uuid import UUID

from sqlalchemy import text

from policy import audit
from policy.errors import NotFound
from runtime.blobs import tenant_key
from runtime.database import Transaction
from runtime.ids import show

State: TypeAlias = Literal["none", "recording", "kept", "deleted"]

SAMPLES_PER_MS = 16
SETTLING_S = 60
"""How long a session that has ended may still be storing its last parts."""


@dataclass(frozen=True)
class Part:
    """Samples `start` to `end` of a session's clock, and where they are stored."""

    start: int
    end: int
    blob_key: str


@dataclass(frozen=True)
class Span:
    """A piece of a session, in ms."""

    start_ms: int
    end_ms: int


@dataclass(frozen=True)
class Recording:
    """What is kept of a session's audio. `parts` are those stored, in order; `missing` what was accepted and is not
    among them."""

    session_id: UUID
    state: State
    expires_at: datetime | None
    deleted_at: datetime | None
    parts: tuple[Part, ...]
    missing: tuple[Span, ...]

    @property
    def samples(self) -> int:
        """Its length on the session's clock, up to the end of the last part stored."""
        return max((part.end for part in self.parts), default=0)

    @property
    def missing_ms(self) -> int:
        return sum(span.end_ms - span.start_ms for span in self.missing)


async def begin(tx: Transaction, tenant_id: UUID, session_id: UUID, ttl_s: int) -> None:
    """Says that audio of the session will come. Again: that more of it will, after another process had it."""
    await tx.execute(_BEGIN, {"tenant": tenant_id, "session": session_id, "ttl_s": ttl_s})


async def add_part(
    tx: Transaction, tenant_id: UUID, session_id: UUID, *, start: int, samples: int, ttl_s: int
) -> tuple[int, str]:
    """The next part's number and the key to store it under. It counts once it is `stored`. Raises `NotFound` for a
    recording that is not there, or has been deleted."""
    named = {"tenant": tenant_id, "session": session_id, "ttl_s": ttl_s}
    if (await tx.execute(_EXTEND, named)).rowcount != 1:  # and locks it: parts follow one another
        raise NotFound("There is no such recording.")
    number = int((await tx.execute(_NEXT, {"tenant": tenant_id, "session": session_id})).scalar_one())
    key = tenant_key(tenant_id, "sessions", session_id.hex, f"{number:05}.flac")
    values = {"tenant": tenant_id, "session": session_id, "number": number, "start": start, "samples": samples}
    await tx.execute(_ADD, {**values, "key": key})
    return number, key


async def stored(tx: Transaction, tenant_id: UUID, session_id: UUID, number: int) -> bool:
    """The part's blob is there. False: its row is not any more, and nothing accounts for the blob."""
    row = await tx.execute(_STORED, {"tenant": tenant_id, "session": session_id, "number": number})
    return row.rowcount == 1


async def finish(tx: Transaction, tenant_id: UUID, session_id: UUID, ttl_s: int) -> None:
    """No more parts will come. From now on its time runs."""
    await tx.execute(_FINISH, {"tenant": tenant_id, "session": session_id, "ttl_s": ttl_s})


async def get(tx: Transaction, tenant_id: UUID, session_id: UUID) -> Recording:
    """What is kept of a session. Raises `NotFound` where there is no such session (also for another tenant's)."""
    named = {"tenant": tenant_id, "session": session_id, "settling_s": SETTLING_S}
    row = (await tx.execute(_GET, named)).one_or_none()
    if row is None:
        raise NotFound("There is no such session.")
    found = await tx.execute(_PARTS, {"tenant": tenant_id, "session": session_id}) if row.state == "kept" else ()
    parts = tuple(Part(part.start_sample, part.start_sample + part.samples, part.blob_key) for part in found)
    missing = _missing(parts, row.accepted_ms) if row.state == "kept" else ()
    deleted_at = row.deleted_at if row.state == "deleted" else None
    return Recording(session_id, row.state, row.expires_at, deleted_at, parts, missing)


async def expire(tx: Transaction, tenant_id: UUID, recording: Recording, *, actor: str) -> None:
    """Ends its time now: it is served no more, and whoever finds it deletes it."""
    await tx.execute(_EXPIRE, {"tenant": tenant_id, "session": recording.session_id})
    before = None if recording.expires_at is None else {"expires_at": recording.expires_at.isoformat()}
    name = name_of(recording.session_id)
    await audit.record(tx, actor=actor, action="recording.expire", object=name, tenant_id=tenant_id, before=before)


def name_of(session_id: UUID) -> str:
    """Its name in the audit log."""
    return f"recording/{show('sess', session_id)}"


def _missing(parts: Sequence[Part], accepted_ms: int) -> tuple[Span, ...]:
    spans, reached = [], 0
    for part in parts:
        if part.start // SAMPLES_PER_MS > reached // SAMPLES_PER_MS:
            spans.append(Span(reached // SAMPLES_PER_MS, part.start // SAMPLES_PER_MS))
        reached = max(reached, part.end)
    if accepted_ms > reached // SAMPLES_PER_MS:
        spans.append(Span(reached // SAMPLES_PER_MS, accepted_ms))
    return tuple(spans)


_BEGIN = text("""
    insert into recordings (tenant_id, session_id, expires_at)
    values (:tenant, :session, now() + make_interval(secs => :ttl_s))
    on conflict (tenant_id, session_id) do update
    set finished_at = null, expires_at = excluded.expires_at where recordings.deleted_at is null
""")
_EXTEND = text("""
    update recordings set expires_at = now() + make_interval(secs => :ttl_s)
    where tenant_id = :tenant and session_id = :session and deleted_at is null
""")
_NEXT = text("""
    select coalesce(max(number), 0) + 1 from recording_parts where tenant_id = :tenant and session_id = :session
""")
_ADD = text("""
    insert into recording_parts (tenant_id, session_id, number, start_sample, samples, blob_key)
    values (:tenant, :session, :number, :start, :samples, :key)
""")
_STORED = text("""
    update recording_parts set stored_at = now()
    where tenant_id = :tenant and session_id = :session and number = :number
""")
_FINISH = text("""
    update recordings set finished_at = now(), expires_at = now() + make_interval(secs => :ttl_s)
    where tenant_id = :tenant and session_id = :session and deleted_at is null
""")
_EXPIRE = text("""
    update recordings set expires_at = least(expires_at, now())
    where tenant_id = :tenant and session_id = :session and deleted_at is null
""")
_GET = text("""
    select s.accepted_ms, r.expires_at, coalesce(r.deleted_at, r.expires_at) as deleted_at,
        case when r.session_id is null then 'none'
             when r.deleted_at is not null then 'deleted'
             when s.status = 'open'
                 or (r.finished_at is null and s.ended_at > now() - make_interval(secs => :settling_s)) then 'recording'
             when r.expires_at <= now() then 'deleted'
             else 'kept' end as state
    from sessions s left join recordings r on r.tenant_id = s.tenant_id and r.session_id = s.id
    where s.tenant_id = :tenant and s.id = :session
""")
_PARTS = text("""
    select start_sample, samples, blob_key from recording_parts
    where tenant_id = :tenant and session_id = :session and stored_at is not null
    order by start_sample, number
""")
