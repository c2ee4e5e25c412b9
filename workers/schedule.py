"""What must happen from time to time: nothing is lost because nobody heard of it, or died before it was done.

Any number of processes may do the same at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog
from sqlalchemy import text

from policy.admission import reap
from policy.tickets import purge
from runtime.blobs import Blobs
from runtime.database import Database
from runtime.telemetry import JOBS, WEBHOOK_BACKLOG_SECONDS
from workers import deliveries
from workers.errors import Unheard
from workers.queue import Doorbell
from workers.recordings import collect
from workers.retention import expire

log = structlog.get_logger()

SWEEP_S = 3.0
SWEEP_BATCH = 500
TIDY_S = 60.0
COUNT_S = 10.0
ABANDONED_S = 180  # three times what a living session is silent for at most


async def sweep(database: Database, doorbell: Doorbell) -> int:
    """Rings for every job that is due: it waits, or its worker's lease has run out. Returns how many."""
    async with database.across_tenants("jobs that are due") as tx:
        due = (await tx.execute(_DUE, {"batch": SWEEP_BATCH})).all()
    for job in due:
        await doorbell.ring(job.tenant_id, job.id, after=job.lease_token)
    return len(due)


async def count(database: Database) -> None:
    """Tells the metrics how many jobs wait and run, and how far webhooks are behind, of all tenants."""
    async with database.across_tenants("how many jobs there are, and how far webhooks are behind") as tx:
        found = {row.status: row.jobs for row in await tx.execute(_COUNT)}
        WEBHOOK_BACKLOG_SECONDS.set(await deliveries.backlog_s(tx))
    for state in ("queued", "running"):
        JOBS.labels(state).set(found.get(state, 0))


@asynccontextmanager
async def swept(database: Database, doorbell: Doorbell) -> AsyncIterator[None]:
    """Rings for due jobs for as long as the context is open; in processes that work."""
    async with _repeated(SWEEP_S, lambda: sweep(database, doorbell)):
        yield


@asynccontextmanager
async def tidied(database: Database, blobs: Blobs) -> AsyncIterator[None]:
    """Ends what crashes left open, removes what they left lying, and counts; in every process."""
    async with (
        _repeated(TIDY_S, lambda: reap(database, ABANDONED_S)),
        _repeated(TIDY_S, lambda: collect(database, blobs)),
        _repeated(TIDY_S, lambda: purge(database)),
        _repeated(TIDY_S, lambda: expire(database, blobs)),
        _repeated(TIDY_S, lambda: deliveries.purge(database)),
        _repeated(COUNT_S, lambda: count(database)),
    ):
        yield


@asynccontextmanager
async def _repeated(seconds: float, chore: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    task = asyncio.create_task(_every(seconds, chore))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _every(seconds: float, chore: Callable[[], Awaitable[object]]) -> None:
    while True:
        try:
            await chore()
        except Unheard as error:
            log.warning("schedule.unheard", reason=error.message)
        except Exception as error:  # noqa: BLE001 — a database or Redis that is away comes back
            log.warning("schedule.failed", error=type(error).__name__)
        await asyncio.sleep(seconds)


_DUE = text("""
    select tenant_id, id, lease_token from jobs
    where status in ('queued', 'running')
      and ((status = 'queued' and run_after <= now()) or (status = 'running' and lease_until < now()))
    order by run_after, id limit :batch
""")
_COUNT = text("select status, count(*) as jobs from jobs where status in ('queued', 'running') group by status")
