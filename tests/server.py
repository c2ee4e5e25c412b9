"""A whole gateway on a loopback port, and callers of it."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from openai import AsyncOpenAI

from dispatchers.assembly import open_door
from dispatchers.dispatch import Door
from dispatchers.interface import Dispatcher
from dispatchers.registry import Registry
from gateway.live_settings import POLL_S, live_settings
from gateway.serve import uvicorn_config
from gateway.state import Gateway
from policy import budget, policies, pricing, tenants
from policy.admission import Admission
from policy.identity import SCOPES, mint
from policy.policies import PolicyBody
from policy.tenants import Tenant
from runtime.resources import open_resources
from runtime.settings import Settings
from workers.main import open_jobs

SAMPLES = Path(__file__).parents[1] / "dispatchers/engine/micro/samples"
FIXTURES = Path(__file__).parent / "fixtures"
PRICE_NANO_PER_HOUR = 360_000_000

LONG = SAMPLES / "long.wav"
CLIP = SAMPLES / "clip02.wav"
CLIP_TEXT = "we need to cancel the address before friday"
CLIP_MS = 3880


@dataclass(frozen=True)
class Served:
    """A gateway that listens."""

    gateway: Gateway
    url: str

    async def tenant(self, *, budget_nano: int | None = None, **policy: Any) -> Tenant:
        """A fresh tenant with a price of its own."""
        async with self.gateway.resources.database.across_tenants("test set-up") as tx:
            tenant = await tenants.create(tx, slug=f"g-{uuid.uuid4().hex[:12]}", actor="test")
            await policies.put(tx, tenant.id, PolicyBody(**policy), actor="test")
            await pricing.set_price(
                tx,
                backend="self_hosted",
                price_nano_per_hour=PRICE_NANO_PER_HOUR,
                currency=tenant.currency,
                tenant_id=tenant.id,
                actor="test",
            )
            if budget_nano is not None:
                await budget.set_budget(tx, tenant.id, period="month", limit_nano=budget_nano, actor="test")
        return tenant

    def token(self, tenant: Tenant, scopes: Iterable[str] = SCOPES, *, ttl_s: int = 3600) -> str:
        settings = self.gateway.settings
        return mint(
            self.gateway.resources.signing_key,
            issuer=settings.issuer,
            audience=settings.audience,
            tenant=tenant,
            subject="tester",
            scopes=tuple(scopes),
            ttl_s=ttl_s,
        )

    def http(self, token: str | None = None) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=60.0, trust_env=False)

    def openai(self, token: str, **options: Any) -> AsyncOpenAI:
        options = {"max_retries": 0, "http_client": httpx.AsyncClient(trust_env=False, timeout=60.0)} | options
        return AsyncOpenAI(api_key=token, base_url=f"{self.url}/v1", **options)

    async def still_serves(self, token: str) -> None:
        """Asserts that an ordinary request still succeeds."""
        async with self.http(token) as http:
            response = await post(http)
        assert (response.status_code, response.json()["text"]) == (200, CLIP_TEXT)


async def post(
    http: httpx.AsyncClient, data: bytes | None = None, *, path: str = "/v1/audio/transcriptions", **fields: Any
) -> httpx.Response:
    """A transcription by hand; `clip02.wav` where nothing else is given."""
    headers = fields.pop("headers", None)
    content = CLIP.read_bytes() if data is None else data
    form = {"model": "micro"} | {name: value for name, value in fields.items() if value is not None}
    return await http.post(path, data=form, files={"file": ("a.wav", content, "audio/wav")}, headers=headers)


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Asserts that a response is a problem, whole and of this kind; returns it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/problem+json")
    body: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "code", "request_id", "retryable"} <= set(body)
    assert (body["status"], body["code"]) == (status, code)
    assert body["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    if str(response.request.url.path).startswith(("/v1/audio", "/v1/models")):
        assert set(body["error"]) == {"message", "type", "param", "code"}
    return body


@asynccontextmanager
async def serving(
    settings: Settings, *, recogniser: Dispatcher | None = None, poll_s: float = POLL_S, **changes: Any
) -> AsyncIterator[Served]:
    """The whole gateway over real parts, in this event loop; `recogniser` in place of what the settings name."""
    async with AsyncExitStack() as stack:
        resources = await stack.enter_async_context(open_resources(settings.model_copy(update=changes)))
        opened = await stack.enter_async_context(open_door(resources))
        door = opened.door
        if recogniser is not None:
            admission = Admission(resources.database, resources.coordination)
            door = Door(
                resources.database,
                admission,
                opened.authenticator,
                Registry.only(recogniser),
                opened.recorder,
            )
        jobs = await stack.enter_async_context(open_jobs(resources, door))
        live = await stack.enter_async_context(live_settings(resources, poll_s=poll_s))
        gateway = Gateway(
            live,
            resources,
            opened.authenticator,
            door,
            jobs,
            opened.catalogue,
            opened.queue_wait_s,
            opened.engine_up,
            opened.tell_figures,
        )
        stack.push_async_callback(gateway.roster.aclose)
        yield Served(gateway, await stack.enter_async_context(_listening(gateway)))


@asynccontextmanager
async def _listening(gateway: Gateway) -> AsyncIterator[str]:
    config = uvicorn_config(gateway)
    config.timeout_graceful_shutdown = 5
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not task.done():  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


@pytest.fixture(scope="module")
async def served(settings: Settings) -> AsyncIterator[Served]:
    """A gateway with the micro model, small thresholds, and jobs done in the same process. It ends with its module: its
    workers would take other tests' jobs."""
    changes = {"model": "micro", "engine_workers": 1, "job_threshold_ms": 20_000, "upload_idle_s": 1.0}
    async with serving(settings, egress_allow=("127.0.0.0/8",), **changes) as running:
        yield running


@pytest.fixture
async def mine(served: Served) -> str:
    """A token of a fresh tenant, with every scope."""
    return served.token(await served.tenant(requests_per_minute=None))


@pytest.fixture
async def http(served: Served, mine: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client with that token."""
    async with served.http(mine) as client:
        yield client
