"""The door. Every protocol, every job, every kind of audio goes through here, so policy cannot differ by transport.

resolve (which backends, why) → admit (quota, price, hold) → recognise (with fallback) → meter → settle
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TypeAlias
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
    ignore,
    to_ms,
)
from dispatchers.later import continued
from dispatchers.meter import Meter
from policy.admission import Admission, Lease, Outcome
from policy.errors import TakenOver
from policy.identity import Authenticator, Caller
from policy.policies import Policy, current
from policy.resolve import Candidate, Decision, Demand, Offer, resolve
from policy.sessions import Progress
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
    """What a live stream came to so far. `coverage` is the share of accepted audio not lost to gaps."""

    accepted_ms: int = 0
    billed_ms: int = 0
    utterances: int = 0
    words: int = 0
    gap_ms: int = 0
    language: str | None = None
    texts: list[str] = field(default_factory=list)

    def progress(self, *, keep_text: bool) -> Progress:
        """For the session's row."""
        text = " ".join(self.texts) if keep_text else None
        return Progress(language=self.language, utterances=self.utterances, words=self.words, text=text)

    @property
    def coverage(self) -> float:
        return 1.0 if self.accepted_ms == 0 else max(0.0, 1.0 - self.gap_ms / self.accepted_ms)

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
    """An open live stream. `summary` is complete once the door's context has been left. `lease` says whether it is ours
    still."""

    session_id: UUID
    candidate: Candidate
    origin: Origin
    policy: Policy
    events: AsyncIterator[Event]
    summary: Summary
    lease: Lease


@dataclass(frozen=True, slots=True)
class Continuation:
    """Where a stream of another process is taken up: the session's `turn` there, the position on its clock from which
    audio comes, how many utterances were announced, and what it came to."""

    session_id: UUID
    turn: int
    from_ms: int
    announced: int
    summary: Summary


Outlives: TypeAlias = Callable[[BaseException], bool]
"""Whether a session is left open, for another process to take up, when this ended its stream here."""


class Door:
    """Assembled once a process, over the backends plugged in here, keyed by policy's names for them."""

    def __init__(
        self,
        database: Database,
        admission: Admission,
        authenticator: Authenticator,
        backends: Mapping[str, Dispatcher],
    ):
        self._database = database
        self._admission = admission
        self._authenticator = authenticator
        self._backends = backends

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
        outlives: Outlives = lambda _: False,
    ) -> AsyncIterator[Live]:
        """A live stream. The end of `audio` drains it; what was accepted is settled whatever happens inside. `hang_up`
        ends `audio` from this side, when the caller may not go on.

        Raises, from the event iterator and after the last final, the reason that ended the stream early
        (`BudgetExhausted`, `TenantSuspended`, `TokenExpired`, `TakenOver` …).
        """
        policy, decision = await self.explain(caller, demand)
        async with self._admission.admit(caller, demand, policy, decision) as lease:
            start = Continuation(lease.session_id, lease.turn, 0, 0, Summary())
            async with self._streaming(
                lease, start, caller, options, audio, hang_up=hang_up, outlives=outlives
            ) as live:
                yield live

    @asynccontextmanager
    async def resumed(
        self,
        caller: Caller,
        where: Continuation,
        options: Options,
        audio: AsyncIterator[StreamInput],
        *,
        hang_up: Callable[[], None],
        outlives: Outlives = lambda _: False,
    ) -> AsyncIterator[Live]:
        """The same for one that another process has left, or is now made to leave."""
        async with (
            self._admission.resumed(caller, where.session_id, where.turn) as lease,
            self._streaming(lease, where, caller, options, audio, hang_up=hang_up, outlives=outlives) as live,
        ):
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
        candidate, policy, summary = lease.decision.candidates[0], lease.policy, where.summary
        dispatcher = self._plugged(candidate.backend)
        keep_text = policy.body.keep_transcripts
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
                dispatcher.stream(meter.audio(audio), pinned) as heard,
                _merged(continued(heard, where.from_ms, where.announced), meter, summary) as merged,
            ):
                origin = dispatcher.origin(candidate.model)
                yield Live(lease.session_id, candidate, origin, policy, merged, summary, lease)
        except BaseException as error:
            ending = error
            raise
        finally:
            outcome = _stream_outcome(summary, ending, keep_text=keep_text)
            if left := ending is not None and outlives(ending):
                lease.detach()
            with suppress(TakenOver):  # then nothing of it is ours to settle any more
                receipt = await asyncio.shield(meter.leave(outcome.code) if left else meter.finish(outcome))
                summary.accepted_ms, summary.billed_ms = receipt.accepted_ms, receipt.billed_ms

    def _plugged(self, backend: str) -> Dispatcher:
        """Raises `BackendUnavailable` where another process had what this one has not."""
        if backend not in self._backends:
            raise BackendUnavailable
        return self._backends[backend]

    def _pinned(self, options: Options, candidate: Candidate, tenant_id: UUID) -> Options:
        return replace(options, model=candidate.model, share=tenant_id.hex)


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
        text=summary.progress(keep_text=keep_text).text,
    )
