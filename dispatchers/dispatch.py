"""The door. Every protocol, every job, every kind of audio goes through here, so policy cannot differ by transport.

resolve (which backends, why) → admit (quota, price, hold) → recognise (with fallback) → meter → settle
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from uuid import UUID

from dispatchers.errors import BackendUnavailable, DispatchError
from dispatchers.interface import (
    SAMPLES_PER_MS,
    Dispatcher,
    Heard,
    Options,
    Samples,
    Segment,
    StreamInput,
    Transcript,
    VadOptions,
    ignore,
    to_ms,
)
from dispatchers.later import continued
from dispatchers.meter import Meter
from dispatchers.recorder import Recorder
from dispatchers.streaming import Continuation, Live, Outlives, Summary, merged, stream_outcome
from policy.admission import Admission, Lease, Outcome
from policy.endpointing import settle
from policy.errors import TakenOver
from policy.identity import Authenticator, Caller
from policy.policies import Policy, PolicyBody, current
from policy.resolve import Candidate, Decision, Demand, Offer, resolve
from runtime.database import Database, Transaction


@dataclass(frozen=True, slots=True)
class Result:
    """A recognised recording and its charge."""

    session_id: UUID
    transcript: Transcript
    candidate: Candidate
    billed_ms: int


class Door:
    """Assembled once a process, over the backends plugged in here, keyed by policy's names for them. Where there are
    live streams, a `recorder` keeps the audio of those whose policy says so."""

    def __init__(
        self,
        database: Database,
        admission: Admission,
        authenticator: Authenticator,
        backends: Mapping[str, Dispatcher],
        recorder: Recorder | None = None,
    ):
        self._database = database
        self._admission = admission
        self._authenticator = authenticator
        self._backends = backends
        self._recorder = recorder

    def offers(self) -> tuple[Offer, ...]:
        """What is plugged in, as the resolver sees it."""
        return tuple(
            Offer(
                backend=name,
                models=dispatcher.capabilities.models,
                words=dispatcher.capabilities.words,
                translate=dispatcher.capabilities.translate,
                streaming=dispatcher.capabilities.stream,
                languages=dispatcher.capabilities.languages,
                up=dispatcher.capabilities.up,
            )
            for name, dispatcher in self._backends.items()
        )

    async def policy(self, caller: Caller) -> Policy:
        """The tenant's policy in force now."""
        async with self._database.tenant(caller.tenant_id) as tx:
            return await current(tx, caller.tenant_id)

    async def explain(self, caller: Caller, demand: Demand) -> tuple[Policy, Decision]:
        """Which backends the demand would go to, and why; raises as the real thing would."""
        policy = await self.policy(caller)
        return policy, resolve(policy.body, demand, self.offers())

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
        self, lease: Lease, options: Options, samples: Samples, heard: Heard = ignore
    ) -> tuple[Transcript, Candidate]:
        """The first candidate that can; the next one only after a retryable failure that nobody has seen a word of."""
        spoken = False

        def note(segment: Segment) -> None:
            nonlocal spoken
            spoken = True
            heard(segment)

        failure: DispatchError = BackendUnavailable()
        for candidate in lease.decision.candidates:
            try:
                transcript = await self._backends[candidate.backend].transcribe(
                    samples, self._pinned(options, candidate, lease.tenant_id), note
                )
            except DispatchError as error:
                failure = error
                if spoken or not error.retryable or not lease.policy.body.fallback:
                    break
            else:
                return transcript, candidate
        raise failure

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
                lease, start, caller, bounded, audio, hang_up=hang_up, outlives=outlives
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
                lease, where, caller, bounded, audio, hang_up=hang_up, outlives=outlives
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
        hang_up: Callable[[], None],
        outlives: Outlives,
    ) -> AsyncIterator[Live]:
        candidate, summary, keep_text = lease.decision.candidates[0], where.summary, lease.policy.body.keep_transcripts
        dispatcher = self._plugged(candidate.backend)
        meter = Meter(
            lease,
            candidate,
            recheck=lambda: self._authenticator.recheck(caller),
            hang_up=hang_up,
            progress=lambda: summary.progress(keep_text=keep_text),
            from_ms=where.from_ms,
        )
        pinned = self._pinned(options, candidate, lease.tenant_id)
        ending: BaseException | None = None
        try:
            async with (
                self._taped(lease, meter.audio(audio), where.from_ms) as metered,
                dispatcher.stream(metered, pinned) as heard,
                merged(continued(heard, where.from_ms, where.announced), meter, summary) as events,
            ):
                origin = dispatcher.origin(candidate.model)
                yield Live(candidate, origin, pinned, events, summary, lease)
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

    def _plugged(self, backend: str) -> Dispatcher:
        """Raises `BackendUnavailable` where another process had what this one has not."""
        if backend not in self._backends:
            raise BackendUnavailable
        return self._backends[backend]

    def _pinned(self, options: Options, candidate: Candidate, tenant_id: UUID) -> Options:
        return replace(options, model=candidate.model, share=tenant_id.hex)


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
