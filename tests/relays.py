"""Relays of a gateway under test: rows as an operator makes them, plugged in as they are in life."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text

from dispatchers.providers import PROVIDERS
from policy import credentials, pricing, relays
from policy.relays import Relay
from policy.resolve import Offer
from policy.tenants import Tenant
from tests.server import Served

RELAY_NANO_PER_HOUR = 720_000_000
RELAY_COST_NANO_PER_HOUR = 180_000_000


@dataclass(frozen=True)
class Plugged:
    """A relay of the gateway, under a name of its own."""

    served: Served
    name: str

    async def credential(self, key: str, *, tenant: Tenant | None = None) -> UUID:
        """Another key, in the place of the one before it; waits until it is in use."""
        resources = self.served.gateway.resources
        async with resources.database.across_tenants("test set-up") as tx:
            tenant_id = None if tenant is None else tenant.id
            record = await credentials.add(tx, resources.sealer, self.name, key, tenant_id=tenant_id, actor="test")
        await until(lambda: self._in_use(record.id, tenant))
        return record.id

    def _in_use(self, credential_id: UUID, tenant: Tenant | None) -> bool:
        registry = self.served.gateway.door._registry
        plug = registry.plugs(None if tenant is None else tenant.id).get(self.name)
        return plug is not None and plug.credential_id == credential_id

    def offer(self, tenant: Tenant | None = None) -> Offer:
        offers = self.served.gateway.door.offers(None if tenant is None else tenant.id)
        return next(offer for offer in offers if offer.backend == self.name)

    async def tenant(self, *, backends: Sequence[str] | None = None, **policy: Any) -> Tenant:
        """A fresh tenant who may use the relay, first, and `self_hosted`, with a price for both."""
        order = [self.name, "self_hosted"] if backends is None else backends
        tenant = await self.served.tenant(backends=order, requests_per_minute=None, **policy)
        async with self.served.gateway.resources.database.across_tenants("test set-up") as tx:
            await pricing.set_price(
                tx,
                backend=self.name,
                price_nano_per_hour=RELAY_NANO_PER_HOUR,
                cost_nano_per_hour=RELAY_COST_NANO_PER_HOUR,
                currency=tenant.currency,
                tenant_id=tenant.id,
                actor="test",
            )
        return tenant


@asynccontextmanager
async def relay(
    served: Served, provider: str, base_url: str, key: str, *, models: tuple[str, ...] | None = None, region: str = "eu"
) -> AsyncIterator[Plugged]:
    """A relay to this address, gone when this is left."""
    database = served.gateway.resources.database
    name = f"r-{uuid.uuid4().hex[:8]}"
    row = Relay(name, provider, base_url=base_url, models=models, region=region)
    async with database.across_tenants("test set-up") as tx:
        await relays.put(tx, row, providers=PROVIDERS, allow_http=True, actor="test")
    plugged = Plugged(served, name)
    await plugged.credential(key)
    try:
        yield plugged
    finally:
        async with database.across_tenants("test set-up") as tx:
            await tx.execute(text("update relays set status = 'disabled' where name = :name"), {"name": name})
        await until(lambda: all(offer.backend != name for offer in served.gateway.door.offers()))


async def until(true: Any, seconds: float = 10.0) -> None:
    """Waits for what the gateway finds out by itself."""
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.01)
