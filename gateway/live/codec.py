"""The seam between a live session and the wire protocols it is spoken in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from dispatchers.audio.live import Wire
from dispatchers.interface import Clear, Event, Flush, Options
from dispatchers.streaming import Live
from gateway.live.frames import Message
from gateway.live.intake import Intake
from gateway.live.latency import Latency
from policy.resolve import Demand
from runtime.errors import StenogateError


@dataclass(frozen=True, slots=True)
class Setup:
    """What a session was opened with."""

    demand: Demand
    options: Options
    wire: Wire


@dataclass(frozen=True, slots=True)
class Resume:
    """Asks for a session that was opened before, after whose message `last_seq` nothing was heard. Audio before
    `from_ms` cannot be sent again."""

    token: str
    last_seq: int
    from_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a session stands when a socket is attached to it, and how to come back to it. `token` None: there is no
    coming back."""

    idle_s: float
    token: str | None
    resumed: bool = False
    resend_from_ms: int = 0
    accepted_ms: int = 0


@dataclass(frozen=True, slots=True)
class Stop:
    """No more audio."""


@dataclass(frozen=True, slots=True)
class Ping:
    """Answered at once, whatever audio waits."""

    id: Any


@dataclass(frozen=True, slots=True)
class Metrics:
    """Asks for this session's own figures."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """A message whose type nobody knows."""

    type: str


Command: TypeAlias = Flush | Clear | Stop | Ping | Metrics | Unknown


class Codec(Protocol):
    """A wire protocol: its text frames to commands, our events to its messages (None: not told)."""

    @property
    def name(self) -> str:
        """The protocol's, for figures."""
        ...

    def resume(self, text: str) -> Resume | None:
        """None where the first frame asks for no session that was before: then it is its `setup`."""
        ...

    def setup(self, text: str) -> Setup: ...

    def opening(self) -> Mapping[str, Any]:
        """What this session was opened with, as JSON for another process's codec."""
        ...

    def reopened(self, opening: Mapping[str, Any]) -> Setup:
        """The setup from another codec's `opening`. Raises `Invalid`."""
        ...

    def command(self, text: str) -> Command: ...
    def ready(self, live: Live, setup: Setup, standing: Standing) -> Message: ...
    def event(self, event: Event) -> Message | None: ...
    def pong(self, ping: Ping, accepted_ms: int) -> Message: ...
    def metrics(self, latency: Latency, intake: Intake) -> Message: ...
    def draining(self, token: str | None, deadline_s: float, reconnect_after_s: float) -> Message: ...
    def warning(self, error: StenogateError) -> Message: ...
    def error(self, error: StenogateError, *, fatal: bool) -> Message: ...
    def closed(self, live: Live, reason: str) -> Message: ...
