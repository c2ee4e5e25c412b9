"""The engine over HTTP, in the shape of OpenAI's transcription API, for callers who know no tenant.

One token, or none on loopback, opens it. Nothing is kept: an upload lies in an unlinked temporary file while it is
transcribed.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable
from hmac import compare_digest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from dispatchers.audio.decode import spool
from dispatchers.backends.local import LocalBackend
from dispatchers.deltas import Deltas
from dispatchers.engine.form import Asked, Task, read, received
from dispatchers.engine.internal import internal_routes, model_routes
from dispatchers.engine.scheduler import Scheduler
from dispatchers.errors import (
    AudioError,
    AudioTooLong,
    BackendTimeout,
    BackendUnavailable,
    DispatchError,
    EmptyAudio,
    OptionError,
    Overloaded,
    UnknownModel,
)
from dispatchers.formats import render, usage
from dispatchers.interface import Samples, Segment, Transcript
from runtime import telemetry

T = TypeVar("T")

LONGEST_HOURS = 12
DECODERS = 2
DECODES_WAITING = 64
CREATED = 1_795_132_800  # models have no birthday of their own; clients want a number

_STATUS: tuple[tuple[type[DispatchError], int], ...] = (
    (UnknownModel, 404),
    (AudioError, 400),
    (OptionError, 400),
    (Overloaded, 503),
    (BackendUnavailable, 503),
    (BackendTimeout, 504),
    (DispatchError, 502),
)
"""The first class that fits decides."""


class EngineServer:
    """The routes, and the backend behind them once it is there.

    `build` makes the backend; it blocks and runs in a thread. `token` None lets everybody in.
    """

    def __init__(self, build: Callable[[], LocalBackend], *, token: str | None, max_upload_bytes: int):
        self._build = build
        self._token = token
        self._max_upload_bytes = max_upload_bytes
        self._backend: LocalBackend | None = None
        self._ready = False
        self._decoder = Scheduler(DECODERS, DECODES_WAITING)

    async def load(self) -> None:
        """Builds the backend and loads its default model. Raises what the building raises, or `BackendUnavailable`."""
        self._backend = backend = await asyncio.to_thread(self._build)
        await backend.warm()
        telemetry.QUEUE_DEPTH.set_function(lambda: backend.waiting)
        telemetry.QUEUE_RUNNING.set_function(lambda: backend.running)
        self._ready = True

    async def aclose(self) -> None:
        """Frees the models, once what runs in them has ended."""
        await self._decoder.aclose()
        if self._backend is not None:
            await self._backend.aclose()

    def app(self) -> Starlette:
        """The ASGI application. It has no lifespan: whoever serves it calls `load` and `aclose`."""
        routes = [
            Route("/v1/audio/transcriptions", self._transcriptions, methods=["POST"]),
            Route("/v1/audio/translations", self._translations, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/livez", _livez),
            Route("/readyz", self._readyz),
            Route("/metrics", _metrics),
            *internal_routes(self._for_gateways, self._max_upload_bytes),
            *model_routes(self._for_operators),
        ]
        handlers: dict[Any, Any] = {
            DispatchError: _refused,
            HTTPException: _rejected,
            ClientDisconnect: _left,
            Exception: _failed,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _transcriptions(self, request: Request) -> Response:
        return await self._answer(request, "transcribe")

    async def _translations(self, request: Request) -> Response:
        return await self._answer(request, "translate")

    async def _answer(self, request: Request, task: Task) -> Response:
        self._authorise(request)
        backend = self._loaded()
        asked, samples = await self._received(request, task)
        if not asked.stream:
            transcript = await _while_connected(request, backend.transcribe(samples, asked.options))
            body, media_type = render(transcript, asked.response_format, words=asked.words, segments=asked.segments)
            return Response(body, headers=_origin(transcript), media_type=media_type)
        events = _events(backend, samples, asked)
        first = await _while_connected(request, anext(events))  # a refusal still gets its status
        return _EventStream(_told(first, events))

    async def _models(self, request: Request) -> Response:
        self._authorise(request)
        entries = [
            {
                "id": card.name,
                "object": "model",
                "created": CREATED,
                "owned_by": "stenogate",
                "engine": card.engine,
                "status": card.status,
                **({} if card.progress is None else {"progress": card.progress}),
            }
            for card in self._built().catalogue()
        ]
        return JSONResponse({"object": "list", "data": entries})

    async def _readyz(self, _: Request) -> Response:
        """503 until the default model is loaded."""
        if not self._ready:
            return JSONResponse({"status": "loading"}, 503, {"retry-after": "5"})
        return JSONResponse({"status": "ready"})

    def _authorise(self, request: Request) -> None:
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not compare_digest(given.strip().encode(), self._token.encode()):
            raise HTTPException(401, "The token was not accepted.", {"www-authenticate": "Bearer"})

    def _built(self) -> LocalBackend:
        if self._backend is None:
            raise BackendUnavailable("The engine has just been started. Try again shortly.", retry_after_s=5)
        return self._backend

    def _loaded(self) -> LocalBackend:
        if not self._ready:
            raise BackendUnavailable("The model is still being loaded. Try again shortly.", retry_after_s=5)
        return self._built()

    def _for_gateways(self, request: Request) -> LocalBackend:
        self._authorise(request)
        return self._loaded()

    def _for_operators(self, request: Request) -> LocalBackend:
        self._authorise(request)
        return self._built()

    async def _received(self, request: Request, task: Task) -> tuple[Asked, Samples]:
        """What is asked, and of which audio. The samples are mapped, so that hours of them cost no memory."""
        form = await received(request, self._max_upload_bytes)
        try:
            asked, upload = read(form.multi_items(), task)
            return asked, await _while_connected(request, self._decoder.run(_decoded, upload.file))
        finally:
            await form.close()


def _decoded(upload: IO[bytes]) -> Samples:
    """Blocks. The files are unlinked before they are used up: what is mapped stays until it is forgotten."""
    with TemporaryDirectory(prefix="stenogate-") as folder:
        path = Path(folder) / "upload"
        with path.open("wb") as file:
            shutil.copyfileobj(upload, file)
        if path.stat().st_size == 0:
            raise EmptyAudio(param="file")
        try:
            return spool(path, Path(folder) / "samples", limit_ms=LONGEST_HOURS * 3_600_000)
        except AudioTooLong:
            raise AudioTooLong(f"The audio is longer than {LONGEST_HOURS} hours.", param="file") from None


# --- events -------------------------------------------------------------------------------------------------------


class _EventStream(StreamingResponse):
    """Closes its events as soon as the client has gone."""

    def __init__(self, events: AsyncGenerator[bytes, None]):
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def _events(backend: LocalBackend, samples: Samples, asked: Asked) -> AsyncGenerator[bytes, None]:
    """Each segment as a delta, then the whole; closed early, the recognition is cancelled."""
    heard: asyncio.Queue[Segment | None] = asyncio.Queue()  # grows to one transcript at most
    working = asyncio.create_task(backend.transcribe(samples, asked.options, heard.put_nowait))
    working.add_done_callback(lambda _: heard.put_nowait(None))
    deltas = Deltas()
    try:
        while (segment := await heard.get()) is not None:
            yield _delta(deltas.add(segment.text))
        transcript = working.result()
    finally:
        await _stopped(working)
    if rest := deltas.rest(transcript.text):
        yield _delta(rest)
    done = {"type": "transcript.text.done", "text": transcript.text, "usage": usage(transcript.duration_ms)}
    yield _event(done | {"stenogate": {"engine": transcript.origin.engine, "model": transcript.origin.model}})


async def _told(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """All events. A failure after the first becomes the one event that makes OpenAI's clients raise."""
    try:
        yield first
        async for event in events:
            yield event
    except DispatchError as error:
        yield _event({"error": _envelope(error)})
    finally:
        await events.aclose()
    yield b"data: [DONE]\n\n"


def _delta(text: str) -> bytes:
    return _event({"type": "transcript.text.delta", "delta": text})


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


# --- answers ------------------------------------------------------------------------------------------------------


async def _livez(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _metrics(_: Request) -> Response:
    body, media_type = telemetry.exposition()
    return Response(body, media_type=media_type)


def _origin(transcript: Transcript) -> dict[str, str]:
    return {"x-stenogate-engine": transcript.origin.engine, "x-stenogate-model": transcript.origin.model}


def _envelope(error: DispatchError) -> dict[str, Any]:
    kind = "server_error" if _status(error) >= 500 else "invalid_request_error"
    return {"message": error.message, "type": kind, "param": error.param, "code": error.code.lower()}


def _status(error: DispatchError) -> int:
    return next(status for kind, status in _STATUS if isinstance(error, kind))


async def _refused(_: Request, error: DispatchError) -> Response:
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if error.retryable and error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    return JSONResponse({"error": _envelope(error)}, _status(error), headers)


async def _rejected(_: Request, error: HTTPException) -> Response:
    code = {401: "invalid_api_key", 404: "not_found", 408: "upload_stalled", 413: "too_large"}.get(error.status_code)
    body = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": body}, error.status_code, error.headers)


async def _left(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody is there to read it


async def _failed(_: Request, error: Exception) -> Response:
    body = {"message": "Something went wrong on our side.", "type": "server_error", "param": None, "code": "internal"}
    return JSONResponse({"error": body}, 500)


# --- callers who leave --------------------------------------------------------------------------------------------


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The work's result; the work is cancelled, and `ClientDisconnect` raised, once the client has gone. The request's
    body must have been read."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await _stopped(leaving)
        await _stopped(working)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stopped(task: asyncio.Future[Any]) -> None:
    """Cancels it and waits for its end. Its failure, if any, was somebody else's to see."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
