"""Versions of a policy on the clock of a real Postgres: scheduled, replaced, withdrawn, rolled back, never a gap."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import text

from policy import history, policies
from policy.errors import Conflict, Invalid, NoPrice, NotFound
from policy.history import Version
from policy.policies import PolicyBody
from policy.pricing import set_price
from policy.resolve import Demand, Offer
from policy.tenants import Tenant
from policy.terms import TermsBook
from runtime.database import Database

OURS = Offer("self_hosted", ("small",), True, True, True, None, True)


def days(count: float) -> datetime:
    return datetime.now(UTC) + timedelta(days=count)


async def put(database: Database, tenant: Tenant, streams: int, **when: Any) -> int:
    async with database.across_tenants("test") as tx:
        body = PolicyBody(max_streams=streams)
        return (await policies.put(tx, tenant.id, body, actor="ops", **when)).version


async def withdraw(database: Database, tenant: Tenant, version: int) -> None:
    async with database.across_tenants("test") as tx:
        await history.withdraw(tx, tenant.id, version, actor="ops")


async def versions(database: Database, tenant: Tenant) -> list[Version]:
    """Oldest first."""
    async with database.tenant(tenant.id) as tx:
        found, _ = await history.listing(tx, tenant.id, limit=200)
    return found[::-1]


async def standings(database: Database, tenant: Tenant) -> list[str]:
    return [version.standing for version in await versions(database, tenant)]


async def in_force(database: Database, tenant: Tenant) -> int:
    async with database.tenant(tenant.id) as tx:
        return (await policies.current(tx, tenant.id)).version


async def last_audit(database: Database, tenant: Tenant) -> Any:
    query = text("select * from audit_log where tenant_id = :id order by seq desc limit 1")
    async with database.across_tenants("test") as tx:
        return (await tx.execute(query, {"id": tenant.id})).one()


async def assert_no_gap(database: Database, tenant: Tenant) -> None:
    """Whatever was done, exactly one version is in force at every moment from the first one on."""
    spans = sorted(
        (version.effective_from, version.effective_until)
        for version in await versions(database, tenant)
        if version.effective_from is not None
    )
    assert all(until == following for (_, until), (following, _) in pairwise(spans))
    assert spans[-1][1] is None
    assert (await standings(database, tenant)).count("in_force") == 1


async def test_a_version_may_be_scheduled_and_takes_over_at_its_moment(database: Database, tenant: Tenant) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=0.6)
    scheduled = await put(database, tenant, 2, effective_from=soon)
    assert await in_force(database, tenant) == 1
    assert await standings(database, tenant) == ["in_force", "scheduled"]
    row = await last_audit(database, tenant)
    assert (row.action, row.object) == ("policy.put", f"policy/{tenant.slug}/{scheduled}")
    assert row.after["effective_from"] == soon.isoformat()
    await asyncio.sleep((soon - datetime.now(UTC)).total_seconds() + 0.05)
    assert await in_force(database, tenant) == scheduled
    assert await standings(database, tenant) == ["past", "in_force"]
    await assert_no_gap(database, tenant)


async def test_what_is_put_now_holds_until_what_was_scheduled_before(database: Database, tenant: Tenant) -> None:
    await put(database, tenant, 2, effective_from=days(2))
    await put(database, tenant, 3)
    await put(database, tenant, 4, effective_from=days(1))
    found = await versions(database, tenant)
    assert [version.standing for version in found] == ["past", "scheduled", "in_force", "scheduled"]
    assert found[2].effective_until == found[3].effective_from
    assert found[3].effective_until == found[1].effective_from
    await assert_no_gap(database, tenant)


async def test_a_scheduled_version_is_withdrawn_and_the_one_before_it_stays(database: Database, tenant: Tenant) -> None:
    scheduled = await put(database, tenant, 2, effective_from=days(1))
    last = await put(database, tenant, 3, effective_from=days(2))
    await withdraw(database, tenant, scheduled)
    found = await versions(database, tenant)
    assert [version.standing for version in found] == ["in_force", "withdrawn", "scheduled"]
    assert found[0].effective_until == found[2].effective_from
    row = await last_audit(database, tenant)
    assert (row.action, row.object, row.after) == ("policy.withdraw", f"policy/{tenant.slug}/{scheduled}", None)
    assert row.before["max_streams"] == 2
    await withdraw(database, tenant, last)
    await assert_no_gap(database, tenant)
    assert (await versions(database, tenant))[0].effective_until is None


async def test_only_what_is_scheduled_can_be_withdrawn(database: Database, tenant: Tenant) -> None:
    with pytest.raises(Conflict, match="in force"):
        await withdraw(database, tenant, 1)
    await put(database, tenant, 2)
    with pytest.raises(Conflict, match="past"):
        await withdraw(database, tenant, 1)
    scheduled = await put(database, tenant, 3, effective_from=days(1))
    await withdraw(database, tenant, scheduled)
    with pytest.raises(Conflict, match="withdrawn"):
        await withdraw(database, tenant, scheduled)
    with pytest.raises(NotFound):
        await withdraw(database, tenant, 99)
    await assert_no_gap(database, tenant)


async def test_two_for_one_moment_the_later_word_counts(database: Database, tenant: Tenant) -> None:
    moment = days(1)
    await put(database, tenant, 2, effective_from=moment)
    await put(database, tenant, 3, effective_from=moment)
    assert await standings(database, tenant) == ["in_force", "withdrawn", "scheduled"]
    await assert_no_gap(database, tenant)


async def test_the_past_is_not_changed(database: Database, tenant: Tenant) -> None:
    for moment in (datetime.now(UTC) - timedelta(seconds=1), datetime(2020, 1, 1, tzinfo=UTC)):
        with pytest.raises(Invalid) as refused:
            await put(database, tenant, 2, effective_from=moment)
        assert refused.value.param == "effective_from"
    assert await standings(database, tenant) == ["in_force"]


async def test_a_rollback_is_a_new_version_equal_to_an_old_one(database: Database, tenant: Tenant) -> None:
    await put(database, tenant, 2)
    await put(database, tenant, 3)
    async with database.across_tenants("test") as tx:
        back = await history.rollback(tx, tenant.id, 2, actor="ops", request_id="req_1")
        with pytest.raises(NotFound):
            await history.rollback(tx, tenant.id, 77, actor="ops")
    assert (back.version, back.body.max_streams) == (4, 2)
    row = await last_audit(database, tenant)
    assert (row.action, row.before["max_streams"], row.after["max_streams"]) == ("policy.rollback", 3, 2)
    assert row.request_id == "req_1"
    one, other = (await versions(database, tenant))[1:4:2]
    assert history.difference(one.body, other.body) == {}
    assert history.difference(PolicyBody(), one.body) == {"max_streams": (8, 2)}


async def test_who_has_not_seen_the_newest_version_is_told(database: Database, tenant: Tenant) -> None:
    """Of two who start from the same version, the second one does not undo what the first one did."""
    answers = await asyncio.gather(
        *(put(database, tenant, streams, newest=1) for streams in range(2, 8)), return_exceptions=True
    )
    assert [answer for answer in answers if not isinstance(answer, Conflict)] == [2]
    assert await standings(database, tenant) == ["past", "in_force"]
    with pytest.raises(Conflict, match="Version 2 was put meanwhile"):
        await put(database, tenant, 9, newest=1)


async def test_writers_at_once_leave_no_gap_whatever_they_do(database: Database, tenant: Tenant) -> None:
    dice = random.Random(4)

    async def something(number: int) -> None:
        match dice.randrange(4):
            case 0:
                await put(database, tenant, number)
            case 1 | 2:
                await put(database, tenant, number, effective_from=days(dice.randint(1, 5)))
            case _:
                for version in await versions(database, tenant):
                    if version.standing == "scheduled":
                        await withdraw(database, tenant, version.version)
                        return

    for _ in range(6):
        outcomes = await asyncio.gather(*(something(number) for number in range(1, 7)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} <= {type(None), Conflict}
        await assert_no_gap(database, tenant)
    numbers = [version.version for version in await versions(database, tenant)]
    assert numbers == list(range(1, len(numbers) + 1))


async def test_should_the_clock_be_set_back_the_newest_version_stays_in_force(
    database: Database, tenant: Tenant
) -> None:
    await put(database, tenant, 2)
    async with database.across_tenants("test") as tx:  # what Postgres would hold had its clock been an hour ahead
        for statement in (
            "update policies set effective = tstzrange(lower(effective) + interval '1 hour', null)"
            " where tenant_id = :id and version = 2",
            "update policies set effective = tstzrange(lower(effective), upper(effective) + interval '1 hour')"
            " where tenant_id = :id and version = 1",
        ):
            await tx.execute(text(statement), {"id": tenant.id})
    async with database.across_tenants("test") as tx:
        ahead = (await history.get(tx, tenant.id, 2)).effective_from
        inserted = text("""
            insert into policies (tenant_id, version, effective, body, created_by, created_at)
            values (:id, 3, 'empty', '{}', 'test', :at)
        """)
        await tx.execute(inserted, {"id": tenant.id, "at": ahead})
    assert await in_force(database, tenant) == 2
    latest = await put(database, tenant, 4)
    assert await in_force(database, tenant) == latest
    await assert_no_gap(database, tenant)


async def test_pages_and_other_tenants(database: Database, tenant: Tenant, other_tenant: Tenant) -> None:
    for streams in range(2, 6):
        await put(database, tenant, streams)
    async with database.tenant(tenant.id) as tx:
        first, following = await history.listing(tx, tenant.id, limit=3)
        rest, end = await history.listing(tx, tenant.id, before=following, limit=3)
        assert [version.version for version in (*first, *rest)] == [5, 4, 3, 2, 1]
        assert end is None
        with pytest.raises(Invalid):
            await history.listing(tx, tenant.id, limit=0)
    async with database.tenant(other_tenant.id) as tx:
        assert (await history.listing(tx, tenant.id))[0] == []
        with pytest.raises(NotFound):
            await history.get(tx, tenant.id, 1)
        with pytest.raises(NotFound):
            await history.get(tx, tenant.id)


# --- what a process keeps of it -----------------------------------------------------------------------------------


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_terms_are_kept_for_seconds_and_no_longer(database: Database, tenant: Tenant) -> None:
    clock = Clock()
    book = TermsBook(database, clock=clock)
    assert (await book.of(tenant.id)).policy.version == 1
    await put(database, tenant, 2)
    clock.now = 0.9
    assert (await book.of(tenant.id)).policy.version == 1
    clock.now = 2.0
    assert (await book.of(tenant.id)).policy.version == 2
    await put(database, tenant, 3)
    assert (await book.of(tenant.id)).policy.version == 2
    book.forget()
    assert (await book.of(tenant.id)).policy.version == 3


async def test_terms_change_at_the_moment_of_a_scheduled_version(database: Database, tenant: Tenant) -> None:
    book = TermsBook(database)
    soon = datetime.now(UTC) + timedelta(seconds=0.5)
    await put(database, tenant, 2, effective_from=soon)
    while datetime.now(UTC) < soon - timedelta(seconds=0.02):
        assert (await book.of(tenant.id)).policy.version == 1
        await asyncio.sleep(0.01)
    await asyncio.sleep((soon - datetime.now(UTC)).total_seconds() + 0.05)
    assert (await book.of(tenant.id)).policy.version == 2


async def test_what_was_kept_refuses_nothing(database: Database, tenant: Tenant) -> None:
    book = TermsBook(database, clock=Clock())
    theirs = replace(OURS, backend="unpriced", kind="relay")  # of which no test sets a list price
    async with database.across_tenants("test") as tx:
        await policies.put(tx, tenant.id, PolicyBody(backends=("unpriced",)), actor="ops")
    with pytest.raises(NoPrice):
        await book.decide(tenant.id, Demand("file"), [theirs])
    async with database.across_tenants("test") as tx:
        await set_price(
            tx, backend="unpriced", price_nano_per_hour=5, currency="USD", tenant_id=tenant.id, actor="test"
        )
    terms, decision = await book.decide(tenant.id, Demand("file"), [theirs])
    assert decision.candidates[0].backend == "unpriced"
    price = terms.prices.of("unpriced", "small")
    assert price is not None
    assert price.price_nano_per_hour == 5


async def test_a_limit_that_was_kept_refuses_nothing_either(database: Database, tenant: Tenant) -> None:
    async with database.across_tenants("test") as tx:
        await policies.put(tx, tenant.id, PolicyBody(max_file_ms=1000), actor="ops")
        await set_price(
            tx, backend="self_hosted", price_nano_per_hour=5, currency="USD", tenant_id=tenant.id, actor="test"
        )
    book = TermsBook(database, clock=Clock())
    with pytest.raises(Invalid):
        await book.decide(tenant.id, Demand("file", audio_ms=2000), [OURS])
    async with database.across_tenants("test") as tx:
        await policies.put(tx, tenant.id, PolicyBody(max_file_ms=2000), actor="ops")
    terms, _ = await book.decide(tenant.id, Demand("file", audio_ms=2000), [OURS])
    assert terms.policy.version == 3


async def test_no_tenants_terms_are_anothers(database: Database, tenant: Tenant, other_tenant: Tenant) -> None:
    book = TermsBook(database, clock=Clock())
    await put(database, tenant, 2)
    mine, theirs = await asyncio.gather(book.of(tenant.id), book.of(other_tenant.id))
    assert (mine.policy.tenant_id, theirs.policy.tenant_id) == (tenant.id, other_tenant.id)
    assert (mine.policy.body.max_streams, theirs.policy.body.max_streams) == (2, 8)


async def test_the_body_is_stored_as_json_that_people_can_read(database: Database, tenant: Tenant) -> None:
    async with database.across_tenants("test") as tx:
        body = PolicyBody(
            backends=("self_hosted", "relay"), aliases={"best": "deepgram/nova-3"}, max_price_per_hour="0.5"
        )
        await policies.put(tx, tenant.id, body, actor="ops")
        query = text("select cast(body as text) from policies where tenant_id = :id order by version desc limit 1")
        stored = json.loads((await tx.execute(query, {"id": tenant.id})).scalar_one())
    assert stored["aliases"] == {"best": "deepgram/nova-3"}
    assert stored["max_price_per_hour"] == "0.5"
