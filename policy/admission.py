"""Admission: the one way to a session, and what becomes of it however its holder leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from policy import budget, identity, policies, quota, sessions, steps, tenants
from policy.errors import Conflict, NoPrice, PolicyError, TakenOver, TenantSuspended, TokenRevoked
from policy.identity import Caller
from policy.lease import Extra, Lease, Receipt, hold_until
from policy.outage import ledger_reachable
from policy.policies import Policy
from policy.pricing import Price, price_for
from policy.resolve import Candidate, Decision, Demand, Refusal
from policy.sessions import Kind, Outcome, Session
from policy.steps import Prices, Unusual
from runtime.beats import beating
from runtime.coordination import Coordination
from runtime.database import Database, Transaction
from runtime.errors import StenogateError
from runtime.ids import uuid7

__all__ = ["Admission", "Extra", "Lease", "Outcome", "Receipt", "reap"]

log = structlog.get_logger(__name__)

FIRST_BLOCKS = 2
CLOSE_TIMEOUT_S = 10.0
HEARTBEAT_S = 60.0
KNOWN_MOST = 4096


class Admission:
    """Admits within the tenant's limits and budget. `block_ms` is how much audio a stream is metered by."""

    def __init__(self, database: Database, coordination: Coordination, *, block_ms: int = 15_000):
        self._database = database
        self._coordination = coordination
        self._block_ms = block_ms
        self._closing: set[asyncio.Task[None]] = set()
        self._known: dict[tuple[UUID, tuple[Candidate, ...]], _Known] = {}

    @asynccontextmanager
    async def admit(self, caller: Caller, demand: Demand, policy: Policy, decision: Decision) -> AsyncIterator[Lease]:
        """A new session: a seat for each channel while inside, its row, and a hold for `demand.audio_ms`, or for two
        blocks where the length is not known. A candidate without a price is dropped from the lease's decision.

        Whoever leaves without having settled with an outcome, or detached, leaves a failed session and no hold.

        Raises `ConcurrencyLimited`, `RateLimited`, `CoordinationUnavailable`, `TenantSuspended`, `TokenRevoked`,
        `NoPrice`, `BudgetExhausted`, `LedgerUnavailable`.
        """
        session_id = uuid7()
        async with quota.admitted(
            self._coordination, caller.tenant_id, session_id, demand.kind, policy.body, seats=demand.channels
        ):
            lease = await self._open(session_id, caller, demand, policy, decision)
            async with self._kept(lease, demand.kind):
                yield lease

    @asynccontextmanager
    async def resumed(self, caller: Caller, session_id: UUID, turn: int) -> AsyncIterator[Lease]:
        """A live session of another process, from `turn` on ours: whoever had it before can neither bill nor end it any
        more. Of several who try this, one succeeds. As with `admit`, a seat while inside, and nothing left open.

        Raises `NotFound`, `TakenOver`, `ConcurrencyLimited`, `CoordinationUnavailable`, `TenantSuspended`, `NoPrice`,
        `LedgerUnavailable`; nothing has changed then.
        """
        async with self.attached(caller.tenant_id, session_id) as former:
            limits = former.policy.body
        async with quota.seated(self._coordination, caller.tenant_id, session_id, "stream", limits):
            with ledger_reachable():
                async with self._database.tenant(caller.tenant_id) as tx:
                    if (await tenants.by_id(tx, caller.tenant_id)).status != "active":
                        raise TenantSuspended
                    if not await sessions.take_over(tx, caller.tenant_id, session_id, turn):
                        raise TakenOver
            async with self.attached(caller.tenant_id, session_id) as lease, self._kept(lease, "stream"):
                yield lease

    @asynccontextmanager
    async def attached(self, tenant_id: UUID, session_id: UUID) -> AsyncIterator[Lease]:
        """The lease of an open session that its admission detached. Leaving ends nothing: its holder settles it with an
        outcome, fails it, or leaves it to the next one to attach. Raises `NotFound`, `Conflict`, `LedgerUnavailable`.
        """
        with ledger_reachable():
            async with self._database.tenant(tenant_id) as tx:
                session = await sessions.get(tx, tenant_id, session_id)
                if session.status != "open":
                    raise Conflict("The session has ended.")
                policy = await policies.at_version(tx, tenant_id, session.policy_version)
                candidates = session.decision.candidates
                prices = await _prices(tx, tenant_id, candidates, session.currency, at=session.started_at)
        lease = Lease(self._database, session, policy, prices)
        try:
            yield lease
        finally:
            await self._write_legs(lease)

    async def _open(
        self, session_id: UUID, caller: Caller, demand: Demand, policy: Policy, decision: Decision
    ) -> Lease:
        """At once where what is known of the tenant still holds, else by reading it anew."""

        def opening(known: _Known) -> steps.Opening:
            return steps.Opening(
                session_id=session_id,
                caller=caller,
                demand=demand,
                policy_version=policy.version,
                candidates=decision.candidates,
                decision=_priced(decision, known.prices, known.currency),
                currency=known.currency,
                prices=known.prices,
                held_ms=FIRST_BLOCKS * self._block_ms if demand.audio_ms is None else demand.audio_ms,
            )

        key = (caller.tenant_id, decision.candidates)
        with ledger_reachable():
            if (known := self._known.get(key)) is not None:
                with suppress(Unusual):
                    session = await steps.open_session(self._database, opening(known))
                    return Lease(self._database, session, policy, known.prices)
            async with self._database.tenant(caller.tenant_id) as tx:
                known = await _look_up(tx, caller, decision)
                session = await _written(tx, opening(known))
        self._remember(key, known)
        return Lease(self._database, session, policy, known.prices)

    def _remember(self, key: tuple[UUID, tuple[Candidate, ...]], known: _Known) -> None:
        self._known.pop(key, None)
        if len(self._known) >= KNOWN_MOST:
            del self._known[next(iter(self._known))]
        self._known[key] = known

    @asynccontextmanager
    async def _kept(self, lease: Lease, kind: Kind) -> AsyncIterator[None]:
        try:
            with beating(HEARTBEAT_S, lambda: self._keep_alive(lease)):
                yield
        except (Exception, asyncio.CancelledError) as error:
            await self._leave(lease, _ending(error, kind))
            raise
        else:
            await self._leave(lease, Outcome("failed", code=StenogateError.code))

    async def _keep_alive(self, lease: Lease) -> None:
        """A session may go a long time without a settle: a stream that is silent, a file in a queue."""
        with suppress(OSError, SQLAlchemyError):  # the next beat tries again; the reaper is far slower
            async with self._database.tenant(lease.tenant_id) as tx:
                await sessions.touch(tx, lease.tenant_id, lease.session_id)

    async def _leave(self, lease: Lease, outcome: Outcome) -> None:
        """Ends the session unless it has ended or is detached. A cancellation meanwhile does not stop that."""
        if lease.closed or lease.detached:
            await self._write_legs(lease)
        else:
            await self._finish(_end(lease, outcome))

    async def _write_legs(self, lease: Lease) -> None:
        """Those that no settle took along."""
        if lease.unwritten:
            await self._finish(_flush(lease))

    async def _finish(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._closing.add(task)  # the loop itself keeps no task alive
        task.add_done_callback(self._closing.discard)
        await asyncio.shield(task)


@dataclass(frozen=True, slots=True)
class _Known:
    """What an admission was last based on. Whether it still holds is for the next one's own statement to say."""

    currency: str
    prices: Prices


async def _look_up(tx: Transaction, caller: Caller, decision: Decision) -> _Known:
    """Raises `TenantSuspended`, `TokenRevoked`, `NoPrice`."""
    tenant = await tenants.by_id(tx, caller.tenant_id)
    if tenant.status != "active":
        raise TenantSuspended
    if await identity.is_revoked(tx, caller.tenant_id, caller.token_id):
        raise TokenRevoked
    return _Known(tenant.currency, await _prices(tx, tenant.id, decision.candidates, tenant.currency))


async def _written(tx: Transaction, opening: steps.Opening) -> Session:
    """What `steps.open_session` does, one after the other. Raises `BudgetExhausted`."""
    tenant_id, session_id = opening.caller.tenant_id, opening.session_id
    await sessions.open_session(
        tx,
        tenant_id,
        session_id,
        subject=opening.caller.subject,
        demand=opening.demand,
        policy_version=opening.policy_version,
        decision=opening.decision,
        currency=opening.currency,
    )
    locked = await sessions.locked(tx, tenant_id, session_id)
    await hold_until(tx, locked, opening.held_ms, opening.nano_per_hour)
    return await sessions.get(tx, tenant_id, session_id)


async def reap(database: Database, older_than_s: int) -> int:
    """Ends, as interrupted, the sessions that a crash left open: streams and files not seen for so long, and jobs of
    which there is no trace. Returns how many. Several may run at once."""
    count = 0
    while True:
        async with database.across_tenants("sessions that a crash left open") as tx:
            row = (await tx.execute(_ABANDONED, {"seconds": older_than_s})).one_or_none()
            if row is None:
                return count
            await sessions.close_session(tx, row.tenant_id, row.id, Outcome("interrupted"))
            await budget.release(tx, row.tenant_id, row.id)
        count += 1
        log.warning("admission.reaped", session_id=str(row.id), tenant_id=str(row.tenant_id))


async def _end(lease: Lease, outcome: Outcome) -> None:
    """Whatever the database says now, it must not hide why we are leaving; the reaper finds what stays open."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await lease.end(outcome)
    except (PolicyError, SQLAlchemyError, TimeoutError) as error:
        log.warning("admission.not_closed", session_id=str(lease.session_id), error=type(error).__name__)


async def _flush(lease: Lease) -> None:
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await lease.flush()
    except (PolicyError, SQLAlchemyError, TimeoutError) as error:
        log.warning("admission.legs_lost", session_id=str(lease.session_id), error=type(error).__name__)


def _ending(error: BaseException, kind: Kind) -> Outcome:
    if isinstance(error, asyncio.CancelledError):
        return Outcome("interrupted" if kind == "stream" else "cancelled")
    return Outcome("failed", code=error.code if isinstance(error, StenogateError) else StenogateError.code)


async def _prices(
    tx: Transaction, tenant_id: UUID, candidates: Sequence[Candidate], currency: str, *, at: datetime | None = None
) -> Prices:
    """The price of every candidate that has one. Raises `NoPrice` when none has."""
    found: dict[tuple[str, str], Price] = {}
    missing: NoPrice | None = None
    for candidate in candidates:
        key = candidate.backend, candidate.model
        try:
            found[key] = await price_for(tx, tenant_id, *key, currency, at=at)
        except NoPrice as error:
            missing = missing or error
    if not found:
        raise missing or NoPrice()
    return found


def _priced(decision: Decision, prices: Prices, currency: str) -> Decision:
    """The decision without the candidates that are not for sale."""
    if len(prices) == len(decision.candidates):
        return decision
    kept = tuple(each for each in decision.candidates if (each.backend, each.model) in prices)
    dropped = tuple(
        Refusal(each.backend, each.model, f"No price in {currency} is set for it.")
        for each in decision.candidates
        if each not in kept
    )
    return Decision(kept, decision.refused + dropped)


_ABANDONED = text("""
    select s.tenant_id, s.id from sessions s
    where s.status = 'open' and s.seen_at < now() - make_interval(secs => :seconds)
      and (s.kind <> 'job' or not exists (select from jobs j where j.tenant_id = s.tenant_id and j.id = s.id))
    order by s.seen_at limit 1
    for update of s skip locked
""")
