"""The ledger under replay: however often and in whatever order segments arrive, each is billed once and in full."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from policy import budget, metering, pricing
from policy.errors import Conflict, Invalid
from policy.metering import Segment
from policy.pricing import Price
from policy.tenants import Tenant
from runtime.database import Database

BLOCK_MS = 12_345


def segment(source: UUID, number: int, price: Price, **changes: Any) -> Segment:
    values = {
        "source_id": source,
        "segment_no": number,
        "start_ms": number * BLOCK_MS,
        "end_ms": (number + 1) * BLOCK_MS,
        "backend": "self_hosted",
        "model": "micro",
        "customer": None,
        "price": price,
    }
    return Segment(**{**values, **changes})


async def settle(database: Database, tenant: Tenant, what: Segment) -> bool:
    async with database.tenant(tenant.id) as tx:
        return await metering.settle(tx, tenant.id, what)


async def everything(database: Database, tenant: Tenant) -> Any:
    """All that a settle may change, as it stands."""
    async with database.tenant(tenant.id) as tx:
        query = """
            select (select count(*) from usage_keys) as keys,
                   (select count(*) from usage_ledger) as rows,
                   (select sum(billed_ms) from usage_ledger) as billed_ms,
                   (select sum(amount_nano) from usage_ledger) as amount,
                   (select sum(billed_ms) from sessions) as sessions_ms,
                   (select sum(accepted_ms) from sessions) as accepted_ms,
                   (select sum(segments) from sessions) as segments,
                   (select sum(settled_nano) from budget_windows) as settled,
                   (select sum(held_nano) from budget_windows) as held,
                   (select sum(amount_nano) from budget_holds) as holds
        """
        return (await tx.execute(text(query))).one()


async def test_sixteen_clients_replaying_two_hundred_segments_bill_each_once(
    database: Database, billed_tenant: Tenant, open_session: Any, list_price: Price
) -> None:
    sources = [await open_session(billed_tenant) for _ in range(20)]
    for source in sources:
        async with database.tenant(billed_tenant.id) as tx:
            await budget.hold(tx, billed_tenant.id, source, 20_000_000)
    segments = [segment(source, number, list_price) for source in sources for number in range(10)]
    deliveries = segments * 10
    random.Random(7).shuffle(deliveries)
    waiting = deque(deliveries)
    billed, replayed = 0, 0

    async def client() -> None:
        nonlocal billed, replayed
        while waiting:
            delivery = waiting.popleft()
            try:
                if await settle(database, billed_tenant, delivery):
                    billed += 1
                else:
                    replayed += 1
            except Conflict:  # its predecessor is not there yet
                waiting.append(delivery)

    await asyncio.gather(*(client() for _ in range(16)))

    each = pricing.amount_nano(BLOCK_MS, list_price.price_nano_per_hour)
    found = await everything(database, billed_tenant)
    assert (billed, replayed) == (200, 1800)
    assert (found.keys, found.rows, found.segments) == (200, 200, 200)
    assert found.billed_ms == found.sessions_ms == found.accepted_ms == 200 * BLOCK_MS
    assert found.amount == found.settled == 200 * each
    assert found.held == found.holds == 20 * 20_000_000 - 200 * each


async def test_a_replay_changes_nothing(
    database: Database, billed_tenant: Tenant, open_session: Any, list_price: Price
) -> None:
    source = await open_session(billed_tenant)
    assert await settle(database, billed_tenant, segment(source, 0, list_price))
    before = await everything(database, billed_tenant)
    assert not await settle(database, billed_tenant, segment(source, 0, list_price))
    assert await everything(database, billed_tenant) == before


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"segment_no": 1, "start_ms": BLOCK_MS - 1, "end_ms": 2 * BLOCK_MS}, id="overlap"),
        pytest.param({"segment_no": 1, "start_ms": BLOCK_MS + 1, "end_ms": 2 * BLOCK_MS}, id="gap"),
        pytest.param({"segment_no": 0, "start_ms": 0, "end_ms": BLOCK_MS + 1}, id="other audio, same number"),
        pytest.param({"segment_no": 0, "start_ms": BLOCK_MS, "end_ms": 2 * BLOCK_MS}, id="next audio, same number"),
    ],
)
async def test_what_does_not_follow_is_refused_and_rolled_back(
    database: Database, billed_tenant: Tenant, open_session: Any, list_price: Price, wrong: dict[str, int]
) -> None:
    source = await open_session(billed_tenant)
    await settle(database, billed_tenant, segment(source, 0, list_price))
    before = await everything(database, billed_tenant)
    with pytest.raises(Conflict):
        await settle(database, billed_tenant, segment(source, 1, list_price, **wrong))
    assert await everything(database, billed_tenant) == before
    with pytest.raises(Invalid):
        await settle(database, billed_tenant, segment(source, 1, list_price, end_ms=BLOCK_MS))


async def test_another_tenant_cannot_bill_to_a_session(
    database: Database, billed_tenant: Tenant, other_tenant: Tenant, open_session: Any, list_price: Price
) -> None:
    source = await open_session(billed_tenant)
    with pytest.raises(Conflict):
        await settle(database, other_tenant, segment(source, 0, list_price))


@pytest.mark.parametrize("change", ["update usage_ledger set billed_ms = 0", "delete from usage_ledger"])
async def test_the_ledger_cannot_be_changed(
    database: Database, billed_tenant: Tenant, open_session: Any, list_price: Price, change: str
) -> None:
    await settle(database, billed_tenant, segment(await open_session(billed_tenant), 0, list_price))
    for door in (database.tenant(billed_tenant.id), database.across_tenants("test")):
        with pytest.raises(DBAPIError, match="permission denied"):
            async with door as tx:
                await tx.execute(text(change))


async def test_a_settle_frees_what_was_held_for_it_and_counts_what_it_cost(
    database: Database, billed_tenant: Tenant, open_session: Any, list_price: Price
) -> None:
    source = await open_session(billed_tenant)
    async with database.tenant(billed_tenant.id) as tx:
        await budget.hold(tx, billed_tenant.id, source, 10_000_000)
    await settle(database, billed_tenant, segment(source, 0, list_price, held_nano=4_000_000))
    await settle(database, billed_tenant, segment(source, 1, list_price, held_nano=9_000_000))
    found = await everything(database, billed_tenant)
    assert (found.held, found.holds) == (0, 0)  # never below
    assert found.settled == 2 * pricing.amount_nano(BLOCK_MS, list_price.price_nano_per_hour)


async def test_the_ledger_day_is_the_utc_date_of_the_sessions_start(
    database: Database, billed_tenant: Tenant, open_session: Any, list_price: Price
) -> None:
    source = await open_session(billed_tenant)
    async with database.tenant(billed_tenant.id) as tx:
        await tx.execute(text("update sessions set started_at = '2026-03-31T23:59:59.999Z'"))
    await settle(database, billed_tenant, segment(source, 0, list_price))
    async with database.tenant(billed_tenant.id) as tx:
        assert (await tx.execute(text("select ledger_day from usage_ledger"))).scalar_one() == date(2026, 3, 31)


async def test_usage_by_any_group(
    database: Database, billed_tenant: Tenant, other_tenant: Tenant, open_session: Any, list_price: Price
) -> None:
    for customer, model, count in (("acme", "micro", 2), ("acme", "small", 1), (None, "micro", 1)):
        source = await open_session(billed_tenant, customer=customer)
        for number in range(count):
            await settle(database, billed_tenant, segment(source, number, list_price, customer=customer, model=model))
    await settle(database, other_tenant, segment(await open_session(other_tenant), 0, list_price))
    today = datetime.now(UTC).date()

    async def rows(**query: Any) -> list[dict[str, Any]]:
        async with database.tenant(billed_tenant.id) as tx:
            return [row.as_json() for row in await metering.usage(tx, billed_tenant.id, **query)]

    each = {"requests": 1, "currency": "USD"}
    assert await rows(group_by=("model", "customer")) == [
        {"model": "micro", "customer": "acme", **each, "audio_ms": 24690, "billed_ms": 24690, "amount": "0.00176945"},
        {"model": "micro", "customer": None, **each, "audio_ms": 12345, "billed_ms": 12345, "amount": "0.000884725"},
        {"model": "small", "customer": "acme", **each, "audio_ms": 12345, "billed_ms": 12345, "amount": "0.000884725"},
    ]
    [total] = await rows(group_by=(), start=today, end=today + timedelta(days=1))
    assert total == {"requests": 3, "currency": "USD", "audio_ms": 49380, "billed_ms": 49380, "amount": "0.0035389"}
    [by_day] = await rows(group_by=["backend", "day"], customer="acme")
    assert list(by_day)[:2] == ["day", "backend"]
    assert (by_day["day"], by_day["requests"], by_day["billed_ms"]) == (today.isoformat(), 2, 37035)
    assert await rows(end=today) == await rows(start=today + timedelta(days=1)) == []
    with pytest.raises(Invalid):
        await rows(group_by=("subject",))


async def test_the_tenants_own_price_comes_first_then_the_very_models(
    database: Database, tenant: Tenant, other_tenant: Tenant
) -> None:
    async with database.across_tenants("test set-up") as tx:
        for model, owner, nano in (("*", None, 1), ("m", None, 2), ("*", tenant.id, 3), ("m", tenant.id, 4)):
            await pricing.set_price(
                tx,
                backend="priced",
                model=model,
                price_nano_per_hour=nano,
                currency="EUR",
                tenant_id=owner,
                actor="test",
            )

    async def price(of: Tenant, model: str, at: datetime | None = None) -> int:
        async with database.tenant(of.id) as tx:
            return (await pricing.price_for(tx, of.id, "priced", model, "EUR", at=at)).price_nano_per_hour

    assert [await price(of, model) for of in (tenant, other_tenant) for model in ("m", "other")] == [4, 3, 2, 1]
    for currency, backend in (("USD", "priced"), ("EUR", "unpriced")):
        async with database.tenant(tenant.id) as tx:
            with pytest.raises(pricing.NoPrice):
                await pricing.price_for(tx, tenant.id, backend, "m", currency)

    async with database.tenant(tenant.id) as tx:
        before = (await tx.execute(text("select now()"))).scalar_one()
    async with database.across_tenants("test set-up") as tx:
        for _ in range(2):  # the second changes nothing
            await pricing.set_price(
                tx,
                backend="priced",
                model="m",
                price_nano_per_hour=5,
                currency="EUR",
                tenant_id=tenant.id,
                actor="test",
            )
        book = await pricing.listing(tx, tenant.id)
    assert await price(tenant, "m") == 5
    assert await price(tenant, "m", before) == 4
    assert [entry.price.price_nano_per_hour for entry in book if entry.price.backend == "priced"] == [1, 2, 3, 5]
