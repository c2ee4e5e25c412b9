"""Which addresses strangers' URLs may lead to."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from runtime.addresses import Allowed, is_public, parsed

PUBLIC = ("8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8")

INSIDE = (
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "169.254.170.2", "100.64.0.1", "100.100.100.200", "192.0.0.192", "168.63.129.16"),
    *("192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1"),
    *("255.255.255.255", "192.88.99.1", "::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1"),
    *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
    *("64:ff9b:1::808:808", "2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1", "100::1", "5f00::1"),
)


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("address", INSIDE)
def test_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


def test_a_zone_is_no_part_of_an_address() -> None:
    assert parsed("fe80::1%eth0") == ip_address("fe80::1")
    assert parsed("localhost") is None


def test_networks_addresses_and_hosts_are_allowed() -> None:
    allowed = Allowed.of(["10.1.0.0/16", "127.0.0.1", "fd00::/8", "Hooks.Internal", "receiver"])
    for address in ("10.1.255.255", "127.0.0.1", "fd12::1"):
        assert allowed.covers("x.example", [ip_address(address)])
    for address in ("10.2.0.0", "127.0.0.2", "fe80::1"):
        assert not allowed.covers("x.example", [ip_address(address)])
        assert allowed.covers("hooks.internal", [ip_address(address)])
    assert not allowed.covers("x.example", [ip_address("10.1.0.1"), ip_address("8.8.8.8")])


@pytest.mark.parametrize("entry", ["10.1.0.1/16", "127.1", "0x7f.1", "10.0.0.0/33", "*", "a b", "http://x", "x:80", ""])
def test_what_is_no_network_and_no_host_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match="is no network"):
        Allowed.of([entry])
