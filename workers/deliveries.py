"""One event to one endpoint: what has become of it, try by try, and sending it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeAlias
from uuid import UUID

from sqlalchemy import Row, text

from policy import audit
from policy.errors import Conflict, Invalid, NotFound
from policy.identity import Caller
from runtime import outbox
from runtime.database import Database, Transaction
from runtime.ids import read, show, uuid7
from workers import endpoints, signing
from workers.endpoints import TEST, Endpoint

Status: TypeAlias = Literal["pending", "delivered", "failed"]

KEPT_DAYS = 30
TRYING_DAYS = 5
"""A delivery has ended within so many days, unless its endpoint is disabled."""

MOST_LIMIT = 200
REPLAY_MOST = 10_000
PURGE_BATCH = 1000


@dataclass(frozen=True)
class Attempt:
    """One try. `outcome`: `delivered`, `refused` (an answer other than 2xx), or the code of what went wrong; `status`
    is HTTP's, None where there was no answer; `detail` says in our words why there was none."""

    number: int
    at: datetime
    outcome: str
    status: int | None
    detail: str | None
    took_ms: int


@dataclass(frozen=True)
class Delivery:
    """An event on its way to an endpoint. `attempts` counts the tries since it was last asked for; `next_at` is None
    unless it is pending; `last` is the last try, if there was any."""

    id: UUID
    endpoint_id: UUID
    event_id: UUID
    topic: str
    status: Status
    attempts: int
    created_at: datetime
    next_at: datetime | None
    ended_at: datetime | None
    last: Attempt | None


@dataclass(frozen=True)
class Told:
    """A delivery with all of its tries, and the body that was sent."""

    delivery: Delivery
    tries: tuple[Attempt, ...]
    body: Mapping[str, Any]


def body_of(topic: str, created_at: datetime, payload: str) -> bytes:
    """What is sent: the same to the byte in every try."""
    head = json.dumps({"type": topic, "timestamp": created_at.isoformat()}, separators=(",", ":"))
    return f'{head[:-1]},"data":{payload}}}'.encode()


async def listing(
    tx: Transaction,
    tenant_id: UUID,
    endpoint_id: UUID,
    *,
    cursor: str | None = None,
    limit: int = 50,
    status: Status | None = None,
) -> tuple[list[Delivery], str | None]:
    """A page, newest first, and the cursor of the next one, if there is one. Raises `Invalid`, `NotFound`."""
    await endpoints.get(tx, tenant_id, endpoint_id)
    last = read("dlv", cursor) if cursor else None
    if cursor and last is None:
        raise Invalid("This cursor was not given by a listing of deliveries.", param="cursor")
    limit = min(limit, MOST_LIMIT)
    named = {"tenant_id": tenant_id, "endpoint_id": endpoint_id, "status": status, "last": last, "limit": limit + 1}
    found = [_delivery(row) for row in await tx.execute(_LISTING, named)]
    page = found[:limit]
    return page, show("dlv", page[-1].id) if len(found) > limit else None


async def get(tx: Transaction, tenant_id: UUID, endpoint_id: UUID, delivery_id: UUID) -> Told:
    """Raises `NotFound`."""
    named = {"tenant_id": tenant_id, "endpoint_id": endpoint_id, "id": delivery_id}
    row = (await tx.execute(_GET, named)).one_or_none()
    if row is None:
        raise NotFound("There is no such delivery.")
    tries = [Attempt(**each._mapping) for each in await tx.execute(_TRIES, named)]
    return Told(_delivery(row), tuple(tries), json.loads(body_of(row.topic, row.happened_at, row.payload)))


async def replay(
    tx: Transaction, caller: Caller, endpoint_id: UUID, delivery_id: UUID, *, request_id: str | None = None
) -> Delivery:
    """Sends it again, now, and as often as a fresh one, whatever has become of it. Raises `NotFound`; `Conflict` where
    the endpoint is disabled."""
    _require_active(await endpoints.get(tx, caller.tenant_id, endpoint_id))
    named = {"tenant_id": caller.tenant_id, "endpoint_id": endpoint_id, "id": delivery_id}
    if (await tx.execute(_AGAIN, named)).rowcount != 1:
        raise NotFound("There is no such delivery.")
    await _note(tx, caller, endpoint_id, {"delivery": show("dlv", delivery_id)}, request_id)
    return (await get(tx, caller.tenant_id, endpoint_id, delivery_id)).delivery


async def replay_since(
    tx: Transaction, caller: Caller, endpoint_id: UUID, since: datetime, *, request_id: str | None = None
) -> int:
    """Sends every event from `since` on that the endpoint has asked for and not taken, also what happened while it was
    disabled: the oldest ten thousand. Returns how many. Raises `NotFound`, `Conflict`."""
    endpoint = await endpoints.get(tx, caller.tenant_id, endpoint_id)
    _require_active(endpoint)
    named = {"tenant_id": caller.tenant_id, "endpoint_id": endpoint_id, "events": list(endpoint.events)}
    sent = (await tx.execute(_MISSED, named | {"since": since, "most": REPLAY_MOST})).rowcount
    await _note(tx, caller, endpoint_id, {"since": since.isoformat(), "deliveries": sent}, request_id)
    return sent


async def test(tx: Transaction, caller: Caller, endpoint_id: UUID) -> UUID:
    """Sends an event that means nothing; returns its id. Raises `NotFound`, `Conflict`."""
    _require_active(await endpoints.get(tx, caller.tenant_id, endpoint_id))
    told = {"object": "webhook", "id": show("hook", endpoint_id)}
    return await outbox.put(tx, caller.tenant_id, TEST, uuid7(), 1, told, endpoint_id=endpoint_id)


async def backlog_s(tx_system: Transaction) -> float:
    """For how many seconds the oldest due delivery to an active endpoint waits, of all tenants."""
    return float((await tx_system.execute(_BACKLOG)).scalar_one())


async def purge(database: Database) -> int:
    """Removes events that are older than 30 days, with the log of their deliveries, and secrets whose time is over.
    Returns how many events."""
    async with database.across_tenants("old events of webhooks") as tx:
        await signing.forget(tx)
        return (await tx.execute(_PURGE, {"days": KEPT_DAYS, "trying": TRYING_DAYS, "batch": PURGE_BATCH})).rowcount


def _require_active(endpoint: Endpoint) -> None:
    if endpoint.status != "active":
        raise Conflict("The webhook is disabled: set its `status` to `active` first.")


async def _note(
    tx: Transaction, caller: Caller, endpoint_id: UUID, after: Mapping[str, Any], request_id: str | None
) -> None:
    await audit.record(
        tx,
        actor=caller.subject,
        action="webhook.replay",
        object=f"webhook/{show('hook', endpoint_id)}",
        tenant_id=caller.tenant_id,
        after=after,
        request_id=request_id,
    )


def _delivery(row: Row[Any]) -> Delivery:
    last = None
    if row.number is not None:
        last = Attempt(row.number, row.at, row.outcome, row.http_status, row.detail, row.took_ms)
    return Delivery(
        id=row.id,
        endpoint_id=row.endpoint_id,
        event_id=row.event_id,
        topic=row.topic,
        status=row.status,
        attempts=row.attempts,
        created_at=row.created_at,
        next_at=row.next_at if row.status == "pending" else None,
        ended_at=row.ended_at,
        last=last,
    )


_SELECT = """
    select d.id, d.endpoint_id, d.event_id, o.topic, d.status, d.attempts, d.created_at, d.next_at, d.ended_at,
           o.created_at as happened_at, o.payload,
           a.number, a.at, a.outcome, a.status as http_status, a.detail, a.took_ms
    from webhook_deliveries d
    join outbox o on o.tenant_id = d.tenant_id and o.id = d.event_id
    left join lateral (
        select * from webhook_attempts a where a.tenant_id = d.tenant_id and a.delivery_id = d.id
        order by a.number desc limit 1) a on true
    where d.tenant_id = :tenant_id and d.endpoint_id = :endpoint_id
"""
_GET = text(f"{_SELECT} and d.id = :id")
_LISTING = text(f"""
    {_SELECT} and (cast(:status as text) is null or d.status = :status)
      and (cast(:last as uuid) is null or (d.created_at, d.id) < (
          select created_at, id from webhook_deliveries
          where tenant_id = :tenant_id and endpoint_id = :endpoint_id and id = cast(:last as uuid)))
    order by d.created_at desc, d.id desc limit :limit
""")  # noqa: S608  constants only
_TRIES = text("""
    select number, at, outcome, status, detail, took_ms from webhook_attempts
    where tenant_id = :tenant_id and delivery_id = :id order by number
""")
_AGAIN = text("""
    update webhook_deliveries set status = 'pending', attempts = 0, next_at = now(), asked_at = now(), ended_at = null
    where tenant_id = :tenant_id and endpoint_id = :endpoint_id and id = :id
""")
_MISSED = text("""
    insert into webhook_deliveries as d (tenant_id, id, endpoint_id, event_id)
    select tenant_id, gen_random_uuid(), cast(:endpoint_id as uuid), id from outbox
    where tenant_id = :tenant_id and created_at >= :since and topic = any(cast(:events as text[]))
      and (endpoint_id is null or endpoint_id = :endpoint_id)
      and not exists (
          select 1 from webhook_deliveries t where t.tenant_id = outbox.tenant_id and t.event_id = outbox.id
            and t.endpoint_id = :endpoint_id and t.status <> 'failed')
    order by created_at limit :most
    on conflict (tenant_id, endpoint_id, event_id) do update
        set status = 'pending', attempts = 0, next_at = now(), asked_at = now(), ended_at = null
        where d.status = 'failed'
""")
_BACKLOG = text("""
    select coalesce(extract(epoch from now() - min(d.next_at)), 0)
    from webhook_deliveries d join webhook_endpoints e on e.tenant_id = d.tenant_id and e.id = d.endpoint_id
    where d.status = 'pending' and d.next_at <= now() and e.status = 'active'
""")
_PURGE = text("""
    delete from outbox where (tenant_id, id) in (
        select tenant_id, id from outbox
        where created_at < now() - make_interval(days => :days) and dispatched_at is not null
          and not exists (select 1 from webhook_deliveries d
                          where d.tenant_id = outbox.tenant_id and d.event_id = outbox.id and d.status = 'pending'
                            and d.asked_at > now() - make_interval(days => :trying))
        order by created_at limit :batch)
""")
