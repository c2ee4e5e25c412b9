"""The engine inside this process: a dispatcher over the models on its shelf."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from dispatchers.engine.interface import Engine, Recognised
from dispatchers.engine.models import ModelSpec
from dispatchers.engine.scheduler import Seat
from dispatchers.engine.shelf import Load, Loaded, Shelf, load_engine
from dispatchers.engine.wire import ModelCard
from dispatchers.errors import BackendFailed, BackendTimeout, DispatchError, UnsupportedOption
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


class LocalBackend:
    """A batch dispatcher over the engines of this process.

    `workers` is the number of cores to use; `queue_limit` bounds what waits for a model, for each urgency;
    `batch_limit` is how many short pieces a Whisper model takes in one go, None going by the device. At most
    `max_loaded` models stay in memory, and none but the default that nobody has asked for `idle_s` (0: for ever). Use
    from one event loop.
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
        idle_s: float = 0.0,
        load: Load | None = None,
    ) -> None:
        def really(spec: ModelSpec) -> Engine:
            return load_engine(
                spec,
                workers=workers,
                device=device,
                compute_type=compute_type,
                cache_dir=cache_dir,
                shortest_window=shortest_window,
                batch_limit=batch_limit,
                told=lambda percent: self._shelf.downloads.update({spec.name: percent}),
            )

        self._shelf = Shelf(
            default, load or really, cache_dir=cache_dir, queue_limit=queue_limit, most=max_loaded, idle_s=idle_s
        )

    @property
    def capabilities(self) -> Capabilities:
        """What the default model can do; another's limits are told when it is asked for."""
        default = self._shelf.default
        return Capabilities(
            words=True,
            translate=default.translate,
            prompt=default.engine == "faster-whisper",
            latest_wins=True,
            languages=default.languages,
            models=self._shelf.names,
        )

    @property
    def ready(self) -> bool:
        """Whether the default model is loaded."""
        return self._shelf.ready

    @property
    def waiting(self) -> int:
        """Transcriptions in the queues."""
        return sum(loaded.scheduler.waiting for loaded in self._shelf.loaded)

    @property
    def running(self) -> int:
        """Transcriptions being worked on."""
        return sum(loaded.scheduler.running for loaded in self._shelf.loaded)

    @property
    def wait_s(self) -> float:
        """About how long live work that came now would wait, for the model that is busiest."""
        return max((loaded.scheduler.wait_s for loaded in self._shelf.loaded), default=0.0)

    @property
    def pace_s(self) -> float:
        """By about how much each piece of live work that comes makes that longer, for the model that is slowest."""
        return max((loaded.scheduler.pace_s for loaded in self._shelf.loaded), default=0.0)

    @property
    def workers(self) -> int:
        """How many transcriptions the loaded models can work on at once."""
        return sum(loaded.scheduler.workers for loaded in self._shelf.loaded)

    def catalogue(self) -> tuple[ModelCard, ...]:
        """The models this backend answers to, and those on their way; the default first."""
        return self._shelf.catalogue()

    async def warm(self) -> None:
        """Finds out which models are on this machine, and loads the default.

        Raises `BackendUnavailable`."""
        await self._shelf.look()
        await self._shelf.get(self._shelf.default)

    def load(self, model: str) -> None:
        """See `Shelf.load`."""
        self._shelf.load(model)

    async def unload(self, model: str) -> None:
        """See `Shelf.unload`."""
        await self._shelf.unload(model)

    def origin(self, model: str) -> Origin:
        """See `Dispatcher.origin`. Raises `UnknownModel`."""
        spec = self._shelf.spec(model)
        return Origin(backend="self_hosted", engine=spec.engine, model=spec.name)

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        """See `Dispatcher.transcribe`. Raises `UnknownModel`, `UnsupportedOption`, or a `BackendError`."""
        spec = await self._shelf.find(options.model)
        spec.check(options)
        async with self._shelf.lent(spec) as loaded:
            return await self._run(loaded, audio, options, heard)

    def stream(
        self, audio: AsyncIterator[StreamInput], options: Options
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Not possible: raises `UnsupportedOption`. The segmenting adapter makes streams of this backend."""
        raise UnsupportedOption("The local engine takes whole recordings only.")

    async def aclose(self) -> None:
        """Ends the threads and processes, once what runs in them has ended."""
        await self._shelf.aclose()

    async def _run(self, loaded: Loaded, audio: Samples, options: Options, heard: Heard) -> Transcript:
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


def _call(loop: asyncio.AbstractEventLoop, tell: Callable[[Segment], None], segment: Segment) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(tell, segment)
