"""An HTTP/1.1 server on loopback that answers as a provider would, and misbehaves when told to."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal, TypeAlias
from urllib.parse import parse_qsl, urlsplit

MOST_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Request:
    """One request, whole. Names of headers are in lower case."""

    method: str
    path: str
    query: tuple[tuple[str, str], ...]
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What the provider says. `pieces` in place of `body`: sent chunked, one by one."""

    body: bytes = b""
    status: int = 200
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: tuple[bytes, ...] | None = None


@dataclass(frozen=True)
class Fault:
    """What goes wrong with an answer, in the order of the wire; what is not set goes as it should.

    `unread`: the request's body is not read. `wait_s` passes before the first byte of the answer. `answer` is sent in
    place of the true one, with these `headers` added. The body goes in pieces of `piece_bytes` with `pause_s` between
    them, and only `most_bytes` of it; then, if not all of it went, comes the `ending`.
    """

    unread: bool = False
    wait_s: float = 0.0
    answer: Answer | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    piece_bytes: int | None = None
    pause_s: float = 0.0
    most_bytes: int | None = None
    ending: Literal["close", "reset", "silence"] = "close"


def _says(body: bytes, status: int = 200, media_type: str = "application/json", **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Fault(answer=Answer(body, status, media_type, named))


FAULTS: dict[str, Fault] = {
    "html": _says(b"<html><body>Please log in: the-secret</body></html>", media_type="text/html"),
    "html that calls itself json": _says(b"<html><body>Please log in: the-secret</body></html>"),
    "nothing": _says(b""),
    "an array": _says(b"[]"),
    "a string": _says(b'"the-secret"'),
    "not utf-8": _says(b'{"text":"\xff\xfe"}'),
    "deep json": _says(b"[" * 100_000 + b"]" * 100_000),
    "large json": _says(b'{"text":"' + b"a" * 5_000_000 + b'"}'),
    "truncated json": Fault(answer=Answer(b'{"text":"the-secret')),
    "broken off": Fault(most_bytes=5),
    "reset": Fault(most_bytes=5, ending="reset"),
    "closed before the answer": Fault(answer=Answer(status=0)),
    "redirect": _says(b"", 302, location="http://127.0.0.1:9/elsewhere"),
    "permanent redirect": _says(b"", 308, location="http://127.0.0.1:9/elsewhere"),
    "no content": _says(b"", 204),
    "unauthorised": _says(b'{"error":{"message":"Incorrect API key provided: the-secret"}}', 401),
    "forbidden": _says(b'{"error":{"message":"the-secret may not"}}', 403),
    "too many": _says(b'{"error":{"message":"the-secret"}}', 429, retry_after="7"),
    "too many until": _says(b"{}", 429, retry_after="Wed, 21 Oct 2065 07:28:00 GMT"),
    "too many, and nonsense": _says(b"{}", 429, retry_after="soon"),
    "bad request": _says(b'{"error":{"message":"the-secret"}}', 400),
    "too large": _says(b"{}", 413),
    "failed": _says(b"the-secret at line 3", 500, "text/plain"),
    "bad gateway": _says(b"<html>", 502, "text/html"),
    "unavailable": _says(b"", 503, retry_after="2"),
    "timed out": _says(b"", 504),
    "silent": Fault(wait_s=3600.0),
    "silent in the answer": Fault(most_bytes=5, ending="silence"),
    "a byte now and then": Fault(piece_bytes=1, pause_s=0.15),
    "never reads": Fault(unread=True, wait_s=3600.0),
}
"""Hostile answers by name. `the-secret` in them must be seen nowhere."""

Responder: TypeAlias = Callable[[Request], Answer]
Upgrader: TypeAlias = Callable[[Request, bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Takes over the connection that a request with this head opened; it is closed afterwards."""


class HttpServer:
    """Answers with `respond`. `fault` meets every answer while it is set, and those in `faults` one answer each before
    it. `requests` are those that came whole; `open` is how many connections there are. Who asks for another protocol is
    given to `upgrade`."""

    def __init__(self, respond: Responder, url: str, upgrade: Upgrader | None = None) -> None:
        self.url = url
        self._upgrade = upgrade
        self.fault: Fault | None = None
        self.faults: list[Fault | None] = []
        self.requests: list[Request] = []
        self.open = 0
        self.opened = 0
        self._respond = respond
        self._upgrade = upgrade
        self._serving: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, for as long as it lives."""
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        self.open, self.opened = self.open + 1, self.opened + 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, or we go: asyncio's streams take a cancelled handler for a failed one
        finally:
            self.open -= 1
            self._serving.discard(task)
            writer.close()

    async def aclose(self) -> None:
        """Drops every connection."""
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; false when the connection is over."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        fault = self.faults.pop(0) if self.faults else self.fault
        request = await _read(head, reader, unread=fault is not None and fault.unread)
        self.requests.append(request)
        if fault is None and self._upgrade is not None and "upgrade" in request.headers:
            await self._upgrade(request, head, reader, writer)
            return False
        answer = Answer() if fault is not None and fault.unread else self._respond(request)
        if fault is None:
            writer.write(_head(answer) + _whole(answer))
            await writer.drain()
            return True
        return await _misbehave(fault, answer, writer)


@asynccontextmanager
async def http_server(
    respond: Responder, upgrade: Upgrader | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[HttpServer]:
    """A server of its own port, in this event loop."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        scheme = "http" if tls is None else "https"
        server = HttpServer(respond, f"{scheme}://127.0.0.1:{listener.getsockname()[1]}", upgrade)
        listening = await asyncio.start_server(server.serve, sock=listener, limit=1024 * 1024, ssl=tls)
        try:
            yield server
        finally:
            listening.close()
            await server.aclose()


@asynccontextmanager
async def deaf() -> AsyncIterator[str]:
    """An address where a connection is neither taken nor refused."""
    loop = asyncio.get_running_loop()
    with socket.socket() as listener, socket.socket() as filler:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        filler.setblocking(False)
        await loop.sock_connect(filler, listener.getsockname())
        with suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                with socket.socket() as second:
                    second.setblocking(False)
                    await loop.sock_connect(second, listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def closed() -> str:
    """An address where connections are refused."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


async def _read(head: bytes, reader: asyncio.StreamReader, *, unread: bool) -> Request:
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    if unread:
        body = b""
    elif headers.get("transfer-encoding") == "chunked":
        body = await _chunks(reader)
    else:
        length = int(headers.get("content-length", 0))
        assert length <= MOST_BYTES
        body = await reader.readexactly(length)
    address = urlsplit(target)
    return Request(method, address.path, tuple(parse_qsl(address.query, keep_blank_values=True)), headers, body)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
        assert len(body) <= MOST_BYTES
    await reader.readexactly(2)
    return bytes(body)


def _head(answer: Answer) -> bytes:
    length = "Transfer-Encoding: chunked" if answer.pieces is not None else f"Content-Length: {len(answer.body)}"
    named = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
    return f"HTTP/1.1 {answer.status} -\r\nContent-Type: {answer.media_type}\r\n{length}\r\n{named}\r\n".encode(
        "latin-1"
    )


def _whole(answer: Answer) -> bytes:
    if answer.pieces is None:
        return answer.body
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in answer.pieces) + b"0\r\n\r\n"


async def _misbehave(fault: Fault, true: Answer, writer: asyncio.StreamWriter) -> bool:
    await asyncio.sleep(fault.wait_s)
    answer = fault.answer or true
    if not answer.status:
        return False
    head = _head(
        Answer(answer.body, answer.status, answer.media_type, {**answer.headers, **fault.headers}, answer.pieces)
    )
    whole = _whole(answer)
    cut = whole if fault.most_bytes is None else whole[: fault.most_bytes]
    writer.write(head)
    step = fault.piece_bytes or max(1, len(cut))
    for at in range(0, len(cut), step):
        writer.write(cut[at : at + step])
        await writer.drain()
        await asyncio.sleep(fault.pause_s)
    if len(cut) == len(whole):
        return True
    match fault.ending:
        case "silence":
            await asyncio.sleep(3600)
        case "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
    return False
