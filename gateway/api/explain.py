"""`/v1/policy`: what the caller's tenant may do, and where a request would run, and why, without running it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from gateway.api.forms import Form, filled
from gateway.auth import caller_of
from gateway.bodies import json_object
from gateway.state import gateway_of
from policy.pricing import PriceList, show_nano
from policy.resolve import Candidate, Decision, Demand, Preference


class Question(Form):
    """What would be asked for."""

    kind: Literal["file", "stream", "job"] = "file"
    model: str | None = Field(None, max_length=200)
    language: str | None = Field(None, max_length=40)
    task: Literal["transcribe", "translate"] = "transcribe"
    backend_preference: Preference = "any"
    features: list[str] = Field([], max_length=16)
    audio_ms: int | None = Field(None, ge=0)

    def demand(self) -> Demand:
        """For the resolver."""
        return Demand(**self.model_dump(exclude={"features"}), features=frozenset(self.features))


async def policy(request: Request) -> Response:
    """The tenant's policy in force."""
    caller = await caller_of(request, "transcribe")
    current = await gateway_of(request).door.policy(caller)
    return JSONResponse({"object": "policy", "version": current.version, "body": current.body.model_dump(mode="json")})


async def explain(request: Request) -> Response:
    """The decision, or the refusal that the request itself would get."""
    gateway = gateway_of(request)
    caller = await caller_of(request, "transcribe")
    question = filled(Question, await json_object(request, idle_s=gateway.settings.upload_idle_s))
    current, decision = await gateway.door.explain(caller, question.demand())
    prices = (await gateway.door.terms.of(caller.tenant_id)).prices
    return JSONResponse(decision_json(decision, prices, version=current.version))


def decision_json(decision: Decision, prices: PriceList, *, version: int | None) -> dict[str, Any]:
    """With what an hour would cost the tenant. `version` None: of a draft."""
    told = decision.as_json()
    for candidate, entry in zip(decision.candidates, told["candidates"], strict=True):
        entry["price_per_hour"] = _price(candidate, prices)
    return {"object": "policy.decision", "policy_version": version, "currency": prices.currency, **told}


def _price(candidate: Candidate, prices: PriceList) -> str | None:
    price = prices.of(candidate.backend, candidate.model)
    return None if price is None else show_nano(price.price_nano_per_hour)


routes: list[BaseRoute] = [
    Route("/v1/policy", policy, methods=["GET"]),
    Route("/v1/policy/explain", explain, methods=["POST"]),
]
