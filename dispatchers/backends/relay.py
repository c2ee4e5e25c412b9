"""What the backends of managed providers share: for whom they ask, and what a provider's HTTP answers mean.

A provider's answer is input like any other: bounded, checked, and never quoted in an error or a log, for it may repeat
what was said or the key.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from dispatchers.errors import (
    BackendError,
    BackendFailed,
    BackendRefused,
    BackendTimeout,
    BackendUnavailable,
    BadAnswer,
    CredentialRefused,
    Throttled,
)

CONNECT_S = 3.0
ANSWER_BYTES = 4 * 1024 * 1024
"""The largest answer that is read: hours of words."""
WAIT_MOST_S = 300.0
"""However long a provider asks us to wait, we look again after this."""
_TEMPORARY = {408, 409, 425}
_THROTTLED = {429, 498}  # 498: Groq's "capacity exceeded"
_UNAVAILABLE = {502, 503, 504, 529}


@dataclass(frozen=True, slots=True)
class Account:
    """Access to a provider. `backend` is the policy's name for it, `shown` the key's beginning, which is all of it that
    people may see; `models` are those offered of it, the default first."""

    backend: str
    base_url: str
    key: str = field(repr=False)
    shown: str
    models: tuple[str, ...]


def client(
    account: Account, headers: Mapping[str, str], *, read_s: float, transport: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """Speaks to the account's provider and to nobody else: redirects are not followed, the environment's proxies not
    asked. `read_s` is how long the provider may be silent."""
    return httpx.AsyncClient(
        base_url=account.base_url,
        headers=headers,
        timeout=httpx.Timeout(read_s, connect=CONNECT_S, pool=CONNECT_S),
        limits=httpx.Limits(max_connections=256, max_keepalive_connections=64, keepalive_expiry=30.0),
        follow_redirects=False,
        trust_env=False,
        transport=transport,
    )


@asynccontextmanager
async def understood(account: Account) -> AsyncIterator[None]:
    """What goes wrong with HTTP, in our words."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise BackendTimeout(f"{account.backend} did not answer in time.") from error
    except httpx.ConnectError as error:
        raise BackendUnavailable(f"{account.backend} cannot be reached.") from error
    except httpx.HTTPError as error:
        raise BackendFailed(f"The connection to {account.backend} broke.") from error


async def whole(account: Account, answer: httpx.Response) -> bytes:
    """The body of a good answer. Raises `BadAnswer` where it is too large, what `refusal` says where it is none."""
    if answer.status_code != httpx.codes.OK:
        raise refusal(account, answer.status_code, answer.headers)
    body = bytearray()
    async for chunk in answer.aiter_bytes():
        body += chunk
        if len(body) > ANSWER_BYTES:
            raise BadAnswer(f"The answer of {account.backend} is too large.")
    return bytes(body)


def refusal(account: Account, status: int, headers: Mapping[str, Any]) -> BackendError:
    """What an answer other than 200 means. Its body is not looked at."""
    name = account.backend
    if status in (401, 403):
        return CredentialRefused(
            f"{name} does not accept the credential {account.shown} (HTTP {status}). The operator must renew it."
        )
    if status in _THROTTLED:
        return Throttled(f"{name} takes no more requests for now.", retry_after_s=retry_after_s(headers))
    if status in _UNAVAILABLE:
        return BackendUnavailable(f"{name} is not available (HTTP {status}).", retry_after_s=retry_after_s(headers))
    if status in _TEMPORARY or status >= 500:
        return BackendFailed(f"{name} failed (HTTP {status}).")
    if 400 <= status < 500:
        return BackendRefused(f"{name} refused the request (HTTP {status}).")
    return BadAnswer(f"{name} answered in a way that is not understood (HTTP {status}).")


def retry_after_s(headers: Mapping[str, Any]) -> float | None:
    """`Retry-After` (RFC 9110, section 10.2.3) in seconds, bounded; None where it is missing or makes no sense."""
    said = str(headers.get("retry-after", "")).strip()
    try:
        seconds = float(said) if said.replace(".", "", 1).isdigit() else _until(said)
    except (ValueError, TypeError, OverflowError):
        return None
    return None if seconds is None else min(max(seconds, 0.0), WAIT_MOST_S)


def _until(date: str) -> float | None:
    return (parsedate_to_datetime(date) - datetime.now(UTC)).total_seconds() if date else None
