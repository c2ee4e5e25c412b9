"""Puts a door together from settings: which backend stands behind `self_hosted`, and what makes it stream."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from dispatchers.adapters.segmenting import Segmenting
from dispatchers.audio.vad import SileroVad
from dispatchers.backends.local import LocalBackend, ModelCard
from dispatchers.backends.scripted import Scripted
from dispatchers.dispatch import Door
from dispatchers.engine.models import resolve
from dispatchers.interface import Dispatcher
from policy.admission import Admission
from policy.identity import Authenticator
from policy.jwks import KeySets
from runtime.resources import Resources
from runtime.settings import Settings

log = structlog.get_logger()


@dataclass(frozen=True)
class Opened:
    """A door and what stands behind it."""

    door: Door
    authenticator: Authenticator
    catalogue: Callable[[], tuple[ModelCard, ...]]
    model_note: str | None


@asynccontextmanager
async def open_door(resources: Resources) -> AsyncIterator[Opened]:
    """The door of this process, its default model loaded. `model_note` says what `auto` chose, and why."""
    settings = resources.settings
    authenticator = Authenticator(
        resources.database,
        signing_key=resources.signing_key,
        issuer=settings.issuer,
        audience=settings.audience,
        jwks=KeySets(allow_http=settings.jwks_allow_http),
    )
    backend, catalogue, note = await _self_hosted(settings)
    vad = await asyncio.to_thread(SileroVad.load)
    backends: dict[str, Dispatcher] = {"self_hosted": Segmenting(backend, vad)}
    admission = Admission(resources.database, resources.coordination)
    try:
        yield Opened(Door(resources.database, admission, authenticator, backends), authenticator, catalogue, note)
    finally:
        for dispatcher in backends.values():
            await dispatcher.aclose()
        await authenticator.aclose()


async def _self_hosted(settings: Settings) -> tuple[Dispatcher, Callable[[], tuple[ModelCard, ...]], str]:
    """What stands behind `self_hosted`, its models, and why this default."""
    if settings.backend == "scripted":
        return Scripted(), tuple, "no model: a scripted answer, for smoke tests"
    resolved = await asyncio.to_thread(
        resolve, settings.model, configured=settings.whisper_model, cache_dir=settings.model_cache_dir
    )
    say = log.warning if resolved.downgraded else log.info
    say("model.chosen", model=resolved.spec.name, engine=resolved.spec.engine, reason=resolved.reason)
    backend = LocalBackend(
        resolved.spec,
        workers=settings.engine_workers or os.cpu_count() or 1,
        device=settings.device,
        compute_type=settings.compute_type,
        cache_dir=settings.model_cache_dir,
        shortest_window=settings.shortest_window,
        queue_limit=settings.engine_queue,
    )
    await backend.warm()
    return backend, backend.catalogue, resolved.reason
