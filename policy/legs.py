"""Legs: what each attempt at a session cost us, the failed ones too.

A tenant pays for audio once, by the ledger, whoever finished it. What it took to get there is written here: one row for
each backend that was asked, with what its provider charges for. Rows are only ever added; each is written with the
session's next settle, or by itself where there is none, and twice the same is once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text

from policy.pricing import Price, amount_nano
from runtime.database import Transaction


@dataclass(frozen=True, slots=True)
class Leg:
    """One attempt: who, from where on the session's sample clock, how much audio was sent (of every channel) and
    charged for, how it went (`completed`, or the code of what went wrong), and how long it took."""

    id: UUID
    backend: str
    model: str
    credential_id: UUID | None
    outcome: str
    start_ms: int
    audio_ms: int
    charged_ms: int
    took_ms: int


async def record(tx: Transaction, tenant_id: UUID, session_id: UUID, legs: Sequence[tuple[Leg, Price]]) -> None:
    """Writes down those that are not yet written, each at the cost that its price has an hour."""
    values = [
        {
            **{name: getattr(leg, name) for name in Leg.__dataclass_fields__},
            "tenant": tenant_id,
            "session": session_id,
            "cost_nano": amount_nano(leg.charged_ms, price.cost_nano_per_hour),
            "currency": price.currency,
        }
        for leg, price in legs
    ]
    if values:
        await tx.execute(_RECORD, values)


async def listing(tx: Transaction, tenant_id: UUID, session_id: UUID) -> list[Leg]:
    """A session's, in the order they began."""
    found = await tx.execute(_LISTING, {"tenant": tenant_id, "session": session_id})
    return [Leg(*row) for row in found]


_RECORD = text("""
    insert into legs (tenant_id, id, session_id, backend, model, credential_id, outcome, start_ms, audio_ms, charged_ms,
                      cost_nano, currency, took_ms)
    values (:tenant, :id, :session, :backend, :model, :credential_id, :outcome, :start_ms, :audio_ms, :charged_ms,
            :cost_nano, :currency, :took_ms)
    on conflict do nothing
""")
_LISTING = text("""
    select id, backend, model, credential_id, outcome, start_ms, audio_ms, charged_ms, took_ms
    from legs where tenant_id = :tenant and session_id = :session order by id
""")
