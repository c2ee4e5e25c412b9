"""The application: routes and what surrounds them. Whoever serves opens the parts and closes them again."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from gateway import docs_page, health
from gateway.api import (
    admin,
    admin_policies,
    admin_relays,
    audio,
    config,
    explain,
    jobs,
    sessions,
    tickets,
    usage,
    webhooks,
)
from gateway.middleware import Answered, Identified, nowhere
from gateway.protocols import native_ws, openai_rest
from gateway.state import Gateway

ROUTES: tuple[BaseRoute, ...] = (
    *openai_rest.routes,
    *native_ws.routes,
    *tickets.routes,
    *config.routes,
    *jobs.routes,
    *webhooks.routes,
    *sessions.routes,
    *audio.routes,
    *usage.routes,
    *explain.routes,
    *admin.routes,
    *admin_relays.routes,
    *admin_policies.routes,
    *health.routes,
    *docs_page.routes,
)


class _Application(Starlette):
    """With our own middleware and no more: `Answered` answers whatever Starlette's would."""

    def build_middleware_stack(self) -> ASGIApp:
        return Identified(Answered(self.router))


def create_app(gateway: Gateway) -> Starlette:
    """An ASGI application over open parts. It has no lifespan of its own."""
    app = _Application(routes=list(ROUTES))
    app.router.redirect_slashes = False
    app.router.default = nowhere
    app.state.gateway = gateway
    return app
