"""`/v1/admin/tenants/{slug}/policies`: the versions of a tenant's policy, for an operator's token."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from gateway.api.explain import Question, decision_json
from gateway.api.forms import Form, FormType, filled
from gateway.api.query import integer, moment
from gateway.auth import operator_of
from gateway.bodies import json_object
from gateway.state import Gateway, gateway_of, request_id_of
from policy import checks, history, policies, tenants
from policy.errors import Invalid, NotFound
from policy.history import MAX_LIMIT, Version
from policy.policies import Policy, PolicyBody
from policy.resolve import Offer
from policy.tenants import Tenant
from runtime.database import Transaction

_NO_STORE = {"cache-control": "no-store"}
_LATEST_S = 253_402_300_799  # the end of the year 9999
_NEWEST = 2_147_483_647


class Timing(Form):
    """When a version is to be in force (Unix seconds; None: now), and after which one it is meant to come."""

    effective_from: int | None = Field(None, ge=0, le=_LATEST_S)
    newest: int | None = Field(None, ge=0, le=_NEWEST)

    @property
    def at(self) -> datetime | None:
        return None if self.effective_from is None else datetime.fromtimestamp(self.effective_from, UTC)


class Draft(Form):
    """A policy's content, not yet looked at."""

    body: dict[str, Any]


class Put(Draft, Timing):
    """A new version."""


class Rollback(Timing):
    """A new version with the content of an old one."""

    version: int = Field(ge=1, le=_NEWEST)


class DryRun(Form):
    """A question, under a draft or a version; neither: under the policy in force."""

    body: dict[str, Any] | None = None
    version: int | None = Field(None, ge=1, le=_NEWEST)
    question: Question = Question()


async def listing(request: Request) -> Response:
    """Every version, newest first, without its content."""
    await operator_of(request)
    limit = integer(request, "limit", 50, least=1, most=MAX_LIMIT)
    before = integer(request, "cursor", 0, least=1, most=_NEWEST) or None
    async with gateway_of(request).resources.database.across_tenants("list policies") as tx:
        tenant = await _tenant(request, tx)
        versions, following = await history.listing(tx, tenant.id, before=before, limit=limit)
    data = [_version_json(tenant, version) for version in versions]
    cursor = None if following is None else str(following)
    return JSONResponse({"object": "list", "data": data, "next_cursor": cursor}, headers=_NO_STORE)


async def single(request: Request) -> Response:
    """One version with its content; `current`: the one in force."""
    await operator_of(request)
    async with gateway_of(request).resources.database.across_tenants("show a policy") as tx:
        tenant = await _tenant(request, tx)
        return _told(tenant, await history.get(tx, tenant.id, _number(request.path_params["version"])))


async def put(request: Request) -> Response:
    """Puts a version in force, now or later, if nothing in it is wrong."""
    operator, gateway, form = await _asked(request, Put)
    async with gateway.resources.database.across_tenants("put a policy") as tx:
        tenant = await _tenant(request, tx)
        body = checks.require_fit(form.body, await checks.known(tx, _plugged(gateway, tenant)))
        done = await policies.put(
            tx,
            tenant.id,
            body,
            actor=operator,
            effective_from=form.at,
            newest=form.newest,
            request_id=request_id_of(request),
        )
        version = await history.get(tx, tenant.id, done.version)
    gateway.door.terms.forget()
    return _told(tenant, version, status=201)


async def rollback(request: Request) -> Response:
    """Puts the content of an earlier version in force again, as a new one."""
    operator, gateway, form = await _asked(request, Rollback)
    async with gateway.resources.database.across_tenants("roll a policy back") as tx:
        tenant = await _tenant(request, tx)
        done = await history.rollback(
            tx,
            tenant.id,
            form.version,
            actor=operator,
            effective_from=form.at,
            newest=form.newest,
            request_id=request_id_of(request),
        )
        version = await history.get(tx, tenant.id, done.version)
    gateway.door.terms.forget()
    return _told(tenant, version, status=201)


async def withdraw(request: Request) -> Response:
    """Takes back a version that is not yet in force."""
    operator = await operator_of(request)
    gateway = gateway_of(request)
    number = _number(request.path_params["version"])
    if number is None:
        raise Invalid("Name the version to withdraw by its number.", param="version")
    async with gateway.resources.database.across_tenants("withdraw a policy") as tx:
        tenant = await _tenant(request, tx)
        await history.withdraw(tx, tenant.id, number, actor=operator.actor, request_id=request_id_of(request))
    gateway.door.terms.forget()
    return Response(status_code=204)


async def diff(request: Request) -> Response:
    """The fields in which two versions differ; left out, the version in force."""
    await operator_of(request)
    numbers = [integer(request, name, 0, least=1, most=_NEWEST) or None for name in ("from", "to")]
    async with gateway_of(request).resources.database.across_tenants("compare policies") as tx:
        tenant = await _tenant(request, tx)
        before, after = [await history.get(tx, tenant.id, number) for number in numbers]
    told = {"object": "policy.diff", "from": before.version, "to": after.version}
    return JSONResponse(told | {"changes": _changes(before.body, after.body)}, headers=_NO_STORE)


async def check(request: Request) -> Response:
    """What is wrong with a draft, and what it would change."""
    _, gateway, form = await _asked(request, Draft)
    async with gateway.resources.database.across_tenants("check a policy") as tx:
        tenant = await _tenant(request, tx)
        current = await policies.current(tx, tenant.id)
        offers = await checks.known(tx, _plugged(gateway, tenant))
    body, problems = checks.read(form.body)
    problems = problems if body is None else checks.misfits(body, offers)
    told = {
        "object": "policy.check",
        "accepted": not problems,
        "problems": [{"field": problem.field, "reason": problem.reason} for problem in problems],
        "changes": None if body is None else _changes(current.body, body),
    }
    return JSONResponse(told, headers=_NO_STORE)


async def explain(request: Request) -> Response:
    """Where a request of the tenant would run under a draft, or another version; or the refusal it would get."""
    _, gateway, form = await _asked(request, DryRun)
    if form.body is not None and form.version is not None:
        raise Invalid("Give a body or a version, not both.", param="version")
    async with gateway.resources.database.across_tenants("explain a policy") as tx:
        tenant = await _tenant(request, tx)
        offers = await checks.known(tx, _plugged(gateway, tenant))
        meant = None if form.version is None else await policies.at_version(tx, tenant.id, form.version)
    terms = await gateway.door.terms.of(tenant.id, anew=True)
    if form.body is not None:
        meant = Policy(tenant.id, 0, checks.require_fit(form.body, offers))
    terms = terms if meant is None else replace(terms, policy=meant)
    decision = terms.decide(form.question.demand(), _plugged(gateway, tenant))
    told = decision_json(decision, terms.prices, version=terms.policy.version or None)
    return JSONResponse(told, headers=_NO_STORE)


async def _asked(request: Request, form: type[FormType]) -> tuple[str, Gateway, FormType]:
    """Who asks, of which gateway, and what."""
    operator = await operator_of(request)
    gateway = gateway_of(request)
    body = await json_object(request, idle_s=gateway.settings.upload_idle_s)
    return operator.actor, gateway, filled(form, body)


async def _tenant(request: Request, tx_system: Transaction) -> Tenant:
    return await tenants.by_slug(tx_system, request.path_params["slug"])


def _plugged(gateway: Gateway, tenant: Tenant) -> tuple[Offer, ...]:
    """What the tenant's requests can go to."""
    return gateway.door.offers(tenant.id)


def _number(shown: str) -> int | None:
    """None: the version in force. Raises `NotFound` for what is no version's number."""
    if shown == "current":
        return None
    if shown.isascii() and shown.isdigit() and 0 < int(shown[:11]) <= _NEWEST:
        return int(shown[:11])
    raise NotFound("The tenant has no such policy.")


def _told(tenant: Tenant, version: Version, status: int = 200) -> Response:
    body = {"body": version.body.model_dump(mode="json")}
    return JSONResponse(_version_json(tenant, version) | body, status, _NO_STORE)


def _version_json(tenant: Tenant, version: Version) -> dict[str, Any]:
    return {
        "object": "policy.version",
        "tenant": tenant.slug,
        "version": version.version,
        "status": version.standing,
        "effective_from": moment(version.effective_from),
        "effective_until": moment(version.effective_until),
        "created_by": version.created_by,
        "created_at": moment(version.created_at),
    }


def _changes(before: PolicyBody, after: PolicyBody) -> list[dict[str, Any]]:
    return [
        {"field": field, "from": one, "to": other} for field, (one, other) in history.difference(before, after).items()
    ]


_POLICIES = "/v1/admin/tenants/{slug}/policies"

routes: list[BaseRoute] = [
    Route(_POLICIES, listing, methods=["GET"]),
    Route(_POLICIES, put, methods=["PUT"]),
    Route(f"{_POLICIES}/rollback", rollback, methods=["POST"]),
    Route(f"{_POLICIES}/check", check, methods=["POST"]),
    Route(f"{_POLICIES}/explain", explain, methods=["POST"]),
    Route(f"{_POLICIES}/diff", diff, methods=["GET"]),
    Route(f"{_POLICIES}/{{version}}", single, methods=["GET"]),
    Route(f"{_POLICIES}/{{version}}", withdraw, methods=["DELETE"]),
]
