"""What a request to a relay costs: HTTP clients against an upstream on loopback that answers at once.

A process of one core asks, another core answers. A request is a form with 32 KB of WAV, as `OpenAIRelay` sends it. CPU
is all that the asking process spends, per request; requests a second are of a closed loop of so many callers. The ways
take turns, and the ratios are to httpx's own connections in the same run.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import aiohttp
import httpx
import httpx2
import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from dispatchers.backends import openai_wire as wire
from dispatchers.backends.relay import Account, client
from dispatchers.interface import Options
from dispatchers.providers import PROVIDERS, open_relay

CALLERS = (1, 16, 64)
SECONDS = 1.5
ROUNDS = 3
AUDIO = np.zeros(16 * 1024, np.int16)
FIELDS = [("model", "whisper-1"), ("response_format", "verbose_json"), ("language", "en")]
WAV = bytes(32 * 1024)
PATH = "audio/transcriptions"
KEY = {"authorization": "Bearer sk-0123456789"}
SAID = b'{"task":"transcribe","language":"english","text":"hello","segments":[{"start":0,"end":1,"text":"hello"}]}'
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(SAID) + SAID

Ask = Callable[[], Awaitable[Any]]


@asynccontextmanager
async def _httpx_form(url: str) -> AsyncIterator[Ask]:
    async with httpx.AsyncClient(base_url=url, headers=KEY, trust_env=False, timeout=30) as http:
        file = ("audio.wav", WAV, "audio/wav")

        async def ask() -> None:
            (await http.post(PATH, data=dict(FIELDS), files={"file": file})).raise_for_status()

        yield ask


@asynccontextmanager
async def _httpx_like(url: str, library: Any) -> AsyncIterator[Ask]:
    async with library.AsyncClient(base_url=url, headers=KEY, trust_env=False, timeout=30) as http:
        yield lambda: _posted(http)


@asynccontextmanager
async def _ours(url: str) -> AsyncIterator[Ask]:
    account = Account("openai", url, "sk-0123456789", "sk-0123", ("whisper-1",))
    async with client(account, KEY, read_s=30) as http:
        yield lambda: _posted(http)


@asynccontextmanager
async def _bare_aiohttp(url: str) -> AsyncIterator[Ask]:
    async with aiohttp.ClientSession(url, headers=KEY) as session:

        async def ask() -> None:
            body, media_type = wire.form(FIELDS, WAV, "audio.wav", "audio/wav")
            async with session.post(PATH, data=body, headers={"content-type": media_type}) as answer:
                await answer.read()

        yield ask


@asynccontextmanager
async def _relay(url: str) -> AsyncIterator[Ask]:
    account = PROVIDERS["openai"].account(backend="openai", key="sk-0123456789", shown="sk-0123", base_url=url)
    relay = open_relay("openai", account)
    options = Options(language="en")
    try:
        yield lambda: relay.transcribe(AUDIO, options)
    finally:
        await relay.aclose()


async def _posted(http: Any) -> None:
    body, media_type = wire.form(FIELDS, WAV, "audio.wav", "audio/wav")
    async with http.stream("POST", PATH, content=body, headers={"content-type": media_type}) as answer:
        await answer.aread()


BASE = "httpx's own connections"
WAYS: dict[str, Callable[[str], Any]] = {
    "httpx's own connections, its own forms": _httpx_form,
    BASE: lambda url: _httpx_like(url, httpx),
    "httpx2": lambda url: _httpx_like(url, httpx2),
    "httpx, connections by aiohttp (ours)": _ours,
    "aiohttp without httpx": _bare_aiohttp,
    "OpenAIRelay.transcribe (ours, whole)": _relay,
}


@dataclass(frozen=True)
class Cost:
    """Of one run."""

    rate: float
    cpu_ms: float


def run(console: Console) -> None:
    """Prints a table for each number of callers."""
    ours, theirs = multiprocessing.Pipe()
    upstream = multiprocessing.get_context("spawn").Process(target=_upstream, args=(theirs,), daemon=True)
    upstream.start()
    url = f"http://127.0.0.1:{ours.recv()}/v1/"
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        for callers in CALLERS:
            _table(console, url, callers)
    finally:
        os.sched_setaffinity(0, cores)
        upstream.terminate()
        upstream.join()


def _table(console: Console, url: str, callers: int) -> None:
    costs: dict[str, list[Cost]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name, way in WAYS.items():
            costs[name].append(uvloop.run(_measured(way, url, callers)))
    cpu = {name: statistics.median(cost.cpu_ms for cost in runs) for name, runs in costs.items()}
    rate = {name: statistics.median(cost.rate for cost in runs) for name, runs in costs.items()}
    table = Table("", "CPU a request", "÷", "requests a second", "×", title=f"{callers} callers")
    for name in WAYS:
        table.add_row(
            name,
            f"{cpu[name]:.3f} ms",
            f"{cpu[name] / cpu[BASE]:.2f}",
            f"{rate[name]:.0f}",
            f"{rate[name] / rate[BASE]:.1f}",
        )
    console.print(table)


async def _measured(way: Callable[[str], Any], url: str, callers: int) -> Cost:
    async with way(url) as ask:
        await _asking(ask, callers, 0.3)  # warms
        cpu, begun = time.process_time(), time.perf_counter()
        count = await _asking(ask, callers, SECONDS)
        return Cost(count / (time.perf_counter() - begun), 1000 * (time.process_time() - cpu) / count)


async def _asking(ask: Ask, callers: int, seconds: float) -> int:
    end = time.perf_counter() + seconds

    async def caller() -> int:
        count = 0
        while time.perf_counter() < end:
            await ask()
            count += 1
        return count

    return sum(await asyncio.gather(*(caller() for _ in range(callers))))


class _Upstream(asyncio.Protocol):
    """Answers each request when it has come whole, without reading it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._head = b""
        self._missing = 0

    def data_received(self, data: bytes) -> None:
        if not self._missing:
            head, separator, body = (self._head + data).partition(b"\r\n\r\n")
            if not separator:
                self._head = head
                return
            self._head = b""
            length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            self._missing = int(length) - len(body)
        else:
            self._missing -= len(data)
        if not self._missing:
            self._transport.write(ANSWER)


def _upstream(told: Connection) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(_Upstream, "127.0.0.1", 0, backlog=1024)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(serve())
