"""The public keys of external issuers (RFC 7517), fetched without blocking and kept through their outages."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import structlog
from jwt import PyJWK

log = structlog.get_logger()

FRESH_S = 300.0
STALE_S = 24 * 3600.0
RETRY_S = 10.0
TIMEOUT_S = 3.0
MAX_BYTES = 256 * 1024
MAX_KEYS = 100


class KeySetUnusable(Exception):
    """What was fetched is no key set."""


@dataclass
class _KeySet:
    """What is known of one URI. Times are of the monotonic clock, in seconds."""

    keys: Mapping[str, PyJWK] = field(default_factory=dict)
    fetched_at: float = float("-inf")
    tried_at: float = float("-inf")
    fetching: asyncio.Task[None] | None = None


class KeySets:
    """Key sets by URI.

    A set older than 5 minutes is fetched again in the background while it goes on serving, for at most 24 hours. An
    unknown key id asks for one fetch, shared by all who wait, and not within 10 seconds of the last: a flood of
    made-up key ids costs the issuer nothing. URIs come from the issuers table alone, never from a token.
    """

    def __init__(self, *, allow_http: bool = False, clock: Callable[[], float] = time.monotonic):
        self._schemes = ("https", "http") if allow_http else ("https",)
        self._clock = clock
        self._client = httpx.AsyncClient(timeout=TIMEOUT_S, follow_redirects=False)
        self._sets: dict[str, _KeySet] = {}

    async def key(self, uri: str, key_id: str) -> PyJWK | None:
        """The key, or None when the issuer publishes none of this id, or no usable set."""
        known = self._sets.setdefault(uri, _KeySet())
        age = self._clock() - known.fetched_at
        if age > STALE_S:
            known.keys = {}
        if age > FRESH_S or key_id not in known.keys:
            self._start_fetching(uri, known)
        if key_id not in known.keys and known.fetching is not None:
            await asyncio.shield(known.fetching)
        return known.keys.get(key_id)

    async def aclose(self) -> None:
        """Ends what is still fetching."""
        tasks = [known.fetching for known in self._sets.values() if known.fetching is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    def _start_fetching(self, uri: str, known: _KeySet) -> None:
        if known.fetching is not None or self._clock() - known.tried_at < RETRY_S:
            return
        known.tried_at = self._clock()
        known.fetching = asyncio.create_task(self._fetch(uri, known))

    async def _fetch(self, uri: str, known: _KeySet) -> None:
        try:
            known.keys = _usable_keys(await self._download(uri))
            known.fetched_at = self._clock()
        except (httpx.HTTPError, httpx.InvalidURL, KeySetUnusable, TimeoutError) as error:
            log.warning("jwks.fetch_failed", uri=uri, error=type(error).__name__, keys_kept=len(known.keys))
        finally:
            known.fetching = None

    async def _download(self, uri: str) -> bytes:
        if httpx.URL(uri).scheme not in self._schemes:
            raise KeySetUnusable("scheme")
        body = bytearray()
        headers = {"accept": "application/jwk-set+json, application/json", "accept-encoding": "identity"}
        async with asyncio.timeout(TIMEOUT_S), self._client.stream("GET", uri, headers=headers) as response:
            if response.status_code != httpx.codes.OK:
                raise KeySetUnusable("status")
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > MAX_BYTES:
                    raise KeySetUnusable("size")
        return bytes(body)


def _usable_keys(body: bytes) -> dict[str, PyJWK]:
    """The signature keys that have an id. Raises `KeySetUnusable` when this is no key set or a boundless one."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise KeySetUnusable("json") from None
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        raise KeySetUnusable("keys")
    parsed = (_parsed(entry) for entry in entries if isinstance(entry, dict))
    return {key.key_id: key for key in parsed if key is not None and key.key_id is not None}


def _parsed(entry: dict[str, Any]) -> PyJWK | None:
    """None for what PyJWT cannot use, for encryption keys, and for shared secrets, which have no place in public.

    A key that names no algorithm gets the usual one of its kind: RS256, ES256, ES384 or EdDSA.
    """
    if not isinstance(entry.get("kid"), str) or entry.get("use", "sig") != "sig" or entry.get("kty") == "oct":
        return None
    try:
        return PyJWK(entry)
    except Exception:  # noqa: BLE001  what a stranger's document makes a parser raise cannot be listed
        return None
