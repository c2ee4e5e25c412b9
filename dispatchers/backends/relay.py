"""What the backends of managed providers share: for whom they ask, and what a provider's HTTP answers mean.

A provider's answer is input like any other: bounded, checked, and never quoted in an error or a log, for it may repeat
what was said or the key.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Annotated, Any, TypeAlias, TypeVar

import httpx
from pydantic import BaseModel, Field, ValidationError

from dispatchers.backends.transport import AiohttpTransport
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

M = TypeVar("M", bound=BaseModel)

CONNECT_S = 3.0
MOST_CONNECTIONS = 256
IDLE_S = 30.0
"""How long an unused connection is kept."""
ANSWER_BYTES = 4 * 1024 * 1024
"""The largest answer that is read: hours of words."""
WAIT_MOST_S = 300.0
"""However long a provider asks us to wait, we look again after this."""
Seconds: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
"""A time as a provider says it."""

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_KEY = {401, 402, 403}
_MISDIRECTED = {404, 405, 410}
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
    account: Account,
    headers: Mapping[str, str],
    *,
    read_s: float,
    connect_s: float = CONNECT_S,
    transport: httpx.AsyncBaseTransport | None = None,
) -> httpx.AsyncClient:
    """Speaks to the account's provider and to nobody else: redirects are not followed, the environment's proxies not
    asked, cookies not kept. `read_s` is how long the provider may be silent."""
    return httpx.AsyncClient(
        base_url=account.base_url,
        headers={"accept-encoding": "identity", **headers},
        timeout=httpx.Timeout(read_s, connect=connect_s, pool=connect_s),
        follow_redirects=False,
        trust_env=False,
        transport=transport or AiohttpTransport(connections=MOST_CONNECTIONS, idle_s=IDLE_S),
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
    )


@asynccontextmanager
async def understood(account: Account, within_s: float | None = None) -> AsyncIterator[None]:
    """What goes wrong with HTTP, in our words. `within_s` is for all of it, however steadily bytes come: a provider may
    also fail to read, for which the transport has no time-out."""
    try:
        async with asyncio.timeout(within_s):
            yield
    except (httpx.TimeoutException, TimeoutError) as error:
        raise BackendTimeout(f"{account.backend} did not answer in time.") from error
    except httpx.ConnectError as error:
        raise BackendUnavailable(f"{account.backend} cannot be reached.") from error
    except httpx.HTTPError as error:
        raise BackendFailed(f"The connection to {account.backend} broke.") from error


async def whole(account: Account, answer: httpx.Response) -> bytes:
    """The body of a good answer. Raises `BadAnswer` where it is too large, what `refusal` says where it is none."""
    return b"".join([chunk async for chunk in pieces(account, answer)])


async def pieces(account: Account, answer: httpx.Response) -> AsyncIterator[bytes]:
    """The same as it comes."""
    if answer.status_code != httpx.codes.OK:
        raise refusal(account, answer.status_code, answer.headers)
    size = 0
    async for chunk in answer.aiter_bytes():
        size += len(chunk)
        if size > ANSWER_BYTES:
            raise BadAnswer(f"The answer of {account.backend} is too large.")
        yield chunk


def parsed(account: Account, form: type[M], body: bytes | str) -> M:
    """JSON of this form; members of it that are not known are left out. Raises `BadAnswer`."""
    try:
        return form.model_validate_json(body, strict=True)
    except ValidationError:  # its text quotes what was said
        raise BadAnswer(f"The answer of {account.backend} is not of the form that was agreed.") from None


def plain(text: str) -> str:
    """Without control characters and halves of characters, which some stores and terminals do not bear."""
    return _CONTROL.sub("", text)


def at_ms(seconds: float, least_ms: int, most_ms: int) -> int:
    """A provider's time in whole ms, within bounds."""
    return round(1000 * min(max(seconds, least_ms / 1000), most_ms / 1000))


def refusal(account: Account, status: int, headers: Mapping[str, Any]) -> BackendError:
    """What an answer other than 200 means. Its body is not looked at."""
    name = account.backend
    if status in _KEY:
        return CredentialRefused(
            f"{name} does not accept the credential {account.shown} (HTTP {status}). The operator must renew it."
        )
    if status in _THROTTLED:
        return Throttled(f"{name} takes no more requests for now.", retry_after_s=retry_after_s(headers))
    if status in _UNAVAILABLE:
        return BackendUnavailable(f"{name} is not available (HTTP {status}).", retry_after_s=retry_after_s(headers))
    if status in _MISDIRECTED:
        return BackendUnavailable(
            f"{name} has not what was asked for at its address (HTTP {status}). The operator must look at it."
        )
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
