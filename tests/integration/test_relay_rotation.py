"""Keys are changed under a gateway at work: nobody notices, and who has a key of its own uses that."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from sqlalchemy import text

from gateway.providers import PROVIDERS
from policy import credentials, pricing, relays
from policy.relays import Relay
from policy.tenants import Tenant
from runtime.database import Database
from runtime.settings import Settings
from tests.providers.http import Answer, HttpServer, Request, http_server
from tests.providers.openai import OPENAI, SCRIPT, OpenAIServer
from tests.server import Served, post, serving

EVER_S = 10.0
FIRST, SECOND, THIRD, OWN = (f"sk-{uuid.uuid4().hex}" for _ in range(4))


class Provider:
    """OpenAI's API for whoever has one of these keys; `used` are the keys that came, in order."""

    def __init__(self, *accepted: str) -> None:
        self.accepted = set(accepted)
        self.used: list[str] = []
        self._answers = OpenAIServer(OPENAI, "any", SCRIPT)

    def respond(self, request: Request) -> Answer:
        key = request.headers["authorization"].removeprefix("Bearer ")
        self.used.append(key)
        shown = {**request.headers, "authorization": f"Bearer {'any' if key in self.accepted else 'none'}"}
        return self._answers.respond(replace(request, headers=shown))

    def bound(self, server: HttpServer) -> None:
        self._answers.http = server


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    answering = Provider(FIRST, SECOND, THIRD, OWN)
    async with http_server(answering.respond) as server:
        answering.bound(server)
        yield answering


@pytest.fixture
async def served(settings: Settings, database: Database, provider: Provider) -> AsyncIterator[Served]:
    """A gateway without an engine, and one relay with the first key."""
    async with database.across_tenants("test set-up") as tx:
        relay = Relay("openai", "openai", f"{provider._answers.http.url}/v1")
        await relays.put(tx, relay, providers=PROVIDERS, allow_http=False, actor="test")
        await pricing.set_price(tx, backend="openai", price_nano_per_hour=1, currency="USD", actor="test")
    try:
        async with serving(settings, backend="none", relay_refresh_s=0.05) as running:
            await add(running, FIRST)
            yield running
    finally:
        async with database.across_tenants("test") as tx:
            for table in ("relay_credentials", "relays"):
                await tx.execute(text(f"delete from {table}"))


async def add(served: Served, key: str, tenant: Tenant | None = None) -> None:
    resources = served.gateway.resources
    async with resources.database.across_tenants("test") as tx:
        tenant_id = None if tenant is None else tenant.id
        await credentials.add(tx, resources.sealer, "openai", key, tenant_id=tenant_id, actor="test")


async def transcribed(served: Served, tenant: Tenant) -> int:
    async with served.http(served.token(tenant)) as http:
        return (await post(http, model="whisper-1")).status_code


async def until_used(served: Served, provider: Provider, tenant: Tenant, key: str) -> None:
    async with asyncio.timeout(EVER_S):
        while not provider.used or provider.used[-1] != key:
            await transcribed(served, tenant)


async def test_requests_go_on_while_the_key_changes(served: Served, provider: Provider) -> None:
    tenant = await served.tenant(backends=("openai",), requests_per_minute=None)
    await until_used(served, provider, tenant, FIRST)
    statuses: list[int] = []
    rotated = asyncio.Event()

    async def keep_asking() -> None:
        while not rotated.is_set():
            statuses.append(await transcribed(served, tenant))

    async with asyncio.TaskGroup() as askers:
        for _ in range(4):
            askers.create_task(keep_asking())
        for key in (SECOND, THIRD):
            await add(served, key)
            async with asyncio.timeout(EVER_S):
                while provider.used[-8:] != [key] * 8:  # noqa: ASYNC110 — it polls
                    await asyncio.sleep(0.02)
        rotated.set()
    assert set(statuses) == {200}
    assert {FIRST, SECOND, THIRD} == set(provider.used)


async def test_a_withdrawn_key_stops_its_own_tenant_alone(served: Served, provider: Provider) -> None:
    sharing, owning = [await served.tenant(backends=("openai",)) for _ in range(2)]
    await add(served, OWN, owning)
    await until_used(served, provider, owning, OWN)
    await until_used(served, provider, sharing, FIRST)
    provider.accepted.remove(OWN)
    assert await transcribed(served, owning) == 502
    assert await transcribed(served, sharing) == 200
