"""Keys to the accounts of relays, of one tenant or of all who have none of their own.

A key is sealed the moment it comes in, and from then on only its beginning is told. A new one takes the old one's place
in the same transaction; what was retired can never be opened again, for its data key is gone. Only the system role
reads this.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, TypeAlias
from uuid import UUID

import structlog
from sqlalchemy import Row, text

from policy import audit
from policy.errors import Invalid, NotFound
from runtime import sealing
from runtime.database import Transaction
from runtime.errors import Misconfigured
from runtime.ids import show, uuid7
from runtime.sealing import Sealed, Sealer

log = structlog.get_logger()

_UNREADABLE: set[UUID] = set()
"""Credentials of which this process has said that they do not open: they are tried every few seconds."""

Status: TypeAlias = Literal["active", "retired"]

SHORTEST, LONGEST = 8, 1024
PREFIX_MOST = 7
"""Characters of a key that are shown: never more than a quarter of it."""


@dataclass(frozen=True, slots=True)
class Credential:
    """A key ready to be used for a relay, on behalf of one tenant, or (None) of all who have none of their own."""

    id: UUID
    relay: str
    tenant_id: UUID | None
    prefix: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Record:
    """What is told of a credential. `tenant` is the slug; `master_key` the id of what its data key is sealed with."""

    id: UUID
    relay: str
    tenant: str | None
    prefix: str
    master_key: str
    status: Status
    created_by: str
    created_at: datetime
    retired_at: datetime | None
    last_used_at: datetime | None


async def opened(tx_system: Transaction, sealer: Sealer) -> tuple[Credential, ...]:
    """The active credentials of active relays. One that does not open is logged, once, and left out."""
    rows = (await tx_system.execute(_OPENABLE)).all()
    return tuple([credential for row in rows if (credential := await _opened(sealer, row)) is not None])


async def used(tx_system: Transaction, ids: Collection[UUID]) -> None:
    """Notes that these served a request just now."""
    await tx_system.execute(_USED, {"ids": list(ids)})


async def listing(tx_system: Transaction, relay: str | None = None) -> list[Record]:
    """Every credential, or every one of a relay, retired ones too; newest first within a relay."""
    return [_record(row) for row in await tx_system.execute(_LISTING, {"relay": relay})]


async def active(tx_system: Transaction, relay: str) -> bool:
    """Whether a relay has a credential in use."""
    return bool((await tx_system.execute(_ANY_ACTIVE, {"relay": relay})).scalar_one())


async def add(
    tx_system: Transaction,
    sealer: Sealer,
    relay: str,
    key: str,
    *,
    tenant_id: UUID | None = None,
    actor: str,
    request_id: str | None = None,
) -> Record:
    """Seals a key and puts it in use, in the place of the one before it, which is retired. Tells never again what it
    is. Raises `Invalid`, `NotFound` (no such relay), `Misconfigured` (nothing to seal with)."""
    if not (SHORTEST <= len(key) <= LONGEST and key.isascii() and key.isprintable() and " " not in key):
        raise Invalid(f"A key is {SHORTEST} to {LONGEST} ASCII characters without spaces.", param="key")
    fresh = uuid7()
    sealed = await sealing.seal(sealer, key, _context(relay, tenant_id, fresh))
    if (await tx_system.execute(_LOCK_RELAY, {"relay": relay})).one_or_none() is None:
        raise NotFound("There is no such relay.")
    former = (await tx_system.execute(_FORMER, {"relay": relay, "tenant_id": tenant_id})).one_or_none()
    if former is not None:
        await _retire(tx_system, former.id, actor=actor, request_id=request_id)
    values = {
        "id": fresh,
        "relay": relay,
        "tenant_id": tenant_id,
        "prefix": prefix_of(key),
        "sealed": sealed.ciphertext,
        "sealed_key": sealed.sealed_key,
        "master_key": sealed.master_key,
        "actor": actor,
    }
    await tx_system.execute(_INSERT, values)
    record = await _by_id(tx_system, fresh)
    await audit.record(
        tx_system,
        actor=actor,
        action="relay_credential.add",
        object=_object(record),
        tenant_id=tenant_id,
        after=_snapshot(record),
        request_id=request_id,
    )
    return record


async def retire(
    tx_system: Transaction, credential_id: UUID, *, relay: str | None = None, actor: str, request_id: str | None = None
) -> Record:
    """Takes a credential (of this relay, if named) out of use for good. Raises `NotFound`."""
    row = (await tx_system.execute(_LOCK_ACTIVE, {"id": credential_id, "relay": relay})).one_or_none()
    if row is None:
        raise NotFound("There is no such credential, or it is retired.")
    return await _retire(tx_system, credential_id, actor=actor, request_id=request_id)


async def rewrap(tx_system: Transaction, sealer: Sealer, *, actor: str) -> int:
    """Puts every data key under the current master key, so that the former one can go; returns how many were not.
    All or none. Raises `Unsealable` (its former master key is missing), `Misconfigured`."""
    rows = (await tx_system.execute(_UNDER_ANOTHER, {"current": sealer.current})).all()
    for row in rows:
        sealed = await sealing.rewrap(sealer, _sealed(row))
        values = {"id": row.id, "sealed_key": sealed.sealed_key, "master_key": sealed.master_key}
        await tx_system.execute(_REWRAP, values)
        await audit.record(
            tx_system,
            actor=actor,
            action="relay_credential.rewrap",
            object=f"relay/{row.relay}/{show('cred', row.id)}",
            tenant_id=row.tenant_id,
            before={"master_key": row.master_key},
            after={"master_key": sealed.master_key},
        )
    return len(rows)


async def forget(tx_system: Transaction, relay: str) -> None:
    """Deletes the retired credentials of a relay that is being removed."""
    await tx_system.execute(_FORGET, {"relay": relay})


def prefix_of(key: str) -> str:
    """All of a key that people may see."""
    return f"{key[: min(PREFIX_MOST, len(key) // 4)]}…"


async def _opened(sealer: Sealer, row: Row[Any]) -> Credential | None:
    try:
        key = await sealing.unseal(sealer, _sealed(row), _context(row.relay, row.tenant_id, row.id))
    except Misconfigured as error:
        if row.id in _UNREADABLE:
            return None
        _UNREADABLE.add(row.id)
        shown = show("cred", row.id)
        log.warning(
            "relay_credential.unreadable", credential=shown, prefix=row.prefix, relay=row.relay, why=error.message
        )
        return None
    return Credential(row.id, row.relay, row.tenant_id, row.prefix, key)


async def _retire(tx: Transaction, credential_id: UUID, *, actor: str, request_id: str | None) -> Record:
    tenant_id = (await tx.execute(_RETIRE, {"id": credential_id})).scalar_one()
    record = await _by_id(tx, credential_id)
    await audit.record(
        tx,
        actor=actor,
        action="relay_credential.retire",
        object=_object(record),
        tenant_id=tenant_id,
        before=_snapshot(record) | {"status": "active"},
        after=_snapshot(record),
        request_id=request_id,
    )
    return record


async def _by_id(tx: Transaction, credential_id: UUID) -> Record:
    return _record((await tx.execute(_BY_ID, {"id": credential_id})).one())


def _context(relay: str, tenant_id: UUID | None, credential_id: UUID) -> bytes:
    """What a sealed key belongs to: in another row it does not open."""
    return f"relay credential\n{relay}\n{tenant_id or 'shared'}\n{credential_id}".encode()


def _sealed(row: Row[Any]) -> Sealed:
    return Sealed(bytes(row.sealed), bytes(row.sealed_key), row.master_key)


def _object(record: Record) -> str:
    return f"relay/{record.relay}/{show('cred', record.id)}"


def _snapshot(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in ("relay", "tenant", "prefix", "master_key", "status")}


def _record(row: Row[Any]) -> Record:
    return Record(**{name: getattr(row, name) for name in Record.__dataclass_fields__})


_SELECT = """
    select c.id, c.relay, t.slug as tenant, c.prefix, c.master_key, c.status, c.created_by, c.created_at, c.retired_at,
           c.last_used_at
    from relay_credentials c left join tenants t on t.id = c.tenant_id
"""
_BY_ID = text(f"{_SELECT} where c.id = :id")
_LISTING = text(f"{_SELECT} where cast(:relay as text) is null or c.relay = :relay order by c.relay, c.id desc")
_OPENABLE = text("""
    select c.id, c.relay, c.tenant_id, c.prefix, c.sealed, c.sealed_key, c.master_key
    from relay_credentials c join relays r on r.name = c.relay
    where c.status = 'active' and r.status = 'active' order by c.id
""")
_ANY_ACTIVE = text("select exists (select from relay_credentials where relay = :relay and status = 'active')")
_LOCK_RELAY = text("select name from relays where name = :relay for update")  # one change after the other
_FORMER = text("""
    select id from relay_credentials
    where relay = :relay and tenant_id is not distinct from cast(:tenant_id as uuid) and status = 'active' for update
""")
_LOCK_ACTIVE = text("""
    select id from relay_credentials
    where id = :id and (cast(:relay as text) is null or relay = :relay) and status = 'active' for update
""")
_INSERT = text("""
    insert into relay_credentials (id, relay, tenant_id, prefix, sealed, sealed_key, master_key, created_by)
    values (:id, :relay, :tenant_id, :prefix, :sealed, :sealed_key, :master_key, :actor)
""")
_RETIRE = text("""
    update relay_credentials set status = 'retired', retired_at = now(), sealed_key = '' where id = :id
    returning tenant_id
""")
_UNDER_ANOTHER = text("""
    select id, relay, tenant_id, sealed, sealed_key, master_key from relay_credentials
    where status = 'active' and master_key <> :current order by id for update
""")
_REWRAP = text("update relay_credentials set sealed_key = :sealed_key, master_key = :master_key where id = :id")
_USED = text("update relay_credentials set last_used_at = now() where id = any(cast(:ids as uuid[]))")
_FORGET = text("delete from relay_credentials where relay = :relay and status = 'retired'")
