"""Deletes recordings of live sessions: when their time is over, or when asked to. A row goes only once its blob has been
seen to be gone, and the audit log says which.

Any number of processes may do the same at once: whoever locks a recording has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Literal, TypeAlias
from uuid import UUID

import structlog
from sqlalchemy import text

from policy import audit, recordings
from runtime.blobs import Blobs, BlobsUnavailable
from runtime.database import Database, Transaction
from runtime.telemetry import RECORDINGS_DELETED, RECORDINGS_OVERDUE

log = structlog.get_logger()

Reason: TypeAlias = Literal["expired", "asked"]

ACTOR = "retention"
BATCH = 100
PARTS = 50
"""Parts in one transaction."""

AT_ONCE = 8
FAILURES = 3


async def expire(database: Database, blobs: Blobs) -> int:
    """Deletes recordings whose time is over, some at a time. Returns how many. What fails is tried again next time."""
    done, failed = 0, set[UUID]()
    for _ in range(BATCH):
        async with database.across_tenants("recordings whose time is over") as tx:
            due = (await tx.execute(_DUE, {"failed": sorted(failed)})).one_or_none()
        if due is None or len(failed) >= FAILURES:
            break
        try:
            done += await erase(database, blobs, due.tenant_id, due.session_id, actor=ACTOR, reason="expired")
        except BlobsUnavailable:
            failed.add(due.session_id)
    return done


async def erase(
    database: Database, blobs: Blobs, tenant_id: UUID, session_id: UUID, *, actor: str, reason: Reason
) -> bool:
    """Deletes the recording whose time is over, as one that has been seen to be gone. False: another process has it, or
    had it. Raises `BlobsUnavailable`: what is left stays due."""
    try:
        while (left := await _erase_some(database, blobs, tenant_id, session_id, actor, reason)) > 0:
            pass
    except BlobsUnavailable:
        log.warning("recording.not_deleted", session_id=str(session_id))
        RECORDINGS_OVERDUE.inc()
        raise
    if left == 0:
        RECORDINGS_DELETED.labels(reason).inc()
    return left == 0


async def _erase_some(
    database: Database, blobs: Blobs, tenant_id: UUID, session_id: UUID, actor: str, reason: Reason
) -> int:
    """Deletes some parts, in one transaction with the row that says so. Returns how many are left; less than 0 where
    there is nothing for us to do."""
    named = {"tenant": tenant_id, "session": session_id}
    async with database.tenant(tenant_id) as tx:
        due = (await tx.execute(_LOCK, named)).one_or_none()
        if due is None:
            return -1
        parts = (await tx.execute(_PARTS, named | {"limit": PARTS})).all()
        await _gone(blobs, [part.blob_key for part in parts])
        await tx.execute(_REMOVE, named | {"numbers": [part.number for part in parts]})
        left = int((await tx.execute(_COUNT, named)).scalar_one())
        if not left:
            await tx.execute(_DELETED, named)
        await _tell(tx, tenant_id, session_id, actor, reason, due.expires_at, [part.blob_key for part in parts], left)
    return left


async def _gone(blobs: Blobs, keys: Sequence[str]) -> None:
    """Deletes the blobs and looks whether they are gone. Raises `BlobsUnavailable` while one is not."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def gone(key: str) -> None:
        async with turns:
            await blobs.delete(key)
            if await blobs.exists(key):
                raise BlobsUnavailable("The store still has what it was told to delete.")

    outcomes = await asyncio.gather(*(gone(key) for key in keys), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


async def _tell(
    tx: Transaction,
    tenant_id: UUID,
    session_id: UUID,
    actor: str,
    reason: Reason,
    expires_at: datetime,
    keys: Sequence[str],
    left: int,
) -> None:
    await audit.record(
        tx,
        actor=actor,
        action="recording.delete",
        object=recordings.name_of(session_id),
        tenant_id=tenant_id,
        before={"expires_at": expires_at.isoformat(), "blobs": list(keys)},
        after={"reason": reason, "deleted": len(keys), "seen_gone": len(keys), "left": left},
    )


_OVER = """
    r.deleted_at is null and r.expires_at <= now() and not exists (
        select 1 from sessions s where s.tenant_id = r.tenant_id and s.id = r.session_id and s.status = 'open')
"""
_DUE = text(f"""
    select r.tenant_id, r.session_id from recordings r
    where {_OVER} and not r.session_id = any(cast(:failed as uuid[]))
    order by r.expires_at limit 1 for update skip locked
""")  # noqa: S608  constants only
_LOCK = text(f"""
    select r.expires_at from recordings r
    where {_OVER} and r.tenant_id = :tenant and r.session_id = :session
    for update skip locked
""")  # noqa: S608
_PARTS = text("""
    select number, blob_key from recording_parts where tenant_id = :tenant and session_id = :session
    order by number limit :limit
""")
_REMOVE = text("""
    delete from recording_parts
    where tenant_id = :tenant and session_id = :session and number = any(cast(:numbers as int[]))
""")
_COUNT = text("select count(*) from recording_parts where tenant_id = :tenant and session_id = :session")
_DELETED = text("update recordings set deleted_at = now() where tenant_id = :tenant and session_id = :session")
