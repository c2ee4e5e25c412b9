"""Tells endpoints what happened: signed, at least once, over some three days, and never slower for one endpoint because
another is slow.

The database is the queue. An event in the outbox becomes a delivery for each endpoint that asked for it; a delivery is
claimed, tried once, and its outcome written under the claim's token, so that of two who thought they had it one counts.
Any number of processes may do the same at once.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import Row, text

from runtime.database import Database, Transaction
from runtime.egress import Egress, Limits
from runtime.errors import Misconfigured, StenogateError
from runtime.ids import show
from runtime.sealing import Sealer
from runtime.telemetry import WEBHOOK_ATTEMPTS
from workers import endpoints, signing
from workers.deliveries import body_of
from workers.endpoints import TEST

log = structlog.get_logger()

MINUTE_S, HOUR_S = 60, 3600
RETRIES_S = (
    *(5, 5 * MINUTE_S, 30 * MINUTE_S, 2 * HOUR_S, 5 * HOUR_S, 10 * HOUR_S, 14 * HOUR_S, 20 * HOUR_S, 24 * HOUR_S),
)
"""How long after each failed try the next one comes: 75.6 hours in all, as Standard Webhooks proposes."""

JITTER = 0.1
WAIT_MOST_S = 24 * HOUR_S
"""However long an endpoint asks us to wait, it is tried again after this."""

LIMITS = Limits(most_bytes=0, total_s=20.0, connect_s=5.0, idle_s=20.0)
"""Of one try. The answer's body is not read."""

LEASE_S = 60
POLL_S = 0.5
PAUSE_S = 0.02
PARTING_S = 2.0
AT_ONCE = 32
PER_ENDPOINT = 8
BATCH = 200
QUIET_MOST_S = 60
GONE = 410


@dataclass(frozen=True, slots=True)
class _Claimed:
    """A delivery that is this process's to try. `attempt` counts from 1 since it was last asked for."""

    tenant_id: UUID
    id: UUID
    claim: UUID
    attempt: int
    endpoint_id: UUID
    url: str
    event: str
    body: bytes


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of a try. `status` is HTTP's, None where there was no answer; `detail` why."""

    word: str
    status: int | None
    took_ms: int
    detail: str | None = None
    wait_s: float | None = None

    @property
    def delivered(self) -> bool:
        return self.word == "delivered"


class Sender:
    """Sends what is due, so many at once. Made once a process."""

    def __init__(self, database: Database, sealer: Sealer, egress: Egress) -> None:
        self._database = database
        self._sealer = sealer
        self._egress = egress
        self._sending: set[asyncio.Task[None]] = set()
        self._free = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled; then what is under way has a moment to end, and is given back."""
        try:
            while True:
                self._free.clear()
                try:
                    await self.round()
                except Exception as error:  # noqa: BLE001 — a database that is away comes back
                    log.warning("webhooks.failed", error=type(error).__name__)
                await asyncio.sleep(PAUSE_S)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._free.wait(), POLL_S)
        finally:
            if self._sending:
                await asyncio.wait(self._sending, timeout=PARTING_S)
            for task in self._sending:
                task.cancel()
            await asyncio.gather(*self._sending, return_exceptions=True)

    async def round(self) -> int:
        """Makes deliveries of what happened, and begins to send those that are due. Returns how many."""
        async with self._database.across_tenants("events that webhooks wait for") as tx:
            if (await tx.execute(_FAN_OUT, {"batch": BATCH, "test": TEST})).rowcount == BATCH:
                self._free.set()  # there may be more
        free = AT_ONCE - len(self._sending)
        claimed = await self._claim(free) if free > 0 else []
        for each in claimed:
            task = asyncio.create_task(self._send(each))
            self._sending.add(task)
            task.add_done_callback(self._done)
        return len(claimed)

    async def settled(self) -> None:
        """Waits for what is under way."""
        await asyncio.gather(*self._sending, return_exceptions=True)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        self._free.set()

    async def _claim(self, most: int) -> list[_Claimed]:
        named = {"most": most, "per_endpoint": PER_ENDPOINT, "lease_s": LEASE_S}
        async with self._database.across_tenants("deliveries of webhooks that are due") as tx:
            return [_claimed(row) for row in await tx.execute(_CLAIM, named)]

    async def _send(self, claimed: _Claimed) -> None:
        shown = {"delivery": show("dlv", claimed.id), "webhook": show("hook", claimed.endpoint_id)}
        try:
            outcome = await self._try(claimed)
            async with self._database.tenant(claimed.tenant_id) as tx:
                word = await _record(tx, claimed, outcome)
        except asyncio.CancelledError:
            await asyncio.shield(self._give_back(claimed))
            raise
        except Exception as error:  # noqa: BLE001 — the claim runs out, and it is tried again
            log.warning("webhook.abandoned", error=type(error).__name__, **shown)
            return
        WEBHOOK_ATTEMPTS.labels(word).inc()
        told = log.info if outcome.delivered else log.warning
        told("webhook.tried", outcome=outcome.word, status=outcome.status, ms=outcome.took_ms, **shown)

    async def _try(self, claimed: _Claimed) -> _Outcome:
        began = time.monotonic()
        word, status, detail, wait_s = "", None, None, None
        try:
            async with self._database.across_tenants("secrets of a webhook") as tx:
                keys = await signing.valid(tx, self._sealer, claimed.tenant_id, claimed.endpoint_id)
            headers = signing.signed(keys, claimed.event, int(time.time()), claimed.body)
            headers["content-type"] = "application/json"
            async with self._egress.open(
                "POST", claimed.url, limits=LIMITS, headers=headers, content=claimed.body
            ) as answer:
                status, wait_s = answer.status, _wait_s(answer.headers.get("retry-after", ""))
                word = "delivered" if 200 <= status < 300 else "refused"
        except StenogateError as error:
            if status is None:
                word, detail = error.code, None if isinstance(error, Misconfigured) else error.message
        return _Outcome(word, status, int((time.monotonic() - began) * 1000), detail, wait_s)

    async def _give_back(self, claimed: _Claimed) -> None:
        with suppress(Exception):  # then the claim runs out
            async with self._database.tenant(claimed.tenant_id) as tx:
                await tx.execute(_GIVE_BACK, _named(claimed))


@asynccontextmanager
async def delivered(database: Database, sealer: Sealer, egress: Egress) -> AsyncIterator[None]:
    """Sends for as long as the context is open; in processes that work."""
    task = asyncio.create_task(Sender(database, sealer, egress).run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _record(tx: Transaction, claimed: _Claimed, outcome: _Outcome) -> str:
    """Writes down what came of it, and when it is tried again: `delivered`, `retried` or `failed`."""
    named = _named(claimed) | {"endpoint_id": claimed.endpoint_id}
    noted = {name: getattr(outcome, name) for name in ("status", "took_ms", "detail")} | {"outcome": outcome.word}
    await tx.execute(_NOTE, named | noted)
    if outcome.delivered:
        await tx.execute(_END, named | {"ended": "delivered"})
        await tx.execute(_WELL, named)
        return "delivered"
    if outcome.word != Misconfigured.code:  # that is not the endpoint's doing
        await tx.execute(_ILL, named | {"most": QUIET_MOST_S})
    if outcome.status == GONE:
        await tx.execute(_END, named | {"ended": "failed"})
        await endpoints.disable(tx, claimed.tenant_id, claimed.endpoint_id, "gone")
        return "failed"
    if claimed.attempt <= len(RETRIES_S):
        await tx.execute(_LATER, named | {"after_s": _after_s(claimed.attempt, outcome.wait_s)})
        return "retried"
    ended = (await tx.execute(_END, named | {"ended": "failed"})).one_or_none()
    if ended is not None and (await tx.execute(_TOOK_NOTHING, named | {"asked_at": ended.asked_at})).scalar_one():
        await endpoints.disable(tx, claimed.tenant_id, claimed.endpoint_id, "failing")
    return "failed"


def _after_s(attempt: int, wait_s: float | None) -> float:
    planned = RETRIES_S[attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311  no secret
    return max(planned, min(wait_s or 0.0, WAIT_MOST_S))


def _wait_s(said: str) -> float | None:
    """`Retry-After` (RFC 9110, section 10.2.3) in seconds; None where it is missing or makes no sense."""
    if said.isascii() and said.isdigit():
        return float(said[:9])
    try:
        return (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds() if said else None
    except (ValueError, TypeError, OverflowError):
        return None


def _named(claimed: _Claimed) -> dict[str, Any]:
    return {"tenant_id": claimed.tenant_id, "id": claimed.id, "claim": claimed.claim}


def _claimed(row: Row[Any]) -> _Claimed:
    return _Claimed(
        tenant_id=row.tenant_id,
        id=row.id,
        claim=row.claim,
        attempt=row.attempts,
        endpoint_id=row.endpoint_id,
        url=row.url,
        event=show("evt", row.event_id),
        body=body_of(row.topic, row.happened_at, row.payload),
    )


_FAN_OUT = text("""
    with due as (
        select tenant_id, id, topic, endpoint_id, created_at from outbox where dispatched_at is null
        order by created_at limit :batch for update skip locked
    ), fanned as (
        insert into webhook_deliveries (tenant_id, id, endpoint_id, event_id)
        select due.tenant_id, gen_random_uuid(), e.id, due.id
        from due join webhook_endpoints e on e.tenant_id = due.tenant_id
        where e.status = 'active' and e.created_at <= due.created_at
          and (due.endpoint_id is null or due.endpoint_id = e.id)
          and (due.topic = any(e.events) or due.topic = :test)
        on conflict do nothing
    )
    update outbox o set dispatched_at = now() from due where o.tenant_id = due.tenant_id and o.id = due.id
""")
# So many of each endpoint, the longest due first: a slow one's backlog stands in nobody's way.
_CLAIM = text("""
    with chosen as (
        select due.tenant_id, due.id from webhook_endpoints e cross join lateral (
            select d.tenant_id, d.id, d.next_at from webhook_deliveries d
            where d.tenant_id = e.tenant_id and d.endpoint_id = e.id and d.status = 'pending' and d.next_at <= now()
              and (d.claimed_until is null or d.claimed_until < now())
            order by d.next_at, d.id
            limit greatest(0, :per_endpoint - (
                select count(*) from webhook_deliveries c
                where c.tenant_id = e.tenant_id and c.endpoint_id = e.id and c.claimed_until > now()))
            for update skip locked) due
        where e.status = 'active' and (e.quiet_until is null or e.quiet_until <= now())
        order by due.next_at limit :most
    )
    update webhook_deliveries d
    set claim = gen_random_uuid(), claimed_until = now() + make_interval(secs => :lease_s), attempts = d.attempts + 1
    from chosen, webhook_endpoints e, outbox o
    where d.tenant_id = chosen.tenant_id and d.id = chosen.id
      and e.tenant_id = d.tenant_id and e.id = d.endpoint_id and o.tenant_id = d.tenant_id and o.id = d.event_id
    returning d.tenant_id, d.id, d.claim, d.attempts, d.endpoint_id, d.event_id, e.url,
              o.topic, o.created_at as happened_at, o.payload
""")
_OURS = "tenant_id = :tenant_id and id = :id and claim = :claim"
_NOTE = text("""
    insert into webhook_attempts (tenant_id, delivery_id, number, outcome, status, detail, took_ms)
    select :tenant_id, :id, coalesce(max(number), 0) + 1, :outcome, :status, :detail, :took_ms
    from webhook_attempts where tenant_id = :tenant_id and delivery_id = :id
""")
_END = text(f"""
    update webhook_deliveries set status = :ended, ended_at = now(), claim = null, claimed_until = null
    where {_OURS} returning asked_at
""")  # noqa: S608  constants only
_LATER = text(f"""
    update webhook_deliveries
    set next_at = now() + make_interval(secs => :after_s), claim = null, claimed_until = null where {_OURS}
""")  # noqa: S608
_GIVE_BACK = text(f"""
    update webhook_deliveries set attempts = attempts - 1, claim = null, claimed_until = null where {_OURS}
""")  # noqa: S608
_WELL = text("""
    update webhook_endpoints set failures = 0, failing_since = null, quiet_until = null
    where tenant_id = :tenant_id and id = :endpoint_id and failing_since is not null
""")
# An endpoint that fails is left alone for a moment, longer each time: whoever is away is not asked by every delivery.
_ILL = text("""
    update webhook_endpoints
    set failing_since = coalesce(failing_since, now()), failures = least(failures + 1, 100),
        quiet_until = now() + make_interval(secs => least(:most, power(2, least(failures, 10))))
    where tenant_id = :tenant_id and id = :endpoint_id and (quiet_until is null or quiet_until <= now())
""")
_TOOK_NOTHING = text("""
    select e.failing_since is not null and e.failing_since <= (
        select min(a.at) from webhook_attempts a
        where a.tenant_id = :tenant_id and a.delivery_id = :id and a.at >= cast(:asked_at as timestamptz))
    from webhook_endpoints e where e.tenant_id = :tenant_id and e.id = :endpoint_id
""")
