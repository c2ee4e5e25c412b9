"""Managed providers that the operator has an account with, as backends: where they are, and what they offer.

What a relay is called is what policies, decisions, prices and the ledger call it. Only the system role reads this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from ipaddress import ip_address
from typing import Any, Literal, TypeAlias, get_args
from urllib.parse import urlsplit

import httpx
from sqlalchemy import Row, text

from policy import audit, credentials
from policy.credentials import Credential, used
from policy.errors import Conflict, Invalid, NotFound
from runtime.database import Transaction
from runtime.sealing import Sealer

__all__ = [
    "Credential",
    "Record",
    "Relay",
    "by_name",
    "is_name",
    "listing",
    "load",
    "put",
    "remove",
    "set_status",
    "used",
]

Status: TypeAlias = Literal["active", "disabled"]

RESERVED = ("relay", "local", "scripted")
"""Names that mean something else in a policy or a setting."""
LONGEST_URL = 500
MOST_MODELS = 64

Providers: TypeAlias = Mapping[str, str | None]
"""Those whose wire we speak, with their own address; None where each operator has another."""


@dataclass(frozen=True)
class Relay:
    """A provider under a name. None means the provider's own: its address, its models (the first is the default).

    `region` is where audio is processed, for policies that say where it may be; some providers have an address for it.
    """

    name: str
    provider: str
    base_url: str | None = None
    region: str | None = None
    models: tuple[str, ...] | None = None
    status: Status = "active"


@dataclass(frozen=True)
class Record:
    """A relay, and since when it is so."""

    relay: Relay
    created_by: str
    created_at: datetime
    changed_at: datetime


async def load(tx_system: Transaction, sealer: Sealer) -> tuple[tuple[Relay, ...], tuple[Credential, ...]]:
    """The active relays by name, and their active credentials, ready to be used."""
    found = tuple(_relay(row) for row in await tx_system.execute(_ACTIVE))
    return found, await credentials.opened(tx_system, sealer)


async def listing(tx_system: Transaction) -> list[Record]:
    """Every relay, by name."""
    return [_record(row) for row in await tx_system.execute(text(f"{_SELECT} order by name"))]


async def by_name(tx_system: Transaction, name: str) -> Record:
    """Raises `NotFound`."""
    row = (await tx_system.execute(text(f"{_SELECT} where name = :name"), {"name": name})).one_or_none()
    if row is None:
        raise NotFound("There is no such relay.")
    return _record(row)


async def put(
    tx_system: Transaction,
    relay: Relay,
    *,
    providers: Providers,
    allow_http: bool,
    actor: str,
    request_id: str | None = None,
) -> Record:
    """Makes the relay what is said here, new or not.

    Where a relay with credentials sends them cannot be changed: they were given for that address. Raises `Invalid`,
    `Conflict`.
    """
    check(relay, providers=providers, allow_http=allow_http)
    before = await _locked(tx_system, relay.name)
    if before is not None and (before.provider, before.base_url) != (relay.provider, relay.base_url):
        await _require_no_credentials(tx_system, relay.name, "other provider or address")
    return await _write(tx_system, before, relay, actor=actor, request_id=request_id)


async def set_status(tx_system: Transaction, name: str, status: Status, *, actor: str) -> Record:
    """Puts a relay out of use, with its credentials, or in use again. Raises `NotFound`."""
    before = await _locked(tx_system, name)
    if before is None:
        raise NotFound("There is no such relay.")
    return await _write(tx_system, before, replace(before, status=status), actor=actor, request_id=None)


async def remove(tx_system: Transaction, name: str, *, actor: str, request_id: str | None = None) -> None:
    """Forgets a relay and its retired credentials. Raises `NotFound`; `Conflict` while it has a credential in use."""
    before = await _locked(tx_system, name)
    if before is None:
        raise NotFound("There is no such relay.")
    await _require_no_credentials(tx_system, name, "no relay")
    await credentials.forget(tx_system, name)
    await tx_system.execute(_DELETE, {"name": name})
    await audit.record(
        tx_system,
        actor=actor,
        action="relay.remove",
        object=f"relay/{name}",
        before=vars(before),
        request_id=request_id,
    )


def is_name(name: str) -> bool:
    """Whether a relay may be called so."""
    return re.fullmatch("[a-z][a-z0-9-]{0,62}", name) is not None and name not in RESERVED


def check(relay: Relay, *, providers: Providers, allow_http: bool) -> None:
    """Raises `Invalid`, which names the field."""
    if not is_name(relay.name):
        raise Invalid(
            "A relay's name is 1 to 63 lower-case letters, digits and hyphens, a letter first; "
            f"{', '.join(RESERVED)} are none.",
            param="name",
        )
    if relay.provider not in providers:
        raise Invalid(f"A provider is one of {', '.join(sorted(providers))}.", param="provider")
    if providers[relay.provider] is None:
        for param in ("base_url", "models"):
            if getattr(relay, param) is None:
                raise Invalid(f"`{relay.provider}` has no `{param}` of its own: say which.", param=param)
    if relay.base_url is not None:
        _check_url(relay.base_url, allow_http=allow_http)
    if relay.region is not None and not re.fullmatch("[a-z0-9][a-z0-9-]{0,62}", relay.region):
        raise Invalid("A region is 1 to 63 lower-case letters, digits and hyphens.", param="region")
    if relay.models is not None and not _are_models(relay.models):
        raise Invalid(f"Models are 1 to {MOST_MODELS} different names of up to 200 characters.", param="models")
    if relay.status not in get_args(Status):
        raise Invalid(f"A status is one of {', '.join(get_args(Status))}.", param="status")


def _are_models(models: tuple[str, ...]) -> bool:
    named = all(0 < len(name) <= 200 and name.isprintable() and " " not in name for name in models)
    return named and 0 < len(models) == len(set(models)) <= MOST_MODELS


def _check_url(url: str, *, allow_http: bool) -> None:
    """Private addresses are the operator's own word; that keys go over a network in clear needs a second one."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        httpx.URL(url)  # who is to go there must understand it
    except (ValueError, httpx.InvalidURL):
        host = None
    plain = url.isascii() and url.isprintable() and " " not in url and "\\" not in url and len(url) <= LONGEST_URL
    if not (plain and host and parts.scheme in ("http", "https")) or {"@", "?", "#"} & set(url):
        raise Invalid(
            "An address is https://host[:port][/path], without a user, a query or a fragment.", param="base_url"
        )
    if parts.scheme == "http" and not (allow_http or _is_this_machine(host)):
        raise Invalid(
            "The address must be https. Where keys and audio may go in clear, set STENOGATE_RELAY_ALLOW_HTTP=true.",
            param="base_url",
        )


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _locked(tx: Transaction, name: str) -> Relay | None:
    row = (await tx.execute(_LOCKED, {"name": name})).one_or_none()
    return None if row is None else _relay(row)


async def _write(tx: Transaction, before: Relay | None, after: Relay, *, actor: str, request_id: str | None) -> Record:
    values = {**vars(after), "models": None if after.models is None else list(after.models), "actor": actor}
    record = _record((await tx.execute(_PUT, values)).one())
    await audit.record(
        tx,
        actor=actor,
        action="relay.put",
        object=f"relay/{after.name}",
        before=None if before is None else vars(before),
        after=vars(after),
        request_id=request_id,
    )
    return record


async def _require_no_credentials(tx: Transaction, name: str, wish: str) -> None:
    """A relay in use can be no relay, or another one's, only when its credentials are retired."""
    if await credentials.active(tx, name):
        raise Conflict(f"`{name}` has credentials in use, so there can be {wish}: retire them first, or disable it.")


def _record(row: Row[Any]) -> Record:
    return Record(_relay(row), row.created_by, row.created_at, row.changed_at)


def _relay(row: Row[Any]) -> Relay:
    models = None if row.models is None else tuple(row.models)
    return Relay(row.name, row.provider, row.base_url, row.region, models, row.status)


_COLUMNS = "name, provider, base_url, region, models, status, created_by, created_at, changed_at"
_SELECT = f"select {_COLUMNS} from relays"  # noqa: S608  constants only
_ACTIVE = text(f"{_SELECT} where status = 'active' order by name")
_LOCKED = text(f"{_SELECT} where name = :name for update")
_PUT = text(f"""
    insert into relays (name, provider, base_url, region, models, status, created_by)
    values (:name, :provider, :base_url, :region, cast(:models as text[]), :status, :actor)
    on conflict (name) do update set provider = excluded.provider, base_url = excluded.base_url,
        region = excluded.region, models = excluded.models, status = excluded.status, changed_at = now()
    returning {_COLUMNS}
""")  # noqa: S608
_DELETE = text("delete from relays where name = :name")
