"""What surrounds every request: its id, its log line, its figures, and an answer whatever happens inside."""

from __future__ import annotations

import asyncio
import re
import time
import traceback
from contextlib import suppress

import structlog
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from gateway.errors import Internal, RouteNotFound, known, problem_response
from runtime.ids import show, uuid7
from runtime.telemetry import REQUEST_SECONDS, REQUESTS

log = structlog.get_logger()

OPENAI_PATHS = ("/v1/audio/", "/v1/models")
CLIENT_GONE = 499  # nobody is there to read it; it is for logs and figures
LINGER_S = 2.0
LINGER_BYTES = 64 * 1024 * 1024

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_NO_SNIFFING = (b"x-content-type-options", b"nosniff")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "WEBSOCKET"})
_QUIET = frozenset({"/livez", "/readyz", "/metrics"})


class Identified:
    """Gives a request its id, on every answer and log line, and counts and logs it when it has ended."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        status = CLIENT_GONE

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
                status = message.get("status", 101)
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode()), _NO_SNIFFING]
            await send(message)

        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        if client_id := headers.get("x-client-request-id"):
            structlog.contextvars.bind_contextvars(client_request_id=client_id[:128])
        started = time.perf_counter()
        try:
            await self._app(scope, receive, sending)
        finally:
            _note(scope, status, time.perf_counter() - started)


def _note(scope: Scope, status: int, seconds: float) -> None:
    route = _template(scope)
    method = scope.get("method", "WEBSOCKET")
    method = method if method in _METHODS else "OTHER"
    REQUESTS.labels(method, route, status).inc()
    if method != "WEBSOCKET":
        REQUEST_SECONDS.labels(method, route).observe(seconds)
    told = log.debug if route in _QUIET else log.info
    told("http.request", method=method, route=route, status=status, ms=round(seconds * 1000, 1))


def _template(scope: Scope) -> str:
    """The path's template, so that ids in it neither multiply the figures nor reach the logs."""
    return getattr(scope.get("route"), "path", "?")


class Answered:
    """Turns whatever is raised inside into a problem. A refusal that comes before the whole request has been read
    still reaches its client: what it goes on sending is read and dropped for a moment before the connection closes."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        unread = _has_body(scope)

        async def receiving() -> Message:
            nonlocal unread
            message = await receive()
            unread = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receiving, sending)
        except ClientDisconnect:
            log.info("http.client_gone")
        except Exception as exc:  # noqa: BLE001 — every failure has to be answered
            response = _refusal(exc, scope)
            if started:
                return  # the server closes the connection: an incomplete answer must not look complete
            if unread:
                response.headers["connection"] = "close"
                send = _lingering(receive, send)
            await response(scope, receive, send)


async def nowhere(scope: Scope, receive: Receive, send: Send) -> None:
    """Where no route leads: a problem, for a WebSocket too, which Starlette would refuse without a word."""
    if scope["type"] == "websocket":
        refusal = problem_response(RouteNotFound(), scope["state"]["request_id"])
        await WebSocket(scope, receive, send).send_denial_response(refusal)
        return
    raise RouteNotFound


def _refusal(exc: Exception, scope: Scope) -> Response:
    error = known(exc)
    if isinstance(error, Internal):
        log.error("http.failed", error=type(exc).__name__, at=_places(exc))
    else:
        log.info("http.refused", code=error.code)
    openai = scope["path"].startswith(OPENAI_PATHS)
    return problem_response(error, scope["state"]["request_id"], openai=openai)


def _places(exc: BaseException) -> list[str]:
    """The traceback without the error's own words, which may quote what a caller sent."""
    frames = traceback.extract_tb(exc.__traceback__)
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]


def _lingering(receive: Receive, send: Send) -> Send:
    """Ends a response only after reading on for a while: closing on a client that still sends would reset the
    connection, and the client might never see the answer."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            await send({**message, "more_body": True})
            with suppress(TimeoutError):
                await asyncio.wait_for(_drain(receive), LINGER_S)
            message = {"type": "http.response.body", "body": b""}
        await send(message)

    return sending


async def _drain(receive: Receive) -> None:
    drained = 0
    while drained < LINGER_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        drained += len(message.get("body", b""))


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _request_id(given: str | None) -> str:
    return given if given is not None and _SANE_ID.fullmatch(given) else show("req", uuid7())
