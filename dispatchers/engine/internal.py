"""The engine for gateways: one recognition a request, told while it is made (`dispatchers.engine.wire`).

Unlike the public routes these take PCM as it is, and what only a gateway may say: urgency, share, stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from tempfile import SpooledTemporaryFile

import numpy as np
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from dispatchers.backends.local import LocalBackend
from dispatchers.engine import wire
from dispatchers.engine.wire import Failure, Line, Status
from dispatchers.errors import BackendFailed, OptionError
from dispatchers.interface import Options, Samples
from runtime.errors import StenogateError
from runtime.telemetry import ENGINE, exposition

log = structlog.get_logger()

OPTIONS_BYTES = 256 * 1024
IN_MEMORY = 4 * 1024 * 1024  # bytes of audio: two minutes
IDLE_S = 30.0


def internal_routes(open_to: Callable[[Request], LocalBackend], most: int) -> list[Route]:
    """The routes over the backend that `open_to` gives to those who may have it; `most` bytes of audio a request."""

    async def recognise(request: Request) -> Response:
        backend = open_to(request)
        options, samples = await _received(request.stream(), most)
        return _Answer(backend, samples, options)

    async def figures(request: Request) -> Response:
        open_to(request)
        body, media_type = exposition(ENGINE)
        return Response(body, media_type=media_type)

    return [
        Route(wire.RECOGNISE, recognise, methods=["POST"]),
        Route(wire.FIGURES, figures),
    ]


def model_routes(open_to: Callable[[Request], LocalBackend]) -> list[Route]:
    """How the engine and its models are, and models loaded and unloaded; over the backend that `open_to` gives, whose
    default may still be loading. Each answers with the status."""

    def told(backend: LocalBackend, code: int = 200) -> Response:
        return Response(wire.dump_status(status_of(backend)), code, media_type="application/json")

    async def status(request: Request) -> Response:
        return told(open_to(request))

    async def load(request: Request) -> Response:
        backend = open_to(request)
        backend.load(request.path_params["model"])
        return told(backend, 202)

    async def unload(request: Request) -> Response:
        backend = open_to(request)
        await backend.unload(request.path_params["model"])
        return told(backend)

    one = wire.MODELS + "/{model:path}"
    return [
        Route(wire.STATUS, status),
        Route(one, load, methods=["PUT"]),
        Route(one, unload, methods=["DELETE"]),
    ]


def status_of(backend: LocalBackend) -> Status:
    """The backend at this moment."""
    return Status(
        backend.capabilities,
        backend.catalogue(),
        backend.waiting,
        backend.running,
        backend.wait_s,
        backend.pace_s,
        backend.ready,
    )


async def _received(body: AsyncIterator[bytes], most: int) -> tuple[Options, Samples]:
    """Raises `OptionError`, `HTTPException` (408 when nothing comes for `IDLE_S`, 413), `ClientDisconnect`."""
    head = b""
    while b"\n" not in head:
        chunk = await _next(body)
        head += chunk
        if not chunk or len(head) > OPTIONS_BYTES:
            raise OptionError("The request begins with a line of options.")
    line, _, rest = head.partition(b"\n")
    return wire.load_options(line), await _audio(rest, body, most)


async def _audio(rest: bytes, body: AsyncIterator[bytes], most: int) -> Samples:
    """What is long is kept in an unlinked file, and mapped: a queue of long recordings costs no memory."""
    size = 0
    with SpooledTemporaryFile(IN_MEMORY) as file:
        while rest or (rest := await _next(body)):
            size += len(rest)
            if size > most:
                raise HTTPException(413, "The audio is too long.")
            if size > IN_MEMORY:
                await asyncio.to_thread(file.write, rest)
            else:
                file.write(rest)
            rest = b""
        if size % 2:
            raise OptionError("The audio breaks off within a sample.")
        file.seek(0)
        return np.memmap(file, "<i2", "r") if size > IN_MEMORY else np.frombuffer(file.read(), "<i2")


async def _next(body: AsyncIterator[bytes]) -> bytes:
    """Empty at the end."""
    try:
        async with asyncio.timeout(IDLE_S):
            return await anext(body, b"")
    except TimeoutError:
        raise HTTPException(408, "The audio stopped coming.") from None


class _Answer(Response):
    """Lines while the work is done, and a heartbeat while it waits its turn. Who leaves cancels it."""

    def __init__(self, backend: LocalBackend, samples: Samples, options: Options):
        super().__init__(media_type="application/x-ndjson")
        del self.headers["content-length"]
        self._backend = backend
        self._asked = samples, options
        self._lines: list[bytes] = []
        self._news = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        working, leaving = asyncio.create_task(self._worked()), asyncio.create_task(_gone(receive))
        working.add_done_callback(lambda _: self._news.set())
        leaving.add_done_callback(lambda _: working.cancel())
        over = False
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while not over:
                await self._wait()
                over, lines, self._lines = working.done(), b"".join(self._lines), []
                await send({"type": "http.response.body", "body": lines or b"\n", "more_body": not over})
        finally:
            working.cancel()
            leaving.cancel()
            await asyncio.wait({working, leaving})

    async def _wait(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(wire.HEARTBEAT_S):
                await self._news.wait()
        self._news.clear()

    async def _worked(self) -> None:
        try:
            transcript = await self._backend.transcribe(*self._asked, lambda segment: self._tell(Line(segment=segment)))
            self._tell(Line(transcript=replace(transcript, segments=()), wait_s=self._backend.wait_s))
        except StenogateError as error:
            self._tell(Line(failure=Failure.of(error), wait_s=self._backend.wait_s))
        except Exception:
            log.exception("engine.failed")
            self._tell(Line(failure=Failure.of(BackendFailed())))

    def _tell(self, line: Line) -> None:
        self._lines.append(wire.dump_line(line))
        self._news.set()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
