"""The next recogniser when one fails."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager

from dispatchers.errors import DispatchError, UnsupportedOption
from dispatchers.interface import (
    Capabilities,
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


class Fallback:
    """Asks `legs` in order, moving on only when an error is `retryable` and nothing has been heard yet: what was once
    said to the caller is never said again by another. The last leg's error is the answer when all fail.

    A stream goes to the first leg that can stream; it does not yet move on to another when that leg fails.
    """

    def __init__(self, legs: Sequence[Dispatcher]):
        if not legs:
            raise ValueError("a fallback needs at least one dispatcher")
        self._legs = tuple(legs)

    @property
    def capabilities(self) -> Capabilities:
        """What every leg can do, whichever comes to answer; `batch`, `stream` and `partials` if any can."""
        each = [leg.capabilities for leg in self._legs]
        limited = [one.languages for one in each if one.languages is not None]
        return Capabilities(
            batch=any(one.batch for one in each),
            stream=any(one.stream for one in each),
            partials=any(one.stream and one.partials for one in each),
            words=all(one.words for one in each),
            translate=all(one.translate for one in each),
            speakers=all(one.speakers for one in each),
            prompt=all(one.prompt for one in each),
            languages=frozenset.intersection(*limited) if limited else None,
            models=tuple(model for model in each[0].models if all(model in one.models for one in each)),
        )

    def origin(self, model: str) -> Origin:
        """The first leg's: who is asked first. A transcript names who answered."""
        return self._legs[0].origin(model)

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        spoken = False

        def hear(segment: Segment) -> None:
            nonlocal spoken
            spoken = True
            heard(segment)

        for leg in self._legs[:-1]:
            try:
                return await leg.transcribe(audio, options, hear)
            except DispatchError as failure:
                if spoken or not failure.retryable:
                    raise
        return await self._legs[-1].transcribe(audio, options, hear)

    def stream(
        self, audio: AsyncIterator[StreamInput], options: Options
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        for leg in self._legs:
            if leg.capabilities.stream:
                return leg.stream(audio, options)
        raise UnsupportedOption("This backend does not stream.")

    async def aclose(self) -> None:
        for leg in self._legs:
            await leg.aclose()
