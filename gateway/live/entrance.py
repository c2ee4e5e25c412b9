"""Before a live connection is let in: where its page comes from, how many its address has, and whether there is room.

Nothing of this touches those who are in already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from dispatchers.errors import BackendUnavailable, Overloaded
from gateway.errors import EdgeError
from gateway.live.seats import SEATS
from gateway.state import gateway_of
from policy.errors import ConcurrencyLimited

ANY_ORIGIN = "*"
IPV6_CLIENT_BITS = 64  # what one subscriber is commonly given (RFC 6177): any of its addresses is the same client
ADDRESS_RETRY_S = 5
AWAY_RETRY_S = 5


class OriginRefused(EdgeError):
    """Pages of this origin may not connect here."""

    code = "FORBIDDEN"


class Addresses:
    """How many live sessions each client address holds in this process."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()

    @contextmanager
    def seat(self, address: str, limit: int) -> Iterator[None]:
        """Raises `ConcurrencyLimited` when the address holds so many already."""
        if self._taken[address] >= limit:
            raise ConcurrencyLimited("Too many streams from this address.", retry_after_s=ADDRESS_RETRY_S)
        self._taken[address] += 1
        try:
            yield
        finally:
            self._taken[address] -= 1
            if not self._taken[address]:
                del self._taken[address]


ADDRESSES = Addresses()


@contextmanager
def let_in(connection: HTTPConnection) -> Iterator[None]:
    """A place for one live session. Raises `OriginRefused`, `ConcurrencyLimited`, `Overloaded`, `BackendUnavailable`
    where nothing that is plugged in is up."""
    gateway = gateway_of(connection)
    settings = gateway.settings
    check_origin(connection, settings.origins)
    with (
        ADDRESSES.seat(client_of(connection), settings.max_streams_per_address),
        SEATS.seat(settings.max_streams),
    ):
        if not gateway.door.up:
            raise BackendUnavailable(retry_after_s=AWAY_RETRY_S)
        wait_s = gateway.queue_wait_s()
        if wait_s > settings.max_queue_wait_s:
            raise Overloaded(retry_after_s=wait_s)
        yield


def check_origin(connection: HTTPConnection, allowed: frozenset[str] | None) -> None:
    """Only browsers send an `Origin`, and no page can forge it. `allowed` None: pages of our own host only.

    Raises `OriginRefused`.
    """
    origin = connection.headers.get("origin")
    if origin is None:
        return
    origin = origin.lower()
    if allowed is None:
        same = urlsplit(origin).netloc == connection.headers.get("host", "").lower() != ""
    else:
        same = ANY_ORIGIN in allowed or origin in allowed
    if not same:
        raise OriginRefused


def client_of(connection: HTTPConnection) -> str:
    """The client's address, as whom its streams are counted. Behind a proxy it is what the server made of
    `X-Forwarded-For`, which it believes of configured proxies only."""
    host = connection.client.host if connection.client is not None else ""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ip_network((address, IPV6_CLIENT_BITS), strict=False))
