"""The seam between the gateway and everything that recognises speech.

A `Dispatcher` turns audio into a transcript. Backends are dispatchers; adapters (`dispatchers.adapters`) are
dispatchers made of dispatchers. All values that cross the seam are frozen dataclasses; every wire protocol is a codec
to and from them. Audio is always mono 16-bit PCM at 16 kHz; times are integer ms from the first accepted sample.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 16_000
SAMPLES_PER_MS = SAMPLE_RATE // 1000

Samples: TypeAlias = NDArray[np.int16]
"""Mono PCM at 16 kHz; a `numpy.memmap` where the recording is long."""


# --- what goes in -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pcm:
    """Audio, in the order it was spoken; any length. Of a stream of several channels (`Options.channels`) the shape is
    (length, channels): all are on one clock."""

    samples: Samples


@dataclass(frozen=True, slots=True)
class Flush:
    """End the current utterance now; answered by its `Final` (if there was speech), then `Flushed`."""


@dataclass(frozen=True, slots=True)
class Clear:
    """Drop the utterance being heard; answered by `Cleared`."""


StreamInput: TypeAlias = Pcm | Flush | Clear


@dataclass(frozen=True, slots=True)
class VadOptions:
    """Endpointing: speech probability that counts as speech, and durations in ms."""

    threshold: float = 0.6
    silence_ms: int = 550
    min_speech_ms: int = 200
    max_utterance_ms: int = 30_000


Urgency: TypeAlias = Literal["final", "partial", "batch"]
"""Which of two waiting pieces of work an engine takes first: final before partial before batch."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked of a recogniser, whole; passed on unchanged by adapters.

    `share` is an opaque key between whose holders an engine is fair; `stream`, another, is one for each live stream: of
    its partials only the newest may wait. `temperature` None means the recogniser's own default (for Whisper: the
    fallback ladder that starts at 0). `context` is what was said just before, as far as it is known; a recogniser that
    was not trained on previous text ignores it.

    Of live streams: `partial_model` is asked for partials in place of `model` (empty: the same), one for each
    `partial_interval_ms` of new speech. `max_delay_ms` is how long after it was spoken a word may wait for its delta,
    on the stream's clock; None: until hypotheses agree. `max_speaking` is how many streams of this `share` may be
    transcribed as they speak at once; None: any number. `channels` above 1: each is heard for itself, and what concerns
    one of them says which, counted from 0. `give_up`: a final that fails ends the stream with its failure, as somebody
    stands by to take up the audio.
    """

    model: str = ""
    task: Literal["transcribe", "translate"] = "transcribe"
    language: str | None = None
    prompt: str | None = None
    context: str = ""
    hotwords: tuple[str, ...] = ()
    temperature: float | None = None
    words: bool = False
    partials: bool = True
    partial_model: str = ""
    partial_interval_ms: int = 250
    max_delay_ms: int | None = None
    max_speaking: int | None = None
    vad: VadOptions = field(default_factory=VadOptions)
    channels: int = 1
    give_up: bool = False
    share: str = ""
    stream: str = ""
    urgency: Urgency = "batch"


# --- what comes out -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Origin:
    """Who recognised it. Recorded in every result: nothing is silently downgraded."""

    backend: str
    engine: str
    model: str


@dataclass(frozen=True, slots=True)
class Word:
    """One word (no surrounding space), its times in ms and the recogniser's confidence, 0 to 1."""

    text: str
    start_ms: int
    end_ms: int
    confidence: float


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a transcript, in ms. `text` carries no surrounding space. The figures are Whisper's own gates
    (Radford et al. 2022, section 4.5); other engines leave them at their neutral values."""

    start_ms: int
    end_ms: int
    text: str
    words: tuple[Word, ...] = ()
    tokens: tuple[int, ...] = ()
    temperature: float = 0.0
    avg_logprob: float = 0.0
    compression_ratio: float = 1.0
    no_speech_prob: float = 0.0
    speaker: str | None = None


@dataclass(frozen=True, slots=True)
class Transcript:
    """A whole recording as text. `language` is an ISO 639-1 code, or `und` where nobody says which."""

    text: str
    language: str
    duration_ms: int
    segments: tuple[Segment, ...]
    origin: Origin
    task: Literal["transcribe", "translate"] = "transcribe"


@dataclass(frozen=True, slots=True)
class SpeechStarted:
    """An utterance begins (pre-roll included). Utterances count from 1, those of all channels together."""

    utterance: int
    start_ms: int
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class Partial:
    """The whole current hypothesis. Its first `stable` code points are exactly the deltas sent so far."""

    utterance: int
    text: str
    stable: int
    start_ms: int
    end_ms: int
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """Newly firm text, to be appended as it is (leading space included); never taken back."""

    utterance: int
    text: str
    start_ms: int
    end_ms: int
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class Final:
    """An utterance's immutable text. Its deltas concatenate to `text` unless `revised`, when `text` supersedes them.
    Of its partials, `coalesced` fell due while an earlier one was under way or gave their place to a newer one, and
    `dropped` came too late or failed."""

    utterance: int
    text: str
    start_ms: int
    end_ms: int
    language: str
    confidence: float
    words: tuple[Word, ...] = ()
    revised: bool = False
    channel: int | None = None
    speaker: str | None = None
    coalesced: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Gap:
    """Audio that was accepted and not transcribed."""

    start_ms: int
    end_ms: int
    reason: str
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class Flushed:
    """Everything before the `Flush` has been answered."""

    accepted_ms: int


@dataclass(frozen=True, slots=True)
class Cleared:
    """The utterance being heard was dropped."""

    accepted_ms: int


@dataclass(frozen=True, slots=True)
class Used:
    """A block of the stream was settled in the ledger."""

    accepted_ms: int
    billed_ms: int
    budget_remaining_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that the listener should know and need not act on."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class StreamError:
    """Something went wrong and the stream goes on (or ends, when `fatal`)."""

    code: str
    message: str
    retryable: bool
    fatal: bool = False
    channel: int | None = None


Event: TypeAlias = SpeechStarted | Partial | Delta | Final | Gap | Flushed | Cleared | Used | Notice | StreamError


# --- the seam -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a dispatcher can do, as data. `languages` None means any; `models` are the names it answers to, its default
    first. `latest_wins`: of one `Options.stream` a newer partial takes the place of a waiting one, and is refused while
    one runs; whichever goes raises `Superseded`. `up`: whether it takes work now."""

    batch: bool = True
    stream: bool = False
    partials: bool = False
    words: bool = False
    translate: bool = False
    speakers: bool = False
    prompt: bool = False
    latest_wins: bool = False
    longest_ms: int | None = None
    least_billed_ms: int = 0
    languages: frozenset[str] | None = None
    models: tuple[str, ...] = ()
    up: bool = True


Heard: TypeAlias = Callable[[Segment], None]
"""Called on the event loop with each segment of a transcription as it becomes known, in order."""


def ignore(_: Segment) -> None:
    """The `Heard` of a caller who waits for the whole."""


class Dispatcher(Protocol):
    """Turns audio into text.

    `stream` is a pipe: the dispatcher pulls its input (so back-pressure needs no code), and the end of the iterator is
    the end of the audio: what was heard is finished, its finals come, then the events end. It is a context manager, not
    a bare generator, because an implementation may run tasks that must end with it (PEP 789). Leaving it early cancels
    what is still queued.

    Raises `dispatchers.errors.DispatchError`, from `transcribe` or from the event iterator.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    def origin(self, model: str) -> Origin:
        """Who recognises when asked for this model. Raises `UnknownModel`."""
        ...

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript: ...

    def stream(
        self, audio: AsyncIterator[StreamInput], options: Options
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]: ...

    async def aclose(self) -> None: ...


def to_ms(samples: int) -> int:
    """Duration of so many samples at 16 kHz, in whole ms, rounded down."""
    return samples // SAMPLES_PER_MS
