"""`/v1/admin/relays`: accounts with managed providers, and their keys, which come in here and never go out again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from gateway.api.query import moment
from gateway.auth import operator_of
from gateway.bodies import json_object
from gateway.providers import PROVIDERS
from gateway.state import gateway_of, request_id_of
from policy import credentials, relays, tenants
from policy.errors import Invalid, NotFound
from policy.relays import Relay, Status
from runtime.ids import read, show

_NO_STORE = {"cache-control": "no-store"}

Form = TypeVar("Form", bound=BaseModel)


class RelayBody(BaseModel):
    """A relay but for its name. What is left out is the provider's own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    provider: str
    base_url: str | None = None
    region: str | None = None
    models: list[str] | None = None
    status: Status = "active"


class CredentialBody(BaseModel):
    """A key, of one tenant (its slug) or of all who have none of their own."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    key: str
    tenant: Annotated[str, StringConstraints(pattern="^[a-z0-9-]{1,63}$")] | None = None


async def listing(request: Request) -> Response:
    """Every relay with its credentials in use."""
    await operator_of(request)
    async with gateway_of(request).resources.database.across_tenants("list relays") as tx:
        found = await relays.listing(tx)
        keys = await credentials.listing(tx)
    data = [_relay(record, (key for key in keys if key.relay == record.relay.name)) for record in found]
    return JSONResponse({"object": "list", "data": data}, headers=_NO_STORE)


async def fetch(request: Request) -> Response:
    """One relay with its credentials in use."""
    await operator_of(request)
    name = _name_of(request)
    async with gateway_of(request).resources.database.across_tenants("show a relay") as tx:
        record = await relays.by_name(tx, name)
        keys = await credentials.listing(tx, name)
    return JSONResponse(_relay(record, keys), headers=_NO_STORE)


async def put(request: Request) -> Response:
    """A new relay, or another in its place."""
    operator = await operator_of(request)
    gateway = gateway_of(request)
    name = request.path_params["name"]
    body = _as(RelayBody, await json_object(request, idle_s=gateway.settings.upload_idle_s))
    models = None if body.models is None else tuple(body.models)
    async with gateway.resources.database.across_tenants("put a relay") as tx:
        record = await relays.put(
            tx,
            Relay(name, body.provider, body.base_url, body.region, models, body.status),
            providers=PROVIDERS,
            allow_http=gateway.settings.relay_allow_http,
            actor=operator.actor,
            request_id=request_id_of(request),
        )
        keys = await credentials.listing(tx, name)
    return JSONResponse(_relay(record, keys), headers=_NO_STORE)


async def remove(request: Request) -> Response:
    """Gone, with its retired credentials."""
    operator = await operator_of(request)
    name = _name_of(request)
    async with gateway_of(request).resources.database.across_tenants("remove a relay") as tx:
        await relays.remove(tx, name, actor=operator.actor, request_id=request_id_of(request))
    return Response(status_code=204)


async def list_credentials(request: Request) -> Response:
    """Every credential of a relay, retired ones too."""
    await operator_of(request)
    name = _name_of(request)
    async with gateway_of(request).resources.database.across_tenants("list credentials") as tx:
        await relays.by_name(tx, name)
        data = [_credential(record) for record in await credentials.listing(tx, name)]
    return JSONResponse({"object": "list", "data": data}, headers=_NO_STORE)


async def add_credential(request: Request) -> Response:
    """A key, used from now on in place of the one before it."""
    operator = await operator_of(request)
    gateway = gateway_of(request)
    name = _name_of(request)
    body = _as(CredentialBody, await json_object(request, idle_s=gateway.settings.upload_idle_s))
    async with gateway.resources.database.across_tenants("add a credential") as tx:
        record = await credentials.add(
            tx,
            gateway.resources.sealer,
            name,
            body.key,
            tenant_id=None if body.tenant is None else (await tenants.by_slug(tx, body.tenant)).id,
            actor=operator.actor,
            request_id=request_id_of(request),
        )
    return JSONResponse(_credential(record), 201, _NO_STORE)


async def retire_credential(request: Request) -> Response:
    """Out of use for good."""
    operator = await operator_of(request)
    name = _name_of(request)
    credential_id = read("cred", request.path_params["credential_id"])
    if credential_id is None:
        raise NotFound("There is no such credential, or it is retired.")
    async with gateway_of(request).resources.database.across_tenants("retire a credential") as tx:
        await credentials.retire(
            tx,
            credential_id,
            relay=name,
            actor=operator.actor,
            request_id=request_id_of(request),
        )
    return Response(status_code=204)


def _name_of(request: Request) -> str:
    name: str = request.path_params["name"]
    if not relays.is_name(name):
        raise NotFound("There is no such relay.")
    return name


def _as(form: type[Form], body: dict[str, Any]) -> Form:
    try:
        return form.model_validate(body)
    except ValidationError as wrong:
        first = wrong.errors(include_input=False, include_url=False)[0]
        if first["type"] == "extra_forbidden":  # its name is not told: a key may have slipped there
            raise Invalid(f"A field is not known. There are {', '.join(form.model_fields)}.") from None
        raise Invalid(first["msg"], param=".".join(str(part) for part in first["loc"])) from None


def _relay(record: relays.Record, keys: Iterable[credentials.Record]) -> dict[str, Any]:
    return {
        "object": "relay",
        **vars(record.relay),
        "created_by": record.created_by,
        "created_at": moment(record.created_at),
        "changed_at": moment(record.changed_at),
        "credentials": [_credential(key) for key in keys if key.status == "active"],
    }


def _credential(record: credentials.Record) -> dict[str, Any]:
    return {
        "object": "relay.credential",
        "id": show("cred", record.id),
        "relay": record.relay,
        "tenant": record.tenant,
        "prefix": record.prefix,
        "master_key": record.master_key,
        "status": record.status,
        "created_by": record.created_by,
        "created_at": moment(record.created_at),
        "retired_at": moment(record.retired_at),
        "last_used_at": moment(record.last_used_at),
    }


_RELAY = "/v1/admin/relays/{name}"
_CREDENTIALS = f"{_RELAY}/credentials"

routes: list[BaseRoute] = [
    Route("/v1/admin/relays", listing, methods=["GET"]),
    Route(_RELAY, fetch, methods=["GET"]),
    Route(_RELAY, put, methods=["PUT"]),
    Route(_RELAY, remove, methods=["DELETE"]),
    Route(_CREDENTIALS, list_credentials, methods=["GET"]),
    Route(_CREDENTIALS, add_credential, methods=["POST"]),
    Route(f"{_CREDENTIALS}/{{credential_id}}", retire_credential, methods=["DELETE"]),
]
