"""The native protocol's frames: JSON text to commands, events to JSON (docs/stream.md)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.datastructures import QueryParams

from dispatchers.interface import (
    Clear,
    Event,
    Flush,
)
from dispatchers.streaming import Live
from gateway.live.codec import Command, Metrics, Ping, Resume, Setup, Standing, Stop, Unknown
from gateway.live.frames import MAX_FRAME_BYTES, Message, Undecodable
from gateway.live.intake import AHEAD_MS, Intake
from gateway.live.latency import Latency
from gateway.protocols.native_events import error_message, message_of, warning_message
from gateway.protocols.native_start import Start, resume_of_frame, start_of_frame, start_of_opening, start_of_query
from policy.errors import Invalid
from runtime.errors import StenogateError
from runtime.ids import show

_ID_LENGTH = 256


class Native:
    """The codec of one connection."""

    name = "native"

    def __init__(self, request_id: str):
        self._request_id = request_id
        self._start = Start()

    # --- frames to commands ---

    def resume(self, text: str) -> Resume | None:
        return resume_of_frame(_object(text))

    def setup(self, text: str) -> Setup:
        return self._opened(start_of_frame(_object(text)))

    def setup_of_query(self, query: QueryParams, fixed: Mapping[str, Any]) -> Setup | None:
        """The same from the address and from a ticket's fixed fields; None where there is no field."""
        start = start_of_query(query, fixed)
        return None if start is None else self._opened(start)

    def opening(self) -> Mapping[str, Any]:
        return self._start.model_dump(mode="json")

    def reopened(self, opening: Mapping[str, Any]) -> Setup:
        return self._opened(start_of_opening(opening))

    def command(self, text: str) -> Command:
        message = _object(text)
        match message.get("type"):
            case "flush":
                return Flush()
            case "clear":
                return Clear()
            case "stop":
                return Stop()
            case "ping":
                return Ping(_echoable(message.get("id")))
            case "metrics":
                return Metrics()
            case "start":
                raise Invalid("The session has started already.", param="type")
            case other:
                return Unknown(str(other)[:64])

    def _opened(self, start: Start) -> Setup:
        self._start = start
        return start.setup(self._request_id)

    # --- events to frames ---

    def ready(self, live: Live, setup: Setup, standing: Standing) -> Message:
        of_partials = live.policy.body.partial_model
        return {
            "type": "ready",
            "session_id": show("sess", live.session_id),
            "resumed": standing.resumed,
            "resend_from_ms": standing.resend_from_ms,
            "resume_token": standing.token,
            "backend": live.origin.backend,
            "engine": live.origin.engine,
            "model": live.origin.model,
            **({} if of_partials is None else {"partial_model": of_partials}),
            "language": setup.options.language,
            "encoding": setup.wire.encoding,
            "sample_rate": setup.wire.rate,
            "recorded": live.policy.body.keep_audio,
            "limits": {
                "frame_bytes": MAX_FRAME_BYTES,
                "ahead_ms": AHEAD_MS,
                "idle_ms": round(standing.idle_s * 1000),
                "session_ms": live.policy.body.max_stream_ms,
            },
            "accepted_ms": standing.accepted_ms,
        }

    def event(self, event: Event) -> Message | None:
        return message_of(event, self._start)

    def pong(self, ping: Ping, accepted_ms: int) -> Message:
        return {"type": "pong", "id": ping.id, "accepted_ms": accepted_ms}

    def metrics(self, latency: Latency, intake: Intake) -> Message:
        return {
            "type": "metrics",
            "accepted_ms": intake.taken_ms,
            "lag_ms": intake.lag_ms,
            "partials": latency.sent["Partial"],
            "coalesced_partials": latency.coalesced,
            "dropped_partials": latency.dropped,
            "finals": latency.sent["Final"],
            "first_partial_ms": _spread(latency.first_partial),
            "final_ms": _spread(latency.final),
        }

    def draining(self, token: str | None, deadline_s: float, reconnect_after_s: float) -> Message:
        return {
            "type": "draining",
            "resume_token": token,
            "deadline_ms": round(deadline_s * 1000),
            "reconnect_after_ms": round(reconnect_after_s * 1000),
        }

    def warning(self, error: StenogateError) -> Message:
        return warning_message(error.code, error.message)

    def error(self, error: StenogateError, *, fatal: bool) -> Message:
        return error_message(error.code, error.message, retryable=error.retryable, fatal=fatal)

    def closed(self, live: Live, reason: str) -> Message:
        summary = live.summary
        return {
            "type": "closed",
            "session_id": show("sess", live.session_id),
            "reason": reason,
            "accepted_ms": summary.accepted_ms,
            "billed_ms": summary.billed_ms,
            "utterances": summary.utterances,
            "words": summary.words,
            "coverage": round(summary.coverage, 6),
        }


def _spread(figures: Sequence[int]) -> dict[str, int] | None:
    """Of the latest figures; None where there are none."""
    if not figures:
        return None
    ordered = sorted(figures)
    at = len(ordered) - 1
    return {"count": len(ordered), "p50": ordered[at // 2], "p95": ordered[at * 95 // 100], "max": ordered[-1]}


def _object(text: str) -> dict[str, Any]:
    """The frame's JSON object. What could not be sent back as JSON (NaN, half a surrogate pair) is none."""
    try:
        value = json.loads(text, parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise Undecodable from None
    if not isinstance(value, dict):
        raise Undecodable
    return value


def _no_number(name: str) -> None:
    raise ValueError(name)


def _echoable(value: object) -> object:
    if len(json.dumps(value)) > _ID_LENGTH:
        raise Invalid(f"A ping's id may have at most {_ID_LENGTH} characters.", param="id")
    return value
