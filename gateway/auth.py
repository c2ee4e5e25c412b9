"""The caller of a request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from starlette.requests import HTTPConnection

from gateway.state import gateway_of
from policy import operators, tickets
from policy.errors import Forbidden, IdentityError, NotOperator
from policy.identity import Caller
from policy.operators import Operator
from policy.outage import ledger_reachable
from policy.tickets import Redeemed
from runtime.telemetry import AUTH_FAILURES

SUBPROTOCOL = "stenogate.v1"
_BEARER_PROTOCOL = "bearer."


async def caller_of(
    connection: HTTPConnection, scope: str, *, token: str | None = None, lately: bool = False
) -> Caller:
    """The verified caller, who holds `scope`. `token`: from where else the protocol may carry it. `lately`: an
    admission follows, which looks again whether he may come in.

    Raises `IdentityError`, `TenantSuspended` or `ScopeMissing`.
    """
    with _refusals_counted():
        authenticator = gateway_of(connection).authenticator
        caller = await authenticator.authenticate(bearer_token(connection) or token, lately=lately)
        _known(caller).require(scope)
    return caller


async def operator_of(connection: HTTPConnection) -> Operator:
    """The operator who calls. Raises `IdentityError`; `NotOperator` for a tenant's caller, whatever its scopes."""
    gateway = gateway_of(connection)
    with _refusals_counted():
        token = bearer_token(connection)
        known = operators.recognised(
            token or "",
            gateway.resources.signing_key,
            issuer=gateway.settings.issuer,
            audience=gateway.settings.audience,
        )
        if known is None:
            _known(await gateway.authenticator.authenticate(token))
            raise NotOperator
    structlog.contextvars.bind_contextvars(subject=known.actor)
    return known


async def ticket_holder(connection: HTTPConnection, ticket: str, scope: str) -> Redeemed:
    """The caller that the ticket speaks for, who holds `scope`; the ticket is used up by that, whatever comes of it.

    Raises `IdentityError`, `TenantSuspended`, `ScopeMissing`, `LedgerUnavailable`.
    """
    gateway = gateway_of(connection)
    with _refusals_counted():
        with ledger_reachable():
            async with gateway.resources.database.across_tenants("redeem a ticket") as tx:
                redeemed = await tickets.redeem(tx, ticket)
        await gateway.authenticator.recheck(redeemed.caller)
        _known(redeemed.caller).require(scope)
    return redeemed


def _known(caller: Caller) -> Caller:
    structlog.contextvars.bind_contextvars(tenant=caller.tenant, subject=caller.subject)
    return caller


@contextmanager
def _refusals_counted() -> Iterator[None]:
    try:
        yield
    except (IdentityError, Forbidden) as refusal:
        AUTH_FAILURES.labels(refusal.code).inc()
        raise


def bearer_token(connection: HTTPConnection) -> str | None:
    """The token of `Authorization: Bearer …` (RFC 6750, section 2.1), or of the subprotocol `bearer.…` that a browser
    offers beside `stenogate.v1`."""
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    offered: list[str] = connection.scope.get("subprotocols") or []
    return next((name.removeprefix(_BEARER_PROTOCOL) for name in offered if name.startswith(_BEARER_PROTOCOL)), None)
