"""What webhooks are told of a job: that it has ended, and how. Its text they fetch."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import Row, text

from runtime import outbox
from runtime.database import Transaction
from runtime.ids import show

_ENDING = 1
"""A job ends once."""


async def job_ended(tx: Transaction, tenant_id: UUID, job_id: UUID) -> None:
    """In the transaction that ends the job, after its row says so: the event of it."""
    row = (await tx.execute(_ENDED, {"tenant_id": tenant_id, "id": job_id})).one()
    topic = f"job.{row.status}"
    await outbox.put(tx, tenant_id, topic, job_id, _ENDING, _told(row), endpoint_id=row.webhook_id)


def _told(row: Row[Any]) -> dict[str, Any]:
    own = f"/v1/jobs/{show('job', row.id)}"
    transcript = {"transcript": f"{own}/transcript"} if row.status == "completed" else {}
    return {
        "id": show("job", row.id),
        "object": "transcription.job",
        "status": row.status,
        "created_at": int(row.created_at.timestamp()),
        "finished_at": int(row.finished_at.timestamp()),
        "audio_ms": row.audio_ms,
        "customer": row.customer,
        "metadata": row.metadata,
        "error": row.error,
        "links": {"self": own, **transcript},
    }


_ENDED = text("""
    select j.id, j.status, j.created_at, j.finished_at, j.audio_ms, j.error, j.webhook_id, s.customer, s.metadata
    from jobs j join sessions s on s.tenant_id = j.tenant_id and s.id = j.id
    where j.tenant_id = :tenant_id and j.id = :id
""")
