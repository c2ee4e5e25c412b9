"""`/v1/jobs`: long recordings on their way to becoming transcripts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast, get_args
from uuid import UUID

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from dispatchers.formats import FORMATS, render
from dispatchers.interface import Transcript
from gateway.api.query import choice, integer, moment, seconds
from gateway.auth import caller_of
from gateway.errors import known, problem_json, told_again
from gateway.sse import EventStream, message, while_connected
from gateway.state import gateway_of, request_id_of
from runtime.ids import read, show
from workers.errors import JobFailed, JobNotFound
from workers.jobs import Job, Jobs, Status

WAIT_MOST_S = 60.0
WAIT_STEP_S = 30.0
LOOK_EVERY_S = 0.5
PAGE = 50
PAGE_MOST = 200


async def listing(request: Request) -> Response:
    """The tenant's jobs, newest first."""
    caller = await caller_of(request, "jobs")
    jobs, cursor = await gateway_of(request).jobs.listing(
        caller.tenant_id,
        cursor=request.query_params.get("cursor"),
        limit=integer(request, "limit", PAGE, least=1, most=PAGE_MOST),
        status=cast(Status | None, choice(request, "status", get_args(Status))),
    )
    return JSONResponse({"object": "list", "data": [job_json(job) for job in jobs], "next_cursor": cursor})


async def single(request: Request) -> Response:
    """One job; with `wait`, not before it has ended or so many seconds have passed."""
    caller = await caller_of(request, "jobs")
    jobs, job_id = gateway_of(request).jobs, _job_id(request)
    wait_s = seconds(request, "wait", most=WAIT_MOST_S)
    job = await jobs.get(caller.tenant_id, job_id)
    if wait_s > 0 and not job.ended:
        job = await while_connected(request, jobs.wait(caller.tenant_id, job_id, wait_s))
    return JSONResponse(job_json(job))


async def transcript(request: Request) -> Response:
    """A completed job's text."""
    caller = await caller_of(request, "jobs")
    fmt = choice(request, "format", FORMATS) or "json"
    made = await gateway_of(request).jobs.transcript(caller.tenant_id, _job_id(request))
    body, media_type = render(made, fmt, words=any(segment.words for segment in made.segments))
    return Response(body, media_type=media_type)


async def events(request: Request) -> Response:
    """The job at each change, until it has ended."""
    caller = await caller_of(request, "jobs")
    request_id = request_id_of(request)

    def failed(exc: Exception) -> bytes:
        return message(problem_json(known(exc), request_id), event="error")

    changes = _changes(gateway_of(request).jobs, caller.tenant_id, _job_id(request))
    return await EventStream(changes, failed).begun(request)


async def _changes(jobs: Jobs, tenant_id: UUID, job_id: UUID) -> AsyncGenerator[bytes, None]:
    last: dict[str, Any] = {}
    while True:
        job = await jobs.get(tenant_id, job_id)
        if (now := job_json(job)) != last:
            yield message(now, event="job")
        if job.ended:
            return
        last = now
        await asyncio.sleep(LOOK_EVERY_S)


async def finished(jobs: Jobs, job: Job) -> tuple[Job, Transcript]:
    """Waits for the job however long it takes. Raises what it failed of."""
    while not job.ended:
        job = await jobs.wait(job.tenant_id, job.id, WAIT_STEP_S)
    if job.status == "completed":
        return job, await jobs.transcript(job.tenant_id, job.id)
    if job.error is None:
        raise JobFailed("The job was cancelled.")
    raise told_again(job.error["code"], job.error["message"])


def job_json(job: Job) -> dict[str, Any]:
    """The job as callers see it. Times are Unix seconds."""
    return {
        "id": show("job", job.id),
        "object": "transcription.job",
        "status": job.status,
        "created_at": moment(job.created_at),
        "started_at": moment(job.started_at),
        "finished_at": moment(job.finished_at),
        "progress": round(job.progress, 4),
        "eta_s": job.eta_s,
        "queue_position": job.queue_position,
        "audio_ms": job.audio_ms,
        "billed_ms": job.billed_ms,
        "backend": job.backend,
        "model": job.model,
        "attempts": job.attempts,
        "filename": job.filename,
        "customer": job.customer,
        "metadata": job.metadata,
        "error": job.error,
        "links": job_links(job),
    }


def job_links(job: Job) -> dict[str, str]:
    """Where the job, its events and, once there is one, its transcript are."""
    own = f"/v1/jobs/{show('job', job.id)}"
    links = {"self": own, "events": f"{own}/events"}
    return links | {"transcript": f"{own}/transcript"} if job.status == "completed" else links


def _job_id(request: Request) -> UUID:
    job_id = read("job", request.path_params["job_id"])
    if job_id is None:
        raise JobNotFound
    return job_id


routes: list[BaseRoute] = [
    Route("/v1/jobs", listing),
    Route("/v1/jobs/{job_id}", single),
    Route("/v1/jobs/{job_id}/transcript", transcript),
    Route("/v1/jobs/{job_id}/events", events),
]
