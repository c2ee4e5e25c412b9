"""Which network addresses a URL that a stranger named may lead to: public ones, and what the operator allows beside."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

# What `is_global` of this Python lets through and yet leads inside, or nowhere (IANA's special-purpose registries).
_NEVER: tuple[Network, ...] = tuple(
    ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's own services, on every virtual machine of its
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata
        "192.88.99.0/24",  # 6to4 relays
        "2002::/16",  # 6to4: an IPv4 address is inside
        "2001::/23",  # protocol assignments; Teredo among them
        "64:ff9b:1::/48",  # local NAT64
        "fec0::/10",  # site-local
        "5f00::/16",  # segment routing
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")
_LABEL = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")


@dataclass(frozen=True)
class Allowed:
    """What the operator allows beside public addresses: networks, and hosts by name, wherever their names lead."""

    networks: tuple[Network, ...] = ()
    hosts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, entries: Iterable[str]) -> Allowed:
        """Raises `ValueError`, which names the entry."""
        networks: list[Network] = []
        hosts: set[str] = set()
        for entry in entries:
            try:
                networks.append(ip_network(entry))
            except ValueError:
                if not _is_host(entry.lower()):
                    raise ValueError(
                        f"{entry} is no network such as 10.1.0.0/16, no address and no name of a host"
                    ) from None
                hosts.add(entry.lower())
        return cls(tuple(networks), frozenset(hosts))

    def covers(self, host: str, addresses: Iterable[Address]) -> bool:
        """Whether the operator vouches for this host, or for every one of its addresses."""
        return host in self.hosts or all(
            any(address.version == network.version and address in network for network in self.networks)
            for address in addresses
        )


def is_public(address: Address) -> bool:
    """Whether anybody on the internet may have this address, and nobody inside has. What carries an IPv4 address in it
    is what that one is."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    return not any(address.version == network.version and address in network for network in _NEVER)


def parsed(written: str) -> Address | None:
    """The address, or None where this is none. A zone (`fe80::1%eth0`) is no part of it."""
    try:
        return ip_address(written.partition("%")[0])
    except ValueError:
        return None


def _is_host(name: str) -> bool:
    """A name that is no number: `127.1` and `0x7f.1` are addresses to some."""
    labels = name.removesuffix(".").split(".")
    return set(name) <= _LABEL and all(0 < len(label) <= 63 for label in labels) and labels[-1][0].isalpha()
