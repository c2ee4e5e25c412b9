"""A session's way through its candidates: who is asked, who is asked next, and what each attempt was.

The order and the permission to fall back are the policy's decision, which the lease holds. What each attempt took is
noted with the lease as a leg; who serves a stream from which moment on is told to whoever bills it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

from dispatchers.adapters.failover import failover
from dispatchers.adapters.per_channel import per_channel
from dispatchers.adapters.tallied import Tally
from dispatchers.errors import AudioError, BackendUnavailable, DispatchError, OptionError
from dispatchers.interface import (
    SAMPLE_RATE,
    Dispatcher,
    Event,
    Heard,
    Options,
    Origin,
    Samples,
    Segment,
    StreamInput,
    Transcript,
    ignore,
)
from dispatchers.plug import Plug
from dispatchers.registry import Registry
from policy.admission import Lease
from policy.legs import Leg as Row
from policy.resolve import Candidate
from runtime.errors import StenogateError
from runtime.ids import uuid7
from runtime.telemetry import FAILOVERS, FAILOVERS_REFUSED, LEG_SECONDS, LEGS

COMPLETED = "completed"
CANCELLED = "cancelled"
LONGEST_S = 60.0
"""A recording is not tried elsewhere later than this, and its own length, after it came."""


@dataclass(eq=False)
class Leg:
    """One attempt under way. `outcome` is what its row will say."""

    candidate: Candidate
    plug: Plug
    dispatcher: Dispatcher
    share: str
    others: bool
    outcome: str = COMPLETED
    _leave: Callable[[], None] | None = field(default=None)

    def options(self, asked: Options) -> Options:
        """What this backend can be asked of it."""
        return replace(
            asked,
            model=self.candidate.model,
            share=self.share,
            partials=asked.partials and (self.plug.partials or self.plug.kind == "self_hosted"),
            give_up=self.others,
        )

    def when_withdrawn(self, leave: Callable[[], None]) -> None:
        self._leave = leave

    def withdraw(self) -> None:
        """The backend may not be used any more."""
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


class Route:
    """Of one session, whose audio begins at `from_ms` here. `candidates` are those allowed now, in order."""

    def __init__(self, registry: Registry, lease: Lease, candidates: tuple[Candidate, ...], *, from_ms: int = 0):
        self.candidates = candidates
        self.from_ms = from_ms
        self._registry = registry
        self._lease = lease
        self._served: list[tuple[int, Candidate]] = []  # from where on, and by whom
        self._legs: set[Leg] = set()

    # --- recordings ---

    async def transcribe(self, options: Options, samples: Samples, heard: Heard) -> tuple[Transcript, Candidate]:
        """The first candidate that can; the next one only after a failure that another need not have, of which nobody
        has seen a word, while there is time, and not too often. Who cannot do what is asked has not failed: what is
        raised is the failure of another, if there was one."""
        spoken = False

        def note(segment: Segment) -> None:
            nonlocal spoken
            spoken = True
            heard(segment)

        told = ignore if heard is ignore else note  # backends do more for who listens
        failure: DispatchError | None = None
        until = time.monotonic() + LONGEST_S + len(samples) / SAMPLE_RATE
        for candidate in self.candidates:
            plug = self.plug(candidate)
            if plug is None or (not plug.up and candidate is not self.candidates[-1]):
                failure = failure or BackendUnavailable()
                continue
            budget = self._registry.budget(candidate.backend)
            budget.asked()
            try:
                with self.leg(candidate, plug, self.from_ms) as leg:
                    transcript = await leg.dispatcher.transcribe(samples, leg.options(options), told)
            except DispatchError as error:
                unable = isinstance(error, OptionError | AudioError)
                failure = failure if failure is not None and unable else error
                if spoken or not error.elsewhere or time.monotonic() > until:
                    break
                if unable:
                    continue
                if candidate is not self.candidates[-1] and not budget.take():
                    FAILOVERS_REFUSED.labels(candidate.backend).inc()
                    break
                if candidate is not self.candidates[-1]:
                    FAILOVERS.labels(candidate.backend, "recording").inc()
            else:
                return transcript, candidate
        raise failure or BackendUnavailable()

    # --- streams ---

    def first(self) -> tuple[Candidate, Origin]:
        """Who is asked first, as far as can be told. Raises `BackendUnavailable`."""
        for candidate in self.candidates:
            if (plug := self.plug(candidate)) is not None and (plug.up or candidate is self.candidates[-1]):
                return candidate, plug.recogniser.origin(candidate.model)
        raise BackendUnavailable

    @asynccontextmanager
    async def stream(self, audio: AsyncIterator[StreamInput], options: Options) -> AsyncIterator[AsyncIterator[Event]]:
        """The stream's events, whoever makes them. One that only this installation's engine can serve is put to it
        directly: the engine looks after its own."""
        first, _ = self.first()
        plug = self.plug(first)
        if plug is not None and plug.kind == "self_hosted" and len(self.candidates) == 1:
            with self.leg(first, plug, self.from_ms, stream=True) as leg:
                async with per_channel(leg.dispatcher.stream, audio, leg.options(options)) as events:
                    yield _noted(events, leg)
        else:
            async with per_channel(partial(failover, lambda: _Way(self)), audio, options) as events:
                yield events

    def served(self, start_ms: int, end_ms: int) -> list[tuple[int, Candidate]]:
        """Who served `[start_ms, end_ms)` of the stream, one after the other: each up to where."""
        turns = [*self._served, (end_ms, self.serving)]
        ends = [(min(until, end_ms), candidate) for (_, candidate), (until, _) in pairwise(turns)]
        return [(until, candidate) for until, candidate in ends if until > start_ms] or [(end_ms, self.serving)]

    @property
    def serving(self) -> Candidate:
        """Who serves the stream now."""
        return self._served[-1][1] if self._served else self.candidates[0]

    def allow(self, candidates: tuple[Candidate, ...]) -> None:
        """From now on only these; whoever is not among them is left."""
        self.candidates = candidates
        for leg in tuple(self._legs):
            if leg.candidate not in candidates:
                leg.withdraw()

    # --- legs ---

    def plug(self, candidate: Candidate) -> Plug | None:
        return self._registry.plug(self._lease.tenant_id, candidate.backend)

    def others(self, candidate: Candidate) -> bool:
        """Whether somebody else could take up what this one lets go of."""
        rest = (self.plug(other) for other in self.candidates if other.backend != candidate.backend)
        return any(plug is not None and plug.up for plug in rest)

    @contextmanager
    def leg(self, candidate: Candidate, plug: Plug, start_ms: int, *, stream: bool = False) -> Iterator[Leg]:
        """An attempt. However it ends, it is noted."""
        tally, began = Tally(), time.monotonic()
        dispatcher = plug.tallied(tally, stream=stream)
        leg = Leg(candidate, plug, dispatcher, self._lease.tenant_id.hex, stream and self.others(candidate))
        self._legs.add(leg)
        if stream and (not self._served or self.serving is not candidate):
            before_ms = self._served[-1][0] if self._served else 0
            self._served.append((max(start_ms, before_ms), candidate))
        try:
            with plug.using():
                yield leg
        except asyncio.CancelledError:
            leg.outcome = CANCELLED
            raise
        except BaseException as error:
            leg.outcome = error.code if isinstance(error, StenogateError) else StenogateError.code
            raise
        finally:
            self._legs.discard(leg)
            took_s = time.monotonic() - began
            LEGS.labels(plug.backend, leg.outcome).inc()
            if not stream:
                LEG_SECONDS.labels(plug.backend).observe(took_s)
            self._lease.note_leg(
                Row(
                    uuid7(),
                    candidate.backend,
                    candidate.model,
                    plug.credential_id,
                    leg.outcome,
                    start_ms,
                    tally.audio_ms,
                    tally.charged_ms,
                    round(1000 * took_s),
                )
            )


class _Way:
    """One channel's way. Who failed is not asked again for the same audio, unless there is nobody else: then once."""

    def __init__(self, route: Route):
        self._route = route
        self._last: Candidate | None = None
        self._failed: list[str] = []  # at the audio from here on
        self._start_ms = -1

    def next_leg(self, start_ms: int) -> AbstractContextManager[Leg] | None:
        """See `dispatchers.adapters.failover.Way`."""
        if start_ms > self._start_ms:
            self._failed.clear()
        self._start_ms = start_ms
        if self._last is not None:
            self._failed.append(self._last.backend)
        ready = [candidate for candidate in self._route.candidates if self._is_up(candidate)]
        fresh = [candidate for candidate in ready if candidate.backend not in self._failed]
        again = [candidate for candidate in ready if self._failed.count(candidate.backend) == 1]
        candidate = next(iter(fresh or again), None)
        plug = None if candidate is None else self._route.plug(candidate)
        if candidate is None or plug is None:
            return None
        if self._last is not None and self._last != candidate:
            FAILOVERS.labels(self._last.backend, "stream").inc()
        self._last = candidate
        return self._route.leg(candidate, plug, self._route.from_ms + start_ms, stream=True)

    def _is_up(self, candidate: Candidate) -> bool:
        plug = self._route.plug(candidate)
        return plug is not None and plug.up


async def _noted(events: AsyncIterator[Event], leg: Leg) -> AsyncIterator[Event]:
    try:
        async for event in events:
            yield event
    except StenogateError as error:
        leg.outcome = error.code
        raise
