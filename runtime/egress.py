"""HTTP to URLs that strangers name: recordings to fetch, endpoints of webhooks.

Whoever names a URL chooses where this process connects to, from inside the operator's network (OWASP API7:2023, server
side request forgery). So a name is looked up once, every one of its addresses is checked, and the connection goes to a
checked address, with the name in the request's head and for its certificate: a name that changes meanwhile changes
nothing.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

import httpx

from runtime.addresses import Address, Allowed, is_public, parsed
from runtime.errors import UrlRefused, UrlTooLarge, UrlUnreachable

PORTS = (443, 8443)
LONGEST_URL = 2000
MOST_ADDRESSES = 16
TRIES = 3
"""Addresses of one host that are tried, one after the other."""
LOOKUPS = 32
REDIRECTS = (301, 302, 303, 307, 308)

Lookup: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a host, in the order to try them. Raises `OSError`."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one exchange may take: bytes of the answer's body, seconds for all of it, for connecting, and of silence."""

    most_bytes: int
    total_s: float
    connect_s: float = 5.0
    idle_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Answer:
    """The head of an answer, and its body as it comes. `url` is where it came from, after redirects."""

    status: int
    headers: httpx.Headers
    url: str
    most_bytes: int
    _response: httpx.Response

    @property
    def declared_bytes(self) -> int | None:
        """The length that the head tells, if it does."""
        said = self.headers.get("content-length", "")
        return int(said) if said.isascii() and said.isdigit() and len(said) < 20 else None

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it was sent. Raises `UrlTooLarge`, before reading where the head says so; `UrlUnreachable` where
        it breaks off, also before the length that the head tells."""
        if (self.declared_bytes or 0) > self.most_bytes:
            raise UrlTooLarge(f"What lies there is larger than {self.most_bytes} bytes.")
        read = 0
        async for chunk in self._response.aiter_raw():
            read += len(chunk)
            if read > self.most_bytes:
                raise UrlTooLarge(f"What lies there is larger than {self.most_bytes} bytes.")
            yield chunk


@dataclass(frozen=True, slots=True)
class _Place:
    """A URL, and the checked addresses of its host."""

    url: httpx.URL
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class _Wish:
    """What is asked of every place on the way."""

    method: str
    headers: Mapping[str, str]
    content: bytes | None
    limits: Limits


class Egress:
    """Connects to public addresses over https, at the usual ports; and to what the operator allows, also over plain
    http and at any port. Each exchange has a connection of its own: none is ever shared between two names."""

    def __init__(
        self,
        allowed: Allowed,
        *,
        lookup: Lookup | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._allowed = allowed
        self._threads = ThreadPoolExecutor(LOOKUPS, "egress-lookup")  # slow names must not hold up other work
        self._lookup = lookup or self._look_up
        self._make_tls = tls or httpx.create_ssl_context
        self._tls: ssl.SSLContext | None = None

    async def check(self, url: str, *, within_s: float = 5.0) -> None:
        """Whether we would go there now. Raises `UrlRefused`; `UrlUnreachable` where the host has no address."""
        async with _deadline(within_s):
            await self._place(url)

    @asynccontextmanager
    async def open(
        self,
        method: str,
        url: str,
        *,
        limits: Limits,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        redirects: int = 0,
    ) -> AsyncIterator[Answer]:
        """One exchange, all of it within `limits`, reading the body included.

        At most so many `redirects` of a GET are followed, each checked as the first was; the headers go along, so there
        is no secret among them. With none, a redirect is an answer like any other. Raises `UrlRefused`,
        `UrlUnreachable` (also when time is up), and what reading the body does.
        """
        wish = _Wish(method, headers or {}, content, limits)
        async with _deadline(limits.total_s), AsyncExitStack() as stack:
            for left in range(redirects, -1, -1):
                place = await self._place(url)
                response = await self._sent(stack, place, wish)
                target = response.headers.get("location")
                if redirects == 0 or response.status_code not in REDIRECTS or target is None:
                    yield Answer(response.status_code, response.headers, str(place.url), limits.most_bytes, response)
                    return
                if left == 0:
                    raise UrlRefused(f"There are more than {redirects} redirects.")
                await stack.aclose()
                url = _joined(place.url, target)

    def close(self) -> None:
        """Forgets the look-ups under way."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _place(self, written: str) -> _Place:
        url = _read(written)
        host = url.raw_host.decode("ascii").lower()
        port = url.port or (80 if url.scheme == "http" else 443)
        addresses = await self._addresses(host.strip("[]"), port)
        if self._allowed.covers(host.removesuffix("."), addresses):
            return _Place(url, addresses)
        if not all(is_public(address) for address in addresses):
            raise UrlRefused("The URL does not lead to a public address.")
        if url.scheme != "https":
            raise UrlRefused("The URL must be https.")
        if port not in PORTS:
            raise UrlRefused(f"The URL's port must be {' or '.join(map(str, PORTS))}.")
        return _Place(url, addresses)

    async def _addresses(self, host: str, port: int) -> tuple[Address, ...]:
        literal = parsed(host)
        if literal is not None:
            return (literal,)
        try:
            found = [parsed(shown) for shown in await self._lookup(host, port)]
        except (OSError, UnicodeError):  # UnicodeError: no name at all
            found = []
        addresses = tuple(dict.fromkeys(address for address in found if address is not None))
        if not addresses:
            raise UrlUnreachable("The URL's host has no address.")
        if len(addresses) > MOST_ADDRESSES:
            raise UrlRefused("The URL's host has too many addresses.")
        return addresses

    async def _look_up(self, host: str, port: int) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(to[0]) for *_, to in found]

    async def _sent(self, stack: AsyncExitStack, place: _Place, wish: _Wish) -> httpx.Response:
        """The answer of the first address that takes the connection."""
        if self._tls is None:  # takes tens of ms to make
            self._tls = await asyncio.get_running_loop().run_in_executor(self._threads, self._make_tls)
        distrusted = False
        for address in place.addresses[:TRIES]:
            client = await stack.enter_async_context(_client(address, self._tls, wish.limits))
            request = client.build_request(wish.method, place.url, headers=dict(wish.headers), content=wish.content)
            try:
                return await stack.enter_async_context(_streamed(client, request))
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                distrusted = distrusted or _is_of_tls(error)
                await stack.aclose()
        raise UrlUnreachable("The certificate of the URL's host is not accepted." if distrusted else None)


class _AtAddress(httpx.AsyncHTTPTransport):
    """Connects to one address, whatever the URL's host, which stays the one that is spoken to."""

    def __init__(self, address: Address, tls: ssl.SSLContext) -> None:
        super().__init__(verify=tls, limits=httpx.Limits(max_connections=1, max_keepalive_connections=0))
        self._address = str(address)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        name = request.url.raw_host.decode("ascii").strip("[]")
        request.extensions = {**request.extensions, "sni_hostname": name}
        request.url = request.url.copy_with(host=self._address)
        return await super().handle_async_request(request)


def _client(address: Address, tls: ssl.SSLContext, limits: Limits) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=_AtAddress(address, tls),
        timeout=httpx.Timeout(limits.idle_s, connect=limits.connect_s),
        headers={"accept-encoding": "identity", "user-agent": "stenogate", "connection": "close"},
        follow_redirects=False,
        trust_env=False,
    )


@asynccontextmanager
async def _streamed(client: httpx.AsyncClient, request: httpx.Request) -> AsyncIterator[httpx.Response]:
    response = await client.send(request, stream=True)
    try:
        yield response
    finally:
        await response.aclose()


@asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    """Bounds the time, and gives what goes wrong on the way our names. What the other side said stays unsaid."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield
    except httpx.HTTPError:
        raise UrlUnreachable("The connection to the URL's host broke, or was silent for too long.") from None
    except TimeoutError:
        if not timeout.expired():
            raise
        raise UrlUnreachable("What lies at the URL did not come in time.") from None


def _read(written: str) -> httpx.URL:
    """The URL, with the one parser that also makes the request. Raises `UrlRefused`."""
    if len(written) > LONGEST_URL or not written.isprintable() or {" ", "\\"} & set(written):
        raise UrlRefused(f"A URL is at most {LONGEST_URL} printable characters, without spaces and backslashes.")
    try:
        url = httpx.URL(written)
    except (httpx.InvalidURL, ValueError):
        raise UrlRefused("This is no URL.") from None
    if url.scheme not in ("https", "http") or not url.raw_host:
        raise UrlRefused("The URL must be https, with a host.")
    if url.userinfo or re.match(r"[^/?#]*//[^/?#]*@", written):
        raise UrlRefused("The URL must not carry a user name or password.")
    if url.port == 0:
        raise UrlRefused("The URL's port must not be 0.")
    return url.copy_with(fragment=None)


def _joined(base: httpx.URL, target: str) -> str:
    try:
        return str(base.join(target))
    except (httpx.InvalidURL, ValueError):
        raise UrlRefused("The redirect does not lead to a URL.") from None


def _is_of_tls(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error is not None
