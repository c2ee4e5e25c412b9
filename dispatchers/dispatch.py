"""The door. Every protocol, every job, every kind of audio goes through here, so policy cannot differ by transport.

resolve (which backends, why) → admit (quota, price, hold) → recognise (with fallback) → meter → settle
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from uuid import UUID

from dispatchers.errors import BackendUnavailable, DispatchError
from dispatchers.interface import (
    Dispatcher,
    Event,
    Final,
    Gap,
    Heard,
    Options,
    Origin,
    Samples,
    Segment,
    StreamInput,
    Transcript,
    Used,
    VadOptions,
    ignore,
    to_ms,
)
from dispatchers.meter import Meter
from dispatchers.recorder import Recorder
from policy.admission import Admission, Lease, Outcome
from policy.endpointing import settle
from policy.identity import Authenticator, Caller
from policy.policies import Policy, PolicyBody, current
from policy.resolve import Candidate, Decision, Demand, Offer, resolve
from runtime.database import Database, Transaction
from runtime.errors import StenogateError

EVENTS_BUFFERED = 256


@dataclass(frozen=True, slots=True)
class Result:
    """A recognised recording and its charge."""

    session_id: UUID
    transcript: Transcript
    candidate: Candidate
    billed_ms: int


@dataclass(slots=True)
class Summary:
    """What a live stream came to so far. `coverage`: the share of accepted audio, of all channels, not lost to gaps."""

    channels: int = 1
    accepted_ms: int = 0
    billed_ms: int = 0
    utterances: int = 0
    words: int = 0
    gap_ms: int = 0
    language: str | None = None
    texts: list[str] = field(default_factory=list)

    @property
    def coverage(self) -> float:
        return 1.0 if self.accepted_ms == 0 else max(0.0, 1.0 - self.gap_ms / (self.channels * self.accepted_ms))

    def note(self, event: Event) -> None:
        match event:
            case Final(text=text, language=language) if text:
                self.utterances += 1
                self.words += len(text.split())
                self.language = language
                self.texts.append(text)
            case Gap(start_ms=start, end_ms=end):
                self.gap_ms += end - start
            case Used(accepted_ms=accepted, billed_ms=billed):
                self.accepted_ms, self.billed_ms = accepted, billed
            case _:
                pass


@dataclass(frozen=True, slots=True)
class Live:
    """An open live stream. `summary` is complete once the door's context has been left."""

    session_id: UUID
    candidate: Candidate
    origin: Origin
    policy: Policy
    events: AsyncIterator[Event]
    summary: Summary


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
                up=True,
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
    ) -> AsyncIterator[Live]:
        """A live stream. The end of `audio` drains it; what was accepted is settled whatever happens inside. `hang_up`
        ends `audio` from this side, when the caller may not go on.

        Raises, from the event iterator and after the last final, the reason that ended the stream early
        (`BudgetExhausted`, `TenantSuspended`, `TokenExpired` …).
        """
        policy, decision = await self.explain(caller, demand)
        async with self._admission.admit(caller, demand, policy, decision) as lease:
            candidate = lease.decision.candidates[0]
            dispatcher = self._backends[candidate.backend]
            meter = Meter(lease, candidate, recheck=lambda: self._authenticator.recheck(caller), hang_up=hang_up)
            summary = Summary(channels=options.channels)
            pinned = self._pinned(_bounded(options, demand, policy.body), candidate, lease.tenant_id)
            ending: BaseException | None = None
            try:
                async with (
                    self._taped(lease, policy, meter.audio(audio)) as metered,
                    dispatcher.stream(metered, pinned) as events,
                    _merged(events, meter, summary) as merged,
                ):
                    origin = dispatcher.origin(candidate.model)
                    yield Live(lease.session_id, candidate, origin, policy, merged, summary)
            except BaseException as error:
                ending = error
                raise
            finally:
                outcome = _stream_outcome(summary, ending, keep_text=policy.body.keep_transcripts)
                receipt = await asyncio.shield(meter.finish(outcome))
                summary.accepted_ms, summary.billed_ms = receipt.accepted_ms, receipt.billed_ms

    @asynccontextmanager
    async def _taped(
        self, lease: Lease, policy: Policy, audio: AsyncIterator[StreamInput]
    ) -> AsyncIterator[AsyncIterator[StreamInput]]:
        """The audio, kept as it passes to the recogniser where the policy says so."""
        if self._recorder is None:
            yield audio
            return
        with self._recorder.taping(lease.tenant_id, lease.session_id, policy.body) as taped:
            yield taped(audio)

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


@asynccontextmanager
async def _merged(events: AsyncIterator[Event], meter: Meter, summary: Summary) -> AsyncIterator[AsyncIterator[Event]]:
    """The dispatcher's events and the meter's in one iterator, which ends by raising what ended the stream, if any."""
    queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue(EVENTS_BUFFERED)

    async def pump() -> None:
        async for event in events:
            await queue.put(event)
        await queue.put(meter.ended_by)

    async def guarded(work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as error:  # noqa: BLE001 — not swallowed: the consumer of the events raises it
            await queue.put(error)

    async def iterate() -> AsyncIterator[Event]:
        while (item := await queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            summary.note(item)
            yield item

    tasks = [asyncio.create_task(guarded(work)) for work in (pump, lambda: meter.run(queue.put))]
    try:
        yield iterate()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _stream_outcome(summary: Summary, ending: BaseException | None, *, keep_text: bool) -> Outcome:
    return Outcome(
        status="completed" if ending is None else "interrupted",
        code=ending.code if isinstance(ending, StenogateError) else None,
        engine=None,
        language=summary.language,
        utterances=summary.utterances,
        words=summary.words,
        text=" ".join(summary.texts) if keep_text else None,
    )
