"""The two steps in one statement each: they do what the long way does, and leave to it whatever is unusual."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text

from policy import budget, identity, policies, pricing, sessions, steps, tenants
from policy.admission import Admission, Lease, Outcome
from policy.errors import BudgetExhausted, TakenOver, TenantSuspended, TokenRevoked
from policy.identity import Caller
from policy.policies import Policy
from policy.pricing import Price, cover_nano
from policy.resolve import Candidate, Decision, Demand
from policy.sessions import Progress
from policy.steps import Unusual
from policy.tenants import Tenant
from runtime.coordination import InProcess
from runtime.database import Database
from tests.integration.conftest import PRICE_NANO_PER_HOUR

HERE = Candidate("self_hosted", "micro", "first")
THERE = Candidate("steps-relay", "big", "second")
DECISION = Decision((HERE,), ())
BOTH = Decision((HERE, THERE), ())
FILE = Demand(kind="file", audio_ms=60_000, customer="acme", metadata={"a": "b"}, request_id="req_1")
DONE = Outcome("completed", engine="ctranslate2", language="en", utterances=1, words=2, text="hello there")


class Counted(Database):
    """Counts the steps that were committed; told to, it has none."""

    committed = 0
    none = False

    async def once(self, statement: str, *values: object) -> Any:
        if self.none:
            raise Unusual
        row = await super().once(statement, *values)
        self.committed += 1
        return row


@pytest.fixture
async def counted(settings: Any) -> AsyncIterator[Counted]:
    opened = Counted(settings.database_url.get_secret_value(), settings.system_database_url.get_secret_value())
    yield opened
    await opened.aclose()


@pytest.fixture
async def admission(counted: Counted, caller: Caller, policy: Policy) -> Admission:
    """One that knows the tenant already."""
    admission = Admission(counted, InProcess())
    async with admission.admit(caller, FILE, policy, DECISION) as lease:
        await lease.end(DONE)
    return admission


@pytest.fixture
async def policy(database: Database, caller: Caller) -> Policy:
    async with database.tenant(caller.tenant_id) as tx:
        return await policies.current(tx, caller.tenant_id)


async def rows(database: Database, lease: Lease) -> dict[str, list[dict[str, Any]]]:
    """All that the database has of a session, without what differs by nature."""
    found = {}
    own = {"id", "session_id", "source_id", "seq"}
    queries = {
        "sessions": "select * from sessions where id = :id",
        "budget_holds": "select * from budget_holds where session_id = :id",
        "usage_keys": "select * from usage_keys where source_id = :id",
        "usage_ledger": "select * from usage_ledger where source_id = :id",
        "windows": "select settled_nano, held_nano from budget_windows",
    }
    async with database.tenant(lease.tenant_id) as tx:
        for name, query in queries.items():
            answer = await tx.execute(text(query), {"id": lease.session_id} if ":id" in query else {})
            found[name] = [
                {key: value for key, value in row._mapping.items() if key not in own and not key.endswith("_at")}
                for row in answer
            ]
    return found


async def test_both_ways_write_the_same(
    counted: Counted, database: Database, admission: Admission, caller: Caller, policy: Policy
) -> None:
    seen = []
    before = None
    for none in (False, True):
        counted.none, counted.committed = none, 0
        async with admission.admit(caller, FILE, policy, DECISION) as lease:
            opened = await rows(database, lease)
            first = await lease.settle(15_000, HERE, progress=Progress("en", 1, 1, "hello"))
            between = await rows(database, lease)
            second = await lease.settle(45_678, HERE, outcome=DONE)
            ended = await rows(database, lease)
        async with database.tenant(caller.tenant_id) as tx:
            session = await sessions.get(tx, caller.tenant_id, lease.session_id)
        assert (session.ended_at is not None, session.seen_at >= session.started_at) == (True, True)
        assert counted.committed == (0 if none else 3)
        spent = ended["windows"][0]["settled_nano"]
        for look in (opened, between, ended):  # windows go on from what was spent before
            look["windows"][0]["settled_nano"] -= before or 0
        before = spent
        free = [receipt.remaining_ms or 0 for receipt in (first, second)]
        seen.append((opened, between, ended, free[0] - free[1], first.billed_ms, second.billed_ms))
    assert seen[0] == seen[1]
    assert seen[0][2]["sessions"][0]["text"] == "hello there"
    assert seen[0][2]["budget_holds"][0]["state"] == "released"


async def test_what_is_known_refuses_nobody_and_lets_nobody_in(
    counted: Counted, database: Database, admission: Admission, caller: Caller, policy: Policy
) -> None:
    async def let_in() -> bool:
        counted.committed = 0
        async with admission.admit(caller, FILE, policy, DECISION) as lease:
            at_once = counted.committed == 1
            await lease.end(DONE)
        return at_once

    assert await let_in()
    for status, error in (("suspended", TenantSuspended), ("closed", TenantSuspended), ("active", None)):
        async with database.across_tenants("test") as tx:
            await tenants.set_status(tx, caller.tenant_id, status, actor="test")  # type: ignore[arg-type]
        if error is not None:
            with pytest.raises(error):
                await let_in()
    assert await let_in()
    async with database.across_tenants("test") as tx:
        await identity.revoke(
            tx, tenant_id=caller.tenant_id, token_id=caller.token_id, expires_at=caller.expires_at, actor="test"
        )
    with pytest.raises(TokenRevoked):
        await let_in()


async def test_a_new_price_counts_from_the_next_session_on(
    database: Database, admission: Admission, caller: Caller, policy: Policy, list_price: Price
) -> None:
    async with admission.admit(caller, FILE, policy, DECISION) as lease:
        async with database.across_tenants("test") as tx:
            await pricing.set_price(
                tx,
                backend="self_hosted",
                model="micro",
                price_nano_per_hour=7,
                currency="USD",
                tenant_id=caller.tenant_id,
                actor="test",
            )
        await lease.settle(60_000, HERE, outcome=DONE)
    async with admission.admit(caller, FILE, policy, DECISION) as later:
        await later.settle(60_000, HERE, outcome=DONE)
    prices = [(await rows(database, each))["usage_ledger"][0]["price_nano_per_hour"] for each in (lease, later)]
    assert prices == [list_price.price_nano_per_hour, 7]


async def test_what_comes_on_sale_is_noticed(
    database: Database, admission: Admission, caller: Caller, policy: Policy
) -> None:
    async def offered() -> list[str]:
        async with admission.admit(caller, FILE, policy, BOTH) as lease:
            await lease.end(DONE)
        return [candidate.backend for candidate in lease.decision.candidates]

    assert await offered() == await offered() == ["self_hosted"]
    async with database.across_tenants("test") as tx:
        await pricing.set_price(
            tx, backend=THERE.backend, price_nano_per_hour=9, currency="USD", tenant_id=caller.tenant_id, actor="test"
        )
    assert await offered() == await offered() == ["self_hosted", THERE.backend]


async def test_a_budget_that_is_new_or_used_up(
    counted: Counted, database: Database, admission: Admission, caller: Caller, policy: Policy
) -> None:
    cost = cover_nano(60_000, PRICE_NANO_PER_HOUR)
    for period, limit in (("day", 3 * cost), ("lifetime", 100 * cost)):
        async with database.across_tenants("test") as tx:
            await budget.set_budget(tx, caller.tenant_id, period=period, limit_nano=limit, actor="test")  # type: ignore[arg-type]

    async def one() -> bool:
        try:
            async with admission.admit(caller, FILE, policy, DECISION) as lease:
                await lease.settle(60_000, HERE, outcome=DONE)
        except BudgetExhausted:
            return False
        return True

    assert await one()  # which opens the windows
    counted.committed = 0
    assert sum(await asyncio.gather(*(one() for _ in range(10)))) == 2
    assert counted.committed == 4
    async with database.tenant(caller.tenant_id) as tx:
        standings = {each.budget.period: each for each in await budget.listing(tx, caller.tenant_id)}
        open_sessions = (await tx.execute(text("select count(*) from sessions where status = 'open'"))).scalar_one()
    assert {(each.settled_nano, each.held_nano) for each in standings.values()} == {(3 * cost, 0)}
    assert open_sessions == 0


async def test_many_sessions_of_several_budgets_at_once(
    database: Database, admission: Admission, caller: Caller, policy: Policy, list_price: Price
) -> None:
    for period in ("day", "lifetime"):
        for hard in (True, False):
            async with database.across_tenants("test") as tx:
                await budget.set_budget(
                    tx,
                    caller.tenant_id,
                    period=period,
                    limit_nano=10**12,
                    hard=hard,
                    actor="test",  # type: ignore[arg-type]
                )

    async def one(part_ms: int) -> None:
        async with admission.admit(caller, FILE, policy, DECISION) as lease:
            await lease.settle(part_ms, HERE)
            await lease.extend(90_000)
            await lease.settle(90_000, HERE, outcome=DONE)

    await one(1_000)
    await asyncio.gather(*(one(1_000 + 500 * number) for number in range(15)))
    async with database.tenant(caller.tenant_id) as tx:
        spent = {each.settled_nano for each in await budget.listing(tx, caller.tenant_id)}
        held = {each.held_nano for each in await budget.listing(tx, caller.tenant_id)}
        billed = (await tx.execute(text("select sum(amount_nano), sum(billed_ms) from usage_ledger"))).one()
    assert (held, billed[1]) == ({0}, 16 * 90_000)
    assert spent == {billed[0]}


async def test_whoever_has_lost_the_session_bills_nothing(
    database: Database, admission: Admission, caller: Caller, policy: Policy
) -> None:
    with pytest.raises(TakenOver):
        async with admission.admit(caller, Demand(kind="stream"), policy, DECISION) as lease:
            async with database.tenant(caller.tenant_id) as tx:
                assert await sessions.take_over(tx, caller.tenant_id, lease.session_id, lease.turn)
            await lease.settle(15_000, HERE)
    assert (await rows(database, lease))["usage_ledger"] == []


async def test_a_step_binds_its_tenant_for_itself_alone(
    counted: Counted, admission: Admission, caller: Caller, policy: Policy
) -> None:
    async with admission.admit(caller, FILE, policy, DECISION) as lease:
        await lease.settle(60_000, HERE, outcome=DONE)
    for _ in range(5):
        row = await counted.once(
            "select current_setting('app.tenant_id', true) as bound, count(*) as seen from tenants"
        )
        assert row["bound"] in (None, "")
        assert row["seen"] == 0


async def test_another_tenants_session_is_nothing_to_settle(
    counted: Counted, admission: Admission, caller: Caller, policy: Policy, other_tenant: Tenant
) -> None:
    async with admission.admit(caller, FILE, policy, DECISION) as lease:
        segment = lease._segment(0, 15_000, 0, HERE)
        with pytest.raises(Unusual):
            await steps.settle(counted, other_tenant.id, segment, turn=0, progress=None, outcome=None)
        await lease.settle(15_000, HERE, outcome=DONE)
    assert len((await rows(counted, lease))["usage_ledger"]) == 1


async def test_a_step_that_is_cut_off_leaves_a_good_connection(counted: Counted, caller: Caller) -> None:
    for _ in range(6):
        working = asyncio.create_task(counted.once("select pg_sleep(30)"))
        await asyncio.sleep(0.02)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        assert working.cancelled()
    assert (await counted.once("select 1 as one"))["one"] == 1
