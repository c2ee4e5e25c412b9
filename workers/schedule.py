"""What must happen from time to time, in every process that works: nothing is lost because nobody heard of it.

Any number of processes may do the same at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog
from sqlalchemy import text

from policy.admission import reap
from runtime.blobs import Blobs
from runtime.database import Database
from workers.errors import Unheard
from workers.queue import Doorbell
from workers.recordings import collect

log = structlog.get_logger()

SWEEP_S = 3.0
SWEEP_BATCH = 500
REAP_S = 60.0
COLLECT_S = 60.0
ABANDONED_S = 180  # three times what a living session is silent for at most


async def sweep(database: Database, doorbell: Doorbell) -> int:
    """Rings for every job that is due: it waits, or its worker's lease has run out. Returns how many."""
    async with database.across_tenants("jobs that are due") as tx:
        due = (await tx.execute(_DUE, {"batch": SWEEP_BATCH})).all()
    for job in due:
        await doorbell.ring(job.tenant_id, job.id, after=job.lease_token)
    return len(due)


@asynccontextmanager
async def scheduled(database: Database, blobs: Blobs, doorbell: Doorbell) -> AsyncIterator[None]:
    """Sweeps jobs, reaps sessions and collects recordings for as long as the context is open."""
    chores = (
        asyncio.create_task(_every(SWEEP_S, lambda: sweep(database, doorbell))),
        asyncio.create_task(_every(REAP_S, lambda: reap(database, ABANDONED_S))),
        asyncio.create_task(_every(COLLECT_S, lambda: collect(database, blobs))),
    )
    try:
        yield
    finally:
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)


async def _every(seconds: float, chore: Callable[[], Awaitable[int]]) -> None:
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
