"""A lease: one session's right to accept audio, as far as money is held for it.

The database is the truth; the object remembers only where this process believes the session stands. A settle whose
commit went unanswered is therefore recognised at the next one, and a second holder of the same session is refused.
Where a session changes hands (`Admission.resumed`), its `turn` tells the holders apart: the newer one's word counts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from policy import budget, legs, metering, sessions, steps, tenants
from policy.errors import Conflict, NoPrice, TakenOver
from policy.legs import Leg
from policy.metering import Segment
from policy.outage import ledger_reachable
from policy.policies import Policy
from policy.pricing import Price, affordable_ms, cover_nano, most_expensive
from policy.resolve import Candidate, Decision
from policy.sessions import Outcome, Progress, Session
from policy.steps import Prices, Unusual
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
        prices: Prices,
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
        self._customer = session.customer
        self._segments = session.segments
        self._hold_price = most_expensive(prices.values()).price_nano_per_hour * session.channels
        self._attempted_ms = session.accepted_ms
        self.turn = session.turn
        self._legs: list[Leg] = []  # not written yet

    def note_leg(self, leg: Leg) -> None:
        """An attempt that is over. It is written down with the next settle, with the session's end, or by `flush`."""
        self._legs.append(leg)

    @property
    def unwritten(self) -> bool:
        return bool(self._legs)

    async def flush(self) -> None:
        """Writes down what attempts there were, whatever has become of the session. Raises `LedgerUnavailable`."""
        if not self._legs:
            return
        with ledger_reachable():
            async with self._database.tenant(self.tenant_id) as tx:
                written = await self._put_legs(tx)
        self._forget(written)

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
        self,
        to_ms: int,
        candidate: Candidate,
        *,
        outcome: Outcome | None = None,
        progress: Progress | None = None,
        extra: Extra | None = None,
    ) -> Receipt:
        """Bills `[settled_ms, to_ms)` to the candidate, notes the progress, and with an outcome ends the session and
        gives back what is still held: in one transaction, in which `extra` runs first. What is billed already costs
        nothing again.

        Raises `Conflict` when the session has ended or somebody else bills it (`TakenOver`: rightly so),
        `LedgerUnavailable`, and what `extra` raises.
        """
        known = (self.settled_ms, self._attempted_ms)
        self._attempted_ms = to_ms
        written, receipt = tuple(self._legs), None
        with ledger_reachable(), SETTLE_SECONDS.time():
            if extra is None and self.settled_ms == known[1] < to_ms:
                receipt = await self._settle_at_once(to_ms, candidate, outcome, progress, written)
            if receipt is None:
                receipt = await self._settle_in_full(
                    to_ms, candidate, outcome=outcome, progress=progress, extra=extra, known=known
                )
        self._forget(written)
        if receipt.accepted_ms > self.settled_ms:
            LEDGER_ROWS.labels(candidate.backend).inc()
            LEDGER_AUDIO_MS.labels(candidate.backend).inc(receipt.accepted_ms - self.settled_ms)
        self.settled_ms = receipt.accepted_ms
        self.held_ms = max(self.held_ms, receipt.accepted_ms)
        self.closed = self.closed or outcome is not None
        return receipt

    async def _settle_at_once(
        self,
        to_ms: int,
        candidate: Candidate,
        outcome: Outcome | None,
        progress: Progress | None,
        attempts: Sequence[Leg],
    ) -> Receipt | None:
        """None: the session does not stand where this process believes, and nothing was changed."""
        segment = self._segment(self.settled_ms, to_ms, self._segments, candidate)
        try:
            settled = await steps.settle(
                self._database,
                self.tenant_id,
                segment,
                turn=self.turn,
                progress=progress,
                outcome=outcome,
                attempts=self._priced(attempts),
            )
        except Unusual:
            return None
        self._segments += 1
        return Receipt(
            accepted_ms=to_ms,
            billed_ms=settled.billed_ms,
            remaining_ms=self._remaining_ms(
                settled.free_nano, settled.held_ms - to_ms if outcome is None else 0, candidate
            ),
            tenant_active=settled.tenant_active,
        )

    async def _settle_in_full(
        self,
        to_ms: int,
        candidate: Candidate,
        *,
        outcome: Outcome | None,
        progress: Progress | None,
        extra: Extra | None,
        known: tuple[int, int],
    ) -> Receipt:
        async with self._database.tenant(self.tenant_id) as tx:
            session = await self._check(tx)
            await self._put_legs(tx)
            if not _is_done(session, to_ms, outcome, known):
                if session.status != "open" or session.accepted_ms not in known:
                    raise Conflict("The session has ended, or somebody else goes on with it.")
                if progress is not None:
                    await sessions.note(tx, self.tenant_id, self.session_id, self.turn, progress)
                if extra is not None:
                    await extra(tx)
                if to_ms > session.accepted_ms:
                    segment = self._segment(session.accepted_ms, to_ms, session.segments, candidate)
                    await metering.settle(tx, self.tenant_id, segment)
                if outcome is not None:
                    await self._close(tx, outcome)
            session, receipt = await self._receipt(tx, candidate)
        self._segments = session.segments
        return receipt

    async def remaining_ms(self, candidate: Candidate) -> int | None:
        """How much more audio can be accepted, what is held included; None: no limit."""
        with ledger_reachable():
            async with self._database.tenant(self.tenant_id) as tx:
                _, receipt = await self._receipt(tx, candidate)
                return receipt.remaining_ms

    async def end(self, outcome: Outcome) -> None:
        """Ends the session as it stands: nothing more is billed, what is held is given back. Again: no effect."""
        with ledger_reachable():
            async with self._database.tenant(self.tenant_id) as tx:
                written = await self._put_legs(tx)
                await self._close(tx, outcome)
        self._forget(written)
        self.closed = True

    async def check(self) -> None:
        """Raises `TakenOver` when the session has gone over to somebody else, `LedgerUnavailable`."""
        with ledger_reachable():
            async with self._database.tenant(self.tenant_id) as tx:
                await self._check(tx)

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

    def _priced(self, attempts: Sequence[Leg]) -> list[legs.Priced]:
        return [(leg, self._prices[leg.backend, leg.model]) for leg in attempts]

    async def _put_legs(self, tx: Transaction) -> tuple[Leg, ...]:
        """Those written; to be forgotten when the transaction is known to have ended well."""
        unwritten = tuple(self._legs)
        await legs.record(tx, self.tenant_id, self.session_id, self._priced(unwritten))
        return unwritten

    def _forget(self, written: tuple[Leg, ...]) -> None:
        self._legs = [leg for leg in self._legs if leg not in written]

    def _segment(self, start_ms: int, to_ms: int, number: int, candidate: Candidate) -> Segment:
        return Segment(
            source_id=self.session_id,
            segment_no=number,
            start_ms=start_ms,
            end_ms=to_ms,
            backend=candidate.backend,
            model=candidate.model,
            customer=self._customer,
            price=self._price(candidate),
            held_nano=_between(start_ms, to_ms, self._hold_price),
            channels=self._channels,
        )

    async def _close(self, tx: Transaction, outcome: Outcome) -> None:
        if await sessions.close_session(tx, self.tenant_id, self.session_id, outcome, turn=self.turn):
            await budget.release(tx, self.tenant_id, self.session_id)

    async def _receipt(self, tx: Transaction, candidate: Candidate) -> tuple[Session, Receipt]:
        session = await sessions.get(tx, self.tenant_id, self.session_id)
        tenant = await tenants.by_id(tx, self.tenant_id)
        free_nano = await budget.remaining(tx, self.tenant_id, self.session_id)
        held_ms = session.held_ms - session.accepted_ms if session.status == "open" else 0
        return session, Receipt(
            accepted_ms=session.accepted_ms,
            billed_ms=session.billed_ms,
            remaining_ms=self._remaining_ms(free_nano, held_ms, candidate),
            tenant_active=tenant.status == "active",
        )

    def _remaining_ms(self, free_nano: int | None, held_ms: int, candidate: Candidate) -> int | None:
        price_nano = self._price(candidate).price_nano_per_hour * self._channels
        free_ms = None if free_nano is None else affordable_ms(free_nano, price_nano)
        return None if free_ms is None else free_ms + held_ms

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
