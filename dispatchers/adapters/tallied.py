"""What a provider was sent, and what it will charge for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from dispatchers.errors import (
    AudioError,
    BackendRefused,
    BackendUnavailable,
    CredentialRefused,
    OptionError,
    Overloaded,
    Superseded,
    Throttled,
)
from dispatchers.interface import (
    Capabilities,
    Dispatcher,
    Event,
    Heard,
    Options,
    Origin,
    Pcm,
    Samples,
    StreamInput,
    Transcript,
    ignore,
    to_ms,
)

FREE = (
    *(BackendUnavailable, Throttled, CredentialRefused, BackendRefused),
    *(Overloaded, Superseded, OptionError, AudioError),
)
"""Failures of requests that were never worked on, which no provider charges for. Whoever was still waiting for an
answer, or got one that cannot be read, pays for it."""


@dataclass(slots=True)
class Tally:
    """Samples, of all channels together. `charged`: those the provider charges for, its minimum included."""

    sent: int = 0
    charged: int = 0

    @property
    def audio_ms(self) -> int:
        return to_ms(self.sent)

    @property
    def charged_ms(self) -> int:
        return to_ms(self.charged)


class Tallied:
    """The dispatcher within; what it is sent is counted in `tally`."""

    def __init__(self, within: Dispatcher, tally: Tally):
        self._within = within
        self._tally = tally
        self._least = within.capabilities.least_billed_ms * 16

    @property
    def capabilities(self) -> Capabilities:
        return self._within.capabilities

    def origin(self, model: str) -> Origin:
        return self._within.origin(model)

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        charge = max(len(audio), self._least)
        self._tally.sent += len(audio)
        self._tally.charged += charge
        try:
            return await self._within.transcribe(audio, options, heard)
        except FREE:
            self._tally.charged -= charge
            raise

    def stream(
        self, audio: AsyncIterator[StreamInput], options: Options
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        return self._within.stream(self._counted(audio), options)

    async def aclose(self) -> None:
        await self._within.aclose()

    async def _counted(self, audio: AsyncIterator[StreamInput]) -> AsyncIterator[StreamInput]:
        async for item in audio:
            if isinstance(item, Pcm):
                self._tally.sent += item.samples.size
                self._tally.charged += item.samples.size
            yield item
