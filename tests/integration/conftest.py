"""What money tests stand on: a tenant that can be billed, and a way to open sessions for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from uuid import UUID

import pytest

from policy import budget, policies, pricing, sessions
from policy.identity import Caller
from policy.pricing import Price
from policy.resolve import Candidate, Decision, Demand
from policy.tenants import Tenant
from runtime.database import Database
from runtime.ids import uuid7
from tests.openai_relays import provider, relay  # noqa: F401  fixtures
from tests.server import http, mine, served  # noqa: F401  fixtures

PRICE_NANO_PER_HOUR = 258_000_000  # $0.0043 a minute
BUDGET_NANO = 5_000_000_000
SELF_HOSTED = Decision((Candidate("self_hosted", "micro", "It is the only one."),), ())

OpenSession = Callable[..., Awaitable[UUID]]


@pytest.fixture
async def list_price(database: Database) -> Price:
    """What anything self-hosted costs in dollars, for every tenant without a price of its own."""
    async with database.across_tenants("test set-up") as tx:
        return await pricing.set_price(
            tx, backend="self_hosted", price_nano_per_hour=PRICE_NANO_PER_HOUR, currency="USD", actor="test"
        )


@pytest.fixture
async def billed_tenant(database: Database, tenant: Tenant, list_price: Price) -> Tenant:
    """A tenant with the list price and a hard monthly budget of 5.00."""
    async with database.across_tenants("test set-up") as tx:
        await budget.set_budget(tx, tenant.id, period="month", limit_nano=BUDGET_NANO, actor="test")
    return tenant


@pytest.fixture
def caller(billed_tenant: Tenant) -> Caller:
    """A verified token of the billed tenant."""
    scopes = frozenset({"transcribe", "jobs", "usage"})
    return Caller(billed_tenant.id, billed_tenant.slug, "tester", scopes, "token", 4_102_444_800)


@pytest.fixture
def open_session(database: Database) -> OpenSession:
    """Writes a session's row as admission does, without a hold."""

    async def open_one(tenant: Tenant, *, kind: str = "stream", customer: str | None = None) -> UUID:
        session_id = uuid7()
        async with database.tenant(tenant.id) as tx:
            await sessions.open_session(
                tx,
                tenant.id,
                session_id,
                subject="tester",
                demand=Demand(kind=kind, customer=customer),  # type: ignore[arg-type]
                policy_version=(await policies.current(tx, tenant.id)).version,
                decision=SELF_HOSTED,
                currency=tenant.currency,
            )
        return session_id

    return open_one
