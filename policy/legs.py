"""Legs: what each attempt at a session cost us, the failed ones too.

A tenant pays for audio once, by the ledger, whoever finished it. What it took to get there is written here: one row for
each backend that was asked, with what its provider charges for. Rows are only ever added; each is written with the
session's next settle, or by itself where there is none, and twice the same is once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias
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


Priced: TypeAlias = tuple[Leg, Price]
"""A leg, and the price whose cost it has."""

NAMES = "id, backend, model, credential_id, outcome, start_ms, audio_ms, charged_ms, took_ms, cost_nano, currency"


async def record(tx: Transaction, tenant_id: UUID, session_id: UUID, legs: Sequence[Priced]) -> None:
    """Writes down those that are not yet written."""
    if legs:
        mine = {"tenant": tenant_id, "session": session_id}
        await tx.execute(_RECORD, [mine | dict(zip(_NAMED, _row(*leg), strict=True)) for leg in legs])


def as_json(legs: Sequence[Priced]) -> str:
    """What is written of them, by name."""
    return json.dumps([dict(zip(_NAMED, _row(*leg), strict=True)) for leg in legs], default=str)


async def listing(tx: Transaction, tenant_id: UUID, session_id: UUID) -> list[Leg]:
    """A session's, in the order they began."""
    found = await tx.execute(_LISTING, {"tenant": tenant_id, "session": session_id})
    return [Leg(*row) for row in found]


def _row(leg: Leg, price: Price) -> tuple[object, ...]:
    cost = amount_nano(leg.charged_ms, price.cost_nano_per_hour)
    return (*(getattr(leg, name) for name in Leg.__dataclass_fields__), cost, price.currency)


_NAMED = NAMES.split(", ")
_RECORD = text(f"""
    insert into legs (tenant_id, session_id, {NAMES})
    values (:tenant, :session, {", ".join(f":{name}" for name in _NAMED)})
    on conflict do nothing
""")  # noqa: S608  constants only
_LISTING = text("""
    select id, backend, model, credential_id, outcome, start_ms, audio_ms, charged_ms, took_ms
    from legs where tenant_id = :tenant and session_id = :session order by id
""")
