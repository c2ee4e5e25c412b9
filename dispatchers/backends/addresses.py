"""Where the engines of a pool are: what a name stands for now, and connections to one of its addresses."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias
from urllib.parse import urlsplit

import httpx

from dispatchers.backends.engine import PATIENCE, POOL

Lookup: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a host. Raises `OSError`."""


async def look_up(host: str, port: int) -> Sequence[str]:
    """The addresses that the name has now, asked of the system. Where there are IPv4 addresses, only those: a machine
    that has both would count as two. Raises `OSError`, when the system gives up."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    by_family = {family: {str(to[0]): None for kind, *_, to in found if kind == family} for family, *_ in found}
    return tuple(by_family.get(socket.AF_INET) or by_family.get(socket.AF_INET6) or ())


def place(url: str) -> tuple[str, int]:
    """Host and port of an engine's URL."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def is_address(host: str) -> bool:
    """Whether the host needs no looking up."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def at_address(url: str, address: str, token: str | None) -> httpx.AsyncClient:
    """A client for the engine that listens at this address of the URL's host. It holds the engine's token."""
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    transport = _AtAddress(address)
    return httpx.AsyncClient(transport=transport, base_url=url, headers=headers, timeout=PATIENCE, trust_env=False)


class _AtAddress(httpx.AsyncHTTPTransport):
    """Connects to one address, whatever the URL's host. The host stays the one that is spoken to, in the request's head
    and for its certificate."""

    def __init__(self, address: str) -> None:
        super().__init__(limits=POOL)
        self._address = address

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.extensions = {**request.extensions, "sni_hostname": request.url.host}
        request.url = request.url.copy_with(host=self._address)
        return await super().handle_async_request(request)
