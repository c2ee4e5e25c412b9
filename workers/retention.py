"""Deletes recordings of live sessions: when their time is over, or when asked to. A row goes only once its blob has
been seen to be gone, and the audit log says which.

Any number of processes may do the same at once: whoever locks a recording has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

import structlog
from sqlalchemy import text

from policy import audit, recordings
from runtime.blobs import Blobs, BlobsUnavailable
from runtime.database import Database
from runtime.telemetry import RECORDINGS_DELETED, RECORDINGS_OVERDUE

log = structlog.get_logger()

ACTOR = "retention"
BATCH = 100
PARTS = 50
"""Parts in one transaction, which stays open while they are deleted …"""

GONE_S = 20.0
"""… for so long at most."""

AT_ONCE = 8
FAILURES = 3


@dataclass(frozen=True)
class Due:
    """A recording whose time is over, and who deletes it."""

    tenant_id: UUID
    session_id: UUID
    actor: str = ACTOR
    reason: Literal["expired", "asked"] = "expired"


async def expire(database: Database, blobs: Blobs) -> int:
    """Deletes recordings whose time is over, some at a time. Returns how many. What fails is tried again next time."""
    done, failed = 0, set[UUID]()
    for _ in range(BATCH):
        async with database.across_tenants("recordings whose time is over") as tx:
            row = (await tx.execute(_DUE, {"failed": sorted(failed)})).one_or_none()
        if row is None or len(failed) >= FAILURES:
            break
        try:
            done += await erase(database, blobs, Due(row.tenant_id, row.session_id))
        except BlobsUnavailable:
            failed.add(row.session_id)
    return done


async def erase(database: Database, blobs: Blobs, due: Due) -> bool:
    """Deletes a recording and sees that it is gone. False: another process has it, or had it. Raises
    `BlobsUnavailable`: what is left stays due."""
    try:
        while (left := await _erase_some(database, blobs, due)) > 0:
            pass
    except BlobsUnavailable:
        log.warning("recording.not_deleted", session_id=str(due.session_id))
        RECORDINGS_OVERDUE.inc()
        raise
    if left == 0:
        RECORDINGS_DELETED.labels(due.reason).inc()
    return left == 0


async def _erase_some(database: Database, blobs: Blobs, due: Due) -> int:
    """Deletes some parts, in one transaction with the entry that says so. Returns how many are left; less than 0 where
    there is nothing for us to do."""
    named = {"tenant": due.tenant_id, "session": due.session_id}
    async with database.tenant(due.tenant_id) as tx:
        locked = (await tx.execute(_LOCK, named)).one_or_none()
        if locked is None:
            return -1
        parts = (await tx.execute(_PARTS, named | {"limit": PARTS})).all()
        keys = [part.blob_key for part in parts]
        found = await _gone(blobs, keys)
        stored = sum(part.stored_at is not None for part in parts)
        if found < stored:  # a disk that is not mounted, or somebody else's work
            log.warning("recording.blobs_missing", session_id=str(due.session_id), stored=stored, found=found)
        await tx.execute(_REMOVE, named | {"numbers": [part.number for part in parts]})
        left = int((await tx.execute(_COUNT, named)).scalar_one())
        if not left:
            await tx.execute(_DELETED, named)
        await audit.record(
            tx,
            actor=due.actor,
            action="recording.delete",
            object=recordings.name_of(due.session_id),
            tenant_id=due.tenant_id,
            before={"expires_at": locked.expires_at.isoformat(), "blobs": keys},
            after={"reason": due.reason, "stored": stored, "found": found, "seen_gone": len(keys), "left": left},
        )
    return left


async def _gone(blobs: Blobs, keys: Sequence[str]) -> int:
    """Deletes the blobs and looks whether they are gone. Returns how many were there: a part that was never stored has
    none. Raises `BlobsUnavailable` when one is not gone."""
    turns = asyncio.Semaphore(AT_ONCE)
    found = 0

    async def gone(key: str) -> None:
        nonlocal found
        async with turns:
            found += await blobs.exists(key)
            await blobs.delete(key)
            if await blobs.exists(key):
                raise BlobsUnavailable("The store still has what it was told to delete.")

    try:
        async with asyncio.timeout(GONE_S), asyncio.TaskGroup() as tasks:
            for key in keys:
                tasks.create_task(gone(key))
    except TimeoutError:
        raise BlobsUnavailable from None
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return found


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
    select number, blob_key, stored_at from recording_parts where tenant_id = :tenant and session_id = :session
    order by number limit :limit
""")
_REMOVE = text("""
    delete from recording_parts
    where tenant_id = :tenant and session_id = :session and number = any(cast(:numbers as int[]))
""")
_COUNT = text("select count(*) from recording_parts where tenant_id = :tenant and session_id = :session")
_DELETED = text("update recordings set deleted_at = now() where tenant_id = :tenant and session_id = :session")
