"""What a gateway and an engine say to each other: the shapes, and their JSON.

A request is one line of JSON, the `Options`, and then the audio, PCM s16le. Its answer is lines of JSON: segments as
they become known, and last the transcript, without the segments told, or a failure. An empty line says that the engine
is still at it. Who reads ignores fields that he does not know, and takes the default for those that are missing, so
that either side may be of another release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict, TypeAdapter
from pydantic import dataclasses as validated

from dispatchers.errors import (
    AudioTooLong,
    AudioTooShort,
    BackendFailed,
    BackendRefused,
    BackendTimeout,
    BackendUnavailable,
    CredentialRefused,
    DispatchError,
    EmptyAudio,
    NotAudio,
    OptionError,
    Overloaded,
    Superseded,
    Throttled,
    UnknownModel,
    UnsupportedAudio,
    UnsupportedOption,
)
from dispatchers.interface import Capabilities, Options, Segment, Transcript
from runtime.errors import StenogateError

RECOGNISE = "/internal/v1/recognise"
STATUS = "/internal/v1/status"
FIGURES = "/internal/v1/figures"
MODELS = "/internal/v1/models"
HEARTBEAT_S = 10.0
END_S = 5.0
"""A child whose parent is gone is gone after so long, whatever it was at."""

ModelStatus = Literal["available", "cached", "downloading", "loading", "ready", "failed"]

_ERRORS: dict[str, type[DispatchError]] = {
    kind.code: kind
    for kind in (
        *(EmptyAudio, NotAudio, AudioTooShort, AudioTooLong, UnsupportedAudio),
        *(OptionError, UnknownModel, UnsupportedOption),
        *(BackendUnavailable, BackendTimeout, BackendFailed, Overloaded, Superseded, BackendRefused),
        *(Throttled, CredentialRefused),
    )
}


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model that an engine answers to. `available`: shipped or installed; `cached`: downloaded; neither loaded.
    `progress`: how much of it is downloaded, in per cent, while it is."""

    name: str
    engine: str
    default: bool
    status: ModelStatus
    progress: int | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """An engine at this moment: its models, the default first; what stands in its queues and runs; how long live work
    that came now would wait, and by how much each piece that comes makes it longer. `ready`: its default model is
    loaded."""

    capabilities: Capabilities
    models: tuple[ModelCard, ...]
    waiting: int
    running: int
    wait_s: float
    pace_s: float = 0.0
    ready: bool = True


NEVER_HEARD = Status(Capabilities(words=True, translate=True, latest_wins=True), (), 0, 0, 0.0, ready=False)
"""Of an engine that has not answered yet: what ours can do, and no model."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A `DispatchError`, told."""

    code: str
    message: str
    retryable: bool
    retry_after_s: float | None = None
    param: str | None = None

    @classmethod
    def of(cls, error: StenogateError) -> Failure:
        return cls(error.code, error.message, error.retryable, error.retry_after_s, error.param)

    def error(self) -> DispatchError:
        """The error again; of a code that we do not know, the nearest that we do."""
        kind = _ERRORS.get(self.code) or (BackendFailed if self.retryable else BackendRefused)
        return kind(self.message, param=self.param, retry_after_s=self.retry_after_s)


@validated.dataclass(frozen=True, slots=True, config=ConfigDict(ser_json_inf_nan="constants"))
class Line:
    """A line of an answer: one of the three. `wait_s`, with the last two: see `Status`."""

    segment: Segment | None = None
    transcript: Transcript | None = None
    failure: Failure | None = None
    wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class Greeting:
    """The one line that an engine in a child process says to who started it: that it is ready, with a note on its
    default model; or why it ends."""

    note: str = ""
    failure: Failure | None = None


_LIVE_ONLY = {"vad", "partials", "partial_model", "partial_interval_ms", "max_delay_ms", "max_speaking", "channels"}

_options = TypeAdapter(Options)
_line = TypeAdapter(Line)
_status = TypeAdapter(Status)
_greeting = TypeAdapter(Greeting)


def dump_options(options: Options) -> bytes:
    """One line. What adapters made use of already is left out."""
    return _options.dump_json(options, exclude_defaults=True, exclude=_LIVE_ONLY) + b"\n"


def load_options(line: bytes) -> Options:
    """Raises `OptionError`."""
    try:
        return _options.validate_json(line)
    except ValueError:  # its text quotes what was said
        raise OptionError("The options cannot be read.") from None


def dump_line(line: Line) -> bytes:
    return _line.dump_json(line, exclude_defaults=True) + b"\n"


def load_line(line: bytes) -> Line:
    """Raises `ValueError`."""
    return _line.validate_json(line)


def dump_status(status: Status) -> bytes:
    return _status.dump_json(status)


def load_status(body: bytes) -> Status:
    """Raises `ValueError`."""
    return _status.validate_json(body)


def dump_greeting(greeting: Greeting) -> bytes:
    return _greeting.dump_json(greeting) + b"\n"


def load_greeting(line: bytes) -> Greeting:
    """Raises `ValueError`."""
    return _greeting.validate_json(line)
