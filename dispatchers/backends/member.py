"""One engine of a pool: what it is asked, how it is, and how long what is asked now would wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import httpx
import structlog

from dispatchers.backends.engine import EngineClient
from dispatchers.backends.outlier import Record
from dispatchers.engine.wire import ModelCard
from dispatchers.errors import BackendError, BackendTimeout, EngineLost
from dispatchers.interface import Heard, Options, Samples, Transcript
from runtime.telemetry import ENGINE_IN_FLIGHT

log = structlog.get_logger()

PROBE_S = 2.0
"""An engine that does not say how it is within so long is silent."""
SILENCES = 3
"""After so many in a row it is given up, with what it was asked. One that refuses connections is asked nothing more,
but may finish what it has."""
BUSY_S, IDLE_S = 0.5, 2.0
"""How often it is asked how it is, while something else is asked of it or it is not ready, and while nothing is."""
LOAD_S = 10.0
"""What a model that is not loaded counts for."""
UNUSABLE = ("failed", "downloading")


class Member:
    """`label` is its address. `ready` once it has said so itself, until it is silent or lost; `trouble` says why it is
    not. `leaving`: its address is no longer one of the pool's. Use from one event loop."""

    def __init__(self, label: str, http: httpx.AsyncClient, limit: int) -> None:
        self.label = label
        self.client = EngineClient(http)
        self.record = Record()
        self.ready = False
        self.leaving = False
        self.looked = False
        self.in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.trouble = "has not answered yet"
        self._limit = limit
        self._asked: set[asyncio.Timeout] = set()
        self._sent = 0  # since its last status
        self._statuses = 0
        self._doubted = asyncio.Event()

    @property
    def full(self) -> bool:
        return self.in_flight >= self._limit

    @property
    def takes_work(self) -> bool:
        return self.ready and not self.leaving

    def card(self, model: str) -> ModelCard | None:
        """The model, if it has that one."""
        return next((card for card in self.client.status.models if card.name == model), None)

    def estimate_s(self, model: str) -> float | None:
        """About how long live work would wait for this model; None where it cannot be had."""
        card = self.card(model)
        if card is None or card.status in UNUSABLE:
            return None
        return self.wait_s + (0.0 if card.status == "ready" else LOAD_S)

    @property
    def wait_s(self) -> float:
        """About how long live work would wait: what it said, and what it was sent since."""
        status = self.client.status
        return status.wait_s + status.pace_s * self._sent

    @property
    def burden_s(self) -> float:
        """Seconds of its work that we have asked for: tells two apart that are both idle."""
        return self.client.status.pace_s * self.in_flight

    async def transcribe(self, audio: Samples, options: Options, heard: Heard) -> Transcript:
        """See `EngineClient.transcribe`. Raises `EngineLost` also when the engine is given up meanwhile."""
        began = time.monotonic()
        with self._counted():
            try:
                async with asyncio.timeout(None) as asked:
                    self._asked.add(asked)
                    try:
                        transcript = await self.client.transcribe(audio, options, heard)
                    finally:
                        self._asked.discard(asked)
            except TimeoutError:
                raise EngineLost("The engine has fallen silent. Try again shortly.") from None
            except EngineLost:
                self._doubt()
                raise
        self.record.succeeded(time.monotonic() - began if options.urgency == "final" else None)
        return transcript

    async def watch(self, changed: Callable[[], None]) -> None:
        """Asks it how it is, until cancelled; `changed` is called when that is something else than before."""
        silences, before = 0, (False, False, False)
        while True:
            self._doubted.clear()
            try:
                async with asyncio.timeout(PROBE_S):
                    await self.client.refresh()
            except (TimeoutError, BackendTimeout):
                silences += 1
                if silences >= SILENCES or not self.ready:
                    self._not_ready("does not answer")
                    self._give_up()
            except BackendError as error:
                silences = 0
                self._not_ready("cannot be reached" if isinstance(error, EngineLost) else error.message)
            else:
                silences = 0
                self._statuses, self._sent = self._statuses + 1, 0
                if self.client.status.ready:
                    self.ready, self.trouble = True, ""
                else:
                    self._not_ready("is loading its model")
            self.looked = True
            if before != (now := (self.looked, self.ready, self.record.out)):
                before = now
                changed()
            with suppress(TimeoutError):
                async with asyncio.timeout(BUSY_S if self.in_flight or not self.ready else IDLE_S):
                    await self._doubted.wait()

    def _doubt(self) -> None:
        """A connection broke: nothing more is asked of it until it has said how it is."""
        if self.ready:
            self.ready, self.trouble = False, "broke a connection"
            self._doubted.set()

    def _not_ready(self, trouble: str) -> None:
        if self.ready or trouble != self.trouble:
            log.warning("engine.away", engine=self.label, trouble=trouble)
        self.ready, self.trouble = False, trouble

    def _give_up(self) -> None:
        now = asyncio.get_running_loop().time()
        for asked in self._asked:
            asked.reschedule(now)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        statuses = self._statuses
        self._sent += 1
        self.in_flight += 1
        self.idle.clear()
        ENGINE_IN_FLIGHT.labels(self.label).set(self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1
            if statuses == self._statuses:
                self._sent -= 1
            if not self.in_flight:
                self.idle.set()
            ENGINE_IN_FLIGHT.labels(self.label).set(self.in_flight)
