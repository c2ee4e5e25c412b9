"""Where the engines of a pool are: what a name stands for now, and connections to one of its addresses."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeAlias
from urllib.parse import urlsplit

import aiohttp
import httpx
from aiohttp.abc import AbstractResolver, ResolveResult

from dispatchers.backends.engine import KEPT_S, PATIENCE
from dispatchers.backends.transport import AiohttpTransport, tls

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
    """A client for the engine that listens at this address of the URL's host; the host stays the one that is spoken to,
    in the request's head and for its certificate. It holds the engine's token."""
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    connector = partial(aiohttp.TCPConnector, resolver=_Known(address), ssl=tls())
    transport = AiohttpTransport(connections=0, idle_s=KEPT_S, connector=connector)
    return httpx.AsyncClient(transport=transport, base_url=url, headers=headers, timeout=PATIENCE, trust_env=False)


class _Known(AbstractResolver):
    """Has looked up already."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        kind = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        return [
            ResolveResult(
                hostname=host, host=self._address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST
            )
        ]

    async def close(self) -> None:
        pass
