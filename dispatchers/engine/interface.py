"""What an engine is: a loaded model that turns PCM into segments, blocking, in whichever thread calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from dispatchers.engine.models import ModelSpec
from dispatchers.interface import Heard, Options, Samples


@dataclass(frozen=True, slots=True)
class Recognised:
    """What an engine heard. `language` is an ISO 639-1 code, also where nothing was said."""

    text: str
    language: str


class Engine(Protocol):
    """A loaded model. `workers` calls of `transcribe` run truly side by side; more only wait for each other."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def workers(self) -> int: ...

    def transcribe(self, samples: Samples, options: Options, heard: Heard, cancelled: Callable[[], bool]) -> Recognised:
        """Blocks until all is recognised. `heard` gets each segment in the calling thread; `cancelled` is asked
        between segments, and when it says yes the rest is left out.

        Raises `UnsupportedOption`, or a `BackendError`."""
        ...

    def close(self) -> None:
        """Frees the model."""
        ...
