"""Origins and client addresses, as the settings and the connection give them."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.requests import HTTPConnection

from gateway.live.entrance import Addresses, OriginRefused, check_origin, client_of
from policy.errors import ConcurrencyLimited
from runtime.settings import Settings


def connection(client: str | None = "10.0.0.1", **headers: str) -> HTTPConnection:
    scope: dict[str, Any] = {
        "type": "websocket",
        "client": None if client is None else (client, 1),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    return HTTPConnection(scope)


@pytest.mark.parametrize(
    ("allowed", "origin", "passes"),
    [
        (None, None, True),
        (None, "https://stt.example", True),
        (None, "http://STT.example", True),
        (None, "https://stt.example:8443", False),
        (None, "https://evil.example", False),
        (None, "https://stt.example.evil.example", False),
        (None, "https://evil.example/stt.example", False),
        (None, "null", False),
        (None, "", False),
        (frozenset({"https://app.example"}), None, True),
        (frozenset({"https://app.example"}), "https://app.example", True),
        (frozenset({"https://app.example"}), "http://app.example", False),
        (frozenset({"https://app.example"}), "https://stt.example", False),
        (frozenset({"*"}), "null", True),
        (frozenset({"*"}), "https://evil.example", True),
    ],
)
def test_origins(allowed: frozenset[str] | None, origin: str | None, passes: bool) -> None:
    given = connection(host="stt.example", **({} if origin is None else {"origin": origin}))
    if passes:
        check_origin(given, allowed)
    else:
        with pytest.raises(OriginRefused):
            check_origin(given, allowed)


def test_an_empty_origin_is_not_the_host_that_is_missing() -> None:
    with pytest.raises(OriginRefused):
        check_origin(connection(origin="null"), None)


@pytest.mark.parametrize(
    ("client", "counted_as"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:aaaa::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:bbbb::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("a name", "a name"),
        (None, ""),
    ],
)
def test_addresses(client: str | None, counted_as: str) -> None:
    assert client_of(connection(client)) == counted_as


def test_seats_of_an_address() -> None:
    addresses = Addresses()
    with addresses.seat("a", 2), addresses.seat("a", 2), addresses.seat("b", 1):
        with pytest.raises(ConcurrencyLimited), addresses.seat("a", 2):
            pass
        with pytest.raises(ConcurrencyLimited), addresses.seat("b", 1):
            pass
    with addresses.seat("a", 1):
        pass
    assert not addresses._taken  # nothing is remembered of those who left


def test_lists_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Settings().origins, Settings().trusted_proxies) == (None, None)
    monkeypatch.setenv("STENOGATE_ORIGINS", "https://App.example, http://localhost:3000")
    monkeypatch.setenv("STENOGATE_TRUSTED_PROXIES", "10.0.0.0/8, 192.0.2.1,fd00::/8")
    settings = Settings()
    assert settings.origins == {"https://app.example", "http://localhost:3000"}
    assert settings.trusted_proxies == tuple(map(ip_network, ("10.0.0.0/8", "192.0.2.1/32", "fd00::/8")))
    monkeypatch.setenv("STENOGATE_ORIGINS", "")
    assert Settings().origins is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ORIGINS", "app.example"),
        ("ORIGINS", "https://app.example/"),
        ("ORIGINS", "https://*.example/path"),
        ("TRUSTED_PROXIES", "*"),
        ("TRUSTED_PROXIES", "10.0.0.1/8"),
        ("TRUSTED_PROXIES", "proxy.internal"),
    ],
)
def test_what_is_no_origin_or_network_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"STENOGATE_{name}", value)
    with pytest.raises(ValidationError):
        Settings()
