"""`/v1/tickets`: a right to open one live stream soon, to be handed to a browser in place of a token."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from gateway.api.query import moment
from gateway.auth import caller_of
from gateway.bodies import json_object
from gateway.protocols.native_start import fixed_fields
from gateway.state import gateway_of
from policy import tickets
from policy.errors import Invalid

Scope = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class Asked(BaseModel):
    """What the ticket shall be good for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ttl_s: int = Field(30, ge=1, le=tickets.LONGEST_S)
    scopes: list[Scope] = Field(["transcribe"], min_length=1, max_length=16)
    start: dict[str, Any] = {}


async def create(request: Request) -> Response:
    """A ticket of the caller's, with no more rights than the caller has."""
    gateway = gateway_of(request)
    caller = await caller_of(request, "transcribe")
    asked = _asked(await json_object(request, idle_s=gateway.settings.upload_idle_s))
    start = fixed_fields(asked.start)
    async with gateway.resources.database.tenant(caller.tenant_id) as tx:
        ticket = await tickets.issue(tx, caller, scopes=asked.scopes, ttl_s=asked.ttl_s, start=start)
    answer = {"ticket": ticket.value, "expires_at": moment(ticket.expires_at)}
    return JSONResponse(answer, 201, {"cache-control": "no-store"})


def _asked(body: dict[str, Any]) -> Asked:
    try:
        return Asked.model_validate(body)
    except ValidationError as wrong:
        first = wrong.errors(include_input=False, include_url=False)[0]
        raise Invalid(first["msg"], param=".".join(str(part) for part in first["loc"])) from None


routes: list[BaseRoute] = [Route("/v1/tickets", create, methods=["POST"])]
