"""Every error in every protocol's terms: HTTP status, WebSocket close code, RFC 9457 problem, OpenAI's envelope.

The edge adds refusals of its own to the tree:

EdgeError
├── BadRequest · UnsupportedMedia · TooLarge · UploadStalled       the request as such
└── RouteNotFound · MethodNotAllowed · Internal
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from policy.errors import LedgerUnavailable
from policy.outage import ledger_reachable
from runtime.errors import StenogateError
from workers.errors import JobFailed

MEDIA_TYPE = "application/problem+json"
DOCS = "/docs#"
RETRY_AFTER_S = {429: 1.0, 503: 5.0}
RETRY_AFTER_MOST_S = 120.0  # beyond it the OpenAI clients do not retry at all


class EdgeError(StenogateError):
    """The request cannot be handled."""

    code = "BAD_REQUEST"


class BadRequest(EdgeError):
    """The request cannot be read."""


class UnsupportedMedia(EdgeError):
    """This content type is not understood here."""

    code = "UNSUPPORTED_MEDIA_TYPE"


class TooLarge(EdgeError):
    """The request is too large."""

    code = "TOO_LARGE"


class UploadStalled(EdgeError):
    """The upload stopped arriving. Send it again."""

    code = "UPLOAD_STALLED"
    retryable = True


class StorageFull(EdgeError):
    """There is no room for the upload now. Try again later."""

    code = "UNAVAILABLE"
    retryable = True


class RouteNotFound(EdgeError):
    """There is nothing at this address. `/docs` lists what there is."""

    code = "NOT_FOUND"


class MethodNotAllowed(EdgeError):
    """This address does not take that method."""

    code = "METHOD_NOT_ALLOWED"


class Internal(EdgeError):
    """Something went wrong on our side. Try again; if it stays so, tell us the request id."""

    code = "INTERNAL"
    retryable = True


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a code says in each protocol. `openai` is the `type` and `code` that its clients know."""

    status: int
    close: int
    title: str
    openai: tuple[str, str | None] = ("invalid_request_error", None)


_SERVER = ("server_error", None)

MEANINGS: Mapping[str, Meaning] = {
    # who is calling, and what they may do
    "TOKEN_MISSING": Meaning(401, 4401, "No token", ("invalid_request_error", "invalid_api_key")),
    "TOKEN_INVALID": Meaning(401, 4401, "Token not accepted", ("invalid_request_error", "invalid_api_key")),
    "TOKEN_EXPIRED": Meaning(401, 4401, "Token expired", ("invalid_request_error", "invalid_api_key")),
    "TOKEN_REVOKED": Meaning(401, 4401, "Token revoked", ("invalid_request_error", "invalid_api_key")),
    "FORBIDDEN": Meaning(403, 4403, "Not allowed"),
    "TENANT_SUSPENDED": Meaning(403, 4403, "Tenant suspended"),
    "NO_PRICE": Meaning(403, 4403, "Not for sale"),
    "BUDGET_EXHAUSTED": Meaning(402, 4402, "Budget exhausted", ("insufficient_quota", "insufficient_quota")),
    "RATE_LIMITED": Meaning(429, 4429, "Too many requests", ("rate_limit_error", "rate_limit_exceeded")),
    "CONCURRENCY_LIMITED": Meaning(429, 4429, "Too many at once", ("rate_limit_error", "rate_limit_exceeded")),
    # the request
    "BAD_REQUEST": Meaning(400, 4400, "Request not readable"),
    "BAD_PARAMETERS": Meaning(400, 4400, "Bad parameters", ("invalid_request_error", "invalid_value")),
    "UNSUPPORTED_OPTION": Meaning(400, 4400, "Unsupported option", ("invalid_request_error", "unsupported_value")),
    "MODEL_NOT_FOUND": Meaning(404, 4400, "No such model"),
    "NOT_FOUND": Meaning(404, 4400, "Not found"),
    "METHOD_NOT_ALLOWED": Meaning(405, 4400, "Method not allowed"),
    "CONFLICT": Meaning(409, 4400, "Conflict"),
    "SETTING_FIXED": Meaning(409, 4400, "Read at the start only"),
    "UPLOAD_STALLED": Meaning(408, 4408, "Upload stalled"),
    "TOO_LARGE": Meaning(413, 1009, "Too large"),
    "URL_REFUSED": Meaning(400, 4400, "URL not allowed"),
    "URL_UNREACHABLE": Meaning(400, 4400, "URL not reachable"),
    "UNSUPPORTED_MEDIA_TYPE": Meaning(400, 1003, "Unsupported content type"),
    # the audio
    "EMPTY_AUDIO": Meaning(400, 1007, "Empty audio"),
    "UNDECODABLE": Meaning(400, 1007, "Not decodable"),
    "AUDIO_TOO_SHORT": Meaning(400, 1007, "Audio too short"),
    "AUDIO_TOO_LONG": Meaning(400, 1009, "Audio too long"),
    "UNSUPPORTED_AUDIO": Meaning(400, 1007, "Unsupported audio"),
    # the recogniser
    "BACKEND_UNAVAILABLE": Meaning(503, 4503, "No backend available", _SERVER),
    "BACKEND_TIMEOUT": Meaning(504, 1011, "Backend timed out", _SERVER),
    "BACKEND_FAILED": Meaning(502, 1011, "Backend failed", _SERVER),
    "BACKEND_REFUSED": Meaning(502, 1011, "Backend refused", _SERVER),
    "BACKEND_THROTTLED": Meaning(503, 1013, "Backend throttled", _SERVER),
    "CREDENTIAL_REFUSED": Meaning(502, 1011, "Backend credential refused", _SERVER),
    "NO_SEAT": Meaning(503, 1013, "No seat free", _SERVER),
    "SUPERSEDED": Meaning(503, 1013, "Superseded", _SERVER),
    # jobs
    "JOB_NOT_READY": Meaning(409, 4400, "Job not ready"),
    "JOB_FAILED": Meaning(409, 4400, "Job failed"),
    # kept audio
    "AUDIO_NOT_KEPT": Meaning(404, 4400, "No audio kept"),
    "AUDIO_NOT_READY": Meaning(409, 4400, "Audio not ready"),
    "AUDIO_GONE": Meaning(410, 4400, "Audio deleted"),
    # live streams
    "UNSUPPORTED_FRAME": Meaning(400, 1003, "Unsupported frame"),
    "UNKNOWN_MESSAGE": Meaning(400, 4400, "Unknown message"),
    "MESSAGE_TOO_BIG": Meaning(413, 1009, "Message too big"),
    "RESTARTING": Meaning(503, 1012, "Restarting", _SERVER),
    "IDLE": Meaning(408, 4408, "Nothing arrived"),
    "SESSION_TOO_LONG": Meaning(400, 4408, "Session too long"),
    "SESSION_TAKEN_OVER": Meaning(409, 4409, "Session taken over"),
    "RESUME_FAILED": Meaning(410, 4410, "Resume failed"),
    "TOO_FAST": Meaning(429, 4413, "Audio too fast"),
    "NOT_READING": Meaning(408, 4413, "Events not read"),
    # our fault
    "DATABASE_UNAVAILABLE": Meaning(503, 1013, "Database away", _SERVER),
    "LEASE_LOST": Meaning(500, 1011, "Lease lost", _SERVER),
    "UNAVAILABLE": Meaning(503, 1013, "Unavailable", _SERVER),
    "MISCONFIGURED": Meaning(500, 1011, "Misconfigured", _SERVER),
    "INTERNAL": Meaning(500, 1011, "Internal error", _SERVER),
}


def known(exc: Exception) -> StenogateError:
    """The error as one of ours; what nobody foresaw is `Internal` and keeps its text to itself."""
    match exc:
        case StenogateError():
            return exc
        case HTTPException(status_code=404):
            return RouteNotFound()
        case HTTPException(status_code=405):
            return MethodNotAllowed()
        case HTTPException():
            return BadRequest()
        case DBAPIError() | PoolTimeout() | ConnectionError() | TimeoutError():
            return _outage(exc) or Internal()
    return Internal()


def _outage(exc: Exception) -> StenogateError | None:
    try:
        with ledger_reachable():
            raise exc
    except LedgerUnavailable as away:
        return away
    except DBAPIError:
        return None


def http_status(error: StenogateError) -> int:
    """The HTTP status of a refusal."""
    return MEANINGS[error.code].status


def close_code(error: StenogateError) -> int:
    """The WebSocket close code of an ended session (RFC 6455, section 7.4; 4xxx are the native protocol's)."""
    return MEANINGS[error.code].close


def problem_json(error: StenogateError, request_id: str) -> dict[str, Any]:
    """RFC 9457, with our `code`, `request_id` and `retryable`."""
    meaning = MEANINGS[error.code]
    body: dict[str, Any] = {
        "type": f"{DOCS}{error.code.lower()}",
        "title": meaning.title,
        "status": meaning.status,
        "detail": error.message,
        "code": error.code,
        "request_id": request_id,
        "retryable": error.retryable,
    }
    return body if error.param is None else body | {"param": error.param}


def openai_json(error: StenogateError) -> dict[str, Any]:
    """The object that OpenAI's clients look for in `error`."""
    kind, code = MEANINGS[error.code].openai
    return {"message": error.message, "type": kind, "param": error.param, "code": code or error.code.lower()}


def problem_response(error: StenogateError, request_id: str, *, openai: bool = False) -> Response:
    """The refusal as a response. OpenAI-shaped routes carry both shapes in one object."""
    body = problem_json(error, request_id)
    if openai:
        body["error"] = openai_json(error)
    return JSONResponse(body, body["status"], headers_of(error), media_type=MEDIA_TYPE)


def headers_of(error: StenogateError) -> dict[str, str]:
    """When to try again, and whether at all: OpenAI's clients would by themselves repeat every 409 and 5xx."""
    status = http_status(error)
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    wait = error.retry_after_s if error.retry_after_s is not None else RETRY_AFTER_S.get(status)
    if wait is not None and error.retryable:
        headers["retry-after"] = str(math.ceil(min(max(wait, 1.0), RETRY_AFTER_MOST_S)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def told_again(code: str, message: str) -> StenogateError:
    """An error that was stored by code and message: a failed job's, for the caller who waited for it."""
    return _by_code().get(code, JobFailed)(message)


def every_error(root: type[StenogateError] = StenogateError) -> Iterator[type[StenogateError]]:
    """The whole tree, as far as it is imported."""
    yield root
    for child in root.__subclasses__():
        yield from every_error(child)


@cache
def _by_code() -> dict[str, type[StenogateError]]:
    import dispatchers.errors  # noqa: F401 — its errors are part of the tree

    return {error.code: error for error in reversed(list(every_error()))}
