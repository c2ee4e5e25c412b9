"""Real worker processes, killed while they send webhooks: nothing is lost, and little comes twice."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import text
from standardwebhooks import Webhook

from policy import tenants
from policy.identity import Caller
from runtime import outbox
from runtime.database import Database
from runtime.ids import show, uuid7
from runtime.sealing import sealer_of
from runtime.settings import Settings
from tests.providers.http import Answer, Fault, http_server
from workers import endpoints
from workers.webhooks import PER_ENDPOINT

ROOT = Path(__file__).parents[2]
EVENTS = 60


@contextmanager
def worker(settings: Settings, redis_url: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    secrets = {
        name: getattr(settings, name).get_secret_value()
        for name in ("database_url", "system_database_url", "sealing_keys")
    }
    given = {"redis_url": redis_url, "egress_allow": "127.0.0.1", "backend": "scripted", "data_dir": settings.data_dir}
    environment = {f"STENOGATE_{name.upper()}": str(value) for name, value in (secrets | given).items()}
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "work"], cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=10)


async def test_killed_workers_lose_no_webhook(
    settings: Settings, database: Database, redis_url: str, tmp_path: Path
) -> None:
    async with database.across_tenants("test set-up") as tx:
        tenant = await tenants.create(tx, slug=f"t-{uuid7().hex[:12]}", actor="test")
    caller = Caller(tenant.id, tenant.slug, "tester", frozenset({"jobs"}), "token", 4_102_444_800)
    log = tmp_path / "worker.log"
    async with http_server(lambda request: Answer(status=204)) as receiver:
        receiver.fault = Fault(wait_s=0.1)
        async with database.tenant(tenant.id) as tx:
            made = await endpoints.create(tx, sealer_of(settings), caller, receiver.url)
        async with database.tenant(tenant.id) as tx:
            events = [await outbox.put(tx, tenant.id, "job.completed", uuid7(), 1, {"n": n}) for n in range(EVENTS)]

        async def received(count: int) -> None:
            async with asyncio.timeout(60):
                while len(receiver.requests) < count:  # noqa: ASYNC110  another process sends
                    await asyncio.sleep(0.01)

        with worker(settings, redis_url, log) as victim:
            await received(20)
            victim.send_signal(signal.SIGKILL)
            victim.wait(timeout=10)
        async with database.tenant(tenant.id) as tx:
            lapsed = "update webhook_deliveries set claimed_until = now() where claimed_until is not null"
            assert 0 < (await tx.execute(text(lapsed))).rowcount <= PER_ENDPOINT
        with worker(settings, redis_url, log) as second:
            await received(40)
            second.send_signal(signal.SIGTERM)
            assert second.wait(timeout=20) == 0, log.read_text()
        with worker(settings, redis_url, log):
            async with asyncio.timeout(60):
                while await undelivered(database, tenant.id):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

    got = Counter(request.headers["webhook-id"] for request in receiver.requests)
    assert set(got) == {show("evt", event) for event in events}
    assert got.total() <= EVENTS + 2 * PER_ENDPOINT
    for request in receiver.requests:
        Webhook(made.secret).verify(request.body, dict(request.headers))
    said = log.read_text()
    assert made.secret.removeprefix("whsec_") not in said
    assert receiver.url not in said


async def undelivered(database: Database, tenant_id: object) -> int:
    async with database.across_tenants("test") as tx:
        query = "select count(*) from webhook_deliveries where tenant_id = :id and status <> 'delivered'"
        left: int = (await tx.execute(text(query), {"id": tenant_id})).scalar_one()
    return left
