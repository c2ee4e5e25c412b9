"""A worker's claim on a job: taken by one conditional UPDATE, renewed while it works, written under a token.

Every write carries the claim's token, so a worker that was thought dead and is not can change nothing any more.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, NoReturn
from uuid import UUID, uuid4

import structlog
from pydantic import TypeAdapter
from sqlalchemy import Row, text

from dispatchers.interface import Options, Origin, Segment, Transcript
from policy.errors import LedgerUnavailable
from policy.outage import ledger_reachable
from policy.resolve import Candidate
from runtime.database import Database, Transaction
from runtime.errors import StenogateError
from workers.chunks import Chunk, Heard
from workers.errors import LeaseLost
from workers.events import job_ended

log = structlog.get_logger()

PROGRESS_S = 1.0

OPTIONS = TypeAdapter(Options)
TRANSCRIPT = TypeAdapter(Transcript)
_SEGMENTS = TypeAdapter(tuple[Segment, ...])
_ORIGIN = TypeAdapter(Origin)


class Claim:
    """One job, held by this worker until it ends, gives it back, or is silent for `lease_s`.

    `attempts` counts the tries since the job last got on, this one included. `reached_ms` is for the worker to set: how
    far into the recording it is.
    """

    def __init__(
        self, database: Database, tenant_id: UUID, job_id: UUID, *, token: UUID, lease_s: float, row: Row[Any]
    ):
        self.tenant_id = tenant_id
        self.job_id = job_id
        self.options: Options = OPTIONS.validate_json(row.options)
        self.blob_key: str = row.blob_key
        self.attempts: int = row.attempts
        self.reached_ms = 0
        self._database = database
        self._token = token
        self._lease_s = lease_s

    @classmethod
    async def take(cls, database: Database, tenant_id: UUID, job_id: UUID, lease_s: float) -> Claim | None:
        """The job, if it is due and nobody has it."""
        token = uuid4()
        async with database.tenant(tenant_id) as tx:
            named = {"tenant_id": tenant_id, "id": job_id, "token": token, "lease_s": lease_s}
            row = (await tx.execute(_TAKE, named)).one_or_none()
        return None if row is None else cls(database, tenant_id, job_id, token=token, lease_s=lease_s, row=row)

    async def keep(self) -> NoReturn:
        """Renews the lease and tells the progress until cancelled.

        Raises `LeaseLost`, but not for a job that this claim itself has ended: its work is just about to return.
        """
        clock = asyncio.get_running_loop().time
        renewed, told_ms = clock(), 0
        while True:
            await asyncio.sleep(min(PROGRESS_S, self._lease_s / 3))
            if self.reached_ms <= told_ms and clock() - renewed < self._lease_s / 3:
                continue
            began, told_ms = clock(), self.reached_ms
            try:
                with ledger_reachable():
                    await self._write(_KEEP, {"done_ms": told_ms}, fence=_OURS)
                renewed = began
            except LedgerUnavailable:
                log.warning("job.database_unavailable", job_id=str(self.job_id))
                if clock() - renewed > self._lease_s:
                    raise LeaseLost from None

    async def renew(self) -> None:
        """Raises `LeaseLost` when somebody else has the job."""
        await self._write(_RENEW, {"done_ms": 0})

    async def measure(self, audio_ms: int) -> None:
        """Stores the recording's true length."""
        await self._write(_MEASURE, {"audio_ms": audio_ms})

    async def heard(self) -> tuple[list[Heard], list[Candidate]]:
        """The chunks that are done, in order, and the candidates that did them."""
        async with self._database.tenant(self.tenant_id) as tx:
            rows = (await tx.execute(_CHUNKS, self._mine())).all()
        pieces = [
            Heard(
                Chunk(row.chunk_no, row.start_ms, row.end_ms),
                row.language,
                _SEGMENTS.validate_json(row.segments),
                _ORIGIN.validate_json(row.origin),
            )
            for row in rows
        ]
        return pieces, [Candidate(**json.loads(row.candidate)) for row in rows]

    async def add(self, piece: Heard, candidate: Candidate) -> None:
        """Stores a chunk that is done; the job has got on."""
        chunk = piece.chunk
        origin = {"origin": _ORIGIN.dump_python(piece.origin), "candidate": vars(candidate)}
        stored = {
            "tenant_id": self.tenant_id,
            "id": self.job_id,
            "chunk_no": chunk.number,
            "start_ms": chunk.start_ms,
            "end_ms": chunk.end_ms,
            "language": piece.language,
            "segments": _SEGMENTS.dump_json(piece.segments).decode(),
            "origin": json.dumps(origin),
        }
        async with self._database.tenant(self.tenant_id) as tx:
            await self._execute(tx, _ADVANCE, {"done_ms": chunk.end_ms})
            await tx.execute(_ADD, stored)

    async def complete(self, tx: Transaction, transcript: Transcript) -> None:
        """In the transaction that charges for it: the transcript, and the job's end."""
        stored = TRANSCRIPT.dump_json(transcript).decode()
        await self._execute(tx, _COMPLETE, {"transcript": stored, "done_ms": transcript.duration_ms})
        await job_ended(tx, self.tenant_id, self.job_id)

    async def fail(self, error: StenogateError) -> None:
        """The job's end without a transcript."""
        told = json.dumps({"code": error.code, "message": error.message})
        async with self._database.tenant(self.tenant_id) as tx:
            await self._execute(tx, _FAIL, {"error": told})
            await job_ended(tx, self.tenant_id, self.job_id)

    async def retry(self, after_s: float) -> None:
        """Back to the queue, to be tried again so much later."""
        await self._write(_REQUEUE, {"after_s": after_s, "given_back": 0})

    async def give_back(self) -> None:
        """Back to the queue at once; this try does not count."""
        await self._write(_REQUEUE, {"after_s": 0.0, "given_back": 1})

    def _mine(self) -> dict[str, Any]:
        return {"tenant_id": self.tenant_id, "id": self.job_id}

    async def _write(self, change: str, named: Mapping[str, Any], fence: str | None = None) -> None:
        async with self._database.tenant(self.tenant_id) as tx:
            await self._execute(tx, change, named, fence)

    async def _execute(self, tx: Transaction, change: str, named: Mapping[str, Any], fence: str | None = None) -> None:
        statement = text(f"update jobs set {change} {fence or _FENCE}")  # noqa: S608  constants only
        claimed = {**self._mine(), "token": self._token, "lease_s": self._lease_s}
        if (await tx.execute(statement, {**named, **claimed})).rowcount != 1:
            raise LeaseLost


_TAKE = text("""
    update jobs set status = 'running', lease_token = :token, lease_until = now() + make_interval(secs => :lease_s),
                    attempts = attempts + 1, started_at = coalesce(started_at, now())
    where tenant_id = :tenant_id and id = :id
      and ((status = 'queued' and run_after <= now()) or (status = 'running' and lease_until < now()))
    returning cast(options as text) as options, blob_key, attempts
""")
_OURS = "where tenant_id = :tenant_id and id = :id and lease_token = :token"
_FENCE = f"{_OURS} and status = 'running'"
_LEASE = "now() + make_interval(secs => :lease_s)"
_RENEW = f"lease_until = {_LEASE}, done_ms = greatest(done_ms, :done_ms)"
_KEEP = f"""
    lease_until = case when status = 'running' then {_LEASE} end,
    done_ms = case when status = 'running' then greatest(done_ms, :done_ms) else done_ms end
"""
_MEASURE = "audio_ms = :audio_ms"
_ADVANCE = f"{_RENEW}, attempts = 1"
_COMPLETE = """
    status = 'completed', transcript = cast(:transcript as jsonb), done_ms = :done_ms, error = null,
    lease_until = null, finished_at = now()
"""
_FAIL = "status = 'failed', error = cast(:error as jsonb), lease_until = null, finished_at = now()"
# The token stays: it tells one try's bell from another's (workers.queue).
_REQUEUE = """
    status = 'queued', lease_until = null, run_after = now() + make_interval(secs => :after_s),
    attempts = attempts - :given_back
"""

_CHUNKS = text("""
    select chunk_no, start_ms, end_ms, language, cast(segments as text) as segments,
           cast(origin -> 'origin' as text) as origin, cast(origin -> 'candidate' as text) as candidate
    from job_chunks where tenant_id = :tenant_id and job_id = :id order by chunk_no
""")
_ADD = text("""
    insert into job_chunks (tenant_id, job_id, chunk_no, start_ms, end_ms, language, segments, origin)
    values (:tenant_id, :id, :chunk_no, :start_ms, :end_ms, :language, cast(:segments as jsonb), cast(:origin as jsonb))
""")
