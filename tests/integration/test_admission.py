"""The lease: whatever happens inside an admission, the session ends, the hold goes back, what was heard is billed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from policy import budget, policies, pricing, sessions, tenants
from policy.admission import Admission, Lease, Outcome, reap
from policy.errors import (
    BudgetExhausted,
    ConcurrencyLimited,
    Conflict,
    LedgerUnavailable,
    NoPrice,
    NotFound,
    RateLimited,
    TenantSuspended,
)
from policy.identity import Caller
from policy.policies import Policy
from policy.pricing import Price, amount_nano, cover_nano
from policy.resolve import Candidate, Decision, Demand
from policy.sessions import Session
from policy.tenants import Tenant
from runtime.coordination import InProcess
from runtime.database import Database, Transaction

BLOCK_MS = 15_000
HERE = Candidate("self_hosted", "micro", "first")
THERE = Candidate("relay", "big", "second")
DECISION = Decision((HERE,), ())
STREAM = Demand(kind="stream")
DONE = Outcome("completed", engine="ctranslate2", language="en", utterances=1, words=2, text="hello there")


@pytest.fixture
def admission(database: Database) -> Admission:
    return Admission(database, InProcess(), block_ms=BLOCK_MS)


@pytest.fixture
async def policy(database: Database, billed_tenant: Tenant) -> Policy:
    async with database.tenant(billed_tenant.id) as tx:
        return await policies.current(tx, billed_tenant.id)


@pytest.fixture
async def relay_price(database: Database, list_price: Price) -> Price:
    """A dearer backend."""
    async with database.across_tenants("test set-up") as tx:
        return await pricing.set_price(
            tx, backend="relay", price_nano_per_hour=3 * list_price.price_nano_per_hour, currency="USD", actor="test"
        )


async def stored(database: Database, lease: Lease) -> Session:
    async with database.tenant(lease.tenant_id) as tx:
        return await sessions.get(tx, lease.tenant_id, lease.session_id)


async def money(database: Database, tenant_id: UUID) -> tuple[int, int]:
    """Settled and held nano-units of the tenant's only budget."""
    async with database.tenant(tenant_id) as tx:
        [standing] = await budget.listing(tx, tenant_id)
    return standing.settled_nano, standing.held_nano


async def ledger(database: Database, tenant_id: UUID) -> list[Any]:
    async with database.tenant(tenant_id) as tx:
        return list(await tx.execute(text("select * from usage_ledger order by seq")))


async def test_a_stream_is_held_extended_settled_and_closed(
    database: Database, admission: Admission, caller: Caller, policy: Policy, list_price: Price
) -> None:
    nano = list_price.price_nano_per_hour
    async with admission.admit(caller, STREAM, policy, DECISION) as lease:
        assert (lease.held_ms, lease.settled_ms, lease.currency) == (30_000, 0, "USD")
        assert await money(database, caller.tenant_id) == (0, cover_nano(30_000, nano))
        await lease.extend(45_000)
        await lease.extend(20_000)  # less than is held: nothing
        assert await money(database, caller.tenant_id) == (0, cover_nano(45_000, nano))
        receipt = await lease.settle(15_000, HERE)
        assert (receipt.accepted_ms, receipt.billed_ms, receipt.tenant_active) == (15_000, 15_000, True)
        assert receipt.remaining_ms == await lease.remaining_ms(HERE)
        assert await money(database, caller.tenant_id) == (
            amount_nano(15_000, nano),
            cover_nano(45_000, nano) - cover_nano(15_000, nano),
        )
        receipt = await lease.settle(31_234, HERE, outcome=DONE)
        assert (receipt.accepted_ms, receipt.billed_ms) == (31_234, 31_234)
    session = await stored(database, lease)
    assert (session.status, session.text, session.words, session.engine) == (
        "completed",
        "hello there",
        2,
        "ctranslate2",
    )
    assert (session.backend, session.model, session.segments) == ("self_hosted", "micro", 2)
    assert (session.accepted_ms, session.billed_ms) == (31_234, 31_234)
    assert session.ended_at is not None
    rows = await ledger(database, caller.tenant_id)
    assert [(row.segment_no, row.start_ms, row.end_ms) for row in rows] == [(0, 0, 15_000), (1, 15_000, 31_234)]
    assert await money(database, caller.tenant_id) == (sum(row.amount_nano for row in rows), 0)


async def test_a_file_is_held_whole(
    database: Database, admission: Admission, caller: Caller, policy: Policy, list_price: Price
) -> None:
    demand = Demand(kind="file", audio_ms=61_230, customer="acme", metadata={"ticket": "7"}, request_id="req_1")
    async with admission.admit(caller, demand, policy, DECISION) as lease:
        assert lease.held_ms == 61_230
        await lease.settle(61_230, HERE, outcome=DONE)
    session = await stored(database, lease)
    assert (session.customer, session.metadata, session.request_id) == ("acme", {"ticket": "7"}, "req_1")
    assert (session.subject, session.policy_version, session.decision) == ("tester", 1, DECISION)
    [row] = await ledger(database, caller.tenant_id)
    assert (row.customer, row.audio_ms, row.amount_nano) == ("acme", 61_230, 4_388_150)


@pytest.mark.parametrize(
    ("kind", "error", "status", "code"),
    [
        ("stream", RuntimeError("a bug"), "failed", "INTERNAL"),
        ("file", RateLimited(), "failed", "RATE_LIMITED"),
        ("stream", asyncio.CancelledError(), "interrupted", None),
        ("file", asyncio.CancelledError(), "cancelled", None),
        ("file", None, "failed", "INTERNAL"),
    ],
)
async def test_leaving_without_an_outcome_ends_the_session_and_gives_the_hold_back(
    *,
    database: Database,
    admission: Admission,
    caller: Caller,
    policy: Policy,
    kind: Any,
    error: BaseException | None,
    status: str,
    code: str | None,
) -> None:
    leases: list[Lease] = []

    async def use() -> None:
        async with admission.admit(caller, Demand(kind=kind, audio_ms=60_000), policy, DECISION) as lease:
            leases.append(lease)
            await lease.settle(10_000, HERE)
            if error is not None:
                raise error

    if error is None:
        await use()
    else:
        with pytest.raises(type(error)) as raised:
            await use()
        assert raised.value is error
    session = await stored(database, leases[0])
    assert (session.status, session.code, session.billed_ms) == (status, code, 10_000)
    settled, held = await money(database, caller.tenant_id)
    assert (settled > 0, held) == (True, 0)


async def test_a_real_cancellation_even_twice_still_closes_the_row(
    database: Database, admission: Admission, caller: Caller, policy: Policy
) -> None:
    inside: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()

    async def use() -> None:
        async with admission.admit(caller, STREAM, policy, DECISION) as lease:
            inside.set_result(lease)
            await asyncio.Event().wait()

    task = asyncio.create_task(use())
    lease = await inside
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(10):
        while (session := await stored(database, lease)).status == "open":  # noqa: ASYNC110  the row is all that tells
            await asyncio.sleep(0.01)
    assert session.status == "interrupted"
    assert await money(database, caller.tenant_id) == (0, 0)


async def test_a_budget_refuses_admission_and_extension_and_leaves_what_is_held(
    database: Database, admission: Admission, caller: Caller, policy: Policy, list_price: Price
) -> None:
    limit = cover_nano(40_000, list_price.price_nano_per_hour)
    async with database.across_tenants("test set-up") as tx:
        await budget.set_budget(tx, caller.tenant_id, period="month", limit_nano=limit, actor="test")
    async with admission.admit(caller, STREAM, policy, DECISION) as lease:
        with pytest.raises(BudgetExhausted):
            await lease.extend(45_000)
        assert lease.held_ms == 30_000
        assert await lease.remaining_ms(HERE) == 40_000
        await lease.extend(40_000)
        with pytest.raises(BudgetExhausted):
            async with admission.admit(caller, STREAM, policy, DECISION):
                pytest.fail("admitted without money")
        receipt = await lease.settle(40_000, HERE, outcome=DONE)
        assert receipt.remaining_ms == 0
    async with database.tenant(caller.tenant_id) as tx:
        page = await sessions.listing(tx, caller.tenant_id)
    assert [session.id for session in page.items] == [lease.session_id]  # the refused one left no row


async def test_the_dearest_candidate_is_held_for_and_the_one_that_served_is_billed(
    *, database: Database, admission: Admission, caller: Caller, policy: Policy, list_price: Price, relay_price: Price
) -> None:
    both = Decision((HERE, THERE), ())
    async with admission.admit(caller, STREAM, policy, both) as lease:
        dear, cheap = relay_price.price_nano_per_hour, list_price.price_nano_per_hour
        assert await money(database, caller.tenant_id) == (0, cover_nano(30_000, dear))
        await lease.settle(10_000, HERE)
        await lease.settle(20_000, THERE)
        assert await money(database, caller.tenant_id) == (
            amount_nano(10_000, cheap) + amount_nano(10_000, dear),
            cover_nano(30_000, dear) - cover_nano(20_000, dear),
        )
        await lease.settle(20_000, HERE, outcome=DONE)
    assert [row.backend for row in await ledger(database, caller.tenant_id)] == ["self_hosted", "relay"]


async def test_what_has_no_price_is_not_for_sale(
    database: Database, admission: Admission, caller: Caller, policy: Policy
) -> None:
    unpriced = Candidate("unpriced", "x", "free?")
    with pytest.raises(NoPrice):
        async with admission.admit(caller, STREAM, policy, Decision((unpriced,), ())):
            pytest.fail("admitted without a price")
    async with admission.admit(caller, STREAM, policy, Decision((unpriced, HERE), ())) as lease:
        assert lease.decision.candidates == (HERE,)
        assert [refusal.backend for refusal in lease.decision.refused] == ["unpriced"]
        with pytest.raises(NoPrice):
            await lease.settle(1_000, unpriced)
        await lease.settle(0, HERE, outcome=DONE)
    assert await ledger(database, caller.tenant_id) == []


async def test_the_price_of_the_start_holds_to_the_end(
    database: Database, admission: Admission, caller: Caller, policy: Policy, list_price: Price
) -> None:
    async with admission.admit(caller, Demand(kind="job", audio_ms=60_000), policy, DECISION) as lease:
        await lease.settle(10_000, HERE)
        lease.detach()
    async with database.across_tenants("test set-up") as tx:
        await pricing.set_price(
            tx, backend="self_hosted", price_nano_per_hour=1, currency="USD", tenant_id=caller.tenant_id, actor="test"
        )
    async with admission.attached(caller.tenant_id, lease.session_id) as again:
        assert (again.held_ms, again.settled_ms, again.policy) == (60_000, 10_000, policy)
        await again.settle(60_000, HERE, outcome=DONE)
    assert {row.price_id for row in await ledger(database, caller.tenant_id)} == {list_price.id}


async def test_a_detached_job_goes_on_where_it_was_whoever_attaches(
    database: Database, admission: Admission, caller: Caller, policy: Policy, other_tenant: Tenant
) -> None:
    async with admission.admit(caller, Demand(kind="job", audio_ms=60_000), policy, DECISION) as lease:
        lease.detach()
    assert (await stored(database, lease)).status == "open"
    assert (await money(database, caller.tenant_id))[1] > 0
    with pytest.raises(RuntimeError):  # a worker that dies
        async with admission.attached(caller.tenant_id, lease.session_id) as first:
            await first.settle(20_000, HERE)
            raise RuntimeError
    with pytest.raises(NotFound):
        async with admission.attached(other_tenant.id, lease.session_id):
            pytest.fail("another tenant's session")
    async with admission.attached(caller.tenant_id, lease.session_id) as second:
        assert second.settled_ms == 20_000
        await second.settle(20_000, HERE)  # delivered again: nothing
        await second.extend(65_000)
        await second.settle(62_000, HERE, outcome=DONE)
    with pytest.raises(Conflict):
        async with admission.attached(caller.tenant_id, lease.session_id):
            pytest.fail("it has ended")
    spans = [(row.start_ms, row.end_ms) for row in await ledger(database, caller.tenant_id)]
    assert spans == [(0, 20_000), (20_000, 62_000)]
    assert (await money(database, caller.tenant_id))[1] == 0


async def test_two_holders_of_one_session_cannot_both_bill(
    database: Database, admission: Admission, caller: Caller, policy: Policy
) -> None:
    async with admission.admit(caller, Demand(kind="job", audio_ms=60_000), policy, DECISION) as lease:
        lease.detach()
    async with (
        admission.attached(caller.tenant_id, lease.session_id) as one,
        admission.attached(caller.tenant_id, lease.session_id) as two,
    ):
        results = await asyncio.gather(one.settle(15_000, HERE), two.settle(20_000, HERE), return_exceptions=True)
        assert sorted(isinstance(result, Conflict) for result in results) == [False, True]
    assert len(await ledger(database, caller.tenant_id)) == 1


async def test_extra_is_written_with_the_bill_or_not_at_all(
    database: Database, admission: Admission, caller: Caller, policy: Policy
) -> None:
    async def write(tx: Transaction) -> None:
        await tx.execute(text("update sessions set subject = 'written' where id = :id"), {"id": lease.session_id})

    async def refuse(tx: Transaction) -> None:
        await write(tx)
        raise Conflict

    async with admission.admit(caller, STREAM, policy, DECISION) as lease:
        with pytest.raises(Conflict):
            await lease.settle(10_000, HERE, extra=refuse)
        assert (await stored(database, lease)).subject == "tester"
        assert await ledger(database, caller.tenant_id) == []
        await lease.settle(10_000, HERE, outcome=DONE, extra=write)
    assert (await stored(database, lease)).subject == "written"
    assert len(await ledger(database, caller.tenant_id)) == 1


class Unheard(Database):
    """A database whose answer to one commit is lost on the way: it is committed, and nobody is told."""

    lose_next = False

    @asynccontextmanager
    async def tenant(self, tenant_id: UUID) -> AsyncIterator[Transaction]:
        async with super().tenant(tenant_id) as tx:
            yield tx
        self._lose()

    async def once(self, statement: str, *values: object) -> Any:
        row = await super().once(statement, *values)
        self._lose()
        return row

    def _lose(self) -> None:
        if self.lose_next:
            self.lose_next = False
            raise ConnectionResetError


async def test_a_commit_that_went_unanswered_is_found_and_not_billed_twice(
    settings: Any, caller: Caller, policy: Policy
) -> None:
    lossy = Unheard(settings.database_url.get_secret_value(), settings.system_database_url.get_secret_value(), pool=2)
    try:
        async with Admission(lossy, InProcess()).admit(caller, STREAM, policy, DECISION) as lease:
            lossy.lose_next = True
            with pytest.raises(LedgerUnavailable):
                await lease.settle(15_000, HERE)
            assert lease.settled_ms == 0
            assert (await lease.settle(21_000, HERE)).billed_ms == 21_000
            lossy.lose_next = True
            with pytest.raises(LedgerUnavailable):
                await lease.settle(25_000, HERE, outcome=DONE)
            assert (await lease.settle(25_000, HERE, outcome=DONE)).billed_ms == 25_000
        spans = [(row.start_ms, row.end_ms) for row in await ledger(lossy, caller.tenant_id)]
        assert spans == [(0, 15_000), (15_000, 21_000), (21_000, 25_000)]
        assert (await stored(lossy, lease)).status == "completed"
    finally:
        await lossy.aclose()


async def test_a_database_that_is_not_there_is_said_to_be_so(caller: Caller, policy: Policy) -> None:
    nowhere = "postgresql://app:x@127.0.0.1:1/none"
    gone = Database(nowhere, nowhere, pool=1)
    with pytest.raises(LedgerUnavailable) as refused:
        async with Admission(gone, InProcess()).admit(caller, STREAM, policy, DECISION):
            pytest.fail("admitted without a database")
    assert (refused.value.retryable, refused.value.code) == (True, "DATABASE_UNAVAILABLE")
    await gone.aclose()


async def test_a_connection_cut_in_the_middle_is_an_outage_and_what_is_held_still_counts(
    database: Database, settings: Any, caller: Caller, policy: Policy
) -> None:
    own = Database(settings.database_url.get_secret_value(), settings.system_database_url.get_secret_value(), pool=1)

    async def cut(tx: Transaction) -> None:
        process = (await tx.execute(text("select pg_backend_pid()"))).scalar_one()
        async with database.tenant(caller.tenant_id) as other:  # the same role, so it may
            await other.execute(text("select pg_terminate_backend(:process, 5000)"), {"process": process})

    try:
        async with Admission(own, InProcess()).admit(caller, STREAM, policy, DECISION) as lease:
            with pytest.raises(LedgerUnavailable):
                await lease.settle(15_000, HERE, extra=cut)
            assert (await lease.settle(15_000, HERE, outcome=DONE)).billed_ms == 15_000
        assert len(await ledger(database, caller.tenant_id)) == 1
    finally:
        await own.aclose()


async def test_limits_of_the_policy(database: Database, admission: Admission, caller: Caller, policy: Policy) -> None:
    tight = replace(policy, body=policy.body.model_copy(update={"max_streams": 1, "requests_per_minute": 2}))
    async with admission.admit(caller, STREAM, tight, DECISION) as lease:
        for _ in range(3):  # a refusal for want of a seat costs nothing of the rate
            with pytest.raises(ConcurrencyLimited):
                async with admission.admit(caller, STREAM, tight, DECISION):
                    pytest.fail("admitted without a seat")
        await lease.settle(1_000, HERE, outcome=DONE)
    async with admission.admit(caller, STREAM, tight, DECISION) as lease:
        await lease.settle(1_000, HERE, outcome=DONE)
    with pytest.raises(RateLimited) as refused:
        async with admission.admit(caller, STREAM, tight, DECISION):
            pytest.fail("admitted too often")
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s > 0


async def test_a_suspended_tenant_is_not_admitted_and_a_running_stream_is_told(
    database: Database, admission: Admission, caller: Caller, policy: Policy
) -> None:
    async with admission.admit(caller, STREAM, policy, DECISION) as lease:
        async with database.across_tenants("test set-up") as tx:
            await tenants.set_status(tx, caller.tenant_id, "suspended", actor="test")
        receipt = await lease.settle(10_000, HERE, outcome=DONE)
        assert (receipt.tenant_active, receipt.billed_ms) == (False, 10_000)
    with pytest.raises(TenantSuspended):
        async with admission.admit(caller, STREAM, policy, DECISION):
            pytest.fail("admitted while suspended")


async def test_the_reaper_ends_what_a_crash_left(
    database: Database, admission: Admission, caller: Caller, policy: Policy
) -> None:
    left = []
    for demand in (STREAM, STREAM, Demand(kind="file", audio_ms=5_000), Demand(kind="job", audio_ms=5_000)):
        async with admission.admit(caller, demand, policy, DECISION) as lease:
            lease.detach()  # a process that is gone leaves the row like this
            left.append(lease)
    young, *old = left
    await old[0].settle(7_000, HERE)
    async with database.tenant(caller.tenant_id) as tx:
        await tx.execute(
            text("update sessions set seen_at = now() - interval '10 minutes' where id <> :young"),
            {"young": young.session_id},
        )
    counts = await asyncio.gather(reap(database, 300), reap(database, 300))
    assert sum(counts) == 3
    assert [(await stored(database, lease)).status for lease in left] == ["open"] + ["interrupted"] * 3
    assert (await stored(database, old[0])).billed_ms == 7_000
    async with database.tenant(caller.tenant_id) as tx:
        held = (await tx.execute(text("select sum(amount_nano) from budget_holds"))).scalar_one()
    assert (await money(database, caller.tenant_id))[1] == held > 0
    with pytest.raises(Conflict):
        await old[0].settle(9_000, HERE)
    with pytest.raises(Conflict):
        await old[0].extend(90_000)
    await young.fail("INTERNAL")
    assert (await money(database, caller.tenant_id))[1] == 0


async def test_pages_of_sessions(database: Database, admission: Admission, caller: Caller, policy: Policy) -> None:
    made = []
    for kind in ("file", "stream", "file", "file", "stream"):
        async with admission.admit(caller, Demand(kind=kind, audio_ms=1_000), policy, DECISION) as lease:  # type: ignore[arg-type]
            await lease.settle(1_000, HERE, outcome=DONE)
            made.append(lease.session_id)

    async def walk(**query: Any) -> list[UUID]:
        seen: list[UUID] = []
        cursor = None
        while True:
            async with database.tenant(caller.tenant_id) as tx:
                page = await sessions.listing(tx, caller.tenant_id, cursor=cursor, limit=2, **query)
            seen += [session.id for session in page.items]
            assert all(session.text is None for session in page.items)
            cursor = page.next_cursor
            if cursor is None:
                return seen

    assert await walk() == made[::-1]
    assert await walk(kind="stream") == [made[4], made[1]]


@pytest.mark.parametrize("cursor", ["?", "bm9uc2Vuc2U=", "MjAyNi0xMS0yMQ==", "é", "MjAyNi0xMS0yMSB4"])
async def test_a_made_up_cursor_is_refused(database: Database, tenant: Tenant, cursor: str) -> None:
    async with database.tenant(tenant.id) as tx:
        with pytest.raises(sessions.Invalid):
            await sessions.listing(tx, tenant.id, cursor=cursor)
