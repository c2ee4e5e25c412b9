"""The recordings of jobs in the blob store: kept until the job has ended, then removed, even if its worker died first.

A job's `blob_key` is there as long as its recording is.
"""

from __future__ import annotations

from uuid import UUID

import structlog
from sqlalchemy import text

from runtime.blobs import Blobs, BlobsUnavailable
from runtime.database import Database

log = structlog.get_logger()

BATCH = 100
GRACE_S = 60  # its own worker comes first


async def discard(database: Database, blobs: Blobs, tenant_id: UUID, job_id: UUID, blob_key: str) -> None:
    """Removes the recording of a job that has ended. Where the store does not answer, it is removed later."""
    try:
        await blobs.delete(blob_key)
    except BlobsUnavailable:
        log.warning("job.recording_left", job_id=str(job_id))
        return
    async with database.tenant(tenant_id) as tx:
        await tx.execute(_DISCARDED, {"tenant_id": tenant_id, "id": job_id})


async def collect(database: Database, blobs: Blobs) -> int:
    """Removes what workers left behind. Returns how many recordings there were."""
    async with database.across_tenants("recordings of jobs that have ended") as tx:
        left = (await tx.execute(_LEFT, {"grace_s": GRACE_S, "batch": BATCH})).all()
    for job in left:
        await discard(database, blobs, job.tenant_id, job.id, job.blob_key)
    return len(left)


_DISCARDED = text("""
    update jobs set blob_key = null where tenant_id = :tenant_id and id = :id and finished_at is not null
""")
_LEFT = text("""
    select tenant_id, id, blob_key from jobs
    where blob_key is not null and finished_at < now() - make_interval(secs => :grace_s)
    order by finished_at limit :batch
""")
