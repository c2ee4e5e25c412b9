"""The models of this process: known by name, loaded when they are asked for, let go when they are not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from dispatchers.engine.further import recognisers
from dispatchers.engine.interface import Engine
from dispatchers.engine.models import MICRO, ModelSpec, fetch, is_cached, known
from dispatchers.engine.scheduler import Scheduler
from dispatchers.engine.wire import ModelCard, ModelStatus
from dispatchers.errors import BackendUnavailable, DispatchError, Overloaded, UnknownModel, UnsupportedOption

_log = logging.getLogger(__name__)

_DOWNLOADED = 100

Load = Callable[[ModelSpec], Engine]


@dataclass(slots=True)
class Loaded:
    """A model in memory, behind its own scheduler. `used_at` is on the loop's clock."""

    engine: Engine
    scheduler: Scheduler
    in_use: int = 0
    used_at: float = 0.0
    idle: asyncio.TimerHandle | None = None


def load_engine(
    spec: ModelSpec,
    *,
    workers: int,
    device: str = "auto",
    compute_type: str = "default",
    cache_dir: Path | None = None,
    shortest_window: int | None = None,
    batch_limit: int | None = None,
    told: Callable[[int], None] = lambda _: None,
) -> Engine:
    """The model, loaded with `workers` cores to use, downloaded first if it must be: `told` gets how far that is, in
    per cent. Blocks.

    Raises `BackendUnavailable`."""
    if spec.engine == "pocketsphinx":
        from dispatchers.engine.sphinx import SphinxEngine

        return SphinxEngine(workers, spec)
    if spec.engine in recognisers():
        return recognisers()[spec.engine].load(spec, workers, device)
    from dispatchers.engine.whisper import WhisperEngine

    return WhisperEngine(
        spec,
        fetch(spec, cache_dir, told),
        device=device,
        compute_type=compute_type,
        cores=workers,
        shortest_window=shortest_window,
        batch_limit=batch_limit,
    )


class Shelf:
    """At most `most` models stay in memory: the default always, of the others those used last, and none that nobody has
    asked for `idle_s` (0: for ever). `load` blocks, and runs in a thread. Use from one event loop."""

    def __init__(
        self,
        default: ModelSpec,
        load: Load,
        *,
        cache_dir: Path | None,
        queue_limit: int,
        most: int,
        idle_s: float,
    ) -> None:
        self.default = default
        self.downloads: dict[str, int] = {}
        """How much of a model is here while it is downloaded, in per cent; threads write it."""
        self._load = load
        self._cache_dir = cache_dir
        self._queue_limit = queue_limit
        self._most = most
        self._idle_s = idle_s
        self._specs = {default.name: default}
        self._specs.setdefault(MICRO.name, MICRO)
        self._asked: dict[str, ModelSpec] = {}  # to be loaded, and not known to be here
        self._loaded: dict[str, Loaded] = {}  # least recently used first
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._unloads: set[asyncio.Task[None]] = set()
        self._failed: set[str] = set()
        self._closed = False

    @property
    def loaded(self) -> tuple[Loaded, ...]:
        """The models in memory."""
        return tuple(self._loaded.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The models that may be asked for, the default first."""
        return tuple(self._specs)

    @property
    def ready(self) -> bool:
        """Whether the default model is in memory."""
        return self.default.name in self._loaded

    def spec(self, name: str) -> ModelSpec:
        """A model that may be asked for. Empty: the default. Raises `UnknownModel`."""
        spec = self._specs.get(name or self.default.name)
        if spec is None:
            raise UnknownModel(param="model")
        return spec

    async def find(self, name: str) -> ModelSpec:
        """The same; it may have been downloaded since the last look, so a known name gets another."""
        if name not in self._specs and name in known():
            await self.look()
        return self.spec(name)

    async def look(self) -> None:
        """Finds out which models are on this machine."""

        def present() -> list[ModelSpec]:
            return [spec for spec in known().values() if is_cached(spec, self._cache_dir)]

        for spec in await asyncio.to_thread(present):
            self._specs.setdefault(spec.name, spec)

    def catalogue(self) -> tuple[ModelCard, ...]:
        """The models that may be asked for, and those on their way; the default first."""
        return tuple(self._card(spec) for spec in (self._specs | self._asked).values())

    @asynccontextmanager
    async def lent(self, spec: ModelSpec) -> AsyncIterator[Loaded]:
        """The model in memory, for as long as it is used. Raises `BackendUnavailable`, `Overloaded`."""
        loaded = await self.get(spec)
        loaded.in_use += 1
        try:
            yield loaded
        finally:
            loaded.in_use -= 1
            self._used(loaded)

    async def get(self, spec: ModelSpec) -> Loaded:
        """The model, once it is in memory. Who waits for a load may give up; the load goes on for the others."""
        while spec.name not in self._loaded:
            if self._closed:
                raise BackendUnavailable
            await asyncio.shield(self._begin(spec))
        loaded = self._loaded.pop(spec.name)
        self._loaded[spec.name] = loaded
        return loaded

    def load(self, name: str) -> None:
        """Begins to load a known model, downloaded first if it must be; `catalogue` says how far that is. Once it is in
        memory it may be asked for.

        Raises `UnknownModel`, `Overloaded` when there is no room."""
        spec = self._specs.get(name) or known().get(name)
        if spec is None:
            raise UnknownModel(param="model")
        if name not in self._loaded:
            self._begin(spec)
        if name not in self._specs:
            self._asked[name] = spec

    async def unload(self, name: str) -> None:
        """Frees a model's memory. One that is not in memory stays as it is.

        Raises `UnknownModel`; `UnsupportedOption` for the default; `Overloaded` while it is at work."""
        if self.spec(name) is self.default:
            raise UnsupportedOption(f"The model {self.default.name} is the default, which stays loaded.", param="model")
        if (loaded := self._loaded.get(name)) is None:
            return
        if loaded.in_use:
            raise Overloaded(f"The model {name} is at work. Try again when it is done.", retry_after_s=5)
        await self._let_go(name)

    async def aclose(self) -> None:
        """Frees all models, once what runs in them has ended."""
        self._closed = True
        await asyncio.gather(*self._loads.values(), return_exceptions=True)
        await asyncio.gather(*self._unloads, *(self._let_go(name) for name in list(self._loaded)))

    # --- in and out of memory ---

    def _begin(self, spec: ModelSpec) -> asyncio.Task[None]:
        if spec.name not in self._loads:
            self._make_room()
            task = asyncio.create_task(self._open(spec))
            self._loads[spec.name] = task
            task.add_done_callback(lambda done: self._opened(spec.name, done))
        return self._loads[spec.name]

    async def _open(self, spec: ModelSpec) -> None:
        try:
            engine = await asyncio.to_thread(self._load, spec)
        except DispatchError:
            raise
        except Exception as error:
            kind = type(error).__name__
            raise BackendUnavailable(f"The model {spec.name} cannot be loaded ({kind}: {error}).") from error
        scheduler = Scheduler(
            engine.workers,
            self._queue_limit,
            batch_limit=engine.batch_limit,
            spread=getattr(engine, "spread", False),
            measured=True,
        )
        self._loaded[spec.name] = loaded = Loaded(engine, scheduler)
        self._specs[spec.name] = spec
        self._asked.pop(spec.name, None)
        self._used(loaded)

    def _opened(self, name: str, task: asyncio.Task[None]) -> None:
        del self._loads[name]
        self.downloads.pop(name, None)
        self._failed.discard(name)
        if not task.cancelled() and task.exception() is not None:
            self._failed.add(name)
            _log.error("the model %s cannot be loaded: %s", name, task.exception())

    def _make_room(self) -> None:
        """Lets the model go that was idle longest. Raises `Overloaded` when every one is at work."""
        if len(self._loaded) + len(self._loads) < self._most:
            return
        for name, loaded in self._loaded.items():
            if name != self.default.name and loaded.in_use == 0:
                self._let_go(name)
                return
        raise Overloaded("Too many models are at work. Try again in a few seconds.", retry_after_s=5)

    def _let_go(self, name: str) -> asyncio.Task[None]:
        loaded = self._loaded.pop(name)
        if loaded.idle is not None:
            loaded.idle.cancel()
        unload = asyncio.create_task(_unload(loaded))
        self._unloads.add(unload)
        unload.add_done_callback(self._unloads.discard)
        return unload

    def _used(self, loaded: Loaded) -> None:
        """It was used until now."""
        loop = asyncio.get_running_loop()
        loaded.used_at = loop.time()
        if self._idle_s and loaded.idle is None and loaded.engine.spec.name != self.default.name:
            loaded.idle = loop.call_later(self._idle_s, self._idled, loaded)

    def _idled(self, loaded: Loaded) -> None:
        loop, name = asyncio.get_running_loop(), loaded.engine.spec.name
        loaded.idle = None
        if self._loaded.get(name) is not loaded:
            return
        left_s = self._idle_s if loaded.in_use else loaded.used_at + self._idle_s - loop.time()
        if left_s > 0:
            loaded.idle = loop.call_later(left_s, self._idled, loaded)
        else:
            _log.info("the model %s is unloaded: nobody has asked for it for %g s", name, self._idle_s)
            self._let_go(name)

    # --- what is told ---

    def _card(self, spec: ModelSpec) -> ModelCard:
        status = self._status(spec)
        progress = self.downloads.get(spec.name) if status == "downloading" else None
        return ModelCard(spec.name, spec.engine, spec.name == self.default.name, status, progress)

    def _status(self, spec: ModelSpec) -> ModelStatus:
        if spec.name in self._loaded:
            return "ready"
        if spec.name in self._loads:
            return "downloading" if self.downloads.get(spec.name, _DOWNLOADED) < _DOWNLOADED else "loading"
        if spec.name in self._failed:
            return "failed"
        return "cached" if spec.engine == "faster-whisper" and spec.name != MICRO.name else "available"


async def _unload(loaded: Loaded) -> None:
    await loaded.scheduler.aclose()
    await asyncio.to_thread(loaded.engine.close)
