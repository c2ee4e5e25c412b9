"""One utterance's text as it goes out: hypotheses, then the final."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dispatchers.adapters.credence import confidence, credible, shifted
from dispatchers.audio.stabilise import Stabiliser, normal
from dispatchers.interface import Delta, Event, Final, Partial, Transcript


@dataclass(eq=False, slots=True)
class Utterance:
    """`coalesced` and `dropped` are its untold partials (see `Final`); a hypothesis with a mean log probability
    `unsure_below` this has to be heard more often. Times are in ms of the stream."""

    number: int
    start_ms: int = 0
    unsure_below: float = -math.inf
    coalesced: int = 0
    dropped: int = 0
    _stabiliser: Stabiliser = field(init=False)
    _heard_until_ms: int = field(init=False)

    def __post_init__(self) -> None:
        self._stabiliser = Stabiliser(self.start_ms)
        self._heard_until_ms = self.start_ms

    def hypothesis(self, transcript: Transcript, start_ms: int, end_ms: int) -> list[Event]:
        """What a transcript of the utterance so far gives to tell."""
        segments = [segment for segment in transcript.segments if credible(segment)]
        text = normal(" ".join(segment.text for segment in segments))
        if not text:
            return []
        unsure = any(segment.avg_logprob < self.unsure_below for segment in segments)
        delta, stable, shown = self._stabiliser.partial(text, end_ms, unsure=unsure)
        self._heard_until_ms = end_ms
        partial = Partial(self.number, shown, stable, start_ms, end_ms)
        return [partial] if delta is None else [Delta(self.number, delta, start_ms, end_ms), partial]

    def overdue(self, until_ms: int) -> list[Event]:
        """What of the newest hypothesis was spoken before `until_ms` and is not firm, made firm."""
        delta = self._stabiliser.overdue(until_ms)
        return [] if delta is None else [Delta(self.number, delta, self.start_ms, self._heard_until_ms)]

    def final(self, transcript: Transcript, start_ms: int, end_ms: int, *, words: bool, deltas: bool) -> list[Event]:
        """What the transcript of all of it gives to tell."""
        segments = [segment for segment in transcript.segments if credible(segment)]
        doubted = len(segments) < len(transcript.segments)
        text = normal(" ".join(segment.text for segment in segments) if doubted else transcript.text)
        delta, revised = self._stabiliser.final(text)
        timed = (shifted(word, start_ms, end_ms) for segment in segments for word in segment.words)
        final = Final(
            self.number,
            text,
            start_ms,
            end_ms,
            language=transcript.language,
            confidence=confidence(segments),
            words=tuple(timed) if words else (),
            revised=revised,
            coalesced=self.coalesced,
            dropped=self.dropped,
        )
        return [final] if delta is None or not deltas else [Delta(self.number, delta, start_ms, end_ms), final]
