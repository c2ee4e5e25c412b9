"""What a quiet tenant notices of a tenant that floods: its own latencies alone, then beside the flood, on one server.

The flood comes at the pace of speech first, then as fast as the server takes it: sessions of recordings, one after the
other.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from gateway.commands.client import Client
from gateway.commands.local import LocalGateway, local_gateway
from policy import policies, pricing, tenants
from policy.identity import SCOPES, mint
from policy.policies import PolicyBody
from runtime.embedded import with_database
from runtime.resources import Resources, open_resources
from runtime.settings import Settings
from runtime.telemetry import configure_logging
from tests.benchmarks.stream import SEED, Load, Talk, final_after, first_text_after, percentile, script, speak, watch

QUIET = 4
FLOOD = 20
PRICE_NANO_PER_HOUR = 260_000_000
LEAD_S = 4.0
MOST = 1.5
LAST_COLUMNS = ("s of the other heard", "cores others used")


def run(console: Console, seconds: float, settings: dict[str, str]) -> None:
    configure_logging("warning", "console")
    with tempfile.TemporaryDirectory(prefix="stenogate-bench-") as scratch:
        with local_gateway(Path(scratch), model="micro", **settings) as gateway:
            with with_database(Settings(data_dir=Path(scratch))) as completed:
                quiet, flood = asyncio.run(_two_tenants(gateway, completed))
            asyncio.run(_compare(console, gateway, quiet, flood, seconds))


async def _two_tenants(gateway: LocalGateway, settings: Settings) -> Sequence[Client]:
    async with open_resources(settings) as resources:
        return [Client(gateway.client.url, await _tenant(resources, slug)) for slug in ("quiet", "flood")]


async def _tenant(resources: Resources, slug: str) -> str:
    """A token of a new tenant."""
    settings = resources.settings
    async with resources.database.across_tenants("benchmark") as tx:
        tenant = await tenants.create(tx, slug=slug, actor="benchmark")
        body = PolicyBody(max_streams=FLOOD, requests_per_minute=None)
        await policies.put(tx, tenant.id, body, actor="benchmark")
        await pricing.set_price(
            tx,
            backend="self_hosted",
            price_nano_per_hour=PRICE_NANO_PER_HOUR,
            currency=tenant.currency,
            tenant_id=tenant.id,
            actor="benchmark",
        )
    return mint(
        resources.signing_key,
        issuer=settings.issuer,
        audience=settings.audience,
        tenant=tenant,
        subject="benchmark",
        scopes=SCOPES,
        ttl_s=3600,
    )


async def _compare(console: Console, gateway: LocalGateway, quiet: Client, flood: Client, seconds: float) -> None:
    await speak(quiet, script(0, 5.0))  # warms
    alone, load_ = await _spoken(gateway, quiet, seconds)
    rows = [("alone", alone, load_, 0.0)]
    for name, pace in ((f"beside {FLOOD} sessions at their own pace", True), (f"beside {FLOOD}, no pace", False)):
        over = asyncio.Event()
        flooding = [asyncio.create_task(_flooding(flood, number, seconds, over, pace=pace)) for number in range(FLOOD)]
        await asyncio.sleep(LEAD_S)
        beside, load_ = await _spoken(gateway, quiet, seconds)
        over.set()
        rows.append((name, beside, load_, sum(await asyncio.gather(*flooding))))
    table = Table(title=f"a tenant of {QUIET} sessions")
    for column in ("", "finals, lost", "final p50", "p95", "skew", "first text p50", "p95", *LAST_COLUMNS):
        table.add_column(column)
    for name, talks, load_, heard_s in rows:
        late, first = final_after(talks), first_text_after(talks)
        table.add_row(
            name,
            f"{len(late)}, {sum(len(talk.said) for talk in talks) - len(late)}",
            *(f"{percentile(late, percent):.2f} s" for percent in (50, 95)),
            f"{percentile(late, 95) / percentile(final_after(alone), 95):.2f}",
            *(f"{percentile(first, percent):.2f} s" for percent in (50, 95)),
            f"{heard_s:.0f}",
            f"{load_.others:.2f}",
        )
    console.print(table)
    console.print(f"Skew: the 95th percentile of the finals beside the flood over that alone; at most {MOST} is asked.")


async def _spoken(gateway: LocalGateway, client: Client, seconds: float) -> tuple[list[Talk], Load]:
    talks = [script(SEED + number, seconds) for number in range(QUIET)]
    load_, over = Load(), asyncio.Event()
    watching = asyncio.create_task(watch(psutil.Process(gateway.pid), load_, over))
    await asyncio.gather(*(speak(client, talk, number * 0.7) for number, talk in enumerate(talks)))
    over.set()
    await watching
    return talks, load_


async def _flooding(client: Client, number: int, seconds: float, over: asyncio.Event, *, pace: bool) -> float:
    """One session after the other until it is over; seconds of audio answered."""
    heard_s = 0.0
    for turn in itertools.count():
        talk = script(1000 + 100 * turn + number, min(seconds, 20.0))
        await speak(client, talk, 0.0 if turn else number * LEAD_S / FLOOD, pace=pace)
        heard_s += talk.heard[-1][1]["accepted_ms"] / 1000
        if over.is_set():
            return heard_s
    raise AssertionError
