"""The record of who changed what. Append-only by grant; written in the transaction of the change itself, so there is no
change without its row and no row without its change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy import text

from runtime.database import Transaction

Snapshot: TypeAlias = Mapping[str, Any]
"""An object's state as JSON values. Never a secret: what is written here stays."""

_INSERT = text("""
    insert into audit_log (tenant_id, actor, action, object, before, after, request_id)
    values (:tenant_id, :actor, :action, :object, cast(:before as jsonb), cast(:after as jsonb), :request_id)
""")


async def record(
    tx: Transaction,
    *,
    actor: str,
    action: str,
    object: str,  # noqa: A002  the log's own word for it
    tenant_id: UUID | None = None,
    before: Snapshot | None = None,
    after: Snapshot | None = None,
    request_id: str | None = None,
) -> None:
    """Appends one row: `actor` did `action` (`policy.put`) to `object` (`policy/acme`)."""
    await tx.execute(
        _INSERT,
        {
            "tenant_id": tenant_id,
            "actor": actor,
            "action": action,
            "object": object,
            "before": _json(before),
            "after": _json(after),
            "request_id": request_id,
        },
    )


def _json(snapshot: Snapshot | None) -> str | None:
    return None if snapshot is None else json.dumps(snapshot, default=str, sort_keys=True)
