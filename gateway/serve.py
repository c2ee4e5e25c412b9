"""The gateway process: opens what it stands on, listens, and closes it all again.

With no database named, it is everything at once: an embedded Postgres, workers in the same process, and a tenant to try
it with.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from types import FrameType

import uvicorn
import uvloop

from dispatchers.assembly import begin_engine, open_door
from dispatchers.backends.child import EngineChild
from gateway.app import create_app
from gateway.demo_tenant import DEMO, ensure_demo_tenant
from gateway.live.gauges import tell_metrics
from gateway.live_settings import live_settings
from gateway.state import Gateway
from gateway.uploads import sweep
from gateway.websocket import WebSocketProtocol
from policy.identity import SCOPES, mint
from runtime.embedded import with_database
from runtime.resources import Resources, open_resources
from runtime.settings import KIB, Settings
from runtime.telemetry import configure_logging, watch_loop_lag
from workers.main import open_jobs

TOKEN_TTL_S = 24 * 3600
SHUTDOWN_S = 20
COLLECTED_EVERY = 5_000, 5, 20
"""The thresholds of the garbage collector. Hardly anything of a stream is in cycles, so it finds next to nothing; with
its own thresholds it soon looks through all streams at once, which holds them up for 0.1 s."""


@dataclass(frozen=True)
class Announcement:
    """Where a gateway listens, which model it answers with and, when embedded, a token for its demo tenant."""

    url: str
    model: str
    model_note: str | None
    token: str | None


def serve(settings: Settings, announce: Callable[[Announcement], None]) -> None:
    """Serves until SIGINT or SIGTERM. Blocking; for the main thread. Raises `OSError` when the port is taken."""
    configure_logging(settings.log_level, settings.log_format)
    embedded = settings.database_url is None
    with _listening(settings) as listener:
        engine = begin_engine(settings)
        with with_database(settings) as completed:
            uvloop.run(_serve(completed, listener, announce, engine, embedded=embedded))


class _Server(uvicorn.Server):
    """A uvicorn server that says when it is listening, and sends its live streams off before it closes them: uvicorn by
    itself closes every WebSocket as soon as it is asked to end. Asked a second time it ends at once."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None], leave: Callable[[], Awaitable[None]]):
        super().__init__(config)
        self._started = started
        self._leave = leave
        self._loop = asyncio.get_running_loop()
        self._leaving: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._asked_to_end)

    def _asked_to_end(self) -> None:
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._end())
        else:
            self.should_exit = self.force_exit = True

    async def _end(self) -> None:
        try:
            await self._leave()
        finally:
            self.should_exit = True


async def _serve(
    settings: Settings,
    listener: socket.socket,
    announce: Callable[[Announcement], None],
    engine: EngineChild | None,
    *,
    embedded: bool,
) -> None:
    async with open_gateway(settings, engine) as (gateway, note):
        token = await _demo_token(gateway.resources) if embedded else None
        host, port = listener.getsockname()[:2]
        gc.collect()
        gc.freeze()  # what is here stays; looking through all of it again and again would hold up every stream
        gc.set_threshold(*COLLECTED_EVERY)
        announcement = Announcement(f"http://{host}:{port}", _default_model(gateway), note, token)
        with _announced(settings, announcement):
            await _Server(
                uvicorn_config(gateway),
                started=lambda: announce(announcement),
                leave=lambda: gateway.roster.drain(gateway.settings.stream_drain_s),
            ).serve(sockets=[listener])


def _default_model(gateway: Gateway) -> str:
    """Empty while no engine has said what it has."""
    return next((model for offer in gateway.door.offers() for model in offer.models), "")


@asynccontextmanager
async def open_gateway(
    settings: Settings, engine: EngineChild | None = None
) -> AsyncIterator[tuple[Gateway, str | None]]:
    """Everything a gateway process holds, its default model loaded (by `engine`, if begun), and what `auto` has to say
    about that model."""
    async with AsyncExitStack() as stack:
        resources = await stack.enter_async_context(open_resources(settings))
        opened = await stack.enter_async_context(open_door(resources, engine))
        jobs = await stack.enter_async_context(open_jobs(resources, opened.door))
        await asyncio.to_thread(sweep, settings.data_dir / "uploads")
        lag = asyncio.create_task(watch_loop_lag(0.1))
        stack.callback(lag.cancel)
        live = await stack.enter_async_context(live_settings(resources))
        gateway = Gateway(
            live,
            resources,
            opened.authenticator,
            opened.door,
            jobs,
            opened.catalogue,
            opened.queue_wait_s,
            opened.engine_up,
            opened.tell_figures,
        )
        tell_metrics(gateway)
        stack.push_async_callback(gateway.roster.aclose)
        yield gateway, opened.model_note


def uvicorn_config(gateway: Gateway) -> uvicorn.Config:
    """How we listen. Sockets are handed over open, so nothing races for the port."""
    proxies = [str(network) for network in gateway.settings.trusted_proxies or ()]
    return uvicorn.Config(
        create_app(gateway),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(proxies),  # else anybody on this machine could name any address as its own
        forwarded_allow_ips=proxies,
        ws=WebSocketProtocol,
        ws_per_message_deflate=False,  # speech does not compress, and inflating is a way in for bombs
        ws_ping_timeout=None,  # pongs stand behind audio that we do not read yet; the idle limit ends dead peers
        ws_max_size=512 * KIB,  # above the protocol's own limit, so that ours answers with its code
        h11_max_incomplete_event_size=64 * KIB,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )


async def _demo_token(resources: Resources) -> str:
    tenant = await ensure_demo_tenant(resources.database)
    settings = resources.settings
    return mint(
        resources.signing_key,
        issuer=settings.issuer,
        audience=settings.audience,
        tenant=tenant,
        subject=DEMO,
        scopes=SCOPES,
        ttl_s=TOKEN_TTL_S,
    )


@contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(1024)
        yield listener


@contextmanager
def _announced(settings: Settings, announcement: Announcement) -> Iterator[None]:
    """`serve.json` in the data dir, readable by its owner only: how other commands find this gateway."""
    path = settings.data_dir / "serve.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".fresh")
    fresh.touch(mode=0o600)
    fresh.write_text(json.dumps(asdict(announcement) | {"pid": os.getpid()}))
    fresh.replace(path)  # whoever reads it reads all of it
    try:
        yield
    finally:
        if path.exists() and json.loads(path.read_text())["pid"] == os.getpid():  # else it speaks of another by now
            path.unlink()
