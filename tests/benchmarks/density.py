"""How many live streams one core carries: `serve` with the scripted recogniser alone on one core, Postgres and the
clients on another.

Each stream sends 100 ms frames at their own pace; what it says is of `stream.script`, of which there are a few, and
everyone begins at another moment. Latency is what a client sees: from the sending of the frame that completes an
endpoint to the arrival of its final, so both ways over loopback and the client's own lateness are in it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from dispatchers.audio.segment import TAIL
from dispatchers.audio.vad import FRAME
from dispatchers.interface import SAMPLES_PER_MS, VadOptions
from gateway.commands.local import LocalGateway, local_gateway
from policy import budget, policies, pricing, tenants
from policy.identity import SCOPES, mint
from policy.policies import PolicyBody
from runtime.database import Database
from runtime.embedded import with_database
from runtime.settings import Settings
from runtime.signing import signing_key
from tests.benchmarks import stream

SERVER_CORE, CLIENT_CORE = 0, 1
FRAME_MS = 100
SCRIPTS = 12
TENANT_STREAMS = 25
OPENED_PER_S = 20
ROOM = 2_000
MIB = 1024 * 1024
NANO = 1_000_000_000
WAIT_S = 60.0

ENDPOINT_MS = -(-VadOptions().silence_ms * SAMPLES_PER_MS // FRAME) * FRAME // SAMPLES_PER_MS
"""Silence after which an utterance is over, in whole frames of the detector."""

FINAL, CLOSED, READY, ERROR = (f'{{"type":"{kind}"'.encode() for kind in ("final", "closed", "ready", "error"))


@dataclass(frozen=True)
class Recital:
    """What several streams say: its WebSocket frames, and when it is said, in s."""

    frames: list[bytes]
    said: list[stream.Said]

    @classmethod
    def of(cls, number: int, seconds: float) -> Recital:
        talk = stream.script(stream.SEED + number, seconds)
        audio = talk.audio.tobytes()
        size = FRAME_MS * SAMPLES_PER_MS * 2
        return cls([_frame(2, audio[at : at + size]) for at in range(0, len(audio), size)], talk.said)


@dataclass
class Speaker(asyncio.Protocol):
    """One stream over a plain socket: a WebSocket client of the least possible cost."""

    recital: Recital
    sent: list[float] = field(default_factory=list)
    lateness: list[float] = field(default_factory=list)
    finals: list[tuple[float, bytes]] = field(default_factory=list)
    closed: bytes = b""

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._held = b""
        self._upgraded = False
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.over: asyncio.Future[None] = self._loop.create_future()

    def open(self, address: str, token: str) -> None:
        """Asks for the upgrade."""
        self._transport.write(
            f"GET /v1/stream?language=en HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {base64.b64encode(secrets.token_bytes(16)).decode()}\r\nSec-WebSocket-Version: 13\r\n"
            f"Authorization: Bearer {token}\r\n\r\n".encode()
        )

    def speak(self, frame: int = 0) -> None:
        """Sends one frame and sees to the next, a frame's time after the last one was due."""
        now = self._loop.time()
        if frame == 0:
            self._began = now
        self.lateness.append(now - self._began - frame * FRAME_MS / 1000)
        self.sent.append(now)
        self._transport.write(self.recital.frames[frame])
        if frame + 1 < len(self.recital.frames):
            self._loop.call_at(self._began + (frame + 1) * FRAME_MS / 1000, self.speak, frame + 1)
        else:
            self._transport.write(_frame(1, b'{"type":"stop"}'))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        data = self._held + data if self._held else data
        if not self._upgraded:
            head, mark, data = data.partition(b"\r\n\r\n")
            if not mark:
                self._held = head
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self._fail(f"refused: {(head + data)[:500]!r}")
                return
            self._upgraded = True
        at = 0
        while (whole := _payload(data, at)) is not None:
            begin, at = whole
            self._hear(data[begin:at])
        self._held = data[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"lost: {exc}")
        if not self.over.done():
            self.over.set_result(None)

    def _hear(self, message: bytes) -> None:
        if message.startswith(FINAL):
            self.finals.append((self._loop.time(), message))
        elif message.startswith(CLOSED):
            self.closed = message
        elif message.startswith(ERROR):
            self._fail(message.decode())
        elif message.startswith(READY):
            self.ready.set_result(None)

    def _fail(self, why: str) -> None:
        if not self.ready.done():
            self.ready.set_exception(RuntimeError(why))

    # --- what came of it ---

    def added(self) -> Iterator[tuple[float, float]]:
        """When each final came, and how long after the frame that completed its endpoint; not those of `stop`."""
        for at, message in self.finals:
            done_ms = json.loads(message)["end_ms"] - TAIL // SAMPLES_PER_MS + ENDPOINT_MS
            frame = -(-done_ms // FRAME_MS) - 1
            if frame < len(self.sent):
                yield at, at - self.sent[frame]

    def lost(self) -> int:
        heard = [json.loads(message) for _, message in self.finals]
        spans = [(event["start_ms"] / 1000, event["end_ms"] / 1000) for event in heard if event["text"]]
        return sum(not any(a < said.end and b > said.start for a, b in spans) for said in self.recital.said)


def _frame(kind: int, payload: bytes) -> bytes:
    """A client's whole frame, masked with zeros: the server's work is the same."""
    size = len(payload)
    length = struct.pack("!BB", 0x80 | kind, 0x80 | size) if size < 126 else struct.pack("!BBH", 0x80 | kind, 254, size)
    return length + bytes(4) + payload


def _payload(data: bytes, at: int) -> tuple[int, int] | None:
    """Where a server's frame that starts here has its payload, if all of it is there."""
    if len(data) < at + 4:
        return None
    size, begin = data[at + 1], at + 2
    if size == 126:
        size, begin = int.from_bytes(data[at + 2 : at + 4], "big"), at + 4
    return (begin, begin + size) if len(data) >= begin + size else None


# --- a run ---


@dataclass(frozen=True)
class Look:
    """The state of things at one moment. CPU in seconds."""

    at: float
    server: float
    threads: dict[int, float]
    clients: float
    postgres: float
    cores: tuple[float, ...]
    rss: float
    lag: dict[float, float]

    @classmethod
    async def now(cls, url: str, pid: int) -> Look:
        server, me = psutil.Process(pid), psutil.Process()
        async with httpx.AsyncClient(trust_env=False) as http:
            text = (await http.get(f"{url}/metrics")).text
        lag = next(f for f in text_string_to_metric_families(text) if f.name == "stenogate_event_loop_lag_seconds")
        return cls(
            time.monotonic(),
            sum(server.cpu_times()[:2]),
            {thread.id: thread.user_time + thread.system_time for thread in server.threads()},
            sum(me.cpu_times()[:2]),
            sum(sum(child.cpu_times()[:2]) for child in me.children(recursive=True) if child.name() == "postgres"),
            tuple(sum(core) - core.idle - core.iowait for core in psutil.cpu_times(percpu=True)),
            server.memory_info().rss / MIB,
            {float(s.labels["le"]): s.value for s in lag.samples if s.name.endswith("_bucket")},
        )


@dataclass(frozen=True)
class Outcome:
    """A run's figures between two looks, when everybody spoke."""

    speakers: list[Speaker]
    opening_s: float
    idle: Look
    begun: Look
    ended: Look


def run(console: Console, counts: Sequence[int], seconds: float, settings: dict[str, str]) -> None:
    """A fresh server for each number of streams; `seconds` is how long all of them speak at once."""
    os.sched_setaffinity(0, {CLIENT_CORE})
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="stenogate-bench-") as scratch:
        with with_database(Settings(data_dir=Path(scratch, "database"))) as database:
            tokens = asyncio.run(_tenants(database, max(counts)))
            for count in counts:
                with _serving(Path(scratch, f"serve-{count}"), database, settings) as gateway:
                    outcomes.append(uvloop.run(_measure(gateway, count, seconds, tokens)))
    table = Table("streams", *map(str, counts), title=f"{seconds:.0f} s {settings or ''}".strip())
    for name, row in zip(
        _figures(outcomes[0]), zip(*(_figures(o).values() for o in outcomes), strict=True), strict=True
    ):
        table.add_row(name, *row)
    console.print(table)
    console.print(
        f"The server is alone on core {SERVER_CORE}; clients and Postgres are on core {CLIENT_CORE}.", style="dim"
    )


async def _tenants(settings: Settings, streams: int) -> list[str]:
    """A token for each of so many streams, of tenants with a budget each."""
    assert settings.database_url is not None
    assert settings.system_database_url is not None
    database = Database(settings.database_url.get_secret_value(), settings.system_database_url.get_secret_value())
    tokens: list[str] = []
    async with database.across_tenants("benchmark set-up") as tx:
        while len(tokens) < streams:
            tenant = await tenants.create(tx, slug=f"d-{len(tokens)}", actor="bench")
            body = PolicyBody(max_streams=TENANT_STREAMS, requests_per_minute=None)
            await policies.put(tx, tenant.id, body, actor="bench")
            await pricing.set_price(
                tx, backend="self_hosted", price_nano_per_hour=NANO, currency="USD", tenant_id=tenant.id, actor="bench"
            )
            await budget.set_budget(tx, tenant.id, period="month", limit_nano=1_000 * NANO, actor="bench")
            token = mint(
                signing_key(settings), issuer=settings.issuer, audience=settings.audience, tenant=tenant,
                subject="bench", scopes=SCOPES, ttl_s=3600,
            )  # fmt: skip
            tokens += [token] * TENANT_STREAMS
    await database.aclose()
    return tokens


@contextmanager
def _serving(data_dir: Path, database: Settings, settings: dict[str, str]) -> Iterator[LocalGateway]:
    urls = {name: getattr(database, name).get_secret_value() for name in ("database_url", "system_database_url")} | {
        "signing_key": signing_key(database).decode()
    }
    limits = {"max_streams": str(ROOM), "max_streams_per_address": str(ROOM)}
    os.sched_setaffinity(0, {SERVER_CORE})  # which the server inherits
    gateway = local_gateway(data_dir, backend="scripted", **urls, **limits, **settings)
    with gateway as serving:
        os.sched_setaffinity(0, {CLIENT_CORE})
        yield serving


async def _measure(gateway: LocalGateway, count: int, seconds: float, tokens: list[str]) -> Outcome:
    opening_s = count / OPENED_PER_S
    recitals = [Recital.of(number, opening_s + seconds) for number in range(SCRIPTS)]
    async with _spoken(gateway, [Recital.of(SCRIPTS, 4.0)] * 4, tokens):  # warms
        pass
    idle = await Look.now(gateway.client.url, gateway.pid)
    first = time.monotonic()
    async with _spoken(gateway, [recitals[number % SCRIPTS] for number in range(count)], tokens) as speakers:
        opened = time.monotonic() - first
        if opened > opening_s + seconds / 4:
            raise RuntimeError(f"{count} streams took {opened:.0f} s to open: too little time is left to measure them")
        await asyncio.sleep(1.0)
        begun = await Look.now(gateway.client.url, gateway.pid)
        await asyncio.sleep(max(0.0, opening_s + seconds - 1.0 - (time.monotonic() - first)))
        ended = await Look.now(gateway.client.url, gateway.pid)
    return Outcome(speakers, opened, idle, begun, ended)


@asynccontextmanager
async def _spoken(gateway: LocalGateway, recitals: list[Recital], tokens: list[str]) -> AsyncIterator[list[Speaker]]:
    """Speakers that have all begun; afterwards, that have all ended."""
    where = urlsplit(gateway.client.url)
    loop = asyncio.get_running_loop()
    speakers: list[Speaker] = []
    began = loop.time()
    for number, (recital, token) in enumerate(zip(recitals, tokens, strict=False)):
        await asyncio.sleep(began + number / OPENED_PER_S - loop.time())
        _, speaker = await loop.create_connection(lambda said=recital: Speaker(said), where.hostname, where.port)
        speaker.open(where.netloc, token)
        await asyncio.wait_for(speaker.ready, WAIT_S)
        speaker.speak()
        speakers.append(speaker)
    yield speakers
    async with asyncio.timeout(WAIT_S + len(recitals[0].frames) * FRAME_MS / 1000):
        await asyncio.gather(*(speaker.over for speaker in speakers))


# --- the figures ---


def _figures(outcome: Outcome) -> dict[str, str]:
    begun, ended, speakers = outcome.begun, outcome.ended, outcome.speakers
    took = ended.at - begun.at
    added = [ms for speaker in speakers for at, ms in speaker.added() if begun.at <= at <= ended.at]
    late = [ms for speaker in speakers for ms in speaker.lateness]
    closed = [json.loads(speaker.closed or b"{}") for speaker in speakers]
    threads = sorted((now - begun.threads.get(thread, 0.0)) / took for thread, now in ended.threads.items())
    return {
        "server, share of its core": _percent((ended.server - begun.server) / took),
        "  its busiest threads": ", ".join(_percent(share) for share in threads[-3:][::-1]),
        "server CPU, ms a stream-second": f"{1000 * (ended.server - begun.server) / took / len(speakers):.2f}",
        "clients; Postgres": f"{_percent((ended.clients - begun.clients) / took)}; "
        + _percent((ended.postgres - begun.postgres) / took),
        "server's core busy, clients' core busy": ", ".join(
            _percent((ended.cores[core] - begun.cores[core]) / took) for core in (SERVER_CORE, CLIENT_CORE)
        ),
        "a frame sent late by the client, p99": f"{1000 * _at(late, 99):.0f} ms",
        "all opened in": f"{outcome.opening_s:.0f} s",
        "finals seen": str(len(added)),
        "endpoint to final, p50": f"{1000 * _at(added, 50):.0f} ms",
        "p95": f"{1000 * _at(added, 95):.0f} ms",
        "p99": f"{1000 * _at(added, 99):.0f} ms",
        "event loop lag, p99 at most": f"{1000 * _lag(begun, ended):.0f} ms",
        "memory a stream, all of it": f"{(ended.rss - outcome.idle.rss) / len(speakers):.2f} MiB",
        "utterances lost": f"{sum(s.lost() for s in speakers)} of {sum(len(s.recital.said) for s in speakers)}",
        "streams ended well, all audio covered": str(sum(end.get("coverage") == 1.0 for end in closed)),
    }


def _lag(begun: Look, ended: Look) -> float:
    """The upper edge of the histogram's bucket where the 99th percentile is."""
    counts = {edge: ended.lag[edge] - begun.lag[edge] for edge in ended.lag}
    return next(edge for edge, count in counts.items() if count >= 0.99 * counts[float("inf")])


def _at(figures: list[float], percent: float) -> float:
    return float(np.percentile(figures, percent)) if figures else float("nan")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
