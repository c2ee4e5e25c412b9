"""How a live session is heard: what it received goes through the door, and what comes of it into the record.

Whatever ends the session ends its input only: what was heard is still transcribed, told and settled, within a deadline;
then comes the reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import structlog

from dispatchers.audio.segment import TAIL
from dispatchers.audio.vad import FRAME
from dispatchers.dispatch import Door
from dispatchers.errors import AudioError, BackendTimeout
from dispatchers.interface import SAMPLES_PER_MS, Event, Final, Gap, Pcm, StreamInput, to_ms
from dispatchers.streaming import Live
from gateway.errors import close_code, known
from gateway.live.codec import Codec, Setup
from gateway.live.endings import OUR_FAULT, admitted
from gateway.live.frames import Restarting, SessionTooLong
from gateway.live.intake import Intake
from gateway.live.latency import Latency
from gateway.live.legacy import Keeper, Legacy
from gateway.live.record import Record
from policy.errors import TakenOver
from policy.identity import Caller
from runtime.coordination import Coordination
from runtime.errors import StenogateError
from runtime.telemetry import FINAL_SECONDS, FIRST_PARTIAL_SECONDS, STREAM_SECONDS, UNTOLD_PARTIALS, UTTERANCES

DRAIN_S = 120.0


class Hearing:
    """One session's. `resume_s`: for how long somebody may come back to it; `legacy`: it was another process's."""

    def __init__(
        self,
        codec: Codec,
        setup: Setup,
        caller: Caller,
        coordination: Coordination,
        *,
        resume_s: float,
        legacy: Legacy | None,
    ):
        self.live: Live | None = None
        self.decided = asyncio.Event()  # whether this session was let in, and how long it may be
        self.until = 0.0  # on the loop's clock
        self.ended = False
        self.ending: StenogateError | None = None
        self.keeper: Keeper | None = None
        self.answered_ms = 0 if legacy is None else legacy.from_ms
        self.intake = Intake(setup.wire, self.answered_ms)
        self.latency = Latency()
        self.record = Record(keep=resume_s > 0)
        if legacy is not None:
            self.record.go_on(legacy.last_seq, [entry.message for entry in legacy.missed])
        self._codec = codec
        self._setup = setup
        self._caller = caller
        self._coordination = coordination
        self._resume_s = resume_s
        self._legacy = legacy
        self._longest_ms = 0
        self._over = False
        self._deadline: asyncio.Timeout | None = None
        self._loop = asyncio.get_running_loop()

    async def run(self, door: Door) -> Live:
        """From admission to the last event and its settling. Raises what refused or ended it."""
        from_ms = self.answered_ms
        try:
            async with self._admitted(door) as live, self._kept(live):
                structlog.contextvars.bind_contextvars(session_id=str(live.session_id))
                self.live = live
                self._longest_ms = max(0, live.policy.body.max_stream_ms - from_ms)
                self.until = self._loop.time() + self._longest_ms / 1000
                self.decided.set()
                await self._pass_on(live)
                if self.ending is not None:
                    raise self.ending
        finally:
            self._over = True
            STREAM_SECONDS.labels(self._codec.name).inc((self.intake.taken_ms - from_ms) / 1000)
        return live

    def _admitted(self, door: Door) -> AbstractAsyncContextManager[Live]:
        setup, hang_up = self._setup, self.intake.end
        if self._legacy is None:
            return door.stream(
                self._caller, setup.demand, setup.options, self._audio(), hang_up=hang_up, outlives=self.outlives
            )
        return door.resumed(
            self._caller,
            self._legacy.continuation(),
            setup.demand,
            setup.options,
            self._audio(),
            hang_up=hang_up,
            outlives=self.outlives,
        )

    @asynccontextmanager
    async def _kept(self, live: Live) -> AsyncIterator[None]:
        """What a successor needs is kept meanwhile, and forgotten when there can be none. Where no transcript may be
        kept, neither is this. Channels heard each for itself have no common point to go on from."""
        if not self._resume_s or not live.policy.body.keep_transcripts or live.options.channels > 1:
            yield
            return
        self.keeper = keeper = Keeper.of(
            self._coordination, live.lease, self._codec.opening(), self._legacy, window_s=self._resume_s
        )
        watch = asyncio.create_task(self._watch(keeper, live))
        try:
            yield
        except BaseException as ending:
            if not self.outlives(ending):
                self.keeper = None
                await keeper.close()
            raise
        else:
            self.keeper = None
            await keeper.close()
        finally:
            watch.cancel()

    async def _watch(self, keeper: Keeper, live: Live) -> None:
        try:
            await keeper.watch(live.lease.check)
        except TakenOver as error:  # nobody hears us any more
            self.end(error)
            if self._deadline is not None:
                self._deadline.reschedule(self._loop.time())

    def outlives(self, ending: BaseException) -> bool:
        """Whether another process may go on with what this has ended: a deploy, or our own fault."""
        if self.keeper is None or self.keeper.away:
            return False
        if isinstance(ending, Exception) and not isinstance(ending, Restarting):
            return close_code(known(ending)) == OUR_FAULT
        return self.keeper.shared

    def end(self, reason: StenogateError | None) -> None:
        """No more input. The first reason counts; what was heard has `DRAIN_S` to become text."""
        if self._over:
            return
        self.ended = True
        self.ending = self.ending or reason
        self.intake.end()
        if self._deadline is not None and self._deadline.when() is None:
            self._deadline.reschedule(self._loop.time() + DRAIN_S)

    async def _audio(self) -> AsyncIterator[StreamInput]:
        """What the recogniser pulls: everything received, up to the longest session."""
        await self.decided.wait()
        room = self._longest_ms * SAMPLES_PER_MS
        try:
            async for item in self.intake.items():
                if isinstance(item, Pcm):
                    if len(item.samples) > room:
                        yield Pcm(item.samples[:room])
                        self.end(SessionTooLong())
                        return
                    room -= len(item.samples)
                yield item
        except AudioError as error:  # what could be decoded before is answered
            self.end(error)

    async def _pass_on(self, live: Live) -> None:
        """Every event to its end. Raises `BackendTimeout` when the end does not come."""
        try:
            async with asyncio.timeout(DRAIN_S if self.ended else None) as self._deadline:
                async for event in live.events:
                    if self._is_cut_off(live, event):
                        continue
                    self._note(event)
                    await self._pass(event)
        except TimeoutError:
            raise (self.ending if isinstance(self.ending, TakenOver) else None) or BackendTimeout() from None
        except Exception as exc:  # noqa: BLE001 — inside the door it must be one of ours, which it records
            raise admitted(exc) from None
        finally:
            self.ended, self._deadline = True, None

    async def _pass(self, event: Event) -> None:
        message = self._codec.event(event)
        if message is None:
            return
        before = None
        if self.keeper is not None:
            before = partial(self.keeper.note, event, message, self.intake.taken_ms)
        try:
            await self.record.say(message, before=before)
        except StenogateError as error:  # it does not read: the record is finished without it
            self.end(error)

    def _is_cut_off(self, live: Live, event: Event) -> bool:
        """An utterance that ended only because we leave. Whoever goes on with the session hears it whole, so the client
        hears nothing of it from us; its text is in the session's row, should nobody go on."""
        if not isinstance(event, Final) or not isinstance(self.ending, Restarting) or not self.outlives(self.ending):
            return False
        after_ms = self.intake.taken_ms - event.end_ms
        return after_ms < live.options.vad.silence_ms - to_ms(TAIL - FRAME)

    def _note(self, event: Event) -> None:
        match self.latency.note(event, self._loop.time()):
            case "first_partial", ms:
                FIRST_PARTIAL_SECONDS.observe(ms / 1000)
            case "final", ms:
                FINAL_SECONDS.observe(ms / 1000)
        if isinstance(event, Final):
            UTTERANCES.inc()
            UNTOLD_PARTIALS.labels("coalesced").inc(event.coalesced)
            UNTOLD_PARTIALS.labels("dropped").inc(event.dropped)
        if isinstance(event, Final | Gap):
            self.answered_ms = max(self.answered_ms, event.end_ms)
