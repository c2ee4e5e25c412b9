"""The local engine as the settings want it: in this process, or in a child of it."""

from __future__ import annotations

import importlib.util
import os
import sys

import structlog

from dispatchers.backends.child import EngineChild
from dispatchers.backends.local import LocalBackend
from dispatchers.engine.models import Resolved, resolve
from dispatchers.errors import BackendUnavailable
from runtime.settings import Settings, engine_environment

log = structlog.get_logger()


def choose_model(settings: Settings) -> Resolved:
    """Which model is the default, and why. Blocks: it may ask the hub.

    Raises `UnknownModel`; `BackendUnavailable` with the remedy."""
    if importlib.util.find_spec("faster_whisper") is None:
        raise BackendUnavailable(
            "No engine is installed here. Install `stenogate[engine-cpu]` or `stenogate[engine-gpu]`."
        )
    resolved = resolve(settings.model, configured=settings.whisper_model, cache_dir=settings.model_cache_dir)
    told = log.warning if resolved.downgraded else log.info
    told("model.chosen", model=resolved.spec.name, engine=resolved.spec.engine, reason=resolved.reason)
    return resolved


def local_backend(settings: Settings, chosen: Resolved) -> LocalBackend:
    """The backend, its model not loaded yet."""
    return LocalBackend(
        chosen.spec,
        workers=settings.engine_workers or os.cpu_count() or 1,
        device=settings.device,
        compute_type=settings.compute_type,
        cache_dir=settings.model_cache_dir,
        shortest_window=settings.shortest_window,
        batch_limit=settings.engine_batch or None,
        queue_limit=settings.engine_queue,
        idle_s=settings.engine_idle_s,
    )


def engine_child(settings: Settings) -> EngineChild:
    """The local backend in a child process, which has just been started."""
    return EngineChild([sys.executable, "-m", "dispatchers.engine"], engine_environment(settings))
