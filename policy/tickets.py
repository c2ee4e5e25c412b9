"""Tickets: a caller's right to open one session soon, for clients that should hold no token.

A ticket is 256 random bits, of which only the SHA-256 is kept. Whoever deletes the row has redeemed it, so it works
once, however many gateways there are.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import text

from policy.errors import TokenInvalid
from policy.identity import Caller
from runtime.database import Database, Transaction

LONGEST_S = 60
_PREFIX = "ticket_"
_RANDOM_BYTES = 32
_MAX_LENGTH = 128


@dataclass(frozen=True)
class Ticket:
    """A fresh ticket. `value` is told once and kept nowhere."""

    value: str
    expires_at: datetime


@dataclass(frozen=True)
class Redeemed:
    """Whom a ticket speaks for, and the fields of `start` it was made with, if any. `caller` stands and falls with the
    token that the ticket was made from."""

    caller: Caller
    start: Mapping[str, Any]


async def issue(
    tx: Transaction, caller: Caller, *, scopes: Collection[str], ttl_s: int, start: Mapping[str, Any]
) -> Ticket:
    """A ticket for the caller's own tenant. Raises `ScopeMissing` for a scope that the caller does not hold."""
    for scope in scopes:
        caller.require(scope)
    value = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    values = {
        "tenant_id": caller.tenant_id,
        "digest": _digest(value),
        "subject": caller.subject,
        "scopes": sorted(set(scopes)),
        "token_id": caller.token_id,
        "token_expires_at": caller.expires_at,
        "start": json.dumps(start) if start else None,  # ASCII: nothing in it that Postgres could not hold
        "ttl_s": min(ttl_s, LONGEST_S),
    }
    return Ticket(value, (await tx.execute(_INSERT, values)).scalar_one())


async def redeem(tx_system: Transaction, value: str) -> Redeemed:
    """Uses the ticket up. Raises `TokenInvalid` for one that is unknown, used or late.

    Says nothing of the tenant's standing and the token's: that is `Authenticator.recheck`.
    """
    found = None
    if len(value) <= _MAX_LENGTH and value.isascii():
        found = (await tx_system.execute(_REDEEM, {"digest": _digest(value)})).one_or_none()
    if found is None:
        raise TokenInvalid("The ticket was not accepted. It works once, and not for long.")
    caller = Caller(
        found.tenant_id, found.slug, found.subject, frozenset(found.scopes), found.token_id, found.token_expires_at
    )
    return Redeemed(caller, json.loads(found.start) if found.start else {})


async def purge(database: Database) -> int:
    """Removes the tickets that nobody redeemed in time. Returns how many."""
    async with database.across_tenants("tickets that are late") as tx:
        return (await tx.execute(_PURGE)).rowcount


def _digest(value: str) -> bytes:
    return hashlib.sha256(value.encode()).digest()


_INSERT = text("""
    insert into tickets (tenant_id, digest, subject, scopes, token_id, token_expires_at, start, expires_at)
    values (:tenant_id, :digest, :subject, cast(:scopes as text[]), :token_id, :token_expires_at, :start,
            now() + make_interval(secs => :ttl_s))
    returning expires_at
""")
_REDEEM = text("""
    delete from tickets t using tenants n
    where t.digest = :digest and t.expires_at > now() and n.id = t.tenant_id
    returning t.tenant_id, n.slug, t.subject, t.scopes, t.token_id, t.token_expires_at, t.start
""")
_PURGE = text("delete from tickets where expires_at <= now()")
