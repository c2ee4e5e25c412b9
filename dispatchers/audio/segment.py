"""Speech probabilities to utterances: a pure state machine on the sample clock.

    silence ──voice──▶ candidate ──enough speech──▶ utterance ──endpoint silence──▶ silence
                          └──a short pause──▶ silence      └──too long──▶ cut, and the rest is a candidate

An utterance is announced only once it has `min_speech_ms` of speech, so everything announced also ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dispatchers.audio.tape import Tape
from dispatchers.audio.vad import FRAME
from dispatchers.interface import SAMPLES_PER_MS, Samples, VadOptions

PRE_ROLL = 8 * FRAME
"""Audio kept from before the first voiced frame (256 ms): soft first sounds come before the model is sure."""

TAIL = 6 * FRAME
"""Silence kept after the last voiced frame (192 ms)."""

_CANDIDATE_PAUSE = 6 * FRAME
_HYSTERESIS = 0.15


@dataclass(frozen=True, slots=True)
class Started:
    """An utterance was found; it begins at sample `start`, pre-roll included."""

    utterance: int
    start: int


@dataclass(frozen=True, slots=True)
class Ended:
    """An utterance is complete: samples `start` to `end` of the stream."""

    utterance: int
    start: int
    end: int
    audio: Samples


Action: TypeAlias = Started | Ended


@dataclass(slots=True)
class _Speech:
    """A candidate, or an utterance once it has its number."""

    start: int
    voiced: list[int]  # where its voiced frames start
    number: int | None = None

    @property
    def quiet_from(self) -> int:
        return self.voiced[-1] + FRAME


class Segmenter:
    """Fed a stream's samples with the probabilities of its 512-sample frames, says where utterances start and end.

    Holds no more audio than the utterance being heard (`max_utterance_ms`), or the pre-roll in silence.
    """

    def __init__(self, options: VadOptions):
        self._enter = options.threshold
        self._leave = max(options.threshold - _HYSTERESIS, options.threshold / 2)
        self._endpoint = options.silence_ms * SAMPLES_PER_MS
        self._min_speech = options.min_speech_ms * SAMPLES_PER_MS
        self._longest = options.max_utterance_ms * SAMPLES_PER_MS
        self._tape = Tape()
        self._clock = 0  # samples whose probability is known
        self._floor = 0  # the end of the last utterance: nothing later reaches before it
        self._count = 0
        self._speech: _Speech | None = None

    @property
    def accepted(self) -> int:
        """Samples fed so far."""
        return self._tape.end

    @property
    def voiced_until(self) -> int:
        """Where the newest speech of the utterance being heard ends, or 0 between utterances."""
        return 0 if self._speech is None or self._speech.number is None else self._speech.quiet_from

    @property
    def lulled(self) -> bool:
        """Whether the utterance being heard has been silent for `TAIL`: `so_far` is then what its end will bring,
        unless it goes on."""
        return self.voiced_until > 0 and self._clock - self.voiced_until >= TAIL

    def so_far(self) -> Ended | None:
        """The utterance being heard, as if it ended now; None if none has been announced."""
        speech = self._speech
        if speech is None or speech.number is None:
            return None
        return self._utterance(speech.number, speech.start, min(speech.quiet_from + TAIL, self._tape.end))

    def feed(self, samples: Samples, probabilities: NDArray[np.float32]) -> list[Action]:
        """`probabilities` are those of the frames that `samples` completed."""
        self._tape.append(samples)
        actions: list[Action] = []
        for probability in probabilities.tolist():
            if self._speech is None and probability < self._enter:
                self._clock += FRAME
            else:
                actions += self._frame(probability)
        needed = max(self._floor, self._clock - PRE_ROLL) if self._speech is None else self._speech.start
        self._tape.forget(needed)
        return actions

    def flush(self) -> Iterator[Action]:
        """Ends the utterance being heard at once; what has not been announced is dropped."""
        ended = self.so_far()
        self._speech, self._floor = None, self._tape.end
        if ended is not None:
            yield ended

    def clear(self) -> Ended | None:
        """Drops the utterance being heard and gives it back, if it had been announced, up to the last sample."""
        speech, self._speech, self._floor = self._speech, None, self._tape.end
        if speech is None or speech.number is None:
            return None
        return self._utterance(speech.number, speech.start, self._tape.end)

    def _frame(self, probability: float) -> Iterator[Action]:
        at, self._clock = self._clock, self._clock + FRAME
        if probability >= (self._enter if self._speech is None else self._leave):
            if self._speech is None:
                self._speech = _Speech(max(self._floor, at - PRE_ROLL), [])
            self._speech.voiced.append(at)
        if self._speech is not None:
            yield from self._judge(self._speech)

    def _judge(self, speech: _Speech) -> Iterator[Action]:
        silence = self._clock - speech.quiet_from
        if speech.number is None:
            if silence >= min(_CANDIDATE_PAUSE, self._endpoint):
                self._speech = None
            elif len(speech.voiced) * FRAME >= self._min_speech:
                yield self._announce(speech)
        elif silence >= self._endpoint:
            self._speech, self._floor = None, min(speech.quiet_from + TAIL, self._clock)
            yield self._utterance(speech.number, speech.start, self._floor)
        elif self._clock - speech.start >= self._longest:
            yield from self._cut(speech.number, speech)

    def _announce(self, speech: _Speech) -> Started:
        self._count += 1
        speech.number = self._count
        return Started(speech.number, speech.start)

    def _cut(self, number: int, speech: _Speech) -> Iterator[Action]:
        """Cuts at the quietest point of the second half; speech after it goes on as the next utterance."""
        self._floor = self._quietest(speech.start + self._longest // 2, self._clock)
        yield self._utterance(number, speech.start, self._floor)
        after = [at for at in speech.voiced if at + FRAME > self._floor]
        self._speech = _Speech(self._floor, after) if after else None
        if self._speech is not None:
            yield self._announce(self._speech)  # however short: it is known to be speech

    def _quietest(self, start: int, end: int) -> int:
        """The middle of the frame of least energy, its neighbours counted in, so that one zero crossing is no pause."""
        frames = (end - start) // FRAME
        audio = self._tape.cut(start, start + frames * FRAME).astype(np.float64).reshape(frames, FRAME)
        energy = np.convolve(np.square(audio).mean(axis=1), np.ones(3), mode="valid")
        return start + (int(energy.argmin()) + 1) * FRAME + FRAME // 2

    def _utterance(self, number: int, start: int, end: int) -> Ended:
        return Ended(number, start, end, self._tape.cut(start, end))
