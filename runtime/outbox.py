"""What happened, written down in the transaction in which it happened: nobody is told of what was rolled back, and of
what was committed somebody will be told, whoever dies in between.

An event's id is derived from what happened to what, never made anew: whoever does the same thing twice writes it once,
and a receiver knows it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from uuid import UUID, uuid5

from sqlalchemy import text

from runtime.database import Transaction

_EVENTS = UUID("2b1d4a3e-6f0c-5d57-9a43-4f6a51b7c8e0")


def event_id(tenant_id: UUID, topic: str, object_id: UUID, version: int) -> UUID:
    """The id of what happened (`topic`) to an object for the `version`th time; a UUID of version 5 (RFC 9562)."""
    return uuid5(_EVENTS, f"{tenant_id}\n{topic}\n{object_id}\n{version}")


async def put(  # noqa: PLR0917  what happened to what, in that order
    tx: Transaction,
    tenant_id: UUID,
    topic: str,
    object_id: UUID,
    version: int,
    payload: Mapping[str, Any],
    *,
    endpoint_id: UUID | None = None,
) -> UUID:
    """Writes the event down; returns its id. `endpoint_id`: the only webhook endpoint that is told of it.

    The payload is small: what happened to which object, not the object's content, and never a transcript.
    """
    fresh = event_id(tenant_id, topic, object_id, version)
    values = {
        "tenant_id": tenant_id,
        "id": fresh,
        "topic": topic,
        "object_id": object_id,
        "payload": json.dumps(payload, separators=(",", ":")),
        "endpoint_id": endpoint_id,
    }
    await tx.execute(_PUT, values)
    return fresh


_PUT = text("""
    insert into outbox (tenant_id, id, topic, object_id, payload, endpoint_id)
    values (:tenant_id, :id, :topic, :object_id, :payload, :endpoint_id)
    on conflict do nothing
""")
