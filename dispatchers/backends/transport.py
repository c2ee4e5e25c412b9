"""httpx, its connections by aiohttp: the same interface for a fifth of the CPU (decision 0014)."""

from __future__ import annotations

import io
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import aiohttp
import httpx

AT_ONCE = 512 * 1024
"""A larger body is written piece by piece."""


class AiohttpTransport(httpx.AsyncBaseTransport):
    """HTTP/1.1 over at most `connections` at once (0: any number), each kept for `idle_s` without use; `connector`
    makes what connects, where it is not the usual one. Of httpx's time-outs, `write` is not known to it: who may not
    wait for ever for a server to read has a deadline of their own.

    A request that is cancelled, or an answer that is left before its end, closes its connection. Use from one event
    loop. Raises what httpx raises.
    """

    def __init__(
        self, *, connections: int, idle_s: float, connector: Callable[..., aiohttp.BaseConnector] | None = None
    ) -> None:
        self._connections = connections
        self._idle_s = idle_s
        self._connector = connector or partial(aiohttp.TCPConnector, ssl=tls())
        self._session: aiohttp.ClientSession | None = None  # aiohttp wants to be made in its loop

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See httpx."""
        limits = request.extensions.get("timeout", {})
        timeout = aiohttp.ClientTimeout(
            connect=limits.get("pool"), sock_connect=limits.get("connect"), sock_read=limits.get("read")
        )
        body = _body(request)  # first: it says what of the headers is aiohttp's to say
        with _translated():
            answer = await self._opened().request(
                request.method,
                str(request.url),
                headers=request.headers.multi_items(),
                skip_auto_headers=("content-type",),
                data=body,
                allow_redirects=False,
                timeout=timeout,
            )
        return httpx.Response(answer.status, headers=answer.raw_headers, stream=_Answer(answer), request=request)

    async def aclose(self) -> None:
        """Closes every connection."""
        if self._session is not None:
            await self._session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=self._connector(limit=self._connections, keepalive_timeout=self._idle_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        return self._session


class _Answer(httpx.AsyncByteStream):
    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _translated():
            async for chunk in self._answer.content.iter_any():
                yield chunk

    async def aclose(self) -> None:
        self._answer.release()


def _body(request: httpx.Request) -> bytes | io.BytesIO | AsyncIterator[bytes] | None:
    try:
        content = request.content
    except httpx.RequestNotRead:
        request.headers.pop("transfer-encoding", None)  # aiohttp's to say
        return aiter(request.stream) if isinstance(request.stream, httpx.AsyncByteStream) else None
    return io.BytesIO(content) if len(content) > AT_ONCE else content or None


@contextmanager
def _translated() -> Iterator[None]:
    """aiohttp's errors as httpx's."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise httpx.ConnectTimeout(str(error)) from error
    except TimeoutError as error:
        raise httpx.ReadTimeout(str(error)) from error
    except aiohttp.ClientConnectorError as error:
        raise httpx.ConnectError(str(error)) from error
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError):  # their text may quote the answer
        raise httpx.ReadError("The connection broke.") from None
    except aiohttp.ClientError:
        raise httpx.RemoteProtocolError("The answer is not HTTP.") from None


@cache
def tls() -> ssl.SSLContext:
    """What providers' certificates are checked with. Takes tens of ms to make."""
    return httpx.create_ssl_context()
