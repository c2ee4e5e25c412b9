"""The caller of a request."""

from __future__ import annotations

import structlog
from starlette.requests import HTTPConnection

from gateway.state import gateway_of
from policy.errors import Forbidden, IdentityError
from policy.identity import Caller
from runtime.telemetry import AUTH_FAILURES

SUBPROTOCOL = "stenogate.v1"
_BEARER_PROTOCOL = "bearer."


async def caller_of(connection: HTTPConnection, scope: str, *, token: str | None = None) -> Caller:
    """The verified caller, who holds `scope`. `token`: from where else the protocol may carry it.

    Raises `IdentityError`, `TenantSuspended` or `ScopeMissing`.
    """
    try:
        caller = await gateway_of(connection).authenticator.authenticate(bearer_token(connection) or token)
        structlog.contextvars.bind_contextvars(tenant=caller.tenant, subject=caller.subject)
        caller.require(scope)
    except (IdentityError, Forbidden) as refusal:
        AUTH_FAILURES.labels(refusal.code).inc()
        raise
    return caller


def bearer_token(connection: HTTPConnection) -> str | None:
    """The token of `Authorization: Bearer …` (RFC 6750, section 2.1), or of the subprotocol `bearer.…` that a browser
    offers beside `stenogate.v1`."""
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    offered: list[str] = connection.scope.get("subprotocols") or []
    return next((name.removeprefix(_BEARER_PROTOCOL) for name in offered if name.startswith(_BEARER_PROTOCOL)), None)
