"""What an engine is: a loaded model that turns PCM into segments, blocking, in whichever thread calls it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

from dispatchers.engine.meeting import Meeting
from dispatchers.engine.models import ModelSpec
from dispatchers.interface import Heard, Options, Samples


@dataclass(frozen=True, slots=True)
class Recognised:
    """What an engine heard. `language` is an ISO 639-1 code, also where nothing was said."""

    text: str
    language: str


class Engine(Protocol):
    """A loaded model. `workers` calls of `transcribe` run truly side by side; more only wait for each other, unless
    they are members of one `Meeting`: up to `batch_limit` of one `kind` are then recognised by one worker in one go.

    An engine may have an attribute `spread`: if it is true, a batch costs nearly what its pieces cost one by one, so
    the workers share what waits, instead of one taking all of it."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def workers(self) -> int: ...

    @property
    def batch_limit(self) -> int: ...

    def kind(self, samples: Samples, options: Options) -> Hashable | None:
        """What pieces that may go together have in common; None for one that goes alone."""
        ...

    def transcribe(
        self,
        samples: Samples,
        options: Options,
        heard: Heard,
        cancelled: Callable[[], bool],
        meeting: Meeting | None = None,
    ) -> Recognised:
        """Blocks until all is recognised. `heard` gets each segment in the calling thread; `cancelled` is asked
        between steps (it may block, to let others go first), and when it says yes the rest is left out. The members of
        a `meeting` get the text that each would get alone; leaving it is the caller's.

        Raises `UnsupportedOption`, or a `BackendError`."""
        ...

    def close(self) -> None:
        """Frees the model."""
        ...
