"""The versions of a tenant's policy: what was, is and will be in force, and what one changes of another."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeAlias
from uuid import UUID

from sqlalchemy import Row, text

from policy import audit, policies
from policy.errors import Conflict, Invalid, NotFound
from policy.policies import Policy, PolicyBody
from runtime.database import Transaction

Standing: TypeAlias = Literal["scheduled", "in_force", "past", "withdrawn"]

MAX_LIMIT = 200


@dataclass(frozen=True)
class Version:
    """One version. `withdrawn`: taken back, or replaced, before it took effect, so it has no times. `effective_until`
    None: until another one is put."""

    version: int
    standing: Standing
    effective_from: datetime | None
    effective_until: datetime | None
    created_by: str
    created_at: datetime
    body: PolicyBody


async def listing(
    tx: Transaction, tenant_id: UUID, *, before: int | None = None, limit: int = 50
) -> tuple[list[Version], int | None]:
    """A page, newest first, and the version before which the next one begins, if there is one. Raises `Invalid`."""
    if not 1 <= limit <= MAX_LIMIT:
        raise Invalid(f"limit is from 1 to {MAX_LIMIT}.", param="limit")
    values = {"tenant_id": tenant_id, "before": before, "limit": limit + 1}
    found = [_version(row) for row in await tx.execute(_LISTING, values)]
    return found[:limit], found[limit - 1].version if len(found) > limit else None


async def get(tx: Transaction, tenant_id: UUID, version: int | None = None) -> Version:
    """One of them; None: the one in force. Raises `NotFound`."""
    number = (await policies.current(tx, tenant_id)).version if version is None else version
    row = (await tx.execute(_GET, {"tenant_id": tenant_id, "version": number})).one_or_none()
    if row is None:
        raise NotFound("The tenant has no such policy.")
    return _version(row)


async def rollback(
    tx_system: Transaction,
    tenant_id: UUID,
    version: int,
    *,
    actor: str,
    effective_from: datetime | None = None,
    newest: int | None = None,
    request_id: str | None = None,
) -> Policy:
    """Puts an earlier version's content in force again, as a new version. Raises as `policies.put` does."""
    former = await policies.at_version(tx_system, tenant_id, version)
    return await policies.put(
        tx_system,
        tenant_id,
        former.body,
        actor=actor,
        effective_from=effective_from,
        newest=newest,
        action="policy.rollback",
        request_id=request_id,
    )


async def withdraw(
    tx_system: Transaction, tenant_id: UUID, version: int, *, actor: str, request_id: str | None = None
) -> None:
    """Takes a scheduled version back: the one before it stays in force. Raises `NotFound`; `Conflict` for one that is
    not scheduled any more."""
    slug = await policies.locked(tx_system, tenant_id)
    scheduled = await get(tx_system, tenant_id, version)
    if scheduled.standing != "scheduled" or scheduled.effective_from is None:
        raise Conflict(f"Version {version} is {scheduled.standing.replace('_', ' ')}; roll back to another instead.")
    span = {"at": scheduled.effective_from, "until": scheduled.effective_until}
    await tx_system.execute(_EMPTY, {"tenant_id": tenant_id, "version": version})
    await tx_system.execute(_PROLONG, {"tenant_id": tenant_id, **span})
    await audit.record(
        tx_system,
        actor=actor,
        action="policy.withdraw",
        object=f"policy/{slug}/{version}",
        tenant_id=tenant_id,
        before={"effective_from": scheduled.effective_from.isoformat(), **scheduled.body.model_dump(mode="json")},
        request_id=request_id,
    )


def difference(before: PolicyBody, after: PolicyBody) -> dict[str, tuple[Any, Any]]:
    """The fields in which they differ, each as JSON has it before and after."""
    one, other = before.model_dump(mode="json"), after.model_dump(mode="json")
    return {name: (one[name], other[name]) for name in one if one[name] != other[name]}


def _version(row: Row[Any]) -> Version:
    return Version(**{**row._mapping, "body": PolicyBody.model_validate_json(row.body)})


_SELECT = """
    select version, cast(body as text) as body, created_by, created_at,
           lower(effective) as effective_from, upper(effective) as effective_until,
           case when isempty(effective) then 'withdrawn' when effective @> clock then 'in_force'
                when lower(effective) > clock then 'scheduled' else 'past' end as standing
    from policies,
         (select greatest(statement_timestamp(), max(created_at)) as clock
          from policies where tenant_id = :tenant_id) as clocks
    where tenant_id = :tenant_id
"""
_GET = text(f"{_SELECT} and version = :version")
_LISTING = text(f"""
    {_SELECT} and (cast(:before as int) is null or version < cast(:before as int)) order by version desc limit :limit
""")
_EMPTY = text("update policies set effective = 'empty' where tenant_id = :tenant_id and version = :version")
_PROLONG = text("""
    update policies set effective = tstzrange(lower(effective), cast(:until as timestamptz))
    where tenant_id = :tenant_id and upper(effective) = :at
""")
