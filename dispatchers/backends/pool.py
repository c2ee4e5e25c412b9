"""Many engines elsewhere as one backend: each piece of work goes where it would wait least, and to another engine when
that one fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace

import structlog

from dispatchers.backends.addresses import Lookup, look_up
from dispatchers.backends.choice import Ties, best
from dispatchers.backends.engine import origin_of
from dispatchers.backends.fleet import Fleet
from dispatchers.backends.member import PROBE_S, Member
from dispatchers.engine.wire import NEVER_HEARD, ModelCard, ModelStatus
from dispatchers.errors import (
    BackendError,
    BackendFailed,
    BackendUnavailable,
    DispatchError,
    EngineLost,
    Overloaded,
    Superseded,
    UnknownModel,
    UnsupportedOption,
)
from dispatchers.interface import (
    Capabilities,
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
from runtime.telemetry import ENGINE_FIGURES, ENGINE_RETRIES

log = structlog.get_logger()

ATTEMPTS = 3
"""Engines that one piece of work is given to, at most: audio that kills engines must not kill all of them."""
PAUSE_S = 0.25
"""Before an engine is asked again for what it failed at, where there is no other."""
RETRY_AFTER_S = 5.0
AT_ONCE = 256
MOST_WAITING = 4096

_RANK: dict[ModelStatus, int] = {
    **{"ready": 0, "loading": 1, "downloading": 2},
    **{"cached": 3, "available": 3, "failed": 4},
}


class EnginePool:
    """A batch dispatcher over the engines at these URLs (`http(s)://host:port`). A name is looked up again every few
    seconds, and each of its addresses is an engine of its own. `token` opens them; at most `at_once` pieces of work are
    with one of them. Use from one event loop; `start` comes first.

    A piece of work goes to the engine that is ready, has the model and would come to it first. What fails there is
    given to another: finals, and batch work of which nothing was heard, to three in all. Partials are not, and those of
    one stream stay with one engine. Where there is no engine, partials are refused, and the rest waits `patience_s`.
    An engine that fails again and again, or is much slower than the others, gets nothing for a while.
    """

    def __init__(
        self,
        engines: Sequence[str],
        *,
        token: str | None = None,
        look_up: Lookup = look_up,
        at_once: int = AT_ONCE,
        patience_s: float = 30.0,
    ) -> None:
        self._fleet = Fleet(engines, token=token, look_up=look_up, at_once=at_once)
        self._patience_s = patience_s
        self._ties = Ties()
        self._waiting = 0

    async def start(self) -> str:
        """Finds the engines; a note on how many are ready. Those that are not there yet may come later."""
        await self._fleet.start()
        ready = [member for member in self.members if member.ready]
        return f"{len(ready)} of {len(self.members)} engines are ready."

    @property
    def members(self) -> tuple[Member, ...]:
        """The engines there are, ready or not."""
        return self._fleet.members

    @property
    def up(self) -> bool:
        """Whether any engine takes work."""
        return self._fleet.up

    @property
    def wait_s(self) -> float:
        """About how long live work that came now would wait, on the engine where that is least; 0 where there is none,
        which `up` says."""
        return min((member.wait_s for member in self.members if member.takes_work), default=0.0)

    @property
    def capabilities(self) -> Capabilities:
        """Those of the first engine, for the models of all."""
        told = next((member.client.capabilities for member in self._told()), NEVER_HEARD.capabilities)
        return replace(told, models=tuple(card.name for card in self.catalogue()), up=self.up)

    def catalogue(self) -> tuple[ModelCard, ...]:
        """The models of all engines, each in its best state; the default of the first engine before the others."""
        told = self._told()
        cards: dict[str, ModelCard] = {}
        for member in told:
            for card in member.client.status.models:
                status: ModelStatus = "loading" if card.status == "ready" and not member.ready else card.status
                known = cards.setdefault(card.name, replace(card, status=status, default=False))
                if _RANK[status] < _RANK[known.status]:
                    cards[card.name] = replace(card, status=status, default=False)
        for default in [card.name for card in told[0].client.status.models if card.default] if told else []:
            cards = {default: replace(cards.pop(default), default=True), **cards}
        return tuple(cards.values())

    def origin(self, model: str) -> Origin:
        """See `Dispatcher.origin`. Raises `UnknownModel`, and `BackendUnavailable` before any engine has answered."""
        cards = self.catalogue()
        if not cards:
            raise self._nobody(model)
        return origin_of(cards, model)

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        """See `Dispatcher.transcribe`."""
        until = time.monotonic() + self._patience_s
        if options.urgency == "partial":
            return await self._partial(audio, replace(options, model=self.origin(options.model).model), heard)
        if not self._told():
            await self._wait(until, options.model, lambda: bool(self._told()))
        return await self._kept(audio, replace(options, model=self.origin(options.model).model), heard, until)

    def stream(
        self, audio: AsyncIterator[StreamInput], options: Options
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Not possible: raises `UnsupportedOption`. The segmenting adapter makes streams of this backend."""
        raise UnsupportedOption("The engines take whole recordings only.")

    async def tell_figures(self) -> None:
        """Fetches the engines' numbers for this process' metrics; without those of engines that do not answer."""

        async def figures(member: Member) -> tuple[str, str] | None:
            with suppress(DispatchError, TimeoutError):
                async with asyncio.timeout(PROBE_S):
                    return member.label, await member.client.figures()
            return None

        told = await asyncio.gather(*(figures(member) for member in self.members if member.ready))
        with suppress(ValueError):
            ENGINE_FIGURES.tell(dict(each for each in told if each is not None))

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._fleet.aclose()
        ENGINE_FIGURES.tell(None)

    # --- who does it ---

    async def _partial(self, audio: Samples, options: Options, heard: Heard) -> Transcript:
        with self._ties.tied(options.stream, options.model, self.members) as member:
            if member is None:
                raise self._nobody(options.model)
            try:
                return await self._ask(member, audio, options, heard)
            except EngineLost:
                if not self.up:
                    raise
                raise BackendFailed("The engine was lost. The next partial goes to another.") from None

    async def _kept(self, audio: Samples, options: Options, heard: Heard, until: float) -> Transcript:
        """Has it done by one engine after the other, as long as nobody has heard a word of it."""
        failed: list[Member] = []
        spoken = False

        def note(segment: Segment) -> None:
            nonlocal spoken
            spoken = heard is not ignore
            heard(segment)

        while True:
            member = await self._place(options.model, failed, until)
            try:
                return await self._ask(member, audio, options, note)
            except (BackendError, UnknownModel) as error:
                failed.append(member)
                if isinstance(error, Superseded) or spoken or len(failed) >= ATTEMPTS:
                    raise
                ENGINE_RETRIES.labels(error.code).inc()
                log.warning("engine.retry", engine=member.label, code=error.code)

    async def _ask(self, member: Member, audio: Samples, options: Options, heard: Heard) -> Transcript:
        try:
            return await member.transcribe(audio, options, heard)
        except BackendError as error:
            if not isinstance(error, Superseded | Overloaded):
                member.record.failed()
            raise
        finally:
            self._fleet.judge(member)
            if self._waiting:
                self._fleet.tell()

    async def _place(self, model: str, failed: Sequence[Member], until: float) -> Member:
        """The engine to ask, once there is one. Raises `BackendUnavailable` when that takes too long, `Overloaded`."""
        if (member := best(self.members, model, failed)) is None:
            if failed:
                await asyncio.sleep(PAUSE_S)
            await self._wait(until, model, lambda: best(self.members, model) is not None)
            member = best(self.members, model, failed) or best(self.members, model)
        assert member is not None  # noqa: S101 — it was waited for
        return member

    async def _wait(self, until: float, model: str, met: Callable[[], bool]) -> None:
        """Raises `Overloaded` when too many wait already, and what there is to say when it takes too long."""
        if self._waiting >= MOST_WAITING:
            raise Overloaded(retry_after_s=RETRY_AFTER_S)
        self._waiting += 1
        try:
            async with asyncio.timeout(until - time.monotonic()):
                while not met():
                    await self._fleet.news()
        except TimeoutError:
            raise self._nobody(model) from None
        finally:
            self._waiting -= 1

    def _nobody(self, model: str) -> BackendError:
        """Why none takes it."""
        if any(member.takes_work and member.estimate_s(model) is not None for member in self.members):
            return Overloaded(retry_after_s=max(1.0, self.wait_s))
        what = "that has the model is ready" if self.up else "is ready"
        return BackendUnavailable(f"No engine {what}. Try again shortly.", retry_after_s=RETRY_AFTER_S)

    def _told(self) -> list[Member]:
        """Those that have said what they have, the ready ones first."""
        told = [member for member in self.members if member.client.status.models]
        return sorted(told, key=lambda member: not member.ready)
