"""Engines as processes of their own, and engines that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import httpx
import uvicorn
from starlette.types import ASGIApp

TOKEN = "the engines' token"
START_S = 60.0


@dataclass(frozen=True)
class RunningEngine:
    """A `stenogate engine` that is ready."""

    url: str
    process: subprocess.Popen[bytes]


def free_port(host: str = "127.0.0.1") -> int:
    with socket.create_server((host, 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def engine_process(host: str = "127.0.0.1", port: int | None = None, **settings: str) -> Iterator[RunningEngine]:
    """Starts one with the micro model on one core, and these settings besides; kills it in the end."""
    port = port or free_port(host)
    chosen = {"model": "micro", "engine_workers": "1", "engine_token": TOKEN, "log_level": "warning", **settings}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STENOGATE_")}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "engine", "--host", host, "--port", str(port)],
            env=environment | {f"STENOGATE_{name.upper()}": value for name, value in chosen.items()},
            stdout=log,
            stderr=log,
        )
        try:
            url = f"http://{host}:{port}"
            _until_ready(url, process)
            yield RunningEngine(url, process)
        finally:
            process.kill()
            process.wait()


def _until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    with httpx.Client(base_url=url, timeout=5, trust_env=False) as http:
        while True:
            assert process.poll() is None, "the engine ended before it was ready"
            assert time.monotonic() < deadline, "the engine does not become ready"
            with contextlib.suppress(httpx.TransportError):
                if http.get("/readyz").status_code == 200:
                    return
            time.sleep(0.05)


@asynccontextmanager
async def listening(app: ASGIApp, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """The application's address, while it is served."""
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1))
    with socket.create_server((host, port)) as listener:
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://{host}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


@asynccontextmanager
async def silent() -> AsyncIterator[str]:
    """The address of a server that takes connections and never says a word."""
    writers: list[asyncio.StreamWriter] = []

    async def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await server.wait_closed()


async def until(met: Callable[[], bool], within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not met():  # noqa: ASYNC110 — another process' doing
            await asyncio.sleep(0.01)
