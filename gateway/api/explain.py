"""`/v1/policy/explain`: where a request would run, and why, without running it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from gateway.auth import caller_of
from gateway.bodies import json_object
from gateway.state import gateway_of
from policy.errors import Invalid
from policy.resolve import Demand, Preference


class Question(BaseModel):
    """What would be asked for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: Literal["file", "stream", "job"] = "file"
    model: str | None = Field(None, max_length=200)
    language: str | None = Field(None, max_length=40)
    task: Literal["transcribe", "translate"] = "transcribe"
    backend_preference: Preference = "any"
    features: list[str] = Field([], max_length=16)
    audio_ms: int | None = Field(None, ge=0)


async def explain(request: Request) -> Response:
    """The decision, or the refusal that the request itself would get."""
    gateway = gateway_of(request)
    caller = await caller_of(request, "transcribe")
    question = _question(await json_object(request, idle_s=gateway.settings.upload_idle_s))
    demand = Demand(**question.model_dump(exclude={"features"}), features=frozenset(question.features))
    policy, decision = await gateway.door.explain(caller, demand)
    return JSONResponse({"object": "policy.decision", "policy_version": policy.version, **decision.as_json()})


def _question(body: dict[str, object]) -> Question:
    try:
        return Question.model_validate(body)
    except ValidationError as wrong:
        first = wrong.errors(include_input=False, include_url=False)[0]
        raise Invalid(first["msg"], param=".".join(str(part) for part in first["loc"])) from None


routes: list[BaseRoute] = [Route("/v1/policy/explain", explain, methods=["POST"])]
