"""`/v1/webhooks`: where a tenant is told what happened, and what has become of it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal, cast, get_args
from uuid import UUID

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from gateway.api.forms import Form, FormType, filled
from gateway.api.query import choice, integer, moment
from gateway.auth import caller_of
from gateway.bodies import json_object
from gateway.state import gateway_of, request_id_of
from policy.errors import NotFound
from runtime.errors import UrlError
from runtime.ids import read, show
from workers import deliveries, endpoints
from workers.deliveries import Attempt, Delivery, Status
from workers.endpoints import Endpoint, Made
from workers.signing import OVERLAP_MOST_S, OVERLAP_S

SCOPE = "jobs"
PAGE = 50
PAGE_MOST = 200
LATEST = 253_402_300_799  # the last second of the year 9999

_NO_STORE = {"cache-control": "no-store"}


class Wanted(Form):
    """A new webhook. Without `events`, every kind."""

    url: str
    events: list[str] | None = None
    description: str = ""


class Changes(Form):
    """What shall be otherwise."""

    url: str | None = None
    events: list[str] | None = None
    description: str | None = None
    status: Literal["active", "disabled"] | None = None


class Rotation(Form):
    """For how long the secret before signs beside the new one."""

    overlap_s: int = Field(OVERLAP_S, ge=0, le=OVERLAP_MOST_S)


class Since(Form):
    """From when on, in Unix seconds."""

    since: int = Field(ge=0, le=LATEST)


async def create(request: Request) -> Response:
    """A new webhook with its secret, which is told this once."""
    caller = await caller_of(request, SCOPE)
    wanted = await _form(request, Wanted)
    await _check(request, wanted.url)
    resources = gateway_of(request).resources
    async with resources.database.tenant(caller.tenant_id) as tx:
        made = await endpoints.create(
            tx,
            resources.sealer,
            caller,
            wanted.url,
            events=wanted.events,
            description=wanted.description,
            request_id=request_id_of(request),
        )
    location = {"location": f"/v1/webhooks/{show('hook', made.endpoint.id)}"}
    return JSONResponse(_made(made), 201, _NO_STORE | location)


async def listing(request: Request) -> Response:
    """The tenant's webhooks, oldest first."""
    caller = await caller_of(request, SCOPE)
    async with gateway_of(request).resources.database.tenant(caller.tenant_id) as tx:
        found = await endpoints.listing(tx, caller.tenant_id)
    return JSONResponse({"object": "list", "data": [_webhook(endpoint) for endpoint in found]})


async def single(request: Request) -> Response:
    """One of them."""
    caller = await caller_of(request, SCOPE)
    async with gateway_of(request).resources.database.tenant(caller.tenant_id) as tx:
        return JSONResponse(_webhook(await endpoints.get(tx, caller.tenant_id, _webhook_id(request))))


async def change(request: Request) -> Response:
    """Another address, other events, out of use or in use again."""
    caller = await caller_of(request, SCOPE)
    webhook_id = _webhook_id(request)
    changes = (await _form(request, Changes)).model_dump(exclude_none=True)
    resources = gateway_of(request).resources
    async with resources.database.tenant(caller.tenant_id) as tx:
        await endpoints.get(tx, caller.tenant_id, webhook_id)
    if "url" in changes:
        await _check(request, changes["url"])
    async with resources.database.tenant(caller.tenant_id) as tx:
        changed = await endpoints.change(tx, caller, webhook_id, changes, request_id=request_id_of(request))
    return JSONResponse(_webhook(changed))


async def remove(request: Request) -> Response:
    """Gone, with its secrets and its log."""
    caller = await caller_of(request, SCOPE)
    async with gateway_of(request).resources.database.tenant(caller.tenant_id) as tx:
        await endpoints.remove(tx, caller, _webhook_id(request), request_id=request_id_of(request))
    return Response(status_code=204)


async def rotate(request: Request) -> Response:
    """A fresh secret, told this once."""
    caller = await caller_of(request, SCOPE)
    webhook_id, rotation = _webhook_id(request), await _form(request, Rotation)
    resources = gateway_of(request).resources
    async with resources.database.tenant(caller.tenant_id) as tx:
        made = await endpoints.rotate(
            tx,
            resources.sealer,
            caller,
            webhook_id,
            overlap_s=rotation.overlap_s,
            request_id=request_id_of(request),
        )
    return JSONResponse(_made(made), headers=_NO_STORE)


async def test(request: Request) -> Response:
    """An event that means nothing, on its way."""
    caller = await caller_of(request, SCOPE)
    async with gateway_of(request).resources.database.tenant(caller.tenant_id) as tx:
        event_id = await deliveries.test(tx, caller, _webhook_id(request))
    return JSONResponse({"object": "webhook.event", "id": show("evt", event_id), "type": endpoints.TEST}, 202)


async def log(request: Request) -> Response:
    """What was sent there, newest first."""
    caller = await caller_of(request, SCOPE)
    async with gateway_of(request).resources.database.tenant(caller.tenant_id) as tx:
        found, cursor = await deliveries.listing(
            tx,
            caller.tenant_id,
            _webhook_id(request),
            cursor=request.query_params.get("cursor"),
            limit=integer(request, "limit", PAGE, least=1, most=PAGE_MOST),
            status=cast(Status | None, choice(request, "status", get_args(Status))),
        )
    data = [_delivery(delivery) for delivery in found]
    return JSONResponse({"object": "list", "data": data, "next_cursor": cursor})


async def delivery(request: Request) -> Response:
    """One delivery with every try, and what is sent."""
    caller = await caller_of(request, SCOPE)
    async with gateway_of(request).resources.database.tenant(caller.tenant_id) as tx:
        told = await deliveries.get(tx, caller.tenant_id, _webhook_id(request), _delivery_id(request))
    tries = [_attempt(attempt) for attempt in told.tries]
    return JSONResponse(_delivery(told.delivery) | {"tries": tries, "body": told.body})


async def replay(request: Request) -> Response:
    """The same event once more, with the same id."""
    caller = await caller_of(request, SCOPE)
    async with gateway_of(request).resources.database.tenant(caller.tenant_id) as tx:
        again = await deliveries.replay(
            tx, caller, _webhook_id(request), _delivery_id(request), request_id=request_id_of(request)
        )
    return JSONResponse(_delivery(again), 202)


async def replay_since(request: Request) -> Response:
    """Every event that was not taken, from a moment on."""
    caller = await caller_of(request, SCOPE)
    webhook_id, since = _webhook_id(request), (await _form(request, Since)).since
    async with gateway_of(request).resources.database.tenant(caller.tenant_id) as tx:
        sent = await deliveries.replay_since(
            tx, caller, webhook_id, datetime.fromtimestamp(since, UTC), request_id=request_id_of(request)
        )
    return JSONResponse({"object": "webhook.replay", "deliveries": sent}, 202)


async def _form(request: Request, form: type[FormType]) -> FormType:
    return filled(form, await json_object(request, idle_s=gateway_of(request).settings.upload_idle_s))


async def _check(request: Request, url: str) -> None:
    """Raises `UrlError`, which names the field."""
    try:
        await gateway_of(request).resources.egress.check(url)
    except UrlError as error:
        raise type(error)(error.message, param="url") from None


def _webhook(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "object": "webhook",
        "id": show("hook", endpoint.id),
        "url": endpoint.url,
        "events": list(endpoint.events),
        "description": endpoint.description,
        "status": endpoint.status,
        "disabled_why": endpoint.disabled_why,
        "failing_since": moment(endpoint.failing_since),
        "created_at": moment(endpoint.created_at),
        "changed_at": moment(endpoint.changed_at),
    }


def _made(made: Made) -> dict[str, Any]:
    return _webhook(made.endpoint) | {"secret": made.secret}


def _delivery(delivery: Delivery) -> dict[str, Any]:
    return {
        "object": "webhook.delivery",
        "id": show("dlv", delivery.id),
        "webhook": show("hook", delivery.endpoint_id),
        "event": show("evt", delivery.event_id),
        "type": delivery.topic,
        "status": delivery.status,
        "attempts": delivery.attempts,
        "created_at": moment(delivery.created_at),
        "next_at": moment(delivery.next_at),
        "ended_at": moment(delivery.ended_at),
        "last": None if delivery.last is None else _attempt(delivery.last),
    }


def _attempt(attempt: Attempt) -> dict[str, Any]:
    return {**vars(attempt), "at": moment(attempt.at)}


def _webhook_id(request: Request) -> UUID:
    webhook_id = read("hook", request.path_params["webhook_id"])
    if webhook_id is None:
        raise NotFound("There is no such webhook.")
    return webhook_id


def _delivery_id(request: Request) -> UUID:
    delivery_id = read("dlv", request.path_params["delivery_id"])
    if delivery_id is None:
        raise NotFound("There is no such delivery.")
    return delivery_id


_WEBHOOK = "/v1/webhooks/{webhook_id}"
_DELIVERY = f"{_WEBHOOK}/deliveries/{{delivery_id}}"

routes: list[BaseRoute] = [
    Route("/v1/webhooks", listing, methods=["GET"]),
    Route("/v1/webhooks", create, methods=["POST"]),
    Route(_WEBHOOK, single, methods=["GET"]),
    Route(_WEBHOOK, change, methods=["PATCH"]),
    Route(_WEBHOOK, remove, methods=["DELETE"]),
    Route(f"{_WEBHOOK}/rotate", rotate, methods=["POST"]),
    Route(f"{_WEBHOOK}/test", test, methods=["POST"]),
    Route(f"{_WEBHOOK}/replay", replay_since, methods=["POST"]),
    Route(f"{_WEBHOOK}/deliveries", log, methods=["GET"]),
    Route(_DELIVERY, delivery, methods=["GET"]),
    Route(f"{_DELIVERY}/replay", replay, methods=["POST"]),
]
