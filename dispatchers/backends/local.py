"""The engine inside this process: models by name, loaded when they are needed, each behind its own scheduler."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from dispatchers.engine.interface import Engine, Recognised
from dispatchers.engine.models import KNOWN, MICRO, ModelSpec, fetch, is_cached
from dispatchers.engine.scheduler import Scheduler, Seat
from dispatchers.engine.wire import ModelCard, ModelStatus
from dispatchers.errors import (
    BackendFailed,
    BackendTimeout,
    BackendUnavailable,
    DispatchError,
    Overloaded,
    UnknownModel,
    UnsupportedOption,
)
from dispatchers.interface import (
    Capabilities,
    Event,
    Heard,
    Options,
    Origin,
    Samples,
    Segment,
    StreamInput,
    Transcript,
    ignore,
    to_ms,
)
from runtime.telemetry import RECOGNISED_SECONDS, RECOGNITION_SECONDS

_log = logging.getLogger(__name__)

_PATIENCE_S = 60.0
_SLOWEST = 20.0
"""A transcription may take a minute and twenty times as long as its audio before it counts as hung."""

Load = Callable[[ModelSpec], Engine]


@dataclass(slots=True)
class _Loaded:
    engine: Engine
    scheduler: Scheduler
    in_use: int = 0


def load_engine(
    spec: ModelSpec,
    *,
    workers: int,
    device: str = "auto",
    compute_type: str = "default",
    cache_dir: Path | None = None,
    shortest_window: int | None = None,
    batch_limit: int | None = None,
) -> Engine:
    """The model, loaded with `workers` cores to use, downloaded first if it must be. Blocks.

    Raises `BackendUnavailable`."""
    if spec.engine == "pocketsphinx":
        from dispatchers.engine.sphinx import SphinxEngine

        return SphinxEngine(workers, spec)
    from dispatchers.engine.whisper import WhisperEngine

    return WhisperEngine(
        spec,
        fetch(spec, cache_dir),
        device=device,
        compute_type=compute_type,
        cores=workers,
        shortest_window=shortest_window,
        batch_limit=batch_limit,
    )


class LocalBackend:
    """A batch dispatcher over the engines of this process.

    `workers` is the number of cores to use; `queue_limit` bounds what waits for a model, for each urgency;
    `batch_limit` is how many short pieces a Whisper model takes in one go, None going by the device. At most
    `max_loaded` models stay in memory: the default always, of the others those used last. Use from one event loop.
    """

    def __init__(
        self,
        default: ModelSpec,
        *,
        workers: int,
        device: str = "auto",
        compute_type: str = "default",
        cache_dir: Path | None = None,
        shortest_window: int | None = None,
        batch_limit: int | None = None,
        queue_limit: int = 256,
        max_loaded: int = 3,
        load: Load | None = None,
    ) -> None:
        self._default = default
        self._cache_dir = cache_dir
        self._queue_limit = queue_limit
        self._max_loaded = max_loaded
        self._load = load or (
            lambda spec: load_engine(
                spec,
                workers=workers,
                device=device,
                compute_type=compute_type,
                cache_dir=cache_dir,
                shortest_window=shortest_window,
                batch_limit=batch_limit,
            )
        )
        self._specs = {default.name: default}
        self._specs.setdefault(MICRO.name, MICRO)
        self._loaded: dict[str, _Loaded] = {}  # least recently used first
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._unloads: set[asyncio.Task[None]] = set()
        self._failed: set[str] = set()
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        """What the default model can do; another's limits are told when it is asked for."""
        return Capabilities(
            words=True,
            translate=self._default.translate,
            prompt=self._default.engine == "faster-whisper",
            latest_wins=True,
            languages=self._default.languages,
            models=tuple(self._specs),
        )

    @property
    def waiting(self) -> int:
        """Transcriptions in the queues."""
        return sum(loaded.scheduler.waiting for loaded in self._loaded.values())

    @property
    def running(self) -> int:
        """Transcriptions being worked on."""
        return sum(loaded.scheduler.running for loaded in self._loaded.values())

    @property
    def wait_s(self) -> float:
        """About how long live work that came now would wait, for the model that is busiest."""
        return max((loaded.scheduler.wait_s for loaded in self._loaded.values()), default=0.0)

    @property
    def pace_s(self) -> float:
        """By about how much each piece of live work that comes makes that longer, for the model that is slowest."""
        return max((loaded.scheduler.pace_s for loaded in self._loaded.values()), default=0.0)

    @property
    def ready(self) -> bool:
        """Whether the default model is loaded."""
        return self._default.name in self._loaded

    @property
    def workers(self) -> int:
        """How many transcriptions the loaded models can work on at once."""
        return sum(loaded.scheduler.workers for loaded in self._loaded.values())

    def catalogue(self) -> tuple[ModelCard, ...]:
        """The models this backend answers to, the default first."""
        return tuple(
            ModelCard(spec.name, spec.engine, spec.name == self._default.name, self._status(spec))
            for spec in self._specs.values()
        )

    async def warm(self) -> None:
        """Finds out which models are on this machine, and loads the default.

        Raises `BackendUnavailable`."""
        await self._look()
        await self._get(self._default)

    def origin(self, model: str) -> Origin:
        """See `Dispatcher.origin`. Raises `UnknownModel`."""
        spec = self._specs.get(model or self._default.name)
        if spec is None:
            raise UnknownModel(param="model")
        return Origin(backend="self_hosted", engine=spec.engine, model=spec.name)

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        """See `Dispatcher.transcribe`. Raises `UnknownModel`, `UnsupportedOption`, or a `BackendError`."""
        spec = await self._spec(options.model)
        spec.check(options)
        loaded = await self._get(spec)
        loaded.in_use += 1
        try:
            return await self._run(loaded, audio, options, heard)
        finally:
            loaded.in_use -= 1

    def stream(
        self, audio: AsyncIterator[StreamInput], options: Options
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Not possible: raises `UnsupportedOption`. The segmenting adapter makes streams of this backend."""
        raise UnsupportedOption("The local engine takes whole recordings only.")

    async def aclose(self) -> None:
        """Ends the threads and processes, once what runs in them has ended."""
        self._closed = True
        await asyncio.gather(*self._loads.values(), *self._unloads, return_exceptions=True)
        while self._loaded:
            _, loaded = self._loaded.popitem()
            await _unload(loaded)

    async def _run(self, loaded: _Loaded, audio: Samples, options: Options, heard: Heard) -> Transcript:
        loop, abandoned, segments = asyncio.get_running_loop(), threading.Event(), list[Segment]()
        duration_ms = to_ms(len(audio))

        def tell(segment: Segment) -> None:
            if not abandoned.is_set():
                segments.append(segment)
                heard(segment)

        def work(seat: Seat) -> Recognised:
            def cancelled() -> bool:
                seat.give_way()
                return abandoned.is_set()

            RECOGNISED_SECONDS.labels(loaded.engine.spec.name).inc(duration_ms / 1000)
            with RECOGNITION_SECONDS.labels(loaded.engine.spec.name).time():
                return loaded.engine.transcribe(
                    audio, options, lambda segment: _call(loop, tell, segment), cancelled, seat.meeting
                )

        try:
            result = await loaded.scheduler.seat(
                work,
                urgency=options.urgency,
                share=options.share,
                seconds=duration_ms / 1000,
                stream=options.stream,
                kind=loaded.engine.kind(audio, options),
                timeout_s=_PATIENCE_S + _SLOWEST * duration_ms / 1000,
            )
        except DispatchError:
            raise
        except TimeoutError as error:
            raise BackendTimeout from error
        except Exception as error:
            _log.exception("the engine failed")
            raise BackendFailed from error
        finally:
            abandoned.set()
        origin = self.origin(loaded.engine.spec.name)
        return Transcript(result.text, result.language, duration_ms, tuple(segments), origin, options.task)

    async def _spec(self, name: str) -> ModelSpec:
        """Raises `UnknownModel`. A model may have been downloaded since the last look, so a known name gets another."""
        name = name or self._default.name
        if name not in self._specs and name in KNOWN:
            await self._look()
        if name not in self._specs:
            raise UnknownModel(param="model")
        return self._specs[name]

    async def _look(self) -> None:
        def present() -> list[ModelSpec]:
            return [spec for spec in KNOWN.values() if is_cached(spec, self._cache_dir)]

        for spec in await asyncio.to_thread(present):
            self._specs.setdefault(spec.name, spec)

    async def _get(self, spec: ModelSpec) -> _Loaded:
        """The loaded model. Who waits for a load may give up; the load goes on for the others."""
        while spec.name not in self._loaded:
            if self._closed:
                raise BackendUnavailable
            if spec.name not in self._loads:
                self._make_room()
                task = asyncio.create_task(self._open(spec))
                self._loads[spec.name] = task
                task.add_done_callback(lambda done: self._opened(spec.name, done))
            await asyncio.shield(self._loads[spec.name])
        loaded = self._loaded.pop(spec.name)
        self._loaded[spec.name] = loaded
        return loaded

    async def _open(self, spec: ModelSpec) -> None:
        try:
            engine = await asyncio.to_thread(self._load, spec)
        except DispatchError:
            raise
        except Exception as error:
            kind = type(error).__name__
            raise BackendUnavailable(f"The model {spec.name} cannot be loaded ({kind}: {error}).") from error
        scheduler = Scheduler(engine.workers, self._queue_limit, batch_limit=engine.batch_limit, measured=True)
        self._loaded[spec.name] = _Loaded(engine, scheduler)

    def _opened(self, name: str, task: asyncio.Task[None]) -> None:
        del self._loads[name]
        self._failed.discard(name)
        if not task.cancelled() and task.exception() is not None:
            self._failed.add(name)
            _log.error("the model %s cannot be loaded: %s", name, task.exception())

    def _make_room(self) -> None:
        """Lets the model go that was idle longest. Raises `Overloaded` when every one is at work."""
        if len(self._loaded) + len(self._loads) < self._max_loaded:
            return
        for name, loaded in self._loaded.items():
            if name != self._default.name and loaded.in_use == 0:
                del self._loaded[name]
                unload = asyncio.create_task(_unload(loaded))
                self._unloads.add(unload)
                unload.add_done_callback(self._unloads.discard)
                return
        raise Overloaded("Too many models are at work. Try again in a few seconds.", retry_after_s=5)

    def _status(self, spec: ModelSpec) -> ModelStatus:
        if spec.name in self._loaded:
            return "ready"
        if spec.name in self._loads:
            return "loading"
        if spec.name in self._failed:
            return "failed"
        return "available" if spec.name in (MICRO.name, "pocketsphinx") else "cached"


def _call(loop: asyncio.AbstractEventLoop, tell: Callable[[Segment], None], segment: Segment) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(tell, segment)


async def _unload(loaded: _Loaded) -> None:
    await loaded.scheduler.aclose()
    await asyncio.to_thread(loaded.engine.close)
