"""The OpenAPI 3.1 document: what `gateway.openapi_paths` says of the routes, and the shapes they share."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

from dispatchers.formats import FORMATS
from gateway import openapi_policies, openapi_relays, openapi_webhooks
from gateway.errors import MEANINGS, MEDIA_TYPE
from gateway.openapi_paths import PATHS, listed, obj, ref

_INTEGER = {"type": "integer"}
_STRING = {"type": "string"}
_MAYBE_INTEGER = {"type": ["integer", "null"]}
_MAYBE_STRING = {"type": ["string", "null"]}
_SECONDS = {"type": ["integer", "null"], "description": "Unix seconds."}
_METADATA = {"type": "object", "additionalProperties": _STRING}

_FORM = {
    "file": {"type": "string", "format": "binary", "description": "wav, flac, mp3, m4a, mp4, ogg, webm …"},
    "model": {**_STRING, "description": "Of `GET /v1/models`; `whisper-1` means the tenant's default."},
    "prompt": {**_STRING, "description": "Text that leads up to the recording, or names in it."},
    "response_format": {"type": "string", "enum": list(FORMATS), "default": "json"},
    "temperature": {"type": "number", "minimum": 0, "maximum": 1},
    "language": {**_STRING, "description": "ISO 639-1; unset, it is detected."},
    "timestamp_granularities[]": {
        "type": "array",
        "items": {"type": "string", "enum": ["word", "segment"]},
        "description": "With `verbose_json` only.",
    },
    "keywords[]": {"type": "array", "items": _STRING, "description": "Words likely to occur."},
    "stream": {"type": "boolean", "description": "Answer with server-sent events; `json` and `text` only."},
    "backend_preference": {"type": "string", "enum": ["any", "prefer_self_hosted", "prefer_relay"], "default": "any"},
    "customer": {**_STRING, "description": "The tenant's own customer, for its own bills."},
    "metadata": {**_STRING, "description": "A JSON object of short strings; kept with the session."},
    "async": {
        "type": "string",
        "enum": ["auto", "true", "false"],
        "default": "auto",
        "description": "`true`: a job, answered 202. `false`: always wait. `auto`: a job where the recording is long"
        " and the caller can poll (not an OpenAI SDK, not a stream).",
    },
}

SCHEMAS: dict[str, Any] = {
    "Problem": obj(
        {
            "type": _STRING,
            "title": _STRING,
            "status": _INTEGER,
            "detail": _STRING,
            "code": {"type": "string", "enum": sorted(MEANINGS)},
            "request_id": _STRING,
            "retryable": {"type": "boolean"},
            "param": _STRING,
            "error": {
                **obj({"message": _STRING, "type": _STRING, "param": _MAYBE_STRING, "code": _MAYBE_STRING}),
                "description": "The same for OpenAI's clients; under `/v1/audio` and `/v1/models` only.",
            },
        },
        required=["type", "title", "status", "detail", "code", "request_id", "retryable"],
    ),
    "TranscriptionForm": obj(_FORM, required=["file", "model"]),
    "Usage": obj({"type": {"const": "duration"}, "seconds": _INTEGER}),
    "Transcription": obj({"text": _STRING, "usage": ref("Usage")}, required=["text"]),
    "VerboseTranscription": obj(
        {
            "task": {"type": "string", "enum": ["transcribe", "translate"]},
            "language": _STRING,
            "duration": {"type": "number"},
            "text": _STRING,
            "segments": {"type": "array", "items": ref("Segment")},
            "words": {"type": "array", "items": ref("Word")},
            "usage": ref("Usage"),
        }
    ),
    "Segment": obj(
        {
            "id": _INTEGER,
            "seek": _INTEGER,
            "start": {"type": "number"},
            "end": {"type": "number"},
            "text": _STRING,
            "tokens": {"type": "array", "items": _INTEGER},
            "temperature": {"type": "number"},
            "avg_logprob": {"type": "number"},
            "compression_ratio": {"type": "number"},
            "no_speech_prob": {"type": "number"},
        }
    ),
    "Word": obj({"word": _STRING, "start": {"type": "number"}, "end": {"type": "number"}}),
    "Model": obj(
        {
            "id": _STRING,
            "object": {"const": "model"},
            "created": _INTEGER,
            "owned_by": _STRING,
            "engine": _STRING,
            "status": {"type": "string", "enum": ["available", "cached", "loading", "ready", "failed"]},
            "alias_of": _STRING,
        },
        required=["id", "object", "created", "owned_by"],
    ),
    "Models": listed("Model", cursor=False),
    "Job": obj(
        {
            "id": _STRING,
            "object": {"const": "transcription.job"},
            "status": {"type": "string", "enum": ["queued", "running", "completed", "failed", "cancelled"]},
            "created_at": _SECONDS,
            "started_at": _SECONDS,
            "finished_at": _SECONDS,
            "progress": {"type": "number", "minimum": 0, "maximum": 1},
            "eta_s": {"type": ["number", "null"]},
            "queue_position": _MAYBE_INTEGER,
            "audio_ms": _MAYBE_INTEGER,
            "billed_ms": _INTEGER,
            "backend": _MAYBE_STRING,
            "model": _MAYBE_STRING,
            "attempts": _INTEGER,
            "filename": _MAYBE_STRING,
            "customer": _MAYBE_STRING,
            "metadata": _METADATA,
            "error": {"type": ["object", "null"], "properties": {"code": _STRING, "message": _STRING}},
            "links": obj({"self": _STRING, "events": _STRING, "transcript": _STRING}, required=["self", "events"]),
        },
        required=["id", "object", "status", "created_at", "links"],
    ),
    "Jobs": listed("Job"),
    "Session": obj(
        {
            "id": _STRING,
            "object": {"const": "session"},
            "kind": {"type": "string", "enum": ["file", "stream", "job"]},
            "status": {"type": "string", "enum": ["open", "completed", "failed", "interrupted", "cancelled"]},
            "code": _MAYBE_STRING,
            "subject": _STRING,
            "customer": _MAYBE_STRING,
            "metadata": _METADATA,
            "request_id": _MAYBE_STRING,
            "policy_version": _INTEGER,
            "backend": _MAYBE_STRING,
            "engine": _MAYBE_STRING,
            "model": _MAYBE_STRING,
            "language": _MAYBE_STRING,
            "started_at": _SECONDS,
            "ended_at": _SECONDS,
            "channels": {**_INTEGER, "description": "Those recognised each for itself; `billed_ms` counts each."},
            "accepted_ms": _INTEGER,
            "billed_ms": _INTEGER,
            "utterances": _INTEGER,
            "words": _INTEGER,
            "text": {**_MAYBE_STRING, "description": "Of a single session only; null where it is not kept."},
            "decision": {"type": "object"},
            "legs": {
                "type": "array",
                "items": ref("Leg"),
                "description": "Of a single session only: who was asked, in order, the failed attempts too.",
            },
            "audio": {
                "anyOf": [ref("SessionAudio"), {"type": "null"}],
                "description": "Of a single session only; null where none is kept.",
            },
        }
    ),
    "Leg": obj(
        {
            "backend": _STRING,
            "model": _STRING,
            "outcome": {**_STRING, "description": "`completed`, `cancelled`, or the code of what went wrong."},
            "start_ms": _INTEGER,
            "audio_ms": {**_INTEGER, "description": "Audio sent to it, of every channel."},
            "took_ms": _INTEGER,
        }
    ),
    "SessionAudio": obj(
        {
            "status": {"type": "string", "enum": ["recording", "kept", "deleted"]},
            "expires_at": _SECONDS,
            "deleted_at": _SECONDS,
            "duration_ms": _INTEGER,
            "missing_ms": _INTEGER,
            "missing": {"type": "array", "items": obj({"start_ms": _INTEGER, "end_ms": _INTEGER})},
        },
        required=["status"],
    ),
    "Sessions": listed("Session"),
    "UsageReport": obj(
        {
            "object": {"const": "usage"},
            "currency": _STRING,
            "data": {
                "type": "array",
                "items": obj(
                    {
                        "day": _STRING,
                        "backend": _STRING,
                        "model": _STRING,
                        "customer": _MAYBE_STRING,
                        "requests": _INTEGER,
                        "audio_ms": _INTEGER,
                        "billed_ms": _INTEGER,
                        "amount": {**_STRING, "description": "A decimal number."},
                        "currency": _STRING,
                    }
                ),
            },
        }
    ),
    "TicketRequest": obj(
        {
            "ttl_s": {"type": "integer", "minimum": 1, "maximum": 60, "default": 30},
            "scopes": {"type": "array", "items": _STRING, "default": ["transcribe"]},
            "start": {"type": "object", "description": "Fields of the `start` frame that the client cannot change."},
        }
    ),
    "Ticket": obj(
        {"ticket": _STRING, "expires_at": {**_INTEGER, "description": "Unix seconds."}},
        required=["ticket", "expires_at"],
    ),
    "Config": obj(
        {
            "object": {"const": "config"},
            "protocol": _STRING,
            "encodings": {"type": "array", "items": _STRING},
            "sample_rates": obj({"least": _INTEGER, "most": _INTEGER}),
            "languages": {"type": ["array", "null"], "items": _STRING, "description": "Null: any."},
            "models": {"type": "array", "items": _STRING},
            "limits": {"type": "object", "additionalProperties": _INTEGER},
        }
    ),
    "Question": obj(
        {
            "kind": {"type": "string", "enum": ["file", "stream", "job"], "default": "file"},
            "model": _MAYBE_STRING,
            "language": _MAYBE_STRING,
            "task": {"type": "string", "enum": ["transcribe", "translate"], "default": "transcribe"},
            "backend_preference": _FORM["backend_preference"],
            "features": {"type": "array", "items": _STRING},
            "audio_ms": _MAYBE_INTEGER,
        },
        required=[],
    ),
    "Decision": obj(
        {
            "object": {"const": "policy.decision"},
            "policy_version": {**_MAYBE_INTEGER, "description": "Null: of a draft."},
            "currency": _STRING,
            "candidates": {"type": "array", "items": ref("Candidate")},
            "refused": {"type": "array", "items": ref("Standing")},
        }
    ),
    "AdminConfig": obj({"object": {"const": "admin.config"}, "data": {"type": "array", "items": ref("AdminSetting")}}),
    "AdminSetting": {
        **obj(
            {
                "name": _STRING,
                "value": {"description": "As it is now."},
                "source": {"type": "string", "enum": ["default", "environment", "override"]},
                "change": {"type": "string", "enum": ["live", "new_sessions"], "description": "When a change acts."},
                "default": {},
                "description": _STRING,
            },
            required=["name", "value", "source", "change", "default", "description"],
        ),
        "description": "The other fields are JSON Schema: type, bounds, choices.",
    },
    "AdminStreams": obj(
        {
            "object": {"const": "list"},
            "process": {**_STRING, "description": "Which one answered: host and process id."},
            "seats_free": {**_INTEGER, "description": "How many more live streams it would let in."},
            "data": {"type": "array", "items": ref("AdminStream")},
        }
    ),
    "AdminStream": obj(
        {
            "id": _STRING,
            "tenant": _STRING,
            "started_at": {**_INTEGER, "description": "Unix seconds."},
            "connected": {"type": "boolean", "description": "False: its client is awaited."},
            "backend": _STRING,
            "engine": _STRING,
            "model": _STRING,
            "accepted_ms": _INTEGER,
            "lag_ms": {**_INTEGER, "description": "Audio received and not yet taken."},
        }
    ),
    "Standing": obj({"backend": _STRING, "model": _STRING, "reason": _STRING}),
    "Candidate": obj(
        {
            "backend": _STRING,
            "model": _STRING,
            "reason": _STRING,
            "price_per_hour": {**_MAYBE_STRING, "description": "What an hour costs the tenant, a decimal number."},
        }
    ),
}


@cache
def document() -> dict[str, Any]:
    """The whole document. Codes and their meanings in every protocol stand in `x-codes`."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Stenogate",
            "version": version("stenogate"),
            "description": "Speech in, text and bills out: recordings, live streams and jobs.",
        },
        "security": [{"bearer": []}],
        "paths": PATHS | openapi_webhooks.PATHS | openapi_policies.PATHS | openapi_relays.PATHS,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
            "responses": {
                "Problem": {
                    "description": "A refusal or failure (RFC 9457); `code` says which, `x-codes` lists them.",
                    "content": {MEDIA_TYPE: {"schema": ref("Problem")}},
                }
            },
            "schemas": SCHEMAS | openapi_webhooks.SCHEMAS | openapi_policies.SCHEMAS | openapi_relays.SCHEMAS,
        },
        "x-codes": {
            code: {"status": meaning.status, "close": meaning.close, "title": meaning.title}
            for code, meaning in MEANINGS.items()
        },
    }
