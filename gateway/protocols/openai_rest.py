"""`/v1/audio/transcriptions`, `/v1/audio/translations` and `/v1/models`, as OpenAI's clients know them.

A short recording is recognised while its caller waits. A longer one becomes a job: whoever can poll gets its address;
whoever cannot (an OpenAI SDK, an event stream) is kept waiting on it, and an SDK's retry joins the job it lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from dispatchers.backends.scripted import MODEL as SCRIPTED
from dispatchers.errors import AudioTooLong
from dispatchers.formats import render
from dispatchers.interface import Heard, Samples, Transcript, ignore, to_ms
from gateway.api.jobs import finished, job_json, job_links
from gateway.auth import caller_of
from gateway.protocols.openai_params import Parameters, Task, parse
from gateway.protocols.openai_sse import Told, all_at_once, as_it_is_heard, failed
from gateway.sse import EventStream, while_connected
from gateway.state import Gateway, gateway_of, request_id_of
from gateway.uploads import received
from policy.errors import ModelNotFound
from policy.identity import Caller
from policy.objections import forbidden
from policy.policies import PolicyBody
from policy.resolve import TENANTS_DEFAULT, Offer
from runtime.settings import Settings
from workers.jobs import Job, Upload

CREATED = 1_795_132_800  # models have no birthday of their own; clients want a number


async def transcriptions(request: Request) -> Response:
    """Speech to text in its own language."""
    return await _answer(request, "transcribe")


async def translations(request: Request) -> Response:
    """Speech to English text."""
    return await _answer(request, "translate")


@dataclass(frozen=True, slots=True)
class _Limits:
    """The tenant's, where it has its own, else the installation's."""

    upload_bytes: int
    inline_bytes: int
    inline_ms: int
    file_ms: int
    job_ms: int

    @classmethod
    def of(cls, body: PolicyBody, settings: Settings) -> _Limits:
        return cls(
            upload_bytes=min(body.max_upload_bytes or settings.max_upload_bytes, settings.max_upload_bytes),
            inline_bytes=body.job_threshold_bytes or settings.job_threshold_bytes,
            inline_ms=body.job_threshold_ms or settings.job_threshold_ms,
            file_ms=body.longest_ms("file"),
            job_ms=body.longest_ms("job"),
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    """One request, its form read."""

    request: Request
    gateway: Gateway
    caller: Caller
    parameters: Parameters

    @property
    def from_sdk(self) -> bool:
        return any(name.startswith("x-stainless-") for name in self.request.headers)

    @property
    def is_retry(self) -> bool:
        count = self.request.headers.get("x-stainless-retry-count", "0")
        return count.isascii() and count.isdigit() and int(count) > 0

    @property
    def wants_job(self) -> bool:
        preferred = "respond-async" in self.request.headers.get("prefer", "").lower()
        return self.parameters.asynchronous == "true" or preferred

    @property
    def takes_job(self) -> bool:
        """Whether the caller can make use of a job's address."""
        waits = self.parameters.asynchronous == "false" or self.from_sdk or self.parameters.stream
        return self.wants_job or (not waits and "jobs" in self.caller.scopes)


async def _answer(request: Request, task: Task) -> Response:
    gateway = gateway_of(request)
    caller = await caller_of(request, "transcribe", lately=True)
    body = (await gateway.door.policy(caller)).body
    limits = _Limits.of(body, gateway.settings)
    folder = gateway.settings.data_dir / "uploads"
    idle_s = gateway.settings.upload_idle_s
    async with received(request, folder=folder, most=limits.upload_bytes, idle_s=idle_s) as form:
        asked = _Asked(request, gateway, caller, parse(form.fields, task))
        if asked.wants_job:
            caller.require("jobs")
        # Refuses what the door would refuse, before anything is decoded or stored.
        await gateway.door.explain(caller, asked.parameters.demand("file", audio_ms=None, request_id=""))
        taken = await _take(asked, form.upload, limits)
    if not isinstance(taken, Job):
        return await _inline(asked, taken)
    return _accepted(taken) if asked.takes_job else await _on_job(asked, taken)


async def _take(asked: _Asked, upload: Upload, limits: _Limits) -> Samples | Job:
    """A short recording's samples, or the job that a longer one has become."""
    gateway, caller, parameters = asked.gateway, asked.caller, asked.parameters
    if asked.is_retry and (running := await gateway.jobs.joinable(caller.tenant_id, upload.fingerprint)):
        return running
    if not asked.wants_job and upload.size <= limits.inline_bytes:
        try:
            return await gateway.decoder.load(upload.recording, min(limits.inline_ms, limits.file_ms))
        except AudioTooLong:
            if limits.job_ms <= min(limits.inline_ms, limits.file_ms):
                raise
    demand = parameters.demand("job", audio_ms=None, request_id=request_id_of(asked.request))
    return await gateway.jobs.submit(caller, demand, parameters.options(), upload)


async def _inline(asked: _Asked, samples: Samples) -> Response:
    parameters = asked.parameters
    demand = parameters.demand("file", audio_ms=to_ms(len(samples)), request_id=request_id_of(asked.request))

    async def recognise(heard: Heard = ignore) -> Told:
        result = await asked.gateway.door.transcribe(asked.caller, demand, parameters.options(), samples, heard)
        return result.transcript, _beside(result.candidate.backend, result.transcript, result.billed_ms)

    if parameters.stream:
        return await EventStream(as_it_is_heard(recognise), failed).begun(asked.request)
    return _whole(parameters, *await while_connected(asked.request, recognise()))


async def _on_job(asked: _Asked, job: Job) -> Response:
    """The job's transcript, as if it had been made here. When the caller goes, the job goes on."""

    async def wait() -> Told:
        ended, transcript = await finished(asked.gateway.jobs, job)
        return transcript, _beside(ended.backend or transcript.origin.backend, transcript, ended.billed_ms)

    if asked.parameters.stream:
        return await EventStream(all_at_once(wait), failed).begun(asked.request)
    return _whole(asked.parameters, *await while_connected(asked.request, wait()))


def _accepted(job: Job) -> Response:
    return JSONResponse(job_json(job), 202, {"location": job_links(job)["self"]})


def _whole(parameters: Parameters, transcript: Transcript, beside: Mapping[str, object]) -> Response:
    body, media_type = render(
        transcript, parameters.response_format, words=parameters.words, segments=parameters.segments
    )
    headers = {f"x-stenogate-{name.replace('_', '-')}": str(value) for name, value in beside.items()}
    return Response(body, headers=headers, media_type=media_type)


def _beside(backend: str, transcript: Transcript, billed_ms: int) -> Mapping[str, object]:
    origin = transcript.origin
    return {"backend": backend, "engine": origin.engine, "model": origin.model, "billed_ms": billed_ms}


# --- models -------------------------------------------------------------------------------------------------------


async def models(request: Request) -> Response:
    """What the tenant may ask for, its default first."""
    return JSONResponse({"object": "list", "data": await _models(request)})


async def model(request: Request) -> Response:
    """One of them."""
    name = request.path_params["model"]
    for entry in await _models(request):
        if entry["id"] == name:
            return JSONResponse(entry)
    raise ModelNotFound(param="model")


async def _models(request: Request) -> list[dict[str, object]]:
    gateway = gateway_of(request)
    caller = await caller_of(request, "transcribe")
    body = (await gateway.door.policy(caller)).body
    cards = [card for card in gateway.catalogue() if body.models is None or card.name in body.models]
    cards.sort(key=lambda card: card.name != body.default_model)  # stable: else the installation's default stays first
    entries = [_entry(card.name, card.engine, card.status) for card in cards]
    if cards and TENANTS_DEFAULT not in [*body.aliases, *(card.name for card in cards)]:
        entries.insert(1, _entry(TENANTS_DEFAULT, cards[0].engine, cards[0].status) | {"alias_of": cards[0].name})
    entries += _of_relays(gateway.door.offers(caller.tenant_id), body, {str(entry["id"]) for entry in entries})
    named = {str(entry["id"]): entry for entry in entries}
    return [entry for entry in {**named, **_of_aliases(body, named)}.values() if entry["id"] != SCRIPTED]


def _of_aliases(body: PolicyBody, named: Mapping[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """The policy's own names for these, which come before a model's."""
    found = {}
    for alias in body.aliases:
        target = body.target(alias)
        if entry := named.get(target) or named.get(target.partition("/")[2]):
            found[alias] = entry | {"id": alias, "alias_of": target}
    return found


def _of_relays(offers: Sequence[Offer], body: PolicyBody, known: set[str]) -> Iterator[dict[str, object]]:
    """Those of relays that the policy lets in. A name that several have stands for the first in the policy's order."""
    relays = [offer for offer in offers if offer.kind == "relay"]
    for offer in sorted(relays, key=lambda offer: (body.place(offer.backend) or 0, offer.backend)):
        for name in offer.models:
            if name not in known and forbidden(body, offer, name) is None:
                known.add(name)
                yield _entry(name, offer.backend, "ready" if offer.up else "failed") | {"owned_by": offer.backend}


def _entry(name: str, engine: str, status: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": CREATED,
        "owned_by": "stenogate",
        "engine": engine,
        "status": status,
    }


routes: list[BaseRoute] = [
    Route("/v1/audio/transcriptions", transcriptions, methods=["POST"]),
    Route("/v1/audio/translations", translations, methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/models/{model:path}", model),
]
