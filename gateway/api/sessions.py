"""`/v1/sessions`: what was transcribed, when, by whom it was done and what it came to."""

from __future__ import annotations

from typing import Any, cast, get_args

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from gateway.api.audio import audio_json
from gateway.api.query import choice, integer, moment
from gateway.auth import caller_of
from gateway.state import gateway_of
from policy import legs, recordings, sessions
from policy.errors import NotFound
from policy.legs import Leg
from policy.sessions import MAX_LIMIT, Kind, Session
from runtime.ids import read, show


async def listing(request: Request) -> Response:
    """The tenant's sessions, newest first, without their texts."""
    caller = await caller_of(request, "usage")
    limit = integer(request, "limit", 50, least=1, most=MAX_LIMIT)
    kind = cast(Kind | None, choice(request, "kind", get_args(Kind)))
    async with gateway_of(request).resources.database.tenant(caller.tenant_id) as tx:
        page = await sessions.listing(
            tx, caller.tenant_id, cursor=request.query_params.get("cursor"), limit=limit, kind=kind
        )
    data = [_session_json(session) for session in page.items]
    return JSONResponse({"object": "list", "data": data, "next_cursor": page.next_cursor})


async def single(request: Request) -> Response:
    """One session, with the text (where the policy keeps it) and why it went where it went."""
    caller = await caller_of(request, "usage")
    session_id = read("sess", request.path_params["session_id"])
    if session_id is None:
        raise NotFound("There is no such session.")
    async with gateway_of(request).resources.database.tenant(caller.tenant_id) as tx:
        session = await sessions.get(tx, caller.tenant_id, session_id)
        recording = await recordings.get(tx, caller.tenant_id, session_id)
        attempts = await legs.listing(tx, caller.tenant_id, session_id)
    more = {
        "text": session.text,
        "decision": session.decision.as_json(),
        "legs": [_leg_json(leg) for leg in attempts],
        "audio": audio_json(recording),
    }
    return JSONResponse(_session_json(session) | more)


def _leg_json(leg: Leg) -> dict[str, Any]:
    """What it cost is the operator's business."""
    shown = ("backend", "model", "outcome", "start_ms", "audio_ms", "took_ms")
    return {name: getattr(leg, name) for name in shown}


def _session_json(session: Session) -> dict[str, Any]:
    return {
        "id": show("sess", session.id),
        "object": "session",
        "kind": session.kind,
        "status": session.status,
        "code": session.code,
        "subject": session.subject,
        "customer": session.customer,
        "metadata": dict(session.metadata),
        "request_id": session.request_id,
        "policy_version": session.policy_version,
        "backend": session.backend,
        "engine": session.engine,
        "model": session.model,
        "language": session.language,
        "started_at": moment(session.started_at),
        "ended_at": moment(session.ended_at),
        "channels": session.channels,
        "accepted_ms": session.accepted_ms,
        "billed_ms": session.billed_ms,
        "utterances": session.utterances,
        "words": session.words,
    }


routes: list[BaseRoute] = [
    Route("/v1/sessions", listing),
    Route("/v1/sessions/{session_id}", single),
]
