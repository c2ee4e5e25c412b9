"""A backend as it is plugged into the door: what it can do, whether it can be asked, and who is using it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID

from dispatchers.adapters.tallied import Tallied, Tally
from dispatchers.health import Breaker
from dispatchers.interface import Capabilities, Dispatcher
from policy.resolve import Offer

DOWN = "The backend is down."


@dataclass(eq=False)
class Plug:
    """`backend` is the policy's name for it, `region` where its audio goes. `segmented` makes a stream of a recogniser
    that only takes whole recordings; `credential_id` is the account used; `ready` says whether one without a breaker is
    there, `back_in_s` when about it is again."""

    backend: str
    recogniser: Dispatcher
    kind: Literal["self_hosted", "relay"] = "self_hosted"
    region: str | None = None
    segmented: Callable[[Dispatcher], Dispatcher] | None = None
    credential_id: UUID | None = None
    breaker: Breaker | None = None
    ready: Callable[[], bool] = lambda: True
    back_in_s: Callable[[], float | None] = lambda: None
    used: bool = False
    _users: int = 0
    _free: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def up(self) -> bool:
        up = self.ready() if self.breaker is None else self.breaker.up
        return up and self.recogniser.capabilities.up

    @property
    def partials(self) -> bool:
        """Utterances cut out for a provider are not sent again and again while they are spoken: each time is charged
        for."""
        return self.recogniser.capabilities.partials

    def offer(self) -> Offer:
        """What it can do, as the resolver sees it."""
        able: Capabilities = self.recogniser.capabilities
        breaker = self.breaker
        return Offer(
            backend=self.backend,
            models=able.models,
            words=able.words,
            translate=able.translate,
            streaming=able.stream or self.segmented is not None,
            languages=able.languages,
            up=self.up,
            kind=self.kind,
            region=self.region,
            speakers=able.speakers,
            longest_ms=able.longest_ms,
            why_down=DOWN if breaker is None else breaker.why_down,
            back_in_s=self.back_in_s() if breaker is None else breaker.retry_after_s,
        )

    def tallied(self, tally: Tally, *, stream: bool) -> Dispatcher:
        """The recogniser; what is sent to it is counted."""
        counted = Tallied(self.recogniser, tally)
        if stream and self.segmented is not None and not counted.capabilities.stream:
            return self.segmented(counted)
        return counted

    @contextmanager
    def using(self) -> Iterator[None]:
        """It is not closed meanwhile."""
        self.used = True
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._free.set()

    async def close(self) -> None:
        """Once nobody uses it any more."""
        while self._users:
            self._free.clear()
            await self._free.wait()
        await self.recogniser.aclose()
