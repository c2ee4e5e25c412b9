"""Budgets under concurrency: holds never add up to more than the limit, and windows are the sum of their parts."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from policy import budget, pricing, sessions
from policy.errors import BudgetExhausted, Conflict, Invalid
from policy.metering import Segment, settle
from policy.pricing import Price
from policy.sessions import Outcome
from policy.tenants import Tenant
from runtime.database import Database

DIME = 100_000_000


async def windows(database: Database, tenant: Tenant) -> list[Any]:
    async with database.tenant(tenant.id) as tx:
        query = text("""
            select b.period, b.hard, w.window_start, w.settled_nano, w.held_nano,
                   coalesce((select sum(h.amount_nano) from budget_holds h
                             where h.budget_id = w.budget_id and h.window_start = w.window_start
                               and h.state = 'open'), 0) as open_holds
            from budget_windows w join budgets b on b.id = w.budget_id order by b.period, b.hard
        """)
        return list(await tx.execute(query))


async def set_budget(database: Database, tenant: Tenant, **values: Any) -> None:
    async with database.across_tenants("test set-up") as tx:
        await budget.set_budget(tx, tenant.id, actor="test", **values)


async def hold(database: Database, tenant: Tenant, session_id: UUID, amount: int) -> int | None:
    async with database.tenant(tenant.id) as tx:
        return await budget.hold(tx, tenant.id, session_id, amount)


async def test_a_thousand_concurrent_holds_of_a_dime_take_exactly_five_dollars(
    database: Database, billed_tenant: Tenant, open_session: Any
) -> None:
    clients = asyncio.Semaphore(8)  # the pool has ten connections
    sample = await open_session(billed_tenant)
    async with database.tenant(billed_tenant.id) as tx:
        await tx.execute(
            text("""
                insert into sessions (tenant_id, id, kind, subject, policy_version, decision, currency)
                select tenant_id, gen_random_uuid(), kind, subject, policy_version, decision, currency
                from sessions, generate_series(1, 999) where id = :id
            """),
            {"id": sample},
        )
        ids = list((await tx.execute(text("select id from sessions"))).scalars())
    assert len(ids) == 1000

    async def attempt(session_id: UUID) -> bool:
        async with clients:
            try:
                await hold(database, billed_tenant, session_id, DIME)
            except BudgetExhausted:
                return False
            return True

    admitted = await asyncio.gather(*(attempt(session_id) for session_id in ids))
    assert sum(admitted) == 50
    [window] = await windows(database, billed_tenant)
    assert (window.held_nano, window.settled_nano, window.open_holds) == (50 * DIME, 0, 50 * DIME)


async def test_a_refused_hold_leaves_what_was_held(
    database: Database, billed_tenant: Tenant, open_session: Any
) -> None:
    session_id = await open_session(billed_tenant)
    assert await hold(database, billed_tenant, session_id, 30 * DIME) == 20 * DIME
    with pytest.raises(BudgetExhausted, match=r"month budget has 2\.000000 left"):
        await hold(database, billed_tenant, session_id, 21 * DIME)
    assert await hold(database, billed_tenant, session_id, 20 * DIME) == 0
    [window] = await windows(database, billed_tenant)
    assert window.held_nano == window.open_holds == 50 * DIME


async def test_every_budget_counts_and_the_tightest_hard_one_decides(
    database: Database, billed_tenant: Tenant, open_session: Any
) -> None:
    await set_budget(database, billed_tenant, period="day", limit_nano=3 * DIME)
    await set_budget(database, billed_tenant, period="lifetime", limit_nano=DIME, hard=False)
    session_id = await open_session(billed_tenant)
    assert await hold(database, billed_tenant, session_id, 2 * DIME) == DIME
    with pytest.raises(BudgetExhausted, match="day budget"):
        await hold(database, billed_tenant, session_id, 2 * DIME)
    found = await windows(database, billed_tenant)
    assert [(w.period, w.held_nano, w.open_holds) for w in found] == [
        ("day", 2 * DIME, 2 * DIME),
        ("lifetime", 2 * DIME, 2 * DIME),  # soft: over its limit
        ("month", 2 * DIME, 2 * DIME),
    ]


async def test_without_a_budget_nothing_is_limited(database: Database, tenant: Tenant, open_session: Any) -> None:
    assert await hold(database, tenant, await open_session(tenant), 10**15) is None


async def test_windows_are_cut_in_the_tenants_time_zone_at_the_sessions_start(
    database: Database, billed_tenant: Tenant, open_session: Any
) -> None:
    await set_budget(database, billed_tenant, period="day", limit_nano=50 * DIME)
    async with database.across_tenants("test set-up") as tx:
        await tx.execute(text("update tenants set billing_tz = 'Asia/Tokyo' where id = :id"), {"id": billed_tenant.id})
    session_id = await open_session(billed_tenant)
    async with database.tenant(billed_tenant.id) as tx:
        await tx.execute(
            text("update sessions set started_at = '2026-03-31T15:30:00Z' where id = :id"), {"id": session_id}
        )
    await hold(database, billed_tenant, session_id, DIME)
    await hold(database, billed_tenant, session_id, DIME)  # now, which is another day: the same window
    found = {w.period: (w.window_start.isoformat(), w.held_nano) for w in await windows(database, billed_tenant)}
    assert found == {
        "day": ("2026-03-31T15:00:00+00:00", 2 * DIME),  # 1 April, 00:00 in Tokyo
        "month": ("2026-03-31T15:00:00+00:00", 2 * DIME),
    }


async def test_holds_extensions_settles_and_releases_at_once_balance_to_the_nano(
    database: Database, billed_tenant: Tenant, open_session: Any, list_price: Price
) -> None:
    await set_budget(database, billed_tenant, period="day", limit_nano=50 * DIME)
    clients = asyncio.Semaphore(8)

    async def life(number: int) -> None:
        session_id = await open_session(billed_tenant)
        for block in range(4):
            async with clients:
                await hold(database, billed_tenant, session_id, 1_075_000)
                async with database.tenant(billed_tenant.id) as tx:
                    span = Segment(
                        session_id,
                        block,
                        block * 15_000,
                        block * 15_000 + 15_000,
                        "self_hosted",
                        "micro",
                        None,
                        list_price,
                    )
                    await settle(tx, billed_tenant.id, span)
        await hold(database, billed_tenant, session_id, 777)
        if number % 2:
            async with database.tenant(billed_tenant.id) as tx:
                assert await sessions.close_session(tx, billed_tenant.id, session_id, Outcome("completed"))
                await budget.release(tx, billed_tenant.id, session_id)

    await asyncio.gather(*(life(number) for number in range(20)))
    for window in await windows(database, billed_tenant):
        assert window.settled_nano == 20 * 4 * pricing.amount_nano(15_000, list_price.price_nano_per_hour)
        assert window.held_nano == window.open_holds == 10 * 777


async def test_nothing_is_held_for_a_session_that_has_ended(
    database: Database, billed_tenant: Tenant, open_session: Any
) -> None:
    session_id = await open_session(billed_tenant)
    async with database.tenant(billed_tenant.id) as tx:
        await sessions.close_session(tx, billed_tenant.id, session_id, Outcome("completed"))
    with pytest.raises(Conflict):
        await hold(database, billed_tenant, session_id, DIME)


async def test_setting_a_budget_again_changes_its_limit_and_is_audited(database: Database, tenant: Tenant) -> None:
    await set_budget(database, tenant, period="month", limit_nano=DIME)
    await set_budget(database, tenant, period="month", limit_nano=2 * DIME)
    async with database.tenant(tenant.id) as tx:
        [standing] = await budget.listing(tx, tenant.id)
        rows = await tx.execute(text("select before, after from audit_log where action = 'budget.set' order by seq"))
        assert [(row.before is None, row.after) for row in rows] == [
            (True, {"limit_nano": DIME}),
            (False, {"limit_nano": 2 * DIME}),
        ]
    assert (standing.budget.limit_nano, standing.settled_nano, standing.held_nano) == (2 * DIME, 0, 0)
    with pytest.raises(Invalid):
        await set_budget(database, tenant, period="year", limit_nano=1)
