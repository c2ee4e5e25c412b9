"""Metering of a live stream: what was accepted, what is held for it, what is settled.

Audio is counted as it enters, on its own samples. A hold always covers it before it is accepted and is extended early,
so that a database gone for ten seconds stops nobody; blocks are settled behind it. Where the hold cannot grow, the
audio ends there: what was held is still transcribed, then the reason is raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace

import structlog

from dispatchers.interface import SAMPLES_PER_MS, Pcm, StreamInput, Used, to_ms
from policy.admission import Lease, Outcome, Receipt
from policy.errors import BudgetExhausted, LedgerUnavailable, PolicyError, TenantSuspended
from policy.resolve import Candidate
from policy.sessions import Progress

log = structlog.get_logger()

BLOCK_MS = 15_000
AHEAD_MS = 2 * BLOCK_MS
RETRY_S = 0.5
COVER_TIMEOUT_S = 30.0


class Meter:
    """Counts one stream against its lease.

    `recheck` is awaited at every block and raises when the caller may no longer go on (token expired or revoked,
    tenant suspended). `hang_up` is then called, and must end the source: its next audio may be long in coming.
    `progress` is what the stream came to so far, noted with every block. `served` tells who served a span of it, one
    after the other, each up to where: that is whose price it has. `from_ms`: what came before is not heard here.
    """

    def __init__(
        self,
        lease: Lease,
        served: Callable[[int, int], Sequence[tuple[int, Candidate]]],
        *,
        recheck: Callable[[], Awaitable[None]],
        hang_up: Callable[[], None],
        progress: Callable[[], Progress],
        from_ms: int = 0,
    ):
        self.accepted_samples = from_ms * SAMPLES_PER_MS
        self.billed_ms = 0
        self.ended_by: PolicyError | None = None
        self._left: str | None = None
        self._lease = lease
        self._served = served
        self._recheck = recheck
        self._hang_up = hang_up
        self._progress = progress
        self._moved = asyncio.Event()
        self._covered = asyncio.Event()

    @property
    def accepted_ms(self) -> int:
        return to_ms(self.accepted_samples)

    @property
    def _due(self) -> bool:
        """Whether a block is to be settled or the hold to be extended: once in many messages."""
        lease, accepted_ms = self._lease, self.accepted_ms
        return accepted_ms - lease.settled_ms >= BLOCK_MS or lease.held_ms - accepted_ms <= BLOCK_MS

    async def audio(self, source: AsyncIterator[StreamInput]) -> AsyncIterator[StreamInput]:
        """The source, up to what is held; ends early when `ended_by` is set."""
        async for item in source:
            if not isinstance(item, Pcm):
                yield item
                continue
            while wanted := len(item.samples):
                room = await self._room(wanted)
                if room == 0:
                    return
                self.accepted_samples += room
                if self._due:
                    self._moved.set()
                if room == wanted:
                    yield item
                    break
                yield Pcm(item.samples[:room])
                item = Pcm(item.samples[room:])  # noqa: PLW2901 — what is left of it

    async def run(self, tell: Callable[[Used], Awaitable[None]]) -> None:
        """Settles and extends until cancelled; `tell` gets an event for each settled block."""
        while self.ended_by is None:
            await self._moved.wait()
            self._moved.clear()
            try:
                await self._advance(tell)
            except LedgerUnavailable:
                log.warning("meter.database_unavailable", session_id=str(self._lease.session_id))
                await asyncio.sleep(RETRY_S)
                self._moved.set()
            except PolicyError as refusal:
                self._end(refusal)

    async def finish(self, outcome: Outcome) -> Receipt:
        """Settles the rest and closes the session; keeps trying while the database is away. Raises `TakenOver` when
        somebody else goes on with it."""
        return await self._settle_all(outcome)

    async def leave(self, code: str | None) -> Receipt:
        """The same, and leaves the session open to whoever takes it up, with a note why."""
        self._left = code
        return await self._settle_all(None)

    async def _settle_all(self, outcome: Outcome | None) -> Receipt:
        deadline = asyncio.get_running_loop().time() + COVER_TIMEOUT_S
        while True:
            try:
                return await self._settle(self.accepted_ms, outcome)
            except LedgerUnavailable:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(RETRY_S)

    async def _settle(self, to_ms: int, outcome: Outcome | None = None) -> Receipt:
        """Bills up to here, each span to who served it; only the last one ends the session."""
        *before, (_, last) = self._served(self._lease.settled_ms, to_ms)
        for until_ms, candidate in before:
            await self._lease.settle(until_ms, candidate)
        return await self._lease.settle(to_ms, last, outcome=outcome, progress=self._noted())

    async def _advance(self, tell: Callable[[Used], Awaitable[None]]) -> None:
        lease = self._lease
        if self.accepted_ms - lease.settled_ms >= BLOCK_MS:
            await self._recheck()
            receipt = await self._settle(self.accepted_ms)
            self.billed_ms = receipt.billed_ms
            if not receipt.tenant_active:
                raise TenantSuspended
            await tell(Used(receipt.accepted_ms, receipt.billed_ms, receipt.remaining_ms))
        if lease.held_ms - self.accepted_ms <= BLOCK_MS:
            await lease.extend(self.accepted_ms + AHEAD_MS)
        self._covered.set()

    def _noted(self) -> Progress:
        return replace(self._progress(), code=self._left)

    def _end(self, refusal: PolicyError) -> None:
        self.ended_by = refusal
        self._covered.set()
        if not isinstance(refusal, BudgetExhausted):  # what is held may still be used
            self._hang_up()

    async def _room(self, wanted: int) -> int:
        """How many of so many samples the hold covers; waits for it to grow. 0: the stream is over."""
        while True:
            room = self._lease.held_ms * SAMPLES_PER_MS - self.accepted_samples
            if self.ended_by is not None and not isinstance(self.ended_by, BudgetExhausted):
                return 0
            if room > 0 or self.ended_by is not None:
                return max(0, min(room, wanted))
            self._covered.clear()
            self._moved.set()
            try:
                await asyncio.wait_for(self._covered.wait(), COVER_TIMEOUT_S)
            except TimeoutError:
                self._end(LedgerUnavailable())
