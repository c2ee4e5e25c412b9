"""What the routes work with, assembled by whoever serves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from starlette.requests import HTTPConnection

from dispatchers.dispatch import Door
from gateway.decoding import Decoder
from gateway.live.roster import Roster
from gateway.live_settings import LiveSettings
from policy.identity import Authenticator
from runtime.resources import Resources
from runtime.settings import Settings
from workers.jobs import Jobs

if TYPE_CHECKING:
    from dispatchers.engine.wire import ModelCard


@dataclass(frozen=True)
class Gateway:
    """Open parts, shared by every request. `live_settings` change while it runs; `catalogue` tells the models of this
    installation, its default first; `queue_wait_s` about how long live work that came now would wait for the engine,
    `engine_up` whether it is there; `tell_figures` brings its numbers among ours."""

    live_settings: LiveSettings
    resources: Resources
    authenticator: Authenticator
    door: Door
    jobs: Jobs
    catalogue: Callable[[], tuple[ModelCard, ...]]
    queue_wait_s: Callable[[], float]
    engine_up: Callable[[], bool]
    tell_figures: Callable[[], Awaitable[None]]
    decoder: Decoder = field(default_factory=Decoder)
    roster: Roster = field(default_factory=Roster)

    @property
    def settings(self) -> Settings:
        """As they are now. Those of `resources` are as they were at the start."""
        return self.live_settings.current


def gateway_of(connection: HTTPConnection) -> Gateway:
    """The gateway that a request or WebSocket came to."""
    return cast(Gateway, connection.app.state.gateway)


def request_id_of(connection: HTTPConnection) -> str:
    """The id that every answer and log line of this request carries."""
    return cast(str, connection.scope["state"]["request_id"])
