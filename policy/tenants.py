"""Tenants: the customer accounts. Everything stored or billed belongs to exactly one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args
from uuid import UUID

from sqlalchemy import Row, text

from policy import audit, policies
from policy.errors import Conflict, Invalid, NotFound
from policy.policies import PolicyBody
from runtime.database import Transaction
from runtime.ids import uuid7

Status: TypeAlias = Literal["active", "suspended", "closed"]

_SLUG = re.compile("[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True)
class Tenant:
    """One account. `currency` is an ISO 4217 code, `billing_tz` an IANA time zone: its days and months are billed."""

    id: UUID
    slug: str
    name: str
    status: Status
    currency: str
    billing_tz: str


async def create(
    tx_system: Transaction,
    *,
    slug: str,
    name: str | None = None,
    currency: str = "USD",
    billing_tz: str = "UTC",
    actor: str,
) -> Tenant:
    """A new, active tenant with version 1 of the default policy. Raises `Invalid`; `Conflict` if the slug is taken."""
    if not _SLUG.fullmatch(slug):
        raise Invalid("A slug is 1 to 63 lower-case letters, digits and hyphens.", param="slug")
    if not re.fullmatch("[A-Z]{3}", currency):
        raise Invalid("A currency is an ISO 4217 code such as USD.", param="currency")
    await _require_time_zone(tx_system, billing_tz)
    tenant = Tenant(uuid7(), slug, name or slug, "active", currency, billing_tz)
    created = await tx_system.execute(_INSERT, _snapshot(tenant))
    if created.one_or_none() is None:
        raise Conflict("There is a tenant with this slug already.", param="slug")
    await audit.record(
        tx_system,
        actor=actor,
        action="tenant.create",
        object=f"tenant/{slug}",
        tenant_id=tenant.id,
        after=_snapshot(tenant),
    )
    await policies.put(tx_system, tenant.id, PolicyBody(), actor=actor)
    return tenant


async def by_slug(tx_system: Transaction, slug: str) -> Tenant:
    """Raises `NotFound`, also for what no slug is: Postgres would not take all of it."""
    query = text(f"{_SELECT} where slug = :slug")
    row = (await tx_system.execute(query, {"slug": slug})).one_or_none() if _SLUG.fullmatch(slug) else None
    return _found(row)


async def by_id(tx: Transaction, tenant_id: UUID) -> Tenant:
    """Raises `NotFound` (also for another tenant than the bound one)."""
    return _found((await tx.execute(_BY_ID, {"id": tenant_id})).one_or_none())


async def listing(tx_system: Transaction) -> list[Tenant]:
    """Every tenant, by slug."""
    return [_tenant(row) for row in await tx_system.execute(text(f"{_SELECT} order by slug"))]


async def set_status(tx_system: Transaction, tenant_id: UUID, status: Status, *, actor: str) -> Tenant:
    """Suspends, closes or reactivates; effective for running streams within seconds. Raises `Invalid`, `NotFound`."""
    if status not in get_args(Status):
        raise Invalid(f"A status is one of {', '.join(get_args(Status))}.", param="status")
    locked = text(f"{_SELECT} where id = :id for update")
    before = _found((await tx_system.execute(locked, {"id": tenant_id})).one_or_none())
    after = _found((await tx_system.execute(_SET_STATUS, {"id": tenant_id, "status": status})).one_or_none())
    await audit.record(
        tx_system,
        actor=actor,
        action="tenant.set_status",
        object=f"tenant/{after.slug}",
        tenant_id=tenant_id,
        before=_snapshot(before),
        after=_snapshot(after),
    )
    return after


async def _require_time_zone(tx: Transaction, name: str) -> None:
    """The zone must be one that Postgres knows, as it cuts the billing days."""
    known = await tx.execute(text("select 1 from pg_timezone_names where name = :name"), {"name": name})
    if known.one_or_none() is None:
        raise Invalid("A time zone is an IANA name such as Europe/Vienna.", param="billing_tz")


def _found(row: Row[Any] | None) -> Tenant:
    if row is None:
        raise NotFound("There is no such tenant.")
    return _tenant(row)


def _tenant(row: Row[Any]) -> Tenant:
    return Tenant(row.id, row.slug, row.name, row.status, row.currency, row.billing_tz)


def _snapshot(tenant: Tenant) -> dict[str, Any]:
    return {**vars(tenant)}


_COLUMNS = "id, slug, name, status, currency, billing_tz"
_SELECT = f"select {_COLUMNS} from tenants"  # noqa: S608  constants only
_BY_ID = text(f"{_SELECT} where id = :id")
_INSERT = text(f"""
    insert into tenants ({_COLUMNS}) values (:id, :slug, :name, :status, :currency, :billing_tz)
    on conflict (slug) do nothing returning id
""")  # noqa: S608
_SET_STATUS = text(f"update tenants set status = :status where id = :id returning {_COLUMNS}")  # noqa: S608
