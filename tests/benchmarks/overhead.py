"""What the gateway adds to a request that it relays: `serve` alone on one core; Postgres, the relay's upstream and the
clients on another.

First requests on an absolute schedule, whether or not the earlier ones are answered, then as many as a few connections
get through. Latency counts from the moment the client would send a request, so a queue is in it; how late the client
itself was stands apart. The way is the whole one: a token is verified, limits are counted, money is held, the ledger is
written durably and the hold settled. Each tenant has a hard budget, and `fsync` is on.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import wave
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from dispatchers.interface import SAMPLE_RATE
from dispatchers.providers import PROVIDERS
from gateway.commands.local import local_gateway
from policy import budget, policies, pricing, relays, tenants
from policy.identity import SCOPES, mint
from policy.policies import PolicyBody
from policy.relays import Relay
from runtime.database import Database
from runtime.embedded import with_database
from runtime.settings import Settings
from runtime.signing import signing_key

SERVER_CORE, CLIENT_CORE = 0, 1
RELAY = "bench"
TENANTS = 20
CONNECTIONS = 64
WORKERS = 16
RATE = 300
WARM_S = 4
WAV_BYTES = 32 * 1024
NANO = 1_000_000_000
FORM = (
    b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
    b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\ncontent-type: audio/wav\r\n\r\n'
)


def request(address: str, token: str) -> bytes:
    """A whole HTTP request with 32 KiB of WAV."""
    samples = np.random.default_rng(20).integers(-3000, 3000, (WAV_BYTES - 44) // 2, dtype=np.int16)
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        wav.writeframes(samples.tobytes())
    body = FORM + file.getvalue() + b"\r\n--b--\r\n"
    return (
        f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


# --- the clients ---


class Connection(asyncio.Protocol):
    """A client's connection of the least possible cost: one request at a time, and of the answer its status."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._heard = b""
        self._answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def ask(self, whole: bytes) -> asyncio.Future[bytes]:
        """The status of the answer, as `200`."""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(whole)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._heard += data
        head, mark, body = self._heard.partition(b"\r\n\r\n")
        if mark and len(body) >= int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]):
            self._heard = b""
            self._answer.set_result(head[9:12])

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_result(b"lost")

    def close(self) -> None:
        self._transport.close()


@dataclass
class Asked:
    """What became of a row of requests: the seconds each took, and by how many the client was late with it."""

    took: list[float]
    late: list[float]
    failed: int
    elapsed: float

    def ms(self, percent: float) -> float:
        return 1000 * float(np.percentile(self.took, percent))


@asynccontextmanager
async def connected(url: str, count: int) -> AsyncIterator[list[Connection]]:
    where = urlsplit(url)
    loop = asyncio.get_running_loop()
    opened = [(await loop.create_connection(Connection, where.hostname, where.port))[1] for _ in range(count)]
    try:
        yield opened
    finally:
        for connection in opened:
            connection.close()


async def on_schedule(url: str, requests: Sequence[bytes], rate: float, seconds: float) -> Asked:
    """So many a second, each when it is due, whatever became of those before it."""
    asked = Asked([], [], 0, seconds)
    async with connected(url, CONNECTIONS) as connections, asyncio.TaskGroup() as tasks:
        idle = asyncio.Queue[Connection]()
        for connection in connections:
            idle.put_nowait(connection)

        async def one(whole: bytes, began: float) -> None:
            connection = await idle.get()
            asked.failed += await connection.ask(whole) != b"200"
            asked.took.append(perf_counter() - began)
            idle.put_nowait(connection)

        first = perf_counter()
        for number, whole in zip(range(int(rate * seconds)), cycle(requests), strict=False):
            due = first + number / rate
            if (wait := due - perf_counter()) > 0:
                await asyncio.sleep(wait)
            asked.late.append(perf_counter() - due)
            tasks.create_task(one(whole, perf_counter()))
    return asked


async def saturated(url: str, requests: Sequence[bytes], seconds: float) -> Asked:
    """As many as a few connections get through."""
    asked, begun = Asked([], [], 0, seconds), perf_counter()

    async def work(connection: Connection, number: int) -> None:
        for whole in cycle([*requests[number:], *requests[:number]]):
            sent = perf_counter()
            if sent - begun > seconds:
                return
            asked.failed += await connection.ask(whole) != b"200"
            asked.took.append(perf_counter() - sent)

    async with connected(url, WORKERS) as connections:
        await asyncio.gather(*(work(connection, number) for number, connection in enumerate(connections)))
    asked.elapsed = perf_counter() - begun
    return asked


# --- a run ---


@dataclass(frozen=True)
class Side:
    """A server and the process it is."""

    url: str
    pid: int


@dataclass(frozen=True)
class Spent:
    """CPU seconds of everybody who takes part."""

    gateway: float
    postgres: float
    upstream: float
    clients: float

    @classmethod
    def now(cls, gateway: Side, behind: Side) -> Spent:
        me = psutil.Process()
        postgres = [child for child in me.children(recursive=True) if child.name() == "postgres"]
        served, answered = psutil.Process(gateway.pid), psutil.Process(behind.pid)
        return cls(_cpu(served), sum(map(_cpu, postgres)), _cpu(answered), _cpu(me))


def _cpu(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        return float(sum(process.cpu_times()[:2]))
    return 0.0


def run(console: Console, rate: int, seconds: float, settings: dict[str, str]) -> None:
    """The figures of one fresh server."""
    os.sched_setaffinity(0, {CLIENT_CORE})
    with tempfile.TemporaryDirectory(prefix="stenogate-bench-") as scratch:
        with with_database(Settings(data_dir=Path(scratch, "database"))) as database, upstream() as behind:
            tokens = asyncio.run(_set_up(database, behind.url))
            urls = {
                name: getattr(database, name).get_secret_value() for name in ("database_url", "system_database_url")
            }
            given = {"backend": "scripted", "signing_key": signing_key(database).decode(), **urls, **settings}
            os.sched_setaffinity(0, {SERVER_CORE})  # which the server inherits
            with local_gateway(Path(scratch, "serve"), **given) as gateway:
                os.sched_setaffinity(0, {CLIENT_CORE})
                served = Side(gateway.client.url, gateway.pid)
                uvloop.run(_measure(console, served, behind, tokens, rate=rate, seconds=seconds))


async def _measure(
    console: Console, gateway: Side, behind: Side, tokens: list[str], *, rate: int, seconds: float
) -> None:
    requests = [request(urlsplit(gateway.url).netloc, token) for token in tokens]
    await on_schedule(gateway.url, requests, rate, WARM_S)
    plain = await on_schedule(behind.url, requests, rate, min(seconds, 5.0))
    looks, runs = [Spent.now(gateway, behind)], list[Asked]()
    for asking in (on_schedule(gateway.url, requests, rate, seconds), saturated(gateway.url, requests, seconds)):
        runs.append(await asking)
        looks.append(Spent.now(gateway, behind))
    paced, full = (_figures(plain, asked, *spent) for asked, spent in zip(runs, pairwise(looks), strict=True))
    table = Table("", f"{rate} a second, on schedule", f"{WORKERS} connections, as fast as they can")
    for name in paced:
        table.add_row(name, paced[name], full[name])
    console.print(table)
    console.print(
        f"The gateway is alone on core {SERVER_CORE}; clients, upstream and Postgres share core {CLIENT_CORE}."
        f" Asked directly, the upstream takes {plain.ms(50):.2f} ms, p99 {plain.ms(99):.2f} ms.",
        style="dim",
    )


def _figures(plain: Asked, asked: Asked, begun: Spent, ended: Spent) -> dict[str, str]:
    count = len(asked.took)

    def spent(before: float, after: float) -> str:
        return f"{1000 * (after - before) / count:.2f} ms; {100 * (after - before) / asked.elapsed:.0f} % of a core"

    return {
        "requests a second": f"{count / asked.elapsed:.0f}",
        "failed": str(asked.failed),
        "added, p50": f"{asked.ms(50) - plain.ms(50):.2f} ms",
        "added, p99": f"{asked.ms(99) - plain.ms(99):.2f} ms",
        "sent late by the client, p99": f"{1000 * float(np.percentile(asked.late, 99)):.2f} ms" if asked.late else "-",
        "CPU a request, gateway": spent(begun.gateway, ended.gateway),
        "Postgres": spent(begun.postgres, ended.postgres),
        "upstream": spent(begun.upstream, ended.upstream),
        "clients": spent(begun.clients, ended.clients),
    }


async def _set_up(settings: Settings, upstream_url: str) -> list[str]:
    """A token for each tenant, whose audio goes to the upstream. All have limits that are counted and none that is
    reached."""
    assert settings.database_url is not None
    assert settings.system_database_url is not None
    database = Database(settings.database_url.get_secret_value(), settings.system_database_url.get_secret_value())
    tokens: list[str] = []
    async with database.across_tenants("benchmark set-up") as tx:
        relay = Relay(RELAY, "openai-compatible", base_url=f"{upstream_url}/v1", models=("whisper-1",))
        await relays.put(tx, relay, providers=PROVIDERS, allow_http=True, actor="bench")
        for number in range(TENANTS):
            tenant = await tenants.create(tx, slug=f"o-{number}", actor="bench")
            body = PolicyBody(backends=(RELAY,), max_requests=1_000, requests_per_minute=1_000_000)
            await policies.put(tx, tenant.id, body, actor="bench")
            await pricing.set_price(
                tx, backend=RELAY, price_nano_per_hour=NANO, currency="USD", tenant_id=tenant.id, actor="bench"
            )
            await budget.set_budget(tx, tenant.id, period="month", limit_nano=1_000 * NANO, actor="bench")
            token = mint(
                signing_key(settings), issuer=settings.issuer, audience=settings.audience, tenant=tenant,
                subject="bench", scopes=SCOPES, ttl_s=3600,
            )  # fmt: skip
            tokens.append(token)
    await database.aclose()
    return tokens


# --- the upstream ---


class Upstream(asyncio.Protocol):
    """Answers any request with a transcript, in OpenAI's shape, at once."""

    BODY = (
        b'{"task":"transcribe","language":"english","duration":1.02,"text":"the quick","segments":[{"id":0,"seek":0,'
        b'"start":0.0,"end":0.8,"text":" the quick","tokens":[464,2068],"temperature":0.0,"avg_logprob":-0.3,'
        b'"compression_ratio":1.1,"no_speech_prob":0.01}]}'
    )
    ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._held = bytearray()
        self._whole = 0

    def data_received(self, data: bytes) -> None:
        self._held += data
        while True:
            if not self._whole:
                end = self._held.find(b"\r\n\r\n")
                if end < 0:
                    return
                length = bytes(self._held[:end]).lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]
                self._whole = end + 4 + int(length or 0)
            if len(self._held) < self._whole:
                return
            del self._held[: self._whole]
            self._whole = 0
            self._transport.write(self.ANSWER)


@contextlib.contextmanager
def upstream() -> Iterator[Side]:
    """One in a process of its own."""
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Side(process.stdout.readline().strip(), process.pid)
        finally:
            process.terminate()


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve())
