"""Puts a door together from settings: which backend stands behind `self_hosted`, what makes it stream, and where relays
come from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

from dispatchers.adapters.segmenting import Segmenting
from dispatchers.audio.vad import SileroVad
from dispatchers.backends.child import EngineChild
from dispatchers.backends.pool import EnginePool
from dispatchers.backends.scripted import Scripted
from dispatchers.dispatch import Door
from dispatchers.engine.wire import ModelCard
from dispatchers.interface import Dispatcher
from dispatchers.local import engine_child
from dispatchers.plug import Plug
from dispatchers.recorder import Recorder
from dispatchers.registry import Known, Registry, Relays
from policy import relays
from policy.admission import Admission
from policy.identity import Authenticator
from policy.jwks import KeySets
from runtime.resources import Resources
from runtime.settings import Settings


async def _nothing() -> None:
    """There is no other process."""


@dataclass(frozen=True)
class Opened:
    """A door and what stands behind it. `queue_wait_s`: about how long live work that came now would wait;
    `engine_up`: whether the models are there; `tell_figures` brings their process' numbers among ours."""

    door: Door
    authenticator: Authenticator
    catalogue: Callable[[], tuple[ModelCard, ...]]
    model_note: str | None
    queue_wait_s: Callable[[], float]
    recorder: Recorder
    engine_up: Callable[[], bool]
    tell_figures: Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class _SelfHosted:
    """What stands behind `self_hosted`."""

    backend: Dispatcher | None
    note: str
    catalogue: Callable[[], tuple[ModelCard, ...]] = tuple
    queue_wait_s: Callable[[], float] = lambda: 0.0
    engine_up: Callable[[], bool] = lambda: True
    tell_figures: Callable[[], Awaitable[None]] = _nothing


def begin_engine(settings: Settings) -> EngineChild | None:
    """Starts the engine's process, where there is to be one, ahead of the door: models load while a database starts.
    It ends with this process, or with the door that is opened with it."""
    return engine_child(settings) if settings.backend == "local" and not settings.engines else None


@asynccontextmanager
async def open_door(resources: Resources, engine: EngineChild | None = None) -> AsyncIterator[Opened]:
    """The door of this process, its default model loaded, by `engine` if that has begun. `model_note` says what `auto`
    chose, and why."""
    settings = resources.settings
    async with _self_hosted(settings, engine or begin_engine(settings)) as local:
        authenticator = Authenticator(
            resources.database,
            signing_key=resources.signing_key,
            issuer=settings.issuer,
            audience=settings.audience,
            jwks=KeySets(allow_http=settings.jwks_allow_http),
        )
        vad = await asyncio.to_thread(SileroVad.load)
        admission = Admission(resources.database, resources.coordination)
        recorder = Recorder(resources.database, resources.blobs, settings.data_dir / "recordings")
        try:
            async with _plugged_in(resources, local, vad) as registry:
                yield Opened(
                    Door(resources.database, admission, authenticator, registry, recorder),
                    authenticator,
                    local.catalogue,
                    local.note,
                    local.queue_wait_s,
                    recorder,
                    local.engine_up,
                    _telling(registry, local),
                )
        finally:
            await recorder.aclose()
            vad.close()
            await authenticator.aclose()


@asynccontextmanager
async def _plugged_in(resources: Resources, local: _SelfHosted, vad: SileroVad) -> AsyncIterator[Registry]:
    """The engine of this installation, if any, and the operator's relays, as long as this is open."""
    settings, database = resources.settings, resources.database

    async def load() -> Known:
        async with database.across_tenants("relays and their credentials") as tx:
            return await relays.load(tx, resources.sealer)

    async def note_used(ids: list[UUID]) -> None:
        async with database.across_tenants("when credentials of relays were used") as tx:
            await relays.used(tx, ids)

    def ready() -> bool:
        """Where there is nothing else, it is worth waiting for."""
        return local.engine_up() or registry.alone

    own: list[Plug] = []
    if local.backend is not None:
        streams = Segmenting(
            local.backend, vad, most_speaking=settings.max_speaking, away=lambda: not local.engine_up()
        )
        own = [Plug("self_hosted", streams, region=settings.region, ready=ready, back_in_s=local.queue_wait_s)]
    how = Relays(
        load,
        note_used,
        segmented=lambda recordings: Segmenting(recordings, vad),
        refresh_s=settings.relay_refresh_s,
        requests=settings.relay_requests,
        streams=settings.relay_streams,
    )
    registry = Registry(own, how)
    await registry.keep_up()
    keeping = asyncio.create_task(registry.run())
    try:
        yield registry
    finally:
        keeping.cancel()
        await asyncio.wait({keeping})
        await registry.aclose()


def _telling(registry: Registry, local: _SelfHosted) -> Callable[[], Awaitable[None]]:
    async def tell_figures() -> None:
        registry.tell()
        await local.tell_figures()

    return tell_figures


@asynccontextmanager
async def _self_hosted(settings: Settings, child: EngineChild | None) -> AsyncIterator[_SelfHosted]:
    """The models, in a child process or elsewhere, what answers in their place, or nothing."""
    if settings.backend == "none":
        yield _SelfHosted(None, "no engine here: relays only")
        return
    engine = child or _pool(settings)
    if engine is None:
        yield _SelfHosted(Scripted(), "no model: a scripted answer, for smoke tests")
        return
    try:
        note = await engine.start()
        yield _SelfHosted(engine, note, engine.catalogue, lambda: engine.wait_s, lambda: engine.up, engine.tell_figures)
    finally:
        await engine.aclose()


def _pool(settings: Settings) -> EnginePool | None:
    if not settings.engines or settings.backend == "scripted":
        return None
    token = settings.engine_token
    return EnginePool(settings.engines, token=None if token is None else token.get_secret_value())
