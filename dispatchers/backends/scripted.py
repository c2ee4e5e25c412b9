"""A recogniser that reads from a script: no model, no waiting, the same answer every time.

For the tests of whatever stands on a dispatcher, here and in other people's projects.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import cycle, islice

from dispatchers.errors import DispatchError, UnknownModel, UnsupportedOption
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
    Word,
    ignore,
    to_ms,
)

MODEL = "scripted"
_SCRIPT = ("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog")
_WORDS_IN_SEGMENT = 8


class Scripted:
    """Says one word of `script` for each `word_ms` of audio, starting over when it is used up.

    Told to `fail`, it raises that error instead, after `fail_after` segments. `delay_s` is how long each segment takes.
    Batch only; `dispatchers.adapters.segmenting` makes it a stream.
    """

    def __init__(
        self,
        script: Sequence[str] = _SCRIPT,
        *,
        word_ms: int = 400,
        delay_s: float = 0.0,
        fail: type[DispatchError] | None = None,
        fail_after: int = 0,
    ):
        self._script = tuple(script)
        self._word_ms = word_ms
        self._delay_s = delay_s
        self._fail = fail
        self._fail_after = fail_after

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(words=True, translate=True, prompt=True, models=(MODEL,))

    def origin(self, model: str) -> Origin:
        if model not in ("", MODEL):
            raise UnknownModel(param="model")
        return Origin("scripted", "scripted", MODEL)

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        origin = self.origin(options.model)
        segments: list[Segment] = []
        for segment in self._segments(to_ms(len(audio)), options.words):
            if self._fail is not None and len(segments) == self._fail_after:
                raise self._fail
            await asyncio.sleep(self._delay_s)
            segments.append(segment)
            heard(segment)
        if self._fail is not None:
            raise self._fail
        return Transcript(
            text=" ".join(segment.text for segment in segments),
            language=options.language or "en",
            duration_ms=to_ms(len(audio)),
            segments=tuple(segments),
            origin=origin,
            task=options.task,
        )

    def stream(
        self, audio: AsyncIterator[StreamInput], options: Options
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        raise UnsupportedOption("This backend does not stream.")

    async def aclose(self) -> None:
        """Nothing to close."""

    def _segments(self, duration_ms: int, with_words: bool) -> Iterator[Segment]:
        said = list(islice(cycle(self._script), duration_ms // self._word_ms))
        for first in range(0, len(said), _WORDS_IN_SEGMENT):
            texts = said[first : first + _WORDS_IN_SEGMENT]
            yield Segment(
                first * self._word_ms,
                (first + len(texts)) * self._word_ms,
                " ".join(texts),
                words=tuple(self._word(at, text) for at, text in enumerate(texts, first)) if with_words else (),
            )

    def _word(self, at: int, text: str) -> Word:
        return Word(text, at * self._word_ms, (at + 1) * self._word_ms, confidence=1.0)
