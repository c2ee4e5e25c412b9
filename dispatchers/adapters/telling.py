"""What a stream tells of its utterances."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from dispatchers.adapters.outbox import Outbox
from dispatchers.adapters.utterance import Utterance
from dispatchers.interface import Event, SpeechStarted, Transcript


class Telling:
    """One utterance's events go out together, and none after its last. No word waits for agreement longer than
    `max_delay_ms`, on the stream's clock; None: as long as it takes."""

    def __init__(self, out: Outbox, max_delay_ms: int | None):
        self._out = out
        self._max_delay_ms = max_delay_ms
        self._open: list[Utterance] = []
        self._telling = asyncio.Lock()

    async def begin(self, utterance: Utterance) -> None:
        """It is announced."""
        self._open.append(utterance)
        await self._out.put(SpeechStarted(utterance.number, utterance.start_ms))

    async def suppose(self, utterance: Utterance, transcript: Transcript, start_ms: int, end_ms: int) -> None:
        """Tells a hypothesis, unless the utterance is over."""
        async with self._telling:
            if utterance in self._open:
                await self._out.put(*utterance.hypothesis(transcript, start_ms, end_ms))

    async def hurry(self, now_ms: int) -> None:
        """Tells what has waited long enough; also of utterances that have ended, as their answers may be late."""
        if self._max_delay_ms is None:
            return
        for utterance in tuple(self._open):
            async with self._telling:
                if utterance in self._open:
                    await self._out.put(*utterance.overdue(now_ms - self._max_delay_ms))

    async def end(self, utterance: Utterance, last: Callable[[], Iterable[Event]] = tuple) -> None:
        """`last` gives its last events, now that nothing more can come between."""
        async with self._telling:
            self._open.remove(utterance)
            await self._out.put(*last())
