"""The key-set cache against a real HTTP server on the loopback, its clock in the test's hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from policy.jwks import MAX_BYTES, MAX_KEYS, KeySets

MINUTE = 60
HOUR = 60 * MINUTE


def jwk(key_id: str, private: Any) -> dict[str, Any]:
    algorithm = {
        rsa.RSAPrivateKey: RSAAlgorithm,
        ec.EllipticCurvePrivateKey: ECAlgorithm,
        ed25519.Ed25519PrivateKey: OKPAlgorithm,
    }[
        next(
            kind
            for kind in (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey, ed25519.Ed25519PrivateKey)
            if isinstance(private, kind)
        )
    ]
    return {**algorithm.to_jwk(private.public_key(), as_dict=True), "kid": key_id, "use": "sig"}


ED = ed25519.Ed25519PrivateKey.generate()


@dataclass
class Publisher:
    """An issuer's web server. `gate` holds answers back until it is set."""

    body: bytes = b""
    status: int = 200
    requests: int = 0
    uri: str = ""
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def publish(self, *keys: dict[str, Any]) -> None:
        self.body = json.dumps({"keys": keys}).encode()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.requests += 1
        await self.gate.wait()
        head = f"HTTP/1.1 {self.status} X\r\ncontent-length: {len(self.body)}\r\nconnection: close\r\n"
        writer.write(head.encode() + b"location: /elsewhere\r\n\r\n" + self.body)
        with suppress(ConnectionError):  # a client that had enough
            await writer.drain()
        writer.close()


@asynccontextmanager
async def publisher() -> AsyncIterator[Publisher]:
    published = Publisher()
    published.gate.set()
    server = await asyncio.start_server(published.answer, "127.0.0.1", 0)
    published.uri = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks.json"
    async with server:
        yield published


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    issuer: Publisher
    sets: KeySets
    clock: Clock

    async def has(self, key_id: str) -> bool:
        return await self.sets.key(self.issuer.uri, key_id) is not None

    async def requests_become(self, count: int) -> None:
        """Waits for a fetch that nobody waits for."""
        async with asyncio.timeout(10):
            while self.issuer.requests < count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    clock = Clock()
    sets = KeySets(allow_http=True, clock=clock)
    async with publisher() as issuer:
        issuer.publish(jwk("one", ED))
        yield Bench(issuer, sets, clock)
        await sets.aclose()


@pytest.mark.parametrize(
    ("private", "algorithm"),
    [
        (rsa.generate_private_key(65537, 2048), "RS256"),
        (ec.generate_private_key(ec.SECP256R1()), "ES256"),
        (ED, "EdDSA"),
    ],
)
async def test_a_published_key_verifies_what_its_owner_signed(bench: Bench, private: Any, algorithm: str) -> None:
    bench.issuer.publish(jwk("k", private))
    key = await bench.sets.key(bench.issuer.uri, "k")
    assert key is not None
    token = jwt.encode({"sub": "x"}, private, algorithm=algorithm)
    assert jwt.decode(token, key, algorithms=[algorithm]) == {"sub": "x"}


async def test_a_fresh_set_is_fetched_once(bench: Bench) -> None:
    for _ in range(5):
        assert await bench.has("one")
    assert bench.issuer.requests == 1


async def test_many_who_wait_share_one_fetch(bench: Bench) -> None:
    bench.issuer.gate.clear()
    waiting = [asyncio.create_task(bench.has("one")) for _ in range(50)]
    await bench.requests_become(1)
    bench.issuer.gate.set()
    assert all(await asyncio.gather(*waiting))
    assert bench.issuer.requests == 1


async def test_one_who_gives_up_does_not_take_the_fetch_from_the_others(bench: Bench) -> None:
    bench.issuer.gate.clear()
    impatient, patient = (asyncio.create_task(bench.has("one")) for _ in range(2))
    await bench.requests_become(1)
    impatient.cancel()
    bench.issuer.gate.set()
    assert await patient


async def test_a_rotated_key_is_found_at_once_and_the_old_one_goes(bench: Bench) -> None:
    assert await bench.has("one")
    bench.issuer.publish(jwk("two", ED))
    bench.clock.now += 11
    assert await bench.has("two")
    assert not await bench.has("one")


async def test_a_flood_of_unknown_key_ids_costs_one_fetch_in_ten_seconds(bench: Bench) -> None:
    assert await bench.has("one")
    bench.clock.now += 11
    for number in range(200):
        assert not await bench.has(f"made-up-{number}")
    assert bench.issuer.requests == 2
    assert await bench.has("one")


async def test_an_old_set_serves_while_it_is_fetched_again(bench: Bench) -> None:
    assert await bench.has("one")
    bench.clock.now += 6 * MINUTE
    bench.issuer.gate.clear()
    assert await bench.has("one")  # the server has not answered yet
    await bench.requests_become(2)
    bench.issuer.gate.set()


async def test_an_outage_is_bridged_for_a_day_and_no_longer(bench: Bench) -> None:
    assert await bench.has("one")
    bench.issuer.status = 503
    for _ in range(23):
        bench.clock.now += HOUR
        assert await bench.has("one")
        await bench.requests_become(bench.issuer.requests)
    bench.clock.now += 2 * HOUR
    assert not await bench.has("one")
    bench.issuer.status = 200
    bench.clock.now += 11
    assert await bench.has("one")


async def test_a_server_that_is_gone_is_an_outage_too() -> None:
    clock = Clock()
    sets = KeySets(allow_http=True, clock=clock)
    async with publisher() as issuer:
        issuer.publish(jwk("one", ED))
        assert await sets.key(issuer.uri, "one") is not None
    clock.now += HOUR
    assert await sets.key(issuer.uri, "one") is not None
    assert await sets.key(issuer.uri, "two") is None
    await sets.aclose()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"\xff\xfe",
        b"[]",
        b'{"keys": {}}',
        b"[" * 50_000,
        json.dumps({"keys": [jwk(str(number), ED) for number in range(MAX_KEYS + 1)]}).encode(),
        json.dumps({"keys": [jwk("two", ED)], "padding": "x" * MAX_BYTES}).encode(),
    ],
    ids=["empty", "html", "bytes", "list", "object", "deep", "many", "oversized"],
)
async def test_garbage_gives_no_key_and_takes_none_away(bench: Bench, body: bytes) -> None:
    assert await bench.has("one")
    bench.issuer.body = body
    bench.clock.now += 11
    assert not await bench.has("two")
    assert bench.issuer.requests == 2
    assert await bench.has("one")


@pytest.mark.parametrize(
    "entry",
    [
        "text",
        {},
        {"kid": "two"},
        {"kid": "two", "kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"},
        {"kid": "two", "kty": "RSA", "n": 5, "e": []},
        {"kid": "two", "kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
        {"kid": 2, "kty": "OKP"},
        {**jwk("two", ED), "use": "enc"},
        {**jwk("two", ED), "alg": "none"},
    ],
)
async def test_an_unusable_entry_does_not_spoil_the_others(bench: Bench, entry: Any) -> None:
    bench.issuer.publish(entry, jwk("one", ED))
    assert await bench.has("one")
    assert not await bench.has("two")


async def test_a_redirect_is_not_followed(bench: Bench) -> None:
    bench.issuer.status = 302
    assert not await bench.has("one")
    assert bench.issuer.requests == 1


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9/jwks", "file:///etc/passwd", "ftp://x/y", "", "https://[", "nonsense"]
)
async def test_only_https_is_spoken_unless_the_operator_says_otherwise(uri: str) -> None:
    sets = KeySets()
    assert await sets.key(uri, "one") is None
    await sets.aclose()


async def test_plain_http_is_not_even_tried(bench: Bench) -> None:
    strict = KeySets()
    assert await strict.key(bench.issuer.uri, "one") is None
    assert bench.issuer.requests == 0
    await strict.aclose()


async def test_closing_ends_a_fetch_under_way(bench: Bench) -> None:
    bench.issuer.gate.clear()
    waiting = asyncio.create_task(bench.has("one"))
    await bench.requests_become(1)
    await bench.sets.aclose()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    bench.issuer.gate.set()
