"""An engine elsewhere: in another process of this machine, or on another machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import aiohttp
import httpx
import structlog

from dispatchers.backends.transport import AiohttpTransport
from dispatchers.engine import wire
from dispatchers.engine.wire import ModelCard, Status
from dispatchers.errors import (
    BackendError,
    BackendFailed,
    BackendRefused,
    BackendTimeout,
    BackendUnavailable,
    BadAnswer,
    CredentialRefused,
    EngineLost,
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
)

log = structlog.get_logger()

SILENT_S = 3 * wire.HEARTBEAT_S
PATIENCE = httpx.Timeout(SILENT_S, connect=5.0)
KEPT_S = 30.0
"""A connection without use is kept for so long, which is less than the engine keeps it."""
AT_ONCE = 1024 * 1024
"""Bytes of audio sent in one piece."""
MOST_SAID = 16 * 1024 * 1024
"""Bytes of a line, or of what an engine says of itself: ten hours of text are less than 1 MiB."""
BUSY_S, IDLE_S = 0.25, 5.0
"""How old its status may be while something is asked of the engine, and while nothing is."""


def over_socket(path: Path) -> httpx.AsyncClient:
    """A client for the engine that listens there."""
    connector = partial(aiohttp.UnixConnector, path=str(path))
    transport = AiohttpTransport(connections=0, idle_s=KEPT_S, connector=connector)
    return httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=PATIENCE, trust_env=False)


class EngineClient:
    """A batch dispatcher over an engine's internal routes. `http` knows the engine's address and holds its token, if it
    wants one; it is closed with this. What the engine is, is known once `refresh` was awaited, and kept true while
    `watch` runs. Use from one event loop."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._status = wire.NEVER_HEARD
        self._asking = 0

    @property
    def status(self) -> Status:
        """The engine as it said last."""
        return self._status

    @property
    def capabilities(self) -> Capabilities:
        return self._status.capabilities

    def origin(self, model: str) -> Origin:
        """See `Dispatcher.origin`. Raises `UnknownModel`."""
        return origin_of(self._status.models, model)

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        """See `Dispatcher.transcribe`. Raises what the engine raises, and `EngineLost` when it ends meanwhile."""
        content = _pieces(options, audio) if audio.nbytes > AT_ONCE else wire.dump_options(options) + audio.tobytes()
        segments: list[Segment] = []
        ending = wire.Line()
        async with self._answer("POST", wire.RECOGNISE, content) as answer:
            async for line in _lines(answer):  # to its end, so that the connection can be used again
                if line.segment is None:
                    ending = line
                else:
                    segments.append(line.segment)
                    heard(line.segment)
        if ending.wait_s is not None:
            self._status = replace(self._status, wait_s=ending.wait_s)
        if ending.failure is not None:
            raise ending.failure.error()
        if ending.transcript is None:
            raise EngineLost
        return replace(ending.transcript, segments=tuple(segments))

    def stream(
        self, audio: AsyncIterator[StreamInput], options: Options
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Not possible: raises `UnsupportedOption`. The segmenting adapter makes streams of this backend."""
        raise UnsupportedOption("The engine takes whole recordings only.")

    async def refresh(self) -> None:
        """Asks the engine how it is. Raises a `BackendError`."""
        body = await self._told(wire.STATUS)
        try:
            self._status = wire.load_status(body)
        except ValueError:
            raise BadAnswer("The engine's status cannot be read.") from None

    async def watch(self) -> None:
        """Keeps the status fresh, until cancelled."""
        age_s = 0.0
        while True:
            await asyncio.sleep(BUSY_S)
            age_s += BUSY_S
            if self._asking or self._status.waiting or age_s >= IDLE_S:
                age_s = 0.0
                try:
                    await self.refresh()
                except BackendError as error:
                    log.warning("engine.silent", error=error.message)

    async def figures(self) -> str:
        """Its numbers in Prometheus' text format. Raises a `BackendError`."""
        return (await self._told(wire.FIGURES)).decode(errors="replace")

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def _told(self, path: str) -> bytes:
        said = b""
        async with self._answer("GET", path) as answer:
            async for chunk in answer.aiter_bytes():
                said += chunk
                if len(said) > MOST_SAID:
                    raise BadAnswer("The engine says too much of itself.")
        return said

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, content: bytes | AsyncIterator[bytes] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """Raises a `BackendError` for whatever goes wrong on the way there and back."""
        self._asking += method == "POST"
        try:
            async with self._http.stream(method, path, content=content) as answer:
                if answer.status_code != httpx.codes.OK:
                    raise _refusal(answer.status_code)
                yield answer
        except httpx.TimeoutException as error:
            raise BackendTimeout from error
        except httpx.DecodingError:
            raise BadAnswer("The engine's answer cannot be read.") from None
        except httpx.TransportError as error:
            raise EngineLost from error
        finally:
            self._asking -= method == "POST"


def origin_of(models: tuple[ModelCard, ...], name: str) -> Origin:
    """Who recognises when asked for this model. Raises `UnknownModel`."""
    for card in models:
        if card.name == name or (card.default and not name):
            return Origin(backend="self_hosted", engine=card.engine, model=card.name)
    raise UnknownModel(param="model")


def _refusal(status: int) -> BackendError:
    if status == httpx.codes.SERVICE_UNAVAILABLE:
        return BackendUnavailable("The engine is not ready.", retry_after_s=5)
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return CredentialRefused(
            f"The engine does not accept the token it was sent (HTTP {status}). Set STENOGATE_ENGINE_TOKEN to the same"
            " value for gateways and engines."
        )
    if status < httpx.codes.INTERNAL_SERVER_ERROR:
        return BackendRefused(f"The engine refused the request (HTTP {status}).")
    return BackendFailed()


async def _pieces(options: Options, audio: Samples) -> AsyncIterator[bytes]:
    """A long recording, a piece at a time: it may be mapped from a file."""
    yield wire.dump_options(options)
    step = AT_ONCE // audio.itemsize
    for at in range(0, len(audio), step):
        yield audio[at : at + step].tobytes()


async def _lines(answer: httpx.Response) -> AsyncIterator[wire.Line]:
    """The answer's lines. Raises `BadAnswer` for one that cannot be read."""
    rest = b""
    async for chunk in answer.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > MOST_SAID:
            raise BadAnswer("The engine's answer has no end.")
        for line in filter(None, lines):
            try:
                yield wire.load_line(line)
            except ValueError:  # its text quotes what was said
                raise BadAnswer("The engine's answer cannot be read.") from None
