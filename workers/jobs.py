"""Jobs as the gateway sees them: submitted, looked at, waited for, fetched."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias
from uuid import UUID

import structlog
from sqlalchemy import Row, text

from dispatchers.audio.decode import probe
from dispatchers.dispatch import Door
from dispatchers.interface import Options, Transcript
from policy.admission import Lease
from policy.errors import Invalid
from policy.identity import Caller
from policy.resolve import Demand
from runtime.blobs import Blobs, tenant_key
from runtime.database import Database, Transaction
from runtime.errors import StenogateError
from runtime.ids import read, show, uuid7
from workers.claim import OPTIONS, TRANSCRIPT
from workers.errors import JobFailed, JobNotFound, JobNotReady, Unheard
from workers.queue import Doorbell

log = structlog.get_logger()

Status: TypeAlias = Literal["queued", "running", "completed", "failed", "cancelled"]

SLOWEST_BITS_PER_S = 8_000  # no speech codec in use is slower, so bytes bound the length of what tells no length
JOINABLE_S = 600
MAX_LIMIT = 200
POLL_S = (0.2, 1.0)


@dataclass(frozen=True)
class Upload:
    """A finished upload: a file on the local disk, which its owner removes, or its content where that is short.
    `fingerprint` is the SHA-256 of file and fields."""

    recording: Path | bytes
    size: int
    filename: str | None
    content_type: str | None
    fingerprint: str


@dataclass(frozen=True)
class Job:
    """Where a job stands. `audio_ms` is None until the recording has been decoded; `queue_position` counts the jobs
    before it, of everybody, and is None once it runs (and in listings); `attempts` counts the tries since it last got
    on; `eta_s` is None while nobody can tell."""

    tenant_id: UUID
    id: UUID
    status: Status
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    audio_ms: int | None
    done_ms: int
    billed_ms: int
    backend: str | None
    model: str | None
    attempts: int
    error: Mapping[str, str] | None
    filename: str | None
    customer: str | None
    metadata: Mapping[str, str]
    queue_position: int | None
    eta_s: float | None

    @property
    def progress(self) -> float:
        """From 0 to 1; 1 only when it is completed."""
        if self.status == "completed":
            return 1.0
        return min(0.99, self.done_ms / self.audio_ms) if self.audio_ms else 0.0

    @property
    def ended(self) -> bool:
        return self.status not in ("queued", "running")


class Jobs:
    """Every tenant's jobs. Another tenant's job is not found."""

    def __init__(self, database: Database, blobs: Blobs, door: Door, doorbell: Doorbell):
        self._database = database
        self._blobs = blobs
        self._door = door
        self._doorbell = doorbell

    async def submit(self, caller: Caller, demand: Demand, options: Options, upload: Upload) -> Job:
        """Stores the recording, then its job with the hold for it; durable once this returns.

        Raises `AudioError` where the header alone says that this is no audio, and what admission raises; then nothing
        stays behind.
        """
        demand = replace(demand, audio_ms=await self._claimed_ms(caller, upload))
        await self._door.explain(caller, demand)  # refusals that cost nothing come before the upload is stored
        blob_key = tenant_key(caller.tenant_id, "jobs", uuid7().hex)

        async def write(tx: Transaction, lease: Lease) -> None:
            await tx.execute(_INSERT, _row(lease, options, upload, blob_key))

        try:
            await self._store(blob_key, upload.recording)
            lease = await self._door.accept(caller, demand, write)
        except BaseException:
            await self._discard(blob_key)
            raise
        await self._ring(caller.tenant_id, lease.session_id)
        return await self.get(caller.tenant_id, lease.session_id)

    async def joinable(self, tenant_id: UUID, fingerprint: str) -> Job | None:
        """The newest job of the same upload that runs, waits, or was completed within the last ten minutes."""
        named = {"tenant_id": tenant_id, "fingerprint": fingerprint, "seconds": JOINABLE_S}
        async with self._database.tenant(tenant_id) as tx:
            row = (await tx.execute(_JOINABLE, named)).one_or_none()
        return None if row is None else _job(row)

    async def get(self, tenant_id: UUID, job_id: UUID) -> Job:
        """Raises `JobNotFound`."""
        job = await self._look(tenant_id, job_id)
        if job.status != "queued":
            return job
        async with self._database.across_tenants("how many jobs wait before this one") as tx:
            before = await tx.execute(_POSITION, {"created_at": job.created_at, "id": job_id})
        return replace(job, queue_position=before.scalar_one())

    async def listing(
        self, tenant_id: UUID, *, cursor: str | None = None, limit: int = 50, status: Status | None = None
    ) -> tuple[list[Job], str | None]:
        """A page, newest first, and the cursor of the next one, if there is one. Raises `Invalid`."""
        if not 1 <= limit <= MAX_LIMIT:
            raise Invalid(f"limit is from 1 to {MAX_LIMIT}.", param="limit")
        last = read("job", cursor) if cursor else None
        if cursor and last is None:
            raise Invalid("This cursor was not given by a listing of jobs.", param="cursor")
        named = {"tenant_id": tenant_id, "status": status, "last": last, "limit": limit + 1}
        async with self._database.tenant(tenant_id) as tx:
            found = [_job(row) for row in await tx.execute(_LISTING, named)]
        jobs = found[:limit]
        return jobs, show("job", jobs[-1].id) if len(found) > limit else None

    async def wait(self, tenant_id: UUID, job_id: UUID, timeout_s: float) -> Job:
        """The job once it has ended, or as it stands after so many seconds. Raises `JobNotFound`."""
        clock = asyncio.get_running_loop().time
        deadline, (pause_s, longest_s) = clock() + timeout_s, POLL_S
        while not (job := await self._look(tenant_id, job_id)).ended and (left_s := deadline - clock()) > 0:
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(pause_s * 1.5, longest_s)
        return job

    async def transcript(self, tenant_id: UUID, job_id: UUID) -> Transcript:
        """Raises `JobNotFound`, `JobNotReady`, `JobFailed`."""
        async with self._database.tenant(tenant_id) as tx:
            row = (await tx.execute(_TRANSCRIPT, {"tenant_id": tenant_id, "id": job_id})).one_or_none()
        if row is None:
            raise JobNotFound
        if row.status in ("queued", "running"):
            raise JobNotReady
        if row.transcript is None:
            raise JobFailed
        return TRANSCRIPT.validate_json(row.transcript)

    async def _claimed_ms(self, caller: Caller, upload: Upload) -> int:
        """What a hold is taken for: the length that the header tells, else the most that so many bytes can be."""
        probed = await asyncio.to_thread(probe, upload.recording)
        if probed.duration_ms:
            return probed.duration_ms
        policy = await self._door.policy(caller)
        return min(upload.size * 8 * 1000 // SLOWEST_BITS_PER_S, policy.body.longest_ms("job"))

    async def _look(self, tenant_id: UUID, job_id: UUID) -> Job:
        async with self._database.tenant(tenant_id) as tx:
            row = (await tx.execute(_GET, {"tenant_id": tenant_id, "id": job_id})).one_or_none()
        if row is None:
            raise JobNotFound
        return _job(row)

    async def _store(self, blob_key: str, recording: Path | bytes) -> None:
        if isinstance(recording, bytes):
            await self._blobs.put(blob_key, recording)
        else:
            await self._blobs.put_file(blob_key, recording)

    async def _discard(self, blob_key: str) -> None:
        try:
            await asyncio.shield(self._blobs.delete(blob_key))
        except StenogateError as error:
            log.warning("job.blob_left", blob_key=blob_key, code=error.code)

    async def _ring(self, tenant_id: UUID, job_id: UUID) -> None:
        try:
            await self._doorbell.ring(tenant_id, job_id)
        except Unheard as error:
            log.warning("job.bell_unheard", job_id=str(job_id), reason=error.message)  # the sweeper rings again


def _row(lease: Lease, options: Options, upload: Upload, blob_key: str) -> dict[str, Any]:
    return {
        "tenant_id": lease.tenant_id,
        "id": lease.session_id,
        "options": OPTIONS.dump_json(options).decode(),
        "fingerprint": upload.fingerprint,
        "blob_key": blob_key,
        "filename": _storable(upload.filename),
        "size_bytes": upload.size,
    }


def _storable(filename: str | None) -> str | None:
    """A client may name its file anything; Postgres takes neither NUL nor half a surrogate pair."""
    if filename is None:
        return None
    return filename.replace("\0", "").encode(errors="replace").decode()[:255]


def _job(row: Row[Any]) -> Job:
    return Job(**row._mapping, queue_position=None)


_SELECT = """
    select j.tenant_id, j.id, j.status, j.created_at, j.started_at, j.finished_at, j.audio_ms, j.done_ms, s.billed_ms,
           s.backend, s.model, j.attempts, j.error, j.filename, s.customer, s.metadata,
           case when j.status = 'running' and j.done_ms > 0 and j.audio_ms >= j.done_ms then
               cast(extract(epoch from now() - j.started_at) * (j.audio_ms - j.done_ms) / j.done_ms as float)
           end as eta_s
    from jobs j join sessions s on s.tenant_id = j.tenant_id and s.id = j.id
    where j.tenant_id = :tenant_id
"""
_GET = text(f"{_SELECT} and j.id = :id")
_JOINABLE = text(f"""
    {_SELECT} and j.fingerprint = :fingerprint
      and (j.status in ('queued', 'running')
           or (j.status = 'completed' and j.finished_at > now() - make_interval(secs => :seconds)))
    order by j.created_at desc limit 1
""")
_LISTING = text(f"""
    {_SELECT} and (cast(:status as text) is null or j.status = :status)
      and (cast(:last as uuid) is null or (j.created_at, j.id) < (
          select created_at, id from jobs where tenant_id = :tenant_id and id = cast(:last as uuid)))
    order by j.created_at desc, j.id desc limit :limit
""")  # noqa: S608  constants only
_POSITION = text("select count(*) from jobs where status = 'queued' and (created_at, id) < (:created_at, :id)")
_TRANSCRIPT = text("""
    select status, cast(transcript as text) as transcript from jobs where tenant_id = :tenant_id and id = :id
""")
_INSERT = text("""
    insert into jobs (tenant_id, id, options, fingerprint, blob_key, filename, size_bytes)
    values (:tenant_id, :id, cast(:options as jsonb), :fingerprint, :blob_key, :filename, :size_bytes)
""")
