"""A lease: one session's right to accept audio, as far as money is held for it.

The database is the truth; the object remembers only where this process believes the session stands. A settle whose
commit went unanswered is therefore recognised at the next one, and a second holder of the same session is refused.
Where a session changes hands (`Admission.resumed`), its `turn` tells the holders apart: the newer one's word counts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from policy import budget, metering, sessions, tenants
from policy.errors import Conflict, NoPrice, TakenOver
from policy.metering import Segment
from policy.outage import ledger_reachable
from policy.policies import Policy
from policy.pricing import Price, affordable_ms, cover_nano, most_expensive
from policy.resolve import Candidate, Decision
from policy.sessions import Outcome, Progress, Session
from runtime.database import Database, Transaction
from runtime.telemetry import LEDGER_AUDIO_MS, LEDGER_ROWS, SETTLE_SECONDS

Extra = Callable[[Transaction], Awaitable[None]]


@dataclass(frozen=True)
class Receipt:
    """Where the session stands after a settle. `remaining_ms` is how much more audio the tenant's hard budgets cover at
    the candidate's price, what is held for this session included; None: no limit."""

    accepted_ms: int
    billed_ms: int
    remaining_ms: int | None
    tenant_active: bool


class Lease:
    """Made by `Admission`. `held_ms` and `settled_ms` are positions on the session's sample clock; every price of a
    candidate is the one in force when the session began, and is paid for each channel."""

    def __init__(
        self,
        database: Database,
        session: Session,
        policy: Policy,
        prices: Mapping[tuple[str, str], Price],
    ):
        self.session_id = session.id
        self.tenant_id = session.tenant_id
        self.decision: Decision = session.decision
        self.policy = policy
        self.currency = session.currency
        self.held_ms = session.held_ms
        self.settled_ms = session.accepted_ms
        self.closed = False
        self.detached = False
        self._database = database
        self._prices = prices
        self._channels = session.channels
        self._hold_price = most_expensive(prices.values()).price_nano_per_hour * session.channels
        self._attempted_ms = session.accepted_ms
        self.turn = session.turn

    async def extend(self, to_ms: int) -> None:
        """Holds money for `[0, to_ms)`. Raises `BudgetExhausted` and leaves what is held, `Conflict` when the session
        has ended, `TakenOver`, `LedgerUnavailable`."""
        if to_ms <= self.held_ms:
            return
        with ledger_reachable():
            async with self._database.tenant(self.tenant_id) as tx:
                held_ms = await hold_until(tx, await self._check(tx), to_ms, self._hold_price)
        self.held_ms = max(self.held_ms, held_ms)

    async def settle(
        self, to_ms: int, candidate: Candidate, *, outcome: Outcome | None = None, extra: Extra | None = None
    ) -> Receipt:
        """Bills `[settled_ms, to_ms)` to the candidate, and with an outcome ends the session and gives back what is
        still held: in one transaction, in which `extra` runs first. What is billed already costs nothing again.

        Raises `Conflict` when the session has ended or somebody else bills it (`TakenOver`: rightly so),
        `LedgerUnavailable`, and what `extra` raises.
        """
        known = (self.settled_ms, self._attempted_ms)
        self._attempted_ms = to_ms
        with ledger_reachable(), SETTLE_SECONDS.time():
            async with self._database.tenant(self.tenant_id) as tx:
                session = await self._check(tx)
                if not _is_done(session, to_ms, outcome, known):
                    if session.status != "open" or session.accepted_ms not in known:
                        raise Conflict("The session has ended, or somebody else goes on with it.")
                    if extra is not None:
                        await extra(tx)
                    await self._bill(tx, session, to_ms, candidate)
                    if outcome is not None:
                        await self._close(tx, outcome)
                receipt = await self._receipt(tx, candidate)
        if receipt.accepted_ms > self.settled_ms:
            LEDGER_ROWS.labels(candidate.backend).inc()
            LEDGER_AUDIO_MS.labels(candidate.backend).inc(receipt.accepted_ms - self.settled_ms)
        self.settled_ms = receipt.accepted_ms
        self.held_ms = max(self.held_ms, receipt.accepted_ms)
        self.closed = self.closed or outcome is not None
        return receipt

    async def remaining_ms(self, candidate: Candidate) -> int | None:
        """How much more audio can be accepted, what is held included; None: no limit."""
        with ledger_reachable():
            async with self._database.tenant(self.tenant_id) as tx:
                return (await self._receipt(tx, candidate)).remaining_ms

    async def end(self, outcome: Outcome) -> None:
        """Ends the session as it stands: nothing more is billed, what is held is given back. Again: no effect."""
        with ledger_reachable():
            async with self._database.tenant(self.tenant_id) as tx:
                await self._close(tx, outcome)
        self.closed = True

    async def check(self) -> None:
        """Raises `TakenOver` when the session has gone over to somebody else, `LedgerUnavailable`."""
        with ledger_reachable():
            async with self._database.tenant(self.tenant_id) as tx:
                await self._check(tx)

    async def note(self, tx: Transaction, progress: Progress) -> None:
        """Writes down what the session came to so far."""
        await sessions.note(tx, self.tenant_id, self.session_id, self.turn, progress)

    async def fail(self, code: str) -> None:
        """Ends the session as failed."""
        await self.end(Outcome("failed", code=code))

    def detach(self) -> None:
        """Leaving the admission then keeps row and hold: whoever attaches goes on."""
        self.detached = True

    async def _check(self, tx: Transaction) -> Session:
        """The row, locked. Raises `TakenOver`."""
        session = await sessions.locked(tx, self.tenant_id, self.session_id)
        if session.turn != self.turn:
            raise TakenOver
        return session

    async def _bill(self, tx: Transaction, session: Session, to_ms: int, candidate: Candidate) -> None:
        if to_ms <= session.accepted_ms:
            return
        price = self._price(candidate)
        await metering.settle(
            tx,
            self.tenant_id,
            Segment(
                source_id=self.session_id,
                segment_no=session.segments,
                start_ms=session.accepted_ms,
                end_ms=to_ms,
                backend=candidate.backend,
                model=candidate.model,
                customer=session.customer,
                price=price,
                held_nano=_between(session.accepted_ms, to_ms, self._hold_price),
                channels=self._channels,
            ),
        )

    async def _close(self, tx: Transaction, outcome: Outcome) -> None:
        if await sessions.close_session(tx, self.tenant_id, self.session_id, outcome, turn=self.turn):
            await budget.release(tx, self.tenant_id, self.session_id)

    async def _receipt(self, tx: Transaction, candidate: Candidate) -> Receipt:
        session = await sessions.get(tx, self.tenant_id, self.session_id)
        tenant = await tenants.by_id(tx, self.tenant_id)
        free_nano = await budget.remaining(tx, self.tenant_id, self.session_id)
        price_nano = self._price(candidate).price_nano_per_hour * self._channels
        free_ms = None if free_nano is None else affordable_ms(free_nano, price_nano)
        held_ms = session.held_ms - session.accepted_ms if session.status == "open" else 0
        return Receipt(
            accepted_ms=session.accepted_ms,
            billed_ms=session.billed_ms,
            remaining_ms=None if free_ms is None else free_ms + held_ms,
            tenant_active=tenant.status == "active",
        )

    def _price(self, candidate: Candidate) -> Price:
        price = self._prices.get((candidate.backend, candidate.model))
        if price is None:
            raise NoPrice(f"{candidate.backend} with {candidate.model} is no priced candidate of this session.")
        return price


async def hold_until(tx: Transaction, session: Session, to_ms: int, nano_per_hour: int) -> int:
    """Holds money so that `[0, to_ms)` is covered of a session whose row is locked. Returns how far it is now.

    Raises `BudgetExhausted` (roll back then) and `Conflict`.
    """
    if to_ms <= session.held_ms:
        return session.held_ms
    await sessions.cover(tx, session.tenant_id, session.id, to_ms)
    await budget.hold(tx, session.tenant_id, session.id, _between(session.held_ms, to_ms, nano_per_hour))
    return to_ms


def _between(start_ms: int, end_ms: int, nano_per_hour: int) -> int:
    """What a hold for `[start_ms, end_ms)` is; adjoining ones add up to the hold for both together."""
    return cover_nano(end_ms, nano_per_hour) - cover_nano(start_ms, nano_per_hour)


def _is_done(session: Session, to_ms: int, outcome: Outcome | None, known: tuple[int, int]) -> bool:
    """Whether this very ending was committed before, by an attempt that never heard so."""
    return outcome is not None and session.status == outcome.status and session.accepted_ms == to_ms and to_ms in known
