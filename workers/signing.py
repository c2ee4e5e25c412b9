"""How a webhook proves that it is ours: secrets, and signatures by the Standard Webhooks specification.

A secret is told once, when it is made, and sealed from then on; only the system role reads it. A new one takes its
place while the one before signs beside it, so that a receiver can change over without refusing anything.
"""

from __future__ import annotations

import hmac
import secrets
from base64 import b64decode, b64encode
from collections.abc import Iterable
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text

from runtime import sealing
from runtime.database import Transaction
from runtime.ids import uuid7
from runtime.sealing import Sealed, Sealer

BYTES = 32
PREFIX = "whsec_"
OVERLAP_S = 24 * 3600
OVERLAP_MOST_S = 7 * 24 * 3600
AT_ONCE = 4
"""Secrets that sign beside each other, the current one included: the oldest gives way."""


def signed(keys: Iterable[str], event: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers of a webhook (Standard Webhooks, signature scheme v1): HMAC-SHA256 by each of the secrets.
    `timestamp` is in Unix seconds."""
    content = f"{event}.{timestamp}.".encode() + body
    digests = [hmac.digest(b64decode(key.removeprefix(PREFIX)), content, "sha256") for key in keys]
    return {
        "webhook-id": event,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{b64encode(digest).decode()}" for digest in digests),
    }


async def add(tx: Transaction, sealer: Sealer, tenant_id: UUID, endpoint_id: UUID) -> str:
    """A fresh secret, the endpoint's current one from now on. Raises `Misconfigured` where there is nothing to seal
    with."""
    secret = PREFIX + b64encode(secrets.token_bytes(BYTES)).decode()
    fresh = uuid7()
    sealed = await sealing.seal(sealer, secret, _context(tenant_id, endpoint_id, fresh))
    values = {
        "tenant_id": tenant_id,
        "id": fresh,
        "endpoint_id": endpoint_id,
        "sealed": sealed.ciphertext,
        "sealed_key": sealed.sealed_key,
        "master_key": sealed.master_key,
    }
    await tx.execute(_INSERT, values)
    return secret


async def retire(tx: Transaction, tenant_id: UUID, endpoint_id: UUID, overlap_s: int) -> None:
    """The current secret signs for so long yet; make another."""
    named = {"tenant_id": tenant_id, "endpoint_id": endpoint_id}
    await tx.execute(_RETIRE, named | {"overlap_s": min(overlap_s, OVERLAP_MOST_S)})
    await tx.execute(_CROWD_OUT, named | {"most": AT_ONCE - 1})


async def valid(tx_system: Transaction, sealer: Sealer, tenant_id: UUID, endpoint_id: UUID) -> tuple[str, ...]:
    """The secrets that sign now, the current one first. Raises `Unsealable`, `Misconfigured`."""
    rows = (await tx_system.execute(_VALID, {"tenant_id": tenant_id, "endpoint_id": endpoint_id})).all()
    return tuple([await sealing.unseal(sealer, _sealed(row), _context(tenant_id, endpoint_id, row.id)) for row in rows])


async def rewrap(tx_system: Transaction, sealer: Sealer) -> int:
    """Puts every secret's data key under the current master key; returns how many were not. Raises `Unsealable`,
    `Misconfigured`."""
    rows = (await tx_system.execute(_UNDER_ANOTHER, {"current": sealer.current})).all()
    for row in rows:
        sealed = await sealing.rewrap(sealer, _sealed(row))
        values = {"sealed_key": sealed.sealed_key, "master_key": sealed.master_key}
        await tx_system.execute(_REWRAP, values | {"tenant_id": row.tenant_id, "id": row.id})
    return len(rows)


async def forget(tx_system: Transaction) -> int:
    """Erases the secrets whose time is over. Returns how many."""
    return (await tx_system.execute(_FORGET)).rowcount


def _context(tenant_id: UUID, endpoint_id: UUID, secret_id: UUID) -> bytes:
    """What a sealed secret belongs to: in another row it does not open."""
    return f"webhook secret\n{tenant_id}\n{endpoint_id}\n{secret_id}".encode()


def _sealed(row: Row[Any]) -> Sealed:
    return Sealed(bytes(row.sealed), bytes(row.sealed_key), row.master_key)


_INSERT = text("""
    insert into webhook_secrets (tenant_id, id, endpoint_id, sealed, sealed_key, master_key)
    values (:tenant_id, :id, :endpoint_id, :sealed, :sealed_key, :master_key)
""")
_RETIRE = text("""
    update webhook_secrets set expires_at = now() + make_interval(secs => :overlap_s)
    where tenant_id = :tenant_id and endpoint_id = :endpoint_id and expires_at is null
""")
_CROWD_OUT = text("""
    update webhook_secrets set expires_at = now()
    where tenant_id = :tenant_id and endpoint_id = :endpoint_id and expires_at > now() and id not in (
        select id from webhook_secrets
        where tenant_id = :tenant_id and endpoint_id = :endpoint_id and expires_at > now()
        order by id desc limit :most)
""")
_VALID = text("""
    select id, sealed, sealed_key, master_key from webhook_secrets
    where tenant_id = :tenant_id and endpoint_id = :endpoint_id and (expires_at is null or expires_at > now())
    order by id desc
""")
_UNDER_ANOTHER = text("""
    select tenant_id, id, sealed, sealed_key, master_key from webhook_secrets
    where master_key <> :current order by tenant_id, id for update
""")
_REWRAP = text("""
    update webhook_secrets set sealed_key = :sealed_key, master_key = :master_key
    where tenant_id = :tenant_id and id = :id
""")
_FORGET = text("delete from webhook_secrets where expires_at < now()")
