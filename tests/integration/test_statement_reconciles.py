"""From admission to bill: what the sessions heard, what the ledger has and what the statement says is one number."""

from __future__ import annotations

import asyncio
import json
import random
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from policy import metering, policies, pricing, sessions, statements
from policy.admission import Admission, Outcome
from policy.errors import Conflict, Invalid
from policy.identity import Caller
from policy.metering import Segment
from policy.pricing import Price
from policy.resolve import Candidate, Decision, Demand
from policy.statements import Statement
from policy.tenants import Tenant
from runtime.coordination import InProcess
from runtime.database import Database

MICRO, SMALL = (Candidate("self_hosted", model, "") for model in ("micro", "small"))
DONE = Outcome("completed")


async def build(database: Database, tenant: Tenant, start: date, end: date, customer: str | None = None) -> Statement:
    async with database.tenant(tenant.id) as tx:
        return await statements.build(tx, tenant, start, end, customer)


def this_day() -> tuple[date, date]:
    """Today, and yesterday in case midnight has just passed; half-open."""
    today = datetime.now(UTC).date()
    return today - timedelta(days=1), today + timedelta(days=1)


async def test_a_busy_day_reconciles_to_the_millisecond(
    database: Database, billed_tenant: Tenant, other_tenant: Tenant, caller: Caller, list_price: Price
) -> None:
    dice = random.Random(11)
    admission = Admission(database, InProcess())
    async with database.tenant(billed_tenant.id) as tx:
        policy = await policies.current(tx, billed_tenant.id)
    heard: dict[tuple[str, str | None], int] = {}
    clients = asyncio.Semaphore(6)

    async def stream(customer: str | None, candidate: Candidate, marks: list[int], crash: bool) -> None:
        demand = Demand(kind="stream", customer=customer)
        async with clients, admission.admit(caller, demand, policy, Decision((MICRO, SMALL), ())) as lease:
            for mark in marks:
                await lease.extend(mark + 15_000)
                await lease.settle(mark, candidate)
            heard[candidate.model, customer] = heard.get((candidate.model, customer), 0) + marks[-1]
            if crash:
                raise ConnectionResetError
            await lease.settle(marks[-1], candidate, outcome=DONE)

    results = await asyncio.gather(
        *(
            stream(
                dice.choice(["acme", "zoo", None]),
                dice.choice([MICRO, SMALL]),
                sorted(dice.sample(range(1, 60_000), dice.randint(1, 4))),
                crash=number % 5 == 0,
            )
            for number in range(30)
        ),
        return_exceptions=True,
    )
    assert {type(result) for result in results} == {type(None), ConnectionResetError}

    whole = await build(database, billed_tenant, *this_day())
    check = whole.reconciliation
    assert check.balanced
    assert check.difference_ms == 0
    assert check.lines_billed_ms == check.ledger.sessions_billed_ms == sum(heard.values())
    assert sum(line.sessions for line in whole.lines) == 30
    assert sum(line.segments for line in whole.lines) == check.ledger.rows
    for line in whole.lines:
        assert line.billed_ms == sum(ms for (model, _), ms in heard.items() if model == line.model)
        assert line.price_id == list_price.id
    async with database.tenant(billed_tenant.id) as tx:
        [usage] = await metering.usage(tx, billed_tenant.id, group_by=())
        settled = (await tx.execute(text("select settled_nano from budget_windows"))).scalar_one()
    assert usage.amount_nano == settled == check.ledger.amount_nano
    assert (usage.billed_ms, usage.requests) == (sum(heard.values()), 30)

    for customer in ("acme", "zoo"):
        part = await build(database, billed_tenant, *this_day(), customer)
        assert part.reconciliation.balanced
        assert part.reconciliation.lines_billed_ms == sum(ms for (_, whose), ms in heard.items() if whose == customer)
    assert (await build(database, other_tenant, *this_day())).lines == ()


async def test_a_statement_is_of_the_days_on_which_its_sessions_began(
    database: Database, billed_tenant: Tenant, open_session: Any, list_price: Price
) -> None:
    starts = {
        "2026-02-28T23:59:59.999999Z": 1_000,
        "2026-03-01T00:00:00Z": 20_000,
        "2026-03-31T23:59:59.999999Z": 300_000,
        "2026-04-01T00:00:00Z": 4_000_000,
    }
    for started_at, ms in starts.items():
        source = await open_session(billed_tenant)
        async with database.tenant(billed_tenant.id) as tx:
            moment = datetime.fromisoformat(started_at)
            await tx.execute(text("update sessions set started_at = :at where id = :id"), {"at": moment, "id": source})
            span = Segment(source, 0, 0, ms, "self_hosted", "micro", None, list_price)
            await metering.settle(tx, billed_tenant.id, span)
    march = await build(database, billed_tenant, date(2026, 3, 1), date(2026, 4, 1))
    assert march.reconciliation.balanced
    assert march.reconciliation.lines_billed_ms == 320_000
    assert [(str(day.day), day.billed_ms, str(day.amount)) for day in march.annex] == [
        ("2026-03-01", 20_000, "0.001433"),
        ("2026-03-31", 300_000, "0.021500"),
    ]
    assert str(march.total) == "0.02"
    document = json.loads(statements.to_json(march))
    assert document["reconciliation"]["difference_ms"] == 0
    with pytest.raises(Invalid):
        await build(database, billed_tenant, date(2026, 3, 1), date(2026, 3, 1))


async def test_a_millisecond_that_a_session_has_and_the_ledger_has_not_is_found(
    database: Database, billed_tenant: Tenant, open_session: Any, list_price: Price
) -> None:
    source = await open_session(billed_tenant)
    async with database.tenant(billed_tenant.id) as tx:
        await metering.settle(tx, billed_tenant.id, Segment(source, 0, 0, 5_000, "self_hosted", "m", None, list_price))
        await tx.execute(text("update sessions set billed_ms = billed_ms + 1"))
    check = (await build(database, billed_tenant, *this_day())).reconciliation
    assert (check.difference_ms, check.balanced) == (-1, False)


async def test_a_new_price_begins_a_new_line_and_two_currencies_are_refused(
    database: Database, billed_tenant: Tenant, open_session: Any, list_price: Price
) -> None:
    async with database.across_tenants("test set-up") as tx:
        other, foreign = [
            await pricing.set_price(
                tx,
                backend="self_hosted",
                price_nano_per_hour=nano,
                currency=currency,
                tenant_id=billed_tenant.id,
                actor="test",
            )
            for nano, currency in ((10**9, "USD"), (10**9, "EUR"))
        ]

    async def bill(price: Price) -> None:
        source = await open_session(billed_tenant)
        async with database.tenant(billed_tenant.id) as tx:
            span = Segment(source, 0, 0, 3_600_000, "self_hosted", "micro", None, price)
            await metering.settle(tx, billed_tenant.id, span)
            await sessions.close_session(tx, billed_tenant.id, source, DONE)

    await bill(list_price)
    await bill(other)
    result = await build(database, billed_tenant, *this_day())
    assert {(line.price_id, str(line.amount)) for line in result.lines} == {(list_price.id, "0.26"), (other.id, "1.00")}
    assert (str(result.total), str(result.reconciliation.rounding)) == ("1.26", "0.002000000")
    await bill(foreign)
    with pytest.raises(Conflict, match="EUR"):
        await build(database, billed_tenant, *this_day())
