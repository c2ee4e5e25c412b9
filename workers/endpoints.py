"""Where tenants want to be told what happened: their endpoints of webhooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal, TypeAlias
from uuid import UUID

from sqlalchemy import Row, text

from policy import audit
from policy.errors import Conflict, Invalid, NotFound
from policy.identity import Caller
from runtime.database import Transaction
from runtime.ids import show, uuid7
from runtime.sealing import Sealer
from workers import signing

TOPICS = ("job.completed", "job.failed", "job.cancelled")
TEST = "webhook.test"

Status: TypeAlias = Literal["active", "disabled"]
Why: TypeAlias = Literal["asked", "gone", "failing"]

MOST_ENDPOINTS = 32
LONGEST_DESCRIPTION = 200


@dataclass(frozen=True)
class Endpoint:
    """A registered endpoint. `disabled_why`: its owner `asked`, it answered that it is `gone` (HTTP 410), or it took
    nothing for as long as a delivery is tried (`failing`). `failing_since` is None where it took the last delivery."""

    id: UUID
    url: str
    events: tuple[str, ...]
    description: str
    status: Status
    disabled_why: Why | None
    failing_since: datetime | None
    created_at: datetime
    changed_at: datetime


@dataclass(frozen=True)
class Made:
    """An endpoint, and a fresh secret of its, which is told never again."""

    endpoint: Endpoint
    secret: str


async def create(
    tx: Transaction,
    sealer: Sealer,
    caller: Caller,
    url: str,
    *,
    events: Sequence[str] | None = None,
    description: str = "",
    request_id: str | None = None,
) -> Made:
    """A new endpoint, for every topic where none is named. Where the URL leads is the caller's to check.

    Raises `Invalid`; `Conflict` when there are too many; `Misconfigured` where there is nothing to seal with.
    """
    values = {
        "tenant_id": caller.tenant_id,
        "id": uuid7(),
        "url": url,
        "events": _topics(TOPICS if events is None else events),
        "description": _described(description),
        "most": MOST_ENDPOINTS,
    }
    row = (await tx.execute(_INSERT, values)).one_or_none()
    if row is None:
        raise Conflict(f"There are {MOST_ENDPOINTS} webhooks already: delete one first.")
    endpoint = _endpoint(row)
    secret = await signing.add(tx, sealer, caller.tenant_id, endpoint.id)
    await _note(tx, caller, "webhook.create", after=endpoint, request_id=request_id)
    return Made(endpoint, secret)


async def listing(tx: Transaction, tenant_id: UUID) -> list[Endpoint]:
    """Every endpoint, oldest first."""
    rows = await tx.execute(text(f"{_SELECT} order by created_at, id"), {"tenant_id": tenant_id})
    return [_endpoint(row) for row in rows]


async def get(tx: Transaction, tenant_id: UUID, endpoint_id: UUID) -> Endpoint:
    """Raises `NotFound`."""
    row = (await tx.execute(_GET, {"tenant_id": tenant_id, "id": endpoint_id})).one_or_none()
    if row is None:
        raise NotFound("There is no such webhook.")
    return _endpoint(row)


async def change(
    tx: Transaction, caller: Caller, endpoint_id: UUID, changes: Mapping[str, Any], *, request_id: str | None = None
) -> Endpoint:
    """Other values for `url`, `events`, `description`, `status`. What is active again starts afresh.

    Raises `NotFound`, `Invalid`.
    """
    before = await _locked(tx, caller.tenant_id, endpoint_id)
    after = replace(before, **changes)
    values = {
        "tenant_id": caller.tenant_id,
        "id": endpoint_id,
        "url": after.url,
        "events": _topics(after.events),
        "description": _described(after.description),
        "status": after.status,
        "afresh": (before.status, before.url) != (after.status, after.url),
    }
    changed = _endpoint((await tx.execute(_CHANGE, values)).one())
    await _note(tx, caller, "webhook.change", before=before, after=changed, request_id=request_id)
    return changed


async def remove(tx: Transaction, caller: Caller, endpoint_id: UUID, *, request_id: str | None = None) -> None:
    """Forgets the endpoint with its secrets and its log of deliveries. Raises `NotFound`."""
    before = await _locked(tx, caller.tenant_id, endpoint_id)
    await tx.execute(_DELETE, {"tenant_id": caller.tenant_id, "id": endpoint_id})
    await _note(tx, caller, "webhook.delete", before=before, request_id=request_id)


async def rotate(
    tx: Transaction,
    sealer: Sealer,
    caller: Caller,
    endpoint_id: UUID,
    *,
    overlap_s: int = signing.OVERLAP_S,
    request_id: str | None = None,
) -> Made:
    """A fresh secret; the one before signs beside it for so long. Raises `NotFound`, `Misconfigured`."""
    endpoint = await _locked(tx, caller.tenant_id, endpoint_id)
    await signing.retire(tx, caller.tenant_id, endpoint_id, overlap_s)
    secret = await signing.add(tx, sealer, caller.tenant_id, endpoint_id)
    await _note(tx, caller, "webhook.rotate", before=endpoint, after=endpoint, request_id=request_id)
    return Made(endpoint, secret)


async def disable(tx: Transaction, tenant_id: UUID, endpoint_id: UUID, why: Why) -> None:
    """Takes an active endpoint out of use, on our side."""
    before = await _locked(tx, tenant_id, endpoint_id)
    if before.status == "disabled":
        return
    await tx.execute(_DISABLE, {"tenant_id": tenant_id, "id": endpoint_id, "why": why})
    await audit.record(
        tx,
        actor="webhooks",
        action="webhook.disable",
        object=_object(endpoint_id),
        tenant_id=tenant_id,
        before=_snapshot(before),
        after=_snapshot(replace(before, status="disabled", disabled_why=why)),
    )


async def _locked(tx: Transaction, tenant_id: UUID, endpoint_id: UUID) -> Endpoint:
    row = (await tx.execute(_LOCK, {"tenant_id": tenant_id, "id": endpoint_id})).one_or_none()
    if row is None:
        raise NotFound("There is no such webhook.")
    return _endpoint(row)


async def _note(
    tx: Transaction,
    caller: Caller,
    action: str,
    *,
    before: Endpoint | None = None,
    after: Endpoint | None = None,
    request_id: str | None,
) -> None:
    known = after or before
    assert known is not None  # noqa: S101  one of them is given
    await audit.record(
        tx,
        actor=caller.subject,
        action=action,
        object=_object(known.id),
        tenant_id=caller.tenant_id,
        before=None if before is None else _snapshot(before),
        after=None if after is None else _snapshot(after),
        request_id=request_id,
    )


def _topics(asked: Sequence[str]) -> list[str]:
    topics = list(dict.fromkeys(asked))
    if not topics or set(topics) - set(TOPICS):
        raise Invalid(f"Events are one or more of {', '.join(TOPICS)}.", param="events")
    return topics


def _described(description: str) -> str:
    if len(description) > LONGEST_DESCRIPTION or not description.isprintable():
        raise Invalid(f"A description is up to {LONGEST_DESCRIPTION} printable characters.", param="description")
    return description


def _object(endpoint_id: UUID) -> str:
    return f"webhook/{show('hook', endpoint_id)}"


def _snapshot(endpoint: Endpoint) -> dict[str, Any]:
    """Without the URL's query, where some keep a key."""
    names = ("events", "description", "status", "disabled_why")
    return {"url": endpoint.url.partition("?")[0]} | {name: getattr(endpoint, name) for name in names}


def _endpoint(row: Row[Any]) -> Endpoint:
    found = {name: getattr(row, name) for name in Endpoint.__dataclass_fields__}
    return Endpoint(**found | {"events": tuple(row.events)})


_COLUMNS = "id, url, events, description, status, disabled_why, failing_since, created_at, changed_at"
_SELECT = f"select {_COLUMNS} from webhook_endpoints where tenant_id = :tenant_id"  # noqa: S608  constants only
_GET = text(f"{_SELECT} and id = :id")
_LOCK = text(f"{_SELECT} and id = :id for update")
_INSERT = text(f"""
    insert into webhook_endpoints (tenant_id, id, url, events, description)
    select :tenant_id, :id, :url, cast(:events as text[]), :description
    where (select count(*) from webhook_endpoints where tenant_id = :tenant_id) < :most
    returning {_COLUMNS}
""")  # noqa: S608
_CHANGE = text(f"""
    update webhook_endpoints
    set url = :url, events = cast(:events as text[]), description = :description, changed_at = now(),
        disabled_why = case when cast(:status as text) = 'active' then null else coalesce(disabled_why, 'asked') end,
        failures = case when :afresh then 0 else failures end,
        failing_since = case when :afresh then null else failing_since end,
        quiet_until = case when :afresh then null else quiet_until end,
        status = :status
    where tenant_id = :tenant_id and id = :id
    returning {_COLUMNS}
""")  # noqa: S608
_DISABLE = text("""
    update webhook_endpoints set status = 'disabled', disabled_why = :why, changed_at = now()
    where tenant_id = :tenant_id and id = :id
""")
_DELETE = text("delete from webhook_endpoints where tenant_id = :tenant_id and id = :id")
