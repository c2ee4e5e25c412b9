"""The ledger: append-only rows of accepted audio, and what they come to.

A row is a segment of a session: `[start_ms, end_ms)` on its sample clock, numbered from 0 without a gap. Whoever
delivers it, and however often, the key (session, number) lets it in once, and the session's `accepted_ms` must stand
exactly at its start. Milliseconds are the truth; the amount follows from them and the price, which is copied. Where
several channels are recognised, each for itself, they share the clock, and each is billed.

A session's day is the UTC date of its start, by the database's clock. It is the same for every row of the session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from uuid import UUID

from sqlalchemy import text

from policy.errors import Conflict, Invalid
from policy.pricing import Price, amount_nano, show_nano
from runtime.database import Transaction

GROUPS = ("day", "backend", "model", "customer")


@dataclass(frozen=True)
class Segment:
    """What is to be billed. `held_nano` is what was held for it; None: what it costs, to the nano-unit."""

    source_id: UUID
    segment_no: int
    start_ms: int
    end_ms: int
    backend: str
    model: str
    customer: str | None
    price: Price
    held_nano: int | None = None
    channels: int = 1


@dataclass(frozen=True)
class UsageRow:
    """Usage of one group. `key` has a value for each name grouped by; days are UTC, of the session's start."""

    key: Mapping[str, str | None]
    requests: int
    audio_ms: int
    billed_ms: int
    amount_nano: int
    currency: str

    def as_json(self) -> dict[str, str | int | None]:
        return {
            **self.key,
            "requests": self.requests,
            "audio_ms": self.audio_ms,
            "billed_ms": self.billed_ms,
            "amount": show_nano(self.amount_nano),
            "currency": self.currency,
        }


async def settle(tx: Transaction, tenant_id: UUID, segment: Segment) -> bool:
    """Bills a segment: key, session, ledger row, hold and windows, in one statement.

    False: this very segment is billed already, and nothing was changed. Raises `Conflict` when the session is not open,
    does not stand at the segment's start, or had something else billed under this number; roll back then.
    """
    if segment.end_ms <= segment.start_ms:
        raise Invalid("A segment ends after it starts.")
    ms = segment.end_ms - segment.start_ms
    billed_ms = ms * segment.channels
    amount = amount_nano(billed_ms, segment.price.price_nano_per_hour)
    cost = amount_nano(billed_ms, segment.price.cost_nano_per_hour)
    values = {
        "tenant": tenant_id,
        "source": segment.source_id,
        "segment": segment.segment_no,
        "customer": segment.customer,
        "backend": segment.backend,
        "model": segment.model,
        "start": segment.start_ms,
        "end": segment.end_ms,
        "ms": ms,
        "billed_ms": billed_ms,
        "channels": segment.channels,
        "price": segment.price.id,
        "price_nano": segment.price.price_nano_per_hour,
        "amount": amount,
        "cost": cost,
        "currency": segment.price.currency,
        "held": amount if segment.held_nano is None else segment.held_nano,
    }
    row = (await tx.execute(_SETTLE, values)).one()
    if row.billed:
        return True
    if not row.keyed and (await tx.execute(_SAME, values)).scalar_one():
        return False
    raise Conflict("The session is not open at the start of this segment.")


async def usage(
    tx: Transaction,
    tenant_id: UUID,
    *,
    start: date | None = None,
    end: date | None = None,
    group_by: Sequence[str] = ("day", "backend", "model"),
    customer: str | None = None,
) -> list[UsageRow]:
    """What was used on the UTC days `[start, end)`, by any of `GROUPS`, in their order. Raises `Invalid`."""
    unknown = set(group_by) - set(GROUPS)
    if unknown:
        raise Invalid(f"group_by takes {', '.join(GROUPS)}; not {', '.join(sorted(unknown))}.", param="group_by")
    names = [name for name in GROUPS if name in group_by]
    columns = ["cast(ledger_day as text) as day" if name == "day" else name for name in names]
    query = _USAGE.format(columns="".join(f"{column}, " for column in columns), groups=_ordinals(len(names) + 1))
    found = await tx.execute(text(query), {"tenant": tenant_id, "start": start, "end": end, "customer": customer})
    return [
        UsageRow(
            {name: getattr(row, name) for name in names},
            row.requests,
            row.audio_ms,
            row.billed_ms,
            int(row.amount_nano),
            row.currency,
        )
        for row in found
    ]


def _ordinals(count: int) -> str:
    return ", ".join(str(n) for n in range(1, count + 1))


# The parts feed one another, so they run in this order and all or none of them have an effect. Rows are locked as
# policy.budget says: the session, its holds, the windows by budget id.
_SETTLE = text("""
    with key as (
        insert into usage_keys (tenant_id, source_id, segment_no, kind) values (:tenant, :source, :segment, 'usage')
        on conflict do nothing
        returning source_id
    ), session as (
        update sessions s
        set accepted_ms = :end, billed_ms = s.billed_ms + :billed_ms, segments = s.segments + 1,
            held_ms = greatest(s.held_ms, :end), seen_at = now(), backend = :backend, model = :model
        from key
        where s.tenant_id = :tenant and s.id = key.source_id and s.accepted_ms = :start and s.status = 'open'
        returning s.id, s.started_at
    ), entry as (
        insert into usage_ledger (tenant_id, ledger_day, source_id, segment_no, kind, customer, backend, model,
                                  start_ms, end_ms, audio_ms, billed_ms, price_id, price_nano_per_hour,
                                  amount_nano, cost_nano, currency, channels)
        select :tenant, cast(started_at at time zone 'UTC' as date), id, :segment, 'usage', :customer, :backend, :model,
               :start, :end, :ms, :billed_ms, :price, :price_nano, :amount, :cost, :currency, :channels
        from session
        returning source_id
    ), held as (
        select h.budget_id, h.window_start, least(h.amount_nano, :held) as freed
        from entry
        join budget_holds h on h.tenant_id = :tenant and h.session_id = entry.source_id and h.state = 'open'
        join budget_windows w
             on w.tenant_id = :tenant and w.budget_id = h.budget_id and w.window_start = h.window_start
        order by h.budget_id for update of h, w
    ), lowered as (
        update budget_holds h set amount_nano = h.amount_nano - held.freed
        from held where h.tenant_id = :tenant and h.session_id = :source and h.budget_id = held.budget_id
    ), moved as (
        update budget_windows w set held_nano = w.held_nano - held.freed, settled_nano = w.settled_nano + :amount
        from held
        where w.tenant_id = :tenant and w.budget_id = held.budget_id and w.window_start = held.window_start
    )
    select exists (select from key) as keyed, exists (select from entry) as billed
""")
_SAME = text("""
    select exists (
        select from usage_ledger
        where tenant_id = :tenant and source_id = :source and segment_no = :segment and kind = 'usage'
          and start_ms = :start and end_ms = :end
    )
""")
_USAGE = """
    select {columns}currency, count(distinct source_id) as requests, cast(sum(audio_ms) as bigint) as audio_ms,
           cast(sum(billed_ms) as bigint) as billed_ms, sum(amount_nano) as amount_nano
    from usage_ledger
    where tenant_id = :tenant
      and (cast(:start as date) is null or ledger_day >= :start) and (cast(:end as date) is null or ledger_day < :end)
      and (cast(:customer as text) is null or customer = :customer)
    group by {groups} order by {groups}
"""
