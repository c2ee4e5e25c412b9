"""What of a transcript is believed, and what a stream remembers of what it believed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from dispatchers.interface import Options, Segment, Transcript, Urgency, Word

# Radford et al. 2022, section 4.5
_NO_SPEECH = 0.6
_IMPROBABLE = -1.0
_REPETITIVE = 2.4
_TOO_HOT = 0.5

_DOUBTFUL = -0.2
"""Mean log probability of a window. Of 200 clips of the micro model's sample script 7 % lie below; of what the model
makes of noise, tones, chords and telephone keys, all: -0.53 and less by itself, up to -0.27 beside speech."""

_UNSURE = -0.1
_UNUSUAL = 2.0
_LATELY = 0.1
"""Below which mean log probability a hypothesis is unsure: this, or so many times what the stream's finals have lately
(an exponential mean with this weight for the newest), whichever is lower, for models differ in how they speak of
themselves. The micro model's finals have -0.06 on average. Chosen by docs/benchmarks.md ("Firm text")."""

_SURE = 0.6
_SURE_WORDS = 3
_CONTEXT_CHARACTERS = 1_000
"""About 224 tokens of English, which is what Whisper was trained to take (the engine cuts to tokens)."""


def credible(segment: Segment) -> bool:
    """False for what Whisper typically makes of silence, and for loops."""
    silent = segment.no_speech_prob > _NO_SPEECH and segment.avg_logprob < _IMPROBABLE
    return not silent and segment.compression_ratio <= _REPETITIVE


def doubtful(segment: Segment) -> bool:
    """Whether a segment should have something else to speak for it."""
    return segment.no_speech_prob > _NO_SPEECH or segment.avg_logprob < _DOUBTFUL


def confidence(segments: list[Segment]) -> float:
    """The words' mean confidence, or the tokens' mean probability where there are no words; 0 for no text."""
    figures = [word.confidence for segment in segments for word in segment.words]
    figures = figures or [math.exp(min(segment.avg_logprob, 0.0)) for segment in segments]
    return float(np.mean(figures)) if figures else 0.0


def shifted(word: Word, start_ms: int, end_ms: int) -> Word:
    """From the utterance's clock to the stream's, within the utterance."""
    return replace(word, start_ms=min(start_ms + word.start_ms, end_ms), end_ms=min(start_ms + word.end_ms, end_ms))


@dataclass(slots=True)
class Memory:
    """What a stream's finals have told about what comes next: its language, once one was sure enough, the last text,
    and how sure the recogniser usually is. What was not believed is not remembered; nor is, as in Whisper itself, what
    only a high temperature gave."""

    given: Options
    language: str | None = None
    context: str = ""
    _usual: float | None = None
    _next: dict[Urgency, Options] = field(default_factory=dict)

    @property
    def unsure_below(self) -> float:
        """The mean log probability below which what a hypothesis says should be heard again and again before it is
        firm."""
        return _UNSURE if self._usual is None else min(_UNSURE, _UNUSUAL * self._usual)

    def options(self, urgency: Urgency) -> Options:
        """What to ask for next. A language that was given stays; nobody is told when a partial's words were said."""
        if urgency not in self._next:
            self._next[urgency] = replace(
                self.given,
                model=self.given.partial_model or self.given.model if urgency == "partial" else self.given.model,
                language=self.given.language or self.language,
                context=self.context,
                words=self.given.words and urgency == "final",
                urgency=urgency,
            )
        return self._next[urgency]

    def note(self, transcript: Transcript) -> None:
        """Learns from a final."""
        self._next.clear()
        segments = [segment for segment in transcript.segments if credible(segment) and segment.temperature <= _TOO_HOT]
        said = " ".join(segment.text for segment in segments).split()
        self.context = " ".join([*self.context.split(), *said])[-_CONTEXT_CHARACTERS:]
        if segments:
            self._note_sureness(min(segment.avg_logprob for segment in segments))
        if self.language is None and len(said) >= _SURE_WORDS and confidence(segments) >= _SURE:
            self.language = transcript.language

    def _note_sureness(self, logprob: float) -> None:
        self._usual = logprob if self._usual is None else self._usual + _LATELY * (logprob - self._usual)
