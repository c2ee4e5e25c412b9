"""The engine as a process: listens at once, loads its model meanwhile, ends on a signal."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable

import uvicorn
import uvloop

from dispatchers.backends.local import LocalBackend
from dispatchers.engine.server import EngineServer
from runtime.errors import StenogateError

SHUTDOWN_S = 20


class Unprotected(StenogateError):
    """Without a token the engine only listens on loopback. Set STENOGATE_ENGINE_TOKEN, or use --host 127.0.0.1."""


def run(build: Callable[[], LocalBackend], *, host: str, port: int, token: str | None, max_upload_bytes: int) -> None:
    """Serves until SIGINT or SIGTERM. Blocking; for the main thread.

    Raises `Unprotected`, `OSError` when the port is taken, and what building the backend and loading its default model
    raise: an engine without its model ends."""
    if token is None and not _is_loopback(host):
        raise Unprotected
    # uvicorn raises its signal again when it has ended; the models are freed after that.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server = EngineServer(build, token=token, max_upload_bytes=max_upload_bytes)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=1024) as listener:
        uvloop.run(serve(server, listener))


async def serve(
    server: EngineServer,
    listener: socket.socket,
    http: uvicorn.Server | None = None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves on an open socket until a signal comes or the loading fails, which is then raised; `ready` is called when
    it has succeeded."""
    http = http or uvicorn.Server(uvicorn_config(server))
    loading = asyncio.create_task(server.load())

    def loaded(task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is not None:
            http.should_exit = True
        else:
            ready()

    loading.add_done_callback(loaded)
    try:
        await http.serve(sockets=[listener])
        if loading.done():
            loading.result()
    finally:
        loading.cancel()
        await asyncio.wait({loading})
        await server.aclose()


def uvicorn_config(server: EngineServer) -> uvicorn.Config:
    """How an engine listens."""
    return uvicorn.Config(
        server.app(),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
