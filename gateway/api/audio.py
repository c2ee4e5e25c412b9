"""`/v1/sessions/{session_id}/audio`: what a live session kept of its audio, until its time is over."""

from __future__ import annotations

from typing import Any, cast, get_args
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from dispatchers.audio.encode import MEDIA_TYPES, WAV_HEADER_BYTES, Form
from gateway.api.query import choice, moment
from gateway.auth import caller_of
from gateway.playback import Playing, played
from gateway.state import gateway_of
from policy import recordings
from policy.errors import AudioGone, AudioNotKept, AudioNotReady, NotFound
from policy.identity import Caller
from policy.recordings import Recording
from runtime.ids import read, show
from workers.retention import Due, erase

SCOPE = "usage"


async def fetch(request: Request) -> Response:
    """The whole of it as one file."""
    caller = await caller_of(request, SCOPE)
    form = cast(Form, choice(request, "format", get_args(Form)) or "wav")
    recording = await _kept(request, caller)
    headers = {
        "content-disposition": f'attachment; filename="{show("sess", recording.session_id)}.{form}"',
        "cache-control": "private, no-store",
        "x-stenogate-missing-ms": str(recording.missing_ms),
    }
    if form == "wav":
        headers["content-length"] = str(WAV_HEADER_BYTES + 2 * recording.samples)
    if request.method == "HEAD":
        return Response(headers=headers, media_type=MEDIA_TYPES[form])
    pieces = played(gateway_of(request).resources.blobs, caller.tenant_id, recording, form)
    return await Playing(pieces, form, headers).begun()


async def delete(request: Request) -> Response:
    """Deletes it now."""
    caller = await caller_of(request, SCOPE)
    recording = await _kept(request, caller, empty=True)
    resources = gateway_of(request).resources
    async with resources.database.tenant(caller.tenant_id) as tx:
        await recordings.expire(tx, caller.tenant_id, recording, actor=caller.subject)
    due = Due(caller.tenant_id, recording.session_id, caller.subject, "asked")
    await erase(resources.database, resources.blobs, due)
    return Response(status_code=204)


def audio_json(recording: Recording) -> dict[str, Any] | None:
    """What a session says of its audio. None: none is kept."""
    if recording.state == "none":
        return None
    shown: dict[str, Any] = {"status": recording.state}
    if recording.state == "deleted":
        return shown | {"deleted_at": moment(recording.deleted_at)}
    shown["expires_at"] = moment(recording.expires_at)
    if recording.state == "recording":
        return shown
    return shown | {
        "duration_ms": recording.samples // recordings.SAMPLES_PER_MS,
        "missing_ms": recording.missing_ms,
        "missing": [{"start_ms": span.start_ms, "end_ms": span.end_ms} for span in recording.missing],
    }


async def _kept(request: Request, caller: Caller, *, empty: bool = False) -> Recording:
    """The recording, there to be fetched, or, if it may be `empty`, to be deleted. Raises why it is not."""
    async with gateway_of(request).resources.database.tenant(caller.tenant_id) as tx:
        recording = await recordings.get(tx, caller.tenant_id, _session_id(request))
    match recording.state:
        case "none":
            raise AudioNotKept
        case "recording":
            raise AudioNotReady
        case "deleted":
            raise AudioGone
        case "kept":
            if not recording.parts and not empty:
                raise AudioNotKept
    return recording


def _session_id(request: Request) -> UUID:
    session_id = read("sess", request.path_params["session_id"])
    if session_id is None:
        raise NotFound("There is no such session.")
    return session_id


routes: list[BaseRoute] = [
    Route("/v1/sessions/{session_id}/audio", fetch),
    Route("/v1/sessions/{session_id}/audio", delete, methods=["DELETE"]),
]
