"""Puts a door together from settings: which backend stands behind `self_hosted`, and what makes it stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from dispatchers.adapters.per_channel import PerChannel
from dispatchers.adapters.segmenting import Segmenting
from dispatchers.audio.vad import SileroVad
from dispatchers.backends.local import ModelCard
from dispatchers.backends.scripted import Scripted
from dispatchers.dispatch import Door
from dispatchers.interface import Dispatcher
from dispatchers.local import choose_model, local_backend
from dispatchers.recorder import Recorder
from policy.admission import Admission
from policy.identity import Authenticator
from policy.jwks import KeySets
from runtime.resources import Resources
from runtime.settings import Settings
from runtime.telemetry import QUEUE_DEPTH, QUEUE_RUNNING


@dataclass(frozen=True)
class Opened:
    """A door and what stands behind it. `queue_wait_s`: about how long live work that came now would wait."""

    door: Door
    authenticator: Authenticator
    catalogue: Callable[[], tuple[ModelCard, ...]]
    model_note: str | None
    queue_wait_s: Callable[[], float]
    recorder: Recorder


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
    backend, catalogue, note, wait_s = await _self_hosted(settings)
    vad = await asyncio.to_thread(SileroVad.load)
    segmenting = Segmenting(backend, vad, most_speaking=settings.max_speaking)
    backends: dict[str, Dispatcher] = {"self_hosted": PerChannel(segmenting)}
    admission = Admission(resources.database, resources.coordination)
    recorder = Recorder(resources.database, resources.blobs, settings.data_dir / "recordings")
    try:
        door = Door(resources.database, admission, authenticator, backends, recorder)
        yield Opened(door, authenticator, catalogue, note, wait_s, recorder)
    finally:
        await recorder.aclose()
        for dispatcher in backends.values():
            await dispatcher.aclose()
        vad.close()
        await authenticator.aclose()


async def _self_hosted(
    settings: Settings,
) -> tuple[Dispatcher, Callable[[], tuple[ModelCard, ...]], str, Callable[[], float]]:
    """What stands behind `self_hosted`, its models, why this default, and how long live work would wait for it."""
    if settings.backend == "scripted":
        return Scripted(), tuple, "no model: a scripted answer, for smoke tests", lambda: 0.0  # it has no queue
    chosen = await asyncio.to_thread(choose_model, settings)
    backend = local_backend(settings, chosen)
    QUEUE_DEPTH.set_function(lambda: backend.waiting)
    QUEUE_RUNNING.set_function(lambda: backend.running)
    await backend.warm()
    return backend, backend.catalogue, chosen.reason, lambda: backend.wait_s
