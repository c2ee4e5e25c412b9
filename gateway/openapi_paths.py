"""What the OpenAPI document says of each route."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dispatchers.audio.encode import MEDIA_TYPES
from dispatchers.formats import FORMATS

Json = dict[str, Any]


def ref(schema: str) -> Json:
    return {"$ref": f"#/components/schemas/{schema}"}


def obj(properties: Mapping[str, Any], *, required: list[str] | None = None) -> Json:
    """An object; `required` None: nothing is said of that."""
    schema: Json = {"type": "object", "properties": dict(properties)}
    return schema | {"required": required} if required else schema


def listed(schema: str, *, cursor: bool = True) -> Json:
    properties: Json = {"object": {"const": "list"}, "data": {"type": "array", "items": ref(schema)}}
    if cursor:
        properties["next_cursor"] = {"type": ["string", "null"]}
    return obj(properties)


def operation(summary: str, description: str, answers: Json, *, scope: str | None = "transcribe", **more: Any) -> Json:
    """`answers` are the successes; every operation may also answer with a problem. `scope` None: no token needed."""
    said: Json = {"summary": summary, "description": description, **more}
    said["responses"] = answers | {"default": {"$ref": "#/components/responses/Problem"}}
    if scope is None:
        said["security"] = []
    else:
        said["description"] += f" Scope: `{scope}`."
    return said


def json_answer(schema: str, description: str = "Done.", status: str = "200") -> Json:
    return {status: {"description": description, "content": {"application/json": {"schema": ref(schema)}}}}


def text_answer(media_type: str, description: str = "Done.") -> Json:
    return {"200": {"description": description, "content": {media_type: {"schema": {"type": "string"}}}}}


def query(name: str, description: str, schema: Json | None = None) -> Json:
    return {"name": name, "in": "query", "description": description, "schema": schema or {"type": "string"}}


def path_id(name: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


_FORM = {"required": True, "content": {"multipart/form-data": {"schema": ref("TranscriptionForm")}}}
_HEADERS = {
    f"x-stenogate-{name}": {"schema": {"type": "string"}} for name in ("backend", "engine", "model", "billed-ms")
}
_TRANSCRIPT: Json = {
    "200": {
        "description": "The transcript in the format asked for.",
        "headers": _HEADERS,
        "content": {
            "application/json": {"schema": {"anyOf": [ref("Transcription"), ref("VerboseTranscription")]}},
            "text/plain": {"schema": {"type": "string"}},
            "text/vtt": {"schema": {"type": "string"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
}
_AUDIO: Json = {
    "200": {
        "description": "The file: mono, 16 kHz, on the session's sample clock; what is missing is silence.",
        "headers": {
            "x-stenogate-missing-ms": {"schema": {"type": "integer"}, "description": "How much is missing."},
            "content-disposition": {"schema": {"type": "string"}},
        },
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()},
    }
}
_PAGE = [
    query("limit", "How many, at most 200.", {"type": "integer", "minimum": 1, "maximum": 200, "default": 50}),
    query("cursor", "`next_cursor` of the page before."),
]
_LIVE = """\
Upgrade to a WebSocket. The first frame is `{"type":"start", …}`, or its fields stand in the query string; then binary
frames of audio, and `{"type":"flush"}`, `{"type":"clear"}`, `{"type":"ping"}`, `{"type":"metrics"}`, `{"type":"stop"}`.
Events come as JSON: `ready`, `speech_started`, `partial`, `delta`, `final`, `gap`, `usage`, `flushed`, `cleared`,
`error`, `closed`. A browser offers the subprotocols `stenogate.v1` and `bearer.<token>`, or brings a ticket."""

PATHS: Json = {
    "/v1/audio/transcriptions": {
        "post": operation(
            "Transcribe a recording",
            "OpenAI's call, with fields of our own. A long recording becomes a job, which needs the scope `jobs`.",
            _TRANSCRIPT | json_answer("Job", "The recording has become a job; poll it.", "202"),
            requestBody=_FORM,
            parameters=[
                {"name": "Prefer", "in": "header", "description": "`respond-async`", "schema": {"type": "string"}}
            ],
        )
    },
    "/v1/audio/translations": {
        "post": operation(
            "Translate a recording into English",
            "As transcriptions.",
            _TRANSCRIPT | json_answer("Job", "The recording has become a job; poll it.", "202"),
            requestBody=_FORM,
        )
    },
    "/v1/models": {
        "get": operation(
            "List models", "The tenant's default first; `whisper-1` is an alias of it.", json_answer("Models")
        )
    },
    "/v1/models/{model}": {
        "get": operation("Show a model", "One of the list.", json_answer("Model"), parameters=[path_id("model")])
    },
    "/v1/stream": {
        "get": operation(
            "Transcribe live",
            _LIVE,
            {"101": {"description": "The WebSocket is open."}},
            parameters=[query("ticket", "Of `POST /v1/tickets`, in place of a token.")],
        ),
    },
    "/v1/tickets": {
        "post": operation(
            "Make a ticket",
            "Opens one live stream in place of the token, for a minute at most; for browsers.",
            json_answer("Ticket", "Made; this is the only time that it is told.", "201"),
            requestBody={"content": {"application/json": {"schema": ref("TicketRequest")}}},
        )
    },
    "/v1/config": {
        "get": operation(
            "Show the configuration", "What is offered here, and its limits.", json_answer("Config"), scope=None
        )
    },
    "/v1/jobs": {
        "get": operation(
            "List jobs",
            "Newest first.",
            json_answer("Jobs"),
            scope="jobs",
            parameters=[*_PAGE, query("status", "Only these.", {"$ref": "#/components/schemas/Job/properties/status"})],
        )
    },
    "/v1/jobs/{job_id}": {
        "get": operation(
            "Show a job",
            "With `wait`, answers when the job has ended or that many seconds have passed.",
            json_answer("Job"),
            scope="jobs",
            parameters=[
                path_id("job_id"),
                query("wait", "Seconds.", {"type": "number", "minimum": 0, "maximum": 60, "default": 0}),
            ],
        )
    },
    "/v1/jobs/{job_id}/transcript": {
        "get": operation(
            "Fetch a job's transcript",
            "Once it is completed.",
            _TRANSCRIPT,
            scope="jobs",
            parameters=[
                path_id("job_id"),
                query("format", "Its shape.", {"type": "string", "enum": list(FORMATS), "default": "json"}),
            ],
        )
    },
    "/v1/jobs/{job_id}/events": {
        "get": operation(
            "Follow a job",
            "Server-sent events: `job`, with the job, at each change, until it has ended.",
            text_answer("text/event-stream"),
            scope="jobs",
            parameters=[path_id("job_id")],
        )
    },
    "/v1/sessions": {
        "get": operation(
            "List sessions",
            "Every file, stream and job, newest first, without texts.",
            json_answer("Sessions"),
            scope="usage",
            parameters=[
                *_PAGE,
                query("kind", "Only these.", {"$ref": "#/components/schemas/Session/properties/kind"}),
            ],
        )
    },
    "/v1/sessions/{session_id}": {
        "get": operation(
            "Show a session",
            "With its text, where the policy keeps it.",
            json_answer("Session"),
            scope="usage",
            parameters=[path_id("session_id")],
        )
    },
    "/v1/sessions/{session_id}/audio": {
        "get": operation(
            "Fetch a session's audio",
            "Of a live session, where the policy keeps it (`keep_audio`), from its end until its time is over.",
            _AUDIO,
            scope="usage",
            parameters=[
                path_id("session_id"),
                query("format", "Of the file.", {"type": "string", "enum": list(MEDIA_TYPES), "default": "wav"}),
            ],
        ),
        "delete": operation(
            "Delete a session's audio",
            "Now, before its time is over. The session itself stays.",
            {"204": {"description": "It is gone."}},
            scope="usage",
            parameters=[path_id("session_id")],
        ),
    },
    "/v1/usage": {
        "get": operation(
            "Show usage",
            "What the ledger says.",
            json_answer("UsageReport"),
            scope="usage",
            parameters=[
                query("from", "First day (UTC).", {"type": "string", "format": "date"}),
                query("to", "The day after the last.", {"type": "string", "format": "date"}),
                query(
                    "group_by", "Of `day,backend,model,customer`.", {"type": "string", "default": "day,backend,model"}
                ),
                query("customer", "Only this one's."),
            ],
        )
    },
    "/v1/policy": {"get": operation("Show the policy", "The tenant's own, in force now.", json_answer("Policy"))},
    "/v1/policy/explain": {
        "post": operation(
            "Explain a decision",
            "Where such a request would run, and why; refused as the request itself would be.",
            json_answer("Decision"),
            requestBody={"content": {"application/json": {"schema": ref("Question")}}},
        )
    },
    "/v1/admin/config": {
        "get": operation(
            "Show changeable settings",
            "What running gateways can change; for an operator's token.",
            json_answer("AdminConfig"),
            scope="operator",
        ),
        "patch": operation(
            "Change settings",
            "All of them or none, for every gateway on this database; null gives one back to the environment.",
            json_answer("AdminConfig"),
            scope="operator",
            requestBody={"required": True, "content": {"application/json": {"schema": {"type": "object"}}}},
        ),
    },
    "/v1/admin/streams": {
        "get": operation(
            "List live sessions",
            "Of this process, of every tenant; nothing of what is said.",
            json_answer("AdminStreams"),
            scope="operator",
        )
    },
    "/livez": {"get": operation("Is the process alive", "Yes.", {"200": {"description": "Yes."}}, scope=None)},
    "/readyz": {
        "get": operation(
            "Should it get work",
            "503 while Postgres cannot be reached.",
            {"200": {"description": "Yes."}, "503": {"description": "No; `checks` says why."}},
            scope=None,
        )
    },
    "/metrics": {"get": operation("Figures for Prometheus", "All of them.", text_answer("text/plain"), scope=None)},
    "/metrics.json": {
        "get": operation("Figures for people", "The same as JSON.", {"200": {"description": "Done."}}, scope=None)
    },
    "/openapi.json": {"get": operation("This document", "OpenAPI 3.1.", {"200": {"description": "Done."}}, scope=None)},
    "/docs": {"get": operation("This document as a page", "For people.", text_answer("text/html"), scope=None)},
    "/": {"get": operation("Start", "Leads to `/docs`.", {"307": {"description": "To `/docs`."}}, scope=None)},
}
