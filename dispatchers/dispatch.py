"""The door. Every protocol, every job, every kind of audio goes through here, so policy cannot differ by transport.

resolve (which backends, why) → admit (quota, price, hold) → recognise (with fallback) → meter → settle
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from uuid import UUID

from dispatchers.interface import (
    SAMPLES_PER_MS,
    Heard,
    Options,
    Samples,
    StreamInput,
    Transcript,
    VadOptions,
    ignore,
    to_ms,
)
from dispatchers.later import continued
from dispatchers.meter import Meter
from dispatchers.recorder import Recorder
from dispatchers.registry import Registry
from dispatchers.route import Route
from dispatchers.streaming import Continuation, Live, Outlives, Summary, merged, stream_outcome
from policy.admission import Admission, Lease, Outcome
from policy.endpointing import settle
from policy.errors import NotAllowed, NothingUp, PolicyError, TakenOver
from policy.identity import Authenticator, Caller
from policy.policies import Policy, PolicyBody
from policy.resolve import Candidate, Decision, Demand, Offer, permit
from policy.terms import TermsBook
from runtime.database import Database, Transaction


@dataclass(frozen=True, slots=True)
class Result:
    """A recognised recording and its charge."""

    session_id: UUID
    transcript: Transcript
    candidate: Candidate
    billed_ms: int


class Door:
    """Assembled once a process, over what is plugged in. Where there are live streams, a `recorder` keeps the audio of
    those whose policy says so. `terms`: what tenants may do and pay."""

    def __init__(
        self,
        database: Database,
        admission: Admission,
        authenticator: Authenticator,
        registry: Registry,
        recorder: Recorder | None = None,
    ):
        self.terms = TermsBook(database)
        self._database = database
        self._admission = admission
        self._authenticator = authenticator
        self._registry = registry
        self._recorder = recorder

    def offers(self, tenant_id: UUID | None = None) -> tuple[Offer, ...]:
        """What is plugged in for this tenant, or for any, as the resolver sees it."""
        return self._registry.offers(tenant_id)

    @property
    def up(self) -> bool:
        """Whether anything is, for whomever."""
        return self._registry.up

    async def policy(self, caller: Caller) -> Policy:
        """The tenant's policy in force now."""
        return (await self.terms.of(caller.tenant_id)).policy

    async def explain(self, caller: Caller, demand: Demand) -> tuple[Policy, Decision]:
        """Which backends the demand would go to, and why; raises as the real thing would."""
        terms, decision = await self.terms.decide(caller.tenant_id, demand, self.offers(caller.tenant_id))
        return terms.policy, decision

    async def transcribe(
        self, caller: Caller, demand: Demand, options: Options, samples: Samples, heard: Heard = ignore
    ) -> Result:
        """Recognises a short recording whole and charges for it. `demand.audio_ms` must be its length."""
        policy, decision = await self.explain(caller, demand)
        async with self._admission.admit(caller, demand, policy, decision) as lease:
            transcript, candidate = await self.recognise(lease, options, samples, heard)
            receipt = await lease.settle(
                to_ms(len(samples)), candidate, outcome=outcome_of(transcript, keep_text=policy.body.keep_transcripts)
            )
            return Result(lease.session_id, transcript, candidate, receipt.billed_ms)

    async def recognise(
        self, lease: Lease, options: Options, samples: Samples, heard: Heard = ignore, *, from_ms: int = 0
    ) -> tuple[Transcript, Candidate]:
        """By the first candidate that can (`Route.transcribe`). The samples begin at `from_ms` of the session."""
        route = Route(self._registry, lease, await self._still_allowed(lease), from_ms=from_ms)
        return await route.transcribe(options, samples, heard)

    async def accept(
        self, caller: Caller, demand: Demand, write: Callable[[Transaction, Lease], Awaitable[None]]
    ) -> Lease:
        """Admits a job and lets its lease go on alone: `write` stores the job durably, a worker attaches later."""
        policy, decision = await self.explain(caller, demand)
        async with self._admission.admit(caller, demand, policy, decision) as lease:
            async with self._database.tenant(caller.tenant_id) as tx:
                await write(tx, lease)
            lease.detach()
            return lease

    @asynccontextmanager
    async def attached(self, tenant_id: UUID, session_id: UUID) -> AsyncIterator[Lease]:
        """An accepted job's lease, in the worker that does it."""
        async with self._admission.attached(tenant_id, session_id) as lease:
            yield lease

    @asynccontextmanager
    async def stream(
        self,
        caller: Caller,
        demand: Demand,
        options: Options,
        audio: AsyncIterator[StreamInput],
        *,
        hang_up: Callable[[], None],
        outlives: Outlives = lambda _: False,
    ) -> AsyncIterator[Live]:
        """A live stream. The end of `audio` drains it; what was accepted is settled whatever happens inside. `hang_up`
        ends `audio` from this side, when the caller may not go on.

        Raises, from the event iterator and after the last final, the reason that ended the stream early
        (`BudgetExhausted`, `TenantSuspended`, `TokenExpired`, `TakenOver` …).
        """
        policy, decision = await self.explain(caller, demand)
        async with self._admission.admit(caller, demand, policy, decision) as lease:
            bounded = _bounded(options, demand, policy.body)
            start = Continuation(lease.session_id, lease.turn, 0, 0, Summary(channels=options.channels))
            async with self._streaming(
                lease, start, caller, bounded, audio, demand=demand, hang_up=hang_up, outlives=outlives
            ) as live:
                yield live

    @asynccontextmanager
    async def resumed(
        self,
        caller: Caller,
        where: Continuation,
        demand: Demand,
        options: Options,
        audio: AsyncIterator[StreamInput],
        *,
        hang_up: Callable[[], None],
        outlives: Outlives = lambda _: False,
    ) -> AsyncIterator[Live]:
        """The same for one that another process has left, or is now made to leave."""
        async with self._admission.resumed(caller, where.session_id, where.turn) as lease:
            bounded = _bounded(options, demand, lease.policy.body)
            async with self._streaming(
                lease, where, caller, bounded, audio, demand=demand, hang_up=hang_up, outlives=outlives
            ) as live:
                yield live

    @asynccontextmanager
    async def _streaming(
        self,
        lease: Lease,
        where: Continuation,
        caller: Caller,
        options: Options,
        audio: AsyncIterator[StreamInput],
        *,
        demand: Demand,
        hang_up: Callable[[], None],
        outlives: Outlives,
    ) -> AsyncIterator[Live]:
        summary, keep_text = where.summary, lease.policy.body.keep_transcripts
        route = Route(self._registry, lease, lease.decision.candidates, from_ms=where.from_ms)
        candidate, origin = route.first()
        meter = Meter(
            lease,
            route.served,
            recheck=lambda: self._recheck(caller, demand, lease, route),
            hang_up=hang_up,
            progress=lambda: summary.progress(keep_text=keep_text),
            from_ms=where.from_ms,
        )
        ending: BaseException | None = None
        try:
            async with (
                self._taped(lease, meter.audio(audio), where.from_ms) as metered,
                route.stream(metered, options) as heard,
                merged(continued(heard, where.from_ms, where.announced), meter, summary) as events,
            ):
                yield Live(candidate, origin, replace(options, model=candidate.model), events, summary, lease)
        except BaseException as error:
            ending = error
            raise
        finally:
            outcome = stream_outcome(summary, ending, keep_text=keep_text)
            if left := ending is not None and outlives(ending):
                lease.detach()
            with suppress(TakenOver):  # then nothing of it is ours to settle any more
                receipt = await asyncio.shield(meter.leave(outcome.code) if left else meter.finish(outcome))
                summary.accepted_ms, summary.billed_ms = receipt.accepted_ms, receipt.billed_ms

    @asynccontextmanager
    async def _taped(
        self, lease: Lease, audio: AsyncIterator[StreamInput], from_ms: int
    ) -> AsyncIterator[AsyncIterator[StreamInput]]:
        """The audio, kept as it passes to the recogniser where the policy says so."""
        if self._recorder is None:
            yield audio
            return
        start = from_ms * SAMPLES_PER_MS
        with self._recorder.taping(lease.tenant_id, lease.session_id, lease.policy.body, start=start) as taped:
            yield taped(audio)

    async def _recheck(self, caller: Caller, demand: Demand, lease: Lease, route: Route) -> None:
        """Raises what forbids a live stream to go on: its caller's standing, or a policy that came later and leaves
        nobody it could go on with."""
        await self._authenticator.recheck(caller)
        terms = await self.terms.of(caller.tenant_id)
        if terms.policy.version != lease.policy.version:
            route.allow(self._permitted(terms.policy, demand, lease))

    async def _still_allowed(self, lease: Lease) -> tuple[Candidate, ...]:
        """The lease's candidates, without those that a later policy forbids: a job may wait long. Raises `NotAllowed`
        where none is left, `NothingUp` where none is plugged in any more."""
        policy = (await self.terms.of(lease.tenant_id)).policy
        if policy.version == lease.policy.version:
            return lease.decision.candidates
        return self._permitted(policy, Demand("job"), lease)

    def _permitted(self, policy: Policy, demand: Demand, lease: Lease) -> tuple[Candidate, ...]:
        allowed: list[Candidate] = []
        refusal: PolicyError = NothingUp()
        for candidate in lease.decision.candidates:
            plug = self._registry.plug(lease.tenant_id, candidate.backend)
            if plug is None:
                continue
            try:
                permit(policy.body, demand, plug.offer(), candidate.model)
            except NotAllowed as error:
                refusal = error
            else:
                allowed.append(candidate)
        if not allowed:
            raise refusal
        return tuple(allowed)


def _bounded(options: Options, demand: Demand, policy: PolicyBody) -> Options:
    """A live stream's options as the policy has them."""
    return replace(
        options,
        vad=VadOptions(**settle(policy.vad, demand.vad)),
        partial_model=policy.partial_model or "",
        max_speaking=policy.max_speaking,
    )


def outcome_of(transcript: Transcript, *, keep_text: bool) -> Outcome:
    """What a finished recording's session row says."""
    return Outcome(
        status="completed",
        engine=transcript.origin.engine,
        language=transcript.language,
        utterances=len(transcript.segments),
        words=len(transcript.text.split()),
        text=transcript.text if keep_text else None,
    )
