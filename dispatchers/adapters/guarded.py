"""A managed provider behind everything that keeps its troubles from becoming ours.

So many requests and streams at once and no more; each with a deadline; none while the breaker is open; every outcome
told to the breaker. A slot is a number that a `with` block raises and lowers: nothing that cancels can leak it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import structlog

from dispatchers.errors import BackendFailed, BackendTimeout, Overloaded
from dispatchers.health import Breaker, Trial
from dispatchers.interface import (
    SAMPLE_RATE,
    Capabilities,
    Clear,
    Cleared,
    Dispatcher,
    Event,
    Flush,
    Flushed,
    Heard,
    Options,
    Origin,
    Samples,
    StreamInput,
    Transcript,
    ignore,
)
from runtime.errors import StenogateError
from runtime.telemetry import BACKEND_RUNNING

log = structlog.get_logger()

FULL_RETRY_S = 2.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a provider may take, in seconds. A recording: `base_s`, and `per_audio_s` for each second of it. A
    stream: `open_s` until it is open, and `idle_s` until it takes more audio, answers a command, or goes on finishing.
    """

    base_s: float = 30.0
    per_audio_s: float = 0.5
    open_s: float = 10.0
    idle_s: float = 30.0

    def for_recording(self, samples: int) -> float:
        return self.base_s + self.per_audio_s * samples / SAMPLE_RATE


@runtime_checkable
class Probed(Protocol):
    """A backend that can be asked whether it is well."""

    async def probe(self) -> None:
        """Raises `BackendError`."""
        ...


class Slots:
    """So many at once. `kind`: of what, for the metrics."""

    def __init__(self, backend: str, kind: str, limit: int):
        self._backend = backend
        self._limit = limit
        self._gauge = BACKEND_RUNNING.labels(backend, kind)
        self.taken = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Raises `Overloaded` when all are taken."""
        if self.taken >= self._limit:
            raise Overloaded(f"As much as may is at {self._backend} already.", retry_after_s=FULL_RETRY_S)
        self.taken += 1
        self._gauge.inc()
        try:
            yield
        finally:
            self.taken -= 1
            self._gauge.dec()


class Guarded:
    """The dispatcher within. What it raises that is none of our errors is logged by kind and becomes `BackendFailed`:
    its message may quote what the provider said."""

    def __init__(
        self,
        within: Dispatcher,
        breaker: Breaker,
        *,
        requests: int = 64,
        streams: int = 100,
        patience: Patience | None = None,
    ):
        self._within = within
        self._breaker = breaker
        self._requests = Slots(breaker.backend, "request", requests)
        self._streams = Slots(breaker.backend, "stream", streams)
        self._patience = patience or Patience()

    @property
    def capabilities(self) -> Capabilities:
        return self._within.capabilities

    def origin(self, model: str) -> Origin:
        return self._within.origin(model)

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        with self._requests.slot(), self._breaker.attempt(), self._ours():
            async with asyncio.timeout(self._patience.for_recording(len(audio))):
                return await self._within.transcribe(audio, options, heard)

    @asynccontextmanager
    async def stream(self, audio: AsyncIterator[StreamInput], options: Options) -> AsyncIterator[AsyncIterator[Event]]:
        with self._streams.slot():
            trial, watch = self._breaker.enter(), _Watch(self._patience.idle_s)
            settled = asyncio.get_running_loop().call_later(self._patience.open_s, trial.end, None)
            try:
                async with AsyncExitStack() as stack:
                    with self._judged(trial, watch):
                        async with asyncio.timeout(self._patience.open_s):
                            opened = self._within.stream(watch.fed(audio), options)
                            events = await stack.enter_async_context(opened)
                    yield self._heard(events, watch, trial)
            finally:
                settled.cancel()
                trial.leave()

    async def probe(self) -> bool:
        """Asks the provider something that costs nothing; its answer counts. False: there is no such thing."""
        if not isinstance(self._within, Probed):
            return False
        with self._breaker.attempt(), self._ours():
            async with asyncio.timeout(self._patience.open_s):
                await self._within.probe()
        return True

    async def aclose(self) -> None:
        await self._within.aclose()

    async def _heard(self, events: AsyncIterator[Event], watch: _Watch, trial: Trial) -> AsyncIterator[Event]:
        with self._judged(trial, watch):
            while (event := await watch.next_of(events)) is not None:
                trial.end(None)
                yield event
        trial.end(None)

    @contextmanager
    def _judged(self, trial: Trial, watch: _Watch) -> Iterator[None]:
        """A failure counts, unless it came in with the audio."""
        try:
            with self._ours():
                yield
        except Exception as error:
            if watch.broken is not None:
                raise watch.broken from None
            trial.end(error)
            raise

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """Failures as our errors."""
        try:
            yield
        except StenogateError:
            raise
        except TimeoutError as error:
            raise BackendTimeout(f"{self._breaker.backend} did not answer in time.") from error
        except Exception as error:
            log.error("backend.fault", backend=self._breaker.backend, error=type(error).__name__)  # noqa: TRY400
            raise BackendFailed(f"{self._breaker.backend} failed.") from error


class _Watch:
    """Whether a stream gets on. It owes us something while it holds audio that it has not taken, a command that it has
    not answered, or its last finals. In silence it owes nothing, and may be as quiet as the speaker."""

    def __init__(self, idle_s: float):
        self._idle_s = idle_s
        self._unanswered = 0
        self._holding = self._ended = False
        self._deadline: asyncio.Timeout | None = None
        self._loop = asyncio.get_running_loop()
        self.broken: Exception | None = None
        """What came in with the audio."""

    async def fed(self, audio: AsyncIterator[StreamInput]) -> AsyncIterator[StreamInput]:
        """The audio, on its way in."""
        while (item := await self._next_in(audio)) is not None:
            self._unanswered += isinstance(item, Flush | Clear)
            self._holding = True
            self._set()
            yield item
            self._holding = False
            self._set()
        self._ended = True
        self._set()

    async def next_of(self, events: AsyncIterator[Event]) -> Event | None:
        """None: there are no more. Raises `TimeoutError`."""
        async with asyncio.timeout(None) as deadline:
            self._deadline = deadline
            self._set()
            try:
                event = await anext(events, None)
            finally:
                self._deadline = None
        self._unanswered -= isinstance(event, Flushed | Cleared)
        return event

    async def _next_in(self, audio: AsyncIterator[StreamInput]) -> StreamInput | None:
        try:
            return await anext(audio, None)
        except Exception as error:
            self.broken = error
            raise

    def _set(self) -> None:
        """Counts anew. Nobody waits while nobody asks for the next event."""
        if self._deadline is not None and not self._deadline.expired():
            owing = self._holding or self._unanswered > 0 or self._ended
            self._deadline.reschedule(self._loop.time() + self._idle_s if owing else None)
