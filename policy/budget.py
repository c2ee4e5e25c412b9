"""Budgets: reserve, extend, settle, release.

A window is one period of one budget: what is settled in it and what is held. Money is held before audio is accepted, by
a conditional UPDATE, never by looking first. A session counts in the window of its start, however long it runs, and so
does all that is held for it. A budget counts what is held after it was set.

Locks are taken in one order everywhere: the session's row, its hold, the window; windows by budget id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args
from uuid import UUID

from sqlalchemy import text

from policy import audit
from policy.errors import BudgetExhausted, Conflict, Invalid
from policy.pricing import show_nano
from runtime.database import Transaction
from runtime.ids import uuid7
from runtime.telemetry import BUDGET_REFUSALS

Period: TypeAlias = Literal["day", "month", "lifetime"]


@dataclass(frozen=True)
class Budget:
    """A limit in nano-units of the tenant's currency. A soft one (`hard` false) is counted and never refuses."""

    id: UUID
    period: Period
    limit_nano: int
    hard: bool


@dataclass(frozen=True)
class Standing:
    """A budget and its window of now."""

    budget: Budget
    settled_nano: int
    held_nano: int


async def set_budget(
    tx_system: Transaction, tenant_id: UUID, *, period: Period, limit_nano: int, hard: bool = True, actor: str
) -> Budget:
    """Sets the tenant's one hard, or one soft, budget of a period; what is counted already stays. Raises `Invalid`."""
    if period not in get_args(Period):
        raise Invalid(f"A period is one of {', '.join(get_args(Period))}.", param="period")
    if limit_nano < 0:
        raise Invalid("A limit is not negative.", param="limit_nano")
    key = {"tenant": tenant_id, "period": period, "hard": hard}
    before = (await tx_system.execute(_LIMIT, key)).scalar_one_or_none()
    row = (await tx_system.execute(_SET, {**key, "id": uuid7(), "limit": limit_nano})).one()
    await audit.record(
        tx_system,
        actor=actor,
        action="budget.set",
        object=f"budget/{period}/{'hard' if hard else 'soft'}",
        tenant_id=tenant_id,
        before=None if before is None else {"limit_nano": before},
        after={"limit_nano": limit_nano},
    )
    return Budget(row.id, period, limit_nano, hard)


async def listing(tx: Transaction, tenant_id: UUID) -> list[Standing]:
    """The tenant's budgets and what they stand at."""
    return [
        Standing(Budget(row.id, row.period, row.limit_nano, row.hard), row.settled_nano, row.held_nano)
        for row in await tx.execute(_STANDING, {"tenant": tenant_id})
    ]


async def hold(tx: Transaction, tenant_id: UUID, session_id: UUID, amount_nano: int) -> int | None:
    """Reserves money for a session in every budget of its tenant, or, raising `BudgetExhausted`, in none once the
    transaction is rolled back. Holding again adds to what is held.

    Returns what the tightest hard budget still has, None where there is none. Raises `Conflict` for a session that is
    not open.
    """
    key = {"tenant": tenant_id, "session": session_id}
    windows = (await tx.execute(_OPEN_WINDOWS, key)).all()
    if not windows:
        raise Conflict("The session is not open.")
    least: int | None = None
    for window in windows:
        if window.id is None:
            return None
        taken = {**key, "budget": window.id, "window": window.window_start, "amount": amount_nano}
        row = (await tx.execute(_HOLD, taken)).one_or_none()
        if row is None:
            raise await _exhausted(tx, taken)
        if window.hard:
            least = row.remaining if least is None else min(least, row.remaining)
    return least


async def remaining(tx: Transaction, tenant_id: UUID, session_id: UUID) -> int | None:
    """What a session could still hold: the least that a hard budget of its tenant has. None: as much as it likes."""
    found = await tx.execute(_REMAINING, {"tenant": tenant_id, "session": session_id})
    least: int | None = found.scalar_one()
    return least


async def release(tx: Transaction, tenant_id: UUID, session_id: UUID) -> None:
    """Gives back what is still held for a session. Close its row first, so that nothing more is held for it."""
    await tx.execute(_RELEASE, {"tenant": tenant_id, "session": session_id})


async def _exhausted(tx: Transaction, taken: dict[str, object]) -> BudgetExhausted:
    BUDGET_REFUSALS.inc()
    row = (await tx.execute(_SHORTFALL, taken)).one()
    left = show_nano(max(0, row.remaining))
    until = "" if row.resets_at is None else f" It begins anew at {row.resets_at:%Y-%m-%dT%H:%M:%SZ}."
    return BudgetExhausted(f"The {row.period} budget has {left} left, which does not cover this audio.{until}")


_LIMIT = text("""
    select limit_nano from budgets where tenant_id = :tenant and period = :period and hard = :hard and active for update
""")
_SET = text("""
    insert into budgets (tenant_id, id, period, limit_nano, hard) values (:tenant, :id, :period, :limit, :hard)
    on conflict (tenant_id, period, hard) where active do update set limit_nano = excluded.limit_nano
    returning id
""")

# Cuts the calendar in the tenant's own time zone; a lifetime is one window.
_WINDOW_START = """
    case b.period when 'lifetime' then timestamptz 'epoch' else date_trunc(b.period, {moment}, t.billing_tz) end
"""
_OPEN_WINDOWS = text(f"""
    with session as (
        select tenant_id, started_at from sessions
        where tenant_id = :tenant and id = :session and status = 'open' for no key update
    ), mine as (
        select b.tenant_id, b.id, b.hard, {_WINDOW_START.format(moment="session.started_at")} as window_start
        from session join tenants t on t.id = session.tenant_id
        join budgets b on b.tenant_id = session.tenant_id and b.active
    ), opened as (
        insert into budget_windows (tenant_id, budget_id, window_start)
        select tenant_id, id, window_start from mine order by id
        on conflict do nothing
    )
    select mine.id, mine.hard, mine.window_start from session left join mine on true order by mine.id
""")  # noqa: S608  constants only

# A window that refuses leaves a hold behind that the transaction's end takes back.
_HOLD = text("""
    with noted as (
        insert into budget_holds (tenant_id, session_id, budget_id, window_start, amount_nano)
        values (:tenant, :session, :budget, :window, :amount)
        on conflict (tenant_id, session_id, budget_id)
        do update set amount_nano = budget_holds.amount_nano + excluded.amount_nano
        returning budget_id, window_start
    )
    update budget_windows w set held_nano = w.held_nano + :amount
    from noted join budgets b on b.tenant_id = :tenant and b.id = noted.budget_id
    where w.tenant_id = :tenant and w.budget_id = noted.budget_id and w.window_start = noted.window_start
      and (not b.hard or w.settled_nano + w.held_nano + :amount <= b.limit_nano)
    returning b.limit_nano - w.settled_nano - w.held_nano as remaining
""")
_SHORTFALL = text("""
    select b.period, b.limit_nano - w.settled_nano - w.held_nano as remaining,
           case when b.period <> 'lifetime'
                then (w.window_start at time zone t.billing_tz + cast('1 ' || b.period as interval))
                     at time zone t.billing_tz end as resets_at
    from budgets b join tenants t on t.id = b.tenant_id
    join budget_windows w on w.tenant_id = b.tenant_id and w.budget_id = b.id and w.window_start = :window
    where b.tenant_id = :tenant and b.id = :budget
""")
_REMAINING = text(f"""
    select min(b.limit_nano - coalesce(w.settled_nano + w.held_nano, 0))
    from sessions s join tenants t on t.id = s.tenant_id
    join budgets b on b.tenant_id = s.tenant_id and b.active and b.hard
    left join budget_windows w on w.tenant_id = b.tenant_id and w.budget_id = b.id
         and w.window_start = {_WINDOW_START.format(moment="s.started_at")}
    where s.tenant_id = :tenant and s.id = :session
""")  # noqa: S608
_STANDING = text(f"""
    select b.id, b.period, b.limit_nano, b.hard,
           coalesce(w.settled_nano, 0) as settled_nano, coalesce(w.held_nano, 0) as held_nano
    from budgets b join tenants t on t.id = b.tenant_id
    left join budget_windows w on w.tenant_id = b.tenant_id and w.budget_id = b.id
         and w.window_start = {_WINDOW_START.format(moment="now()")}
    where b.tenant_id = :tenant and b.active order by b.id
""")  # noqa: S608
_RELEASE = text("""
    with held as (
        select h.budget_id, h.window_start, h.amount_nano
        from budget_holds h join budget_windows w
             on w.tenant_id = h.tenant_id and w.budget_id = h.budget_id and w.window_start = h.window_start
        where h.tenant_id = :tenant and h.session_id = :session and h.state = 'open'
        order by h.budget_id for update of h, w
    ), closed as (
        update budget_holds h set amount_nano = 0, state = 'released' from held
        where h.tenant_id = :tenant and h.session_id = :session and h.budget_id = held.budget_id
    )
    update budget_windows w set held_nano = w.held_nano - held.amount_nano from held
    where w.tenant_id = :tenant and w.budget_id = held.budget_id and w.window_start = held.window_start
""")
