"""The engine in a child process: a native crash, a leak or a `kill -9` there costs what was being recognised, not the
gateway, its sessions or its bill."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from pathlib import Path

import structlog

from dispatchers.backends.engine import EngineClient, origin_of, over_socket
from dispatchers.backends.process import EngineProcess
from dispatchers.engine.wire import NEVER_HEARD, ModelCard, Status
from dispatchers.errors import BackendUnavailable, DispatchError, EngineLost, UnsupportedOption
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
)
from runtime.telemetry import ENGINE_FIGURES, ENGINE_RESTARTS, ENGINE_UP

log = structlog.get_logger()

SETTLED_S = 60.0
"""An engine that has lived so long and then ends is started again at once; one that has not, later each time."""
BACKOFF_S, BACKOFF_MOST_S = 0.5, 30.0
NOTICE_S = 0.1
"""Connections break a moment before the end of their process is known."""


class EngineChild:
    """A batch dispatcher over an engine that is started with `command`, and a socket's path after it, and started again
    whenever it ends. Use from one event loop.

    What is in its hands when it ends fails (`EngineLost`), but batch work of which nothing was heard yet is given to
    the next one. Until that is ready partials are refused at once; finals and batch work wait for it, for `patience_s`
    after the end of the one before.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, patience_s: float = 30.0) -> None:
        self._command = command
        self._environment = environment
        self._patience_s = patience_s
        self._folder = Path(tempfile.mkdtemp(prefix="stenogate-engine-"))  # its owner's only
        self._starts = 0
        self._client: EngineClient | None = None  # while the engine is ready
        self._said = NEVER_HEARD  # by the one before
        self._ready = asyncio.Event()
        self._ended = self._began = time.monotonic()
        self._warm_s = 0.0
        self._process = self._spawn()
        self._supervising: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Waits until the engine is ready; its note on its default model. Raises why it could not be."""
        note = await self._welcome()
        self._supervising = asyncio.create_task(self._supervise())
        return note

    @property
    def up(self) -> bool:
        """Whether the engine is ready."""
        return self._client is not None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def wait_s(self) -> float:
        """About how long live work that came now would wait. While the engine is away: for its return, which takes as
        long as the last start did, or, when that is over, as long again as it has been away."""
        if self._client is not None:
            return self._client.status.wait_s
        away_s = time.monotonic() - self._ended
        return self._warm_s - away_s if away_s < self._warm_s else away_s

    @property
    def capabilities(self) -> Capabilities:
        return self._status.capabilities

    def catalogue(self) -> tuple[ModelCard, ...]:
        """The models the engine answers to, the default first."""
        cards = self._status.models
        return cards if self.up else tuple(replace(card, status="loading") if card.default else card for card in cards)

    def origin(self, model: str) -> Origin:
        """See `Dispatcher.origin`. Raises `UnknownModel`."""
        return origin_of(self._status.models, model)

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        """See `Dispatcher.transcribe`."""
        spoken = False

        def note(segment: Segment) -> None:
            nonlocal spoken
            spoken = True
            heard(segment)

        try:
            return await (await self._engine(options)).transcribe(audio, options, note)
        except EngineLost:
            if options.urgency != "batch" or spoken:
                raise
        await asyncio.sleep(NOTICE_S)
        return await (await self._engine(options)).transcribe(audio, options, heard)

    def stream(
        self, audio: AsyncIterator[StreamInput], options: Options
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Not possible: raises `UnsupportedOption`."""
        raise UnsupportedOption("The engine takes whole recordings only.")

    async def tell_figures(self) -> None:
        """Fetches the engine's numbers for this process' metrics. An engine that does not answer leaves its last."""
        if self._client is not None:
            with suppress(DispatchError, ValueError):
                ENGINE_FIGURES.tell({"": await self._client.figures()})

    async def aclose(self) -> None:
        """Ends the engine, once what runs in it has ended or a few seconds have gone by."""
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.wait({self._supervising})
        await self._process.end()
        await self._farewell()
        ENGINE_FIGURES.tell(None)
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- its life ---

    def _spawn(self) -> EngineProcess:
        self._socket.unlink(missing_ok=True)  # of one that was killed
        self._starts += 1
        self._spawned = time.monotonic()
        return EngineProcess([*self._command, str(self._socket)], self._environment)

    @property
    def _socket(self) -> Path:
        return self._folder / f"{self._starts}.sock"

    async def _welcome(self) -> str:
        """Waits for the engine that was started last. Raises why it could not be; then it has ended."""
        try:
            note = await self._process.greeting()
            client = EngineClient(over_socket(self._socket))
            await client.refresh()
        except DispatchError:
            await self._process.end()
            raise
        self._began = time.monotonic()
        self._warm_s = self._began - self._spawned
        self._client, self._watching = client, asyncio.create_task(client.watch())
        self._ready.set()
        ENGINE_UP.set(1)
        return note

    async def _farewell(self) -> None:
        if self._client is None:
            return
        client, self._client = self._client, None
        self._said, self._ended = client.status, time.monotonic()
        self._ready.clear()
        ENGINE_UP.set(0)
        self._watching.cancel()
        await asyncio.wait({self._watching})
        await client.aclose()

    async def _supervise(self) -> None:
        """Starts the engine again whenever it has ended, until cancelled."""
        early = 0  # ends in a row that came soon
        while True:
            status = await self._process.ended()
            early = early + 1 if self._client is None or time.monotonic() - self._began < SETTLED_S else 0
            pause_s = min(BACKOFF_S * 2 ** (early - 2), BACKOFF_MOST_S) if early > 1 else 0.0
            await self._farewell()
            log.error("engine.ended", status=status, again_in_s=pause_s)
            await asyncio.sleep(pause_s)
            ENGINE_RESTARTS.inc()
            try:
                self._process = self._spawn()
                await self._welcome()
            except (DispatchError, OSError) as error:
                log.error("engine.not_started", error=error)  # noqa: TRY400 — its message names the remedy
            else:
                log.warning("engine.started", took_s=round(self._warm_s, 1))

    # --- who asks ---

    async def _engine(self, options: Options) -> EngineClient:
        """The engine, once it is ready. Raises `BackendUnavailable` when that takes too long."""
        while self._client is None:
            left_s = self._patience_s - (time.monotonic() - self._ended)
            if options.urgency == "partial" or left_s <= 0:
                raise BackendUnavailable(
                    "The engine is being started again. Try again shortly.", retry_after_s=self.wait_s
                )
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._ready.wait()
        return self._client

    @property
    def _status(self) -> Status:
        return self._said if self._client is None else self._client.status
