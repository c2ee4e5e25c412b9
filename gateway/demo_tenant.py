"""The tenant that an embedded gateway comes with, so that a stranger can try it at once."""

from __future__ import annotations

from policy import budget, policies, pricing, tenants
from policy.errors import NotFound
from policy.policies import PolicyBody
from policy.tenants import Tenant
from runtime.database import Database, Transaction

DEMO = "demo"
NANO = 1_000_000_000
PRICE_NANO_PER_HOUR = 260_000_000  # 0.26 USD an hour
BUDGET_NANO = 1_000 * NANO
STREAMS = 64


async def ensure_demo_tenant(database: Database) -> Tenant:
    """The demo tenant, made with its policy, list price and budget if this is a fresh data dir."""
    async with database.across_tenants("the embedded gateway's demo tenant") as tx:
        try:
            return await tenants.by_slug(tx, DEMO)
        except NotFound:
            return await _create(tx)


async def _create(tx: Transaction) -> Tenant:
    actor = "embedded"
    tenant = await tenants.create(tx, slug=DEMO, name="Demo", actor=actor)
    body = PolicyBody(max_streams=STREAMS, max_requests=STREAMS, requests_per_minute=None)
    await policies.put(tx, tenant.id, body, actor=actor)
    await pricing.set_price(
        tx, backend="self_hosted", price_nano_per_hour=PRICE_NANO_PER_HOUR, currency=tenant.currency, actor=actor
    )
    await budget.set_budget(tx, tenant.id, period="month", limit_nano=BUDGET_NANO, actor=actor)
    return tenant
