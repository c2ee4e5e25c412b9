"""`/v1/stream`: Stenogate's own live protocol, as JSON text frames and binary audio (docs/stream.md)."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

from starlette.datastructures import QueryParams
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket

from dispatchers.interface import (
    Clear,
    Cleared,
    Delta,
    Event,
    Final,
    Flush,
    Flushed,
    Gap,
    Notice,
    Partial,
    SpeechStarted,
    StreamError,
    Used,
    Word,
)
from dispatchers.streaming import Live
from gateway.auth import SUBPROTOCOL, bearer_token, caller_of, ticket_holder
from gateway.errors import known
from gateway.live.codec import Command, Metrics, Ping, Resume, Setup, Standing, Stop, Unknown
from gateway.live.entrance import check_origin, let_in
from gateway.live.frames import MAX_FRAME_BYTES, SEND_S, Frames, Message, Undecodable
from gateway.live.intake import AHEAD_MS, Intake
from gateway.live.latency import Latency
from gateway.live.pace import Pace
from gateway.live.reception import House, converse
from gateway.protocols.native_start import (
    Start,
    resume_of_frame,
    resume_of_query,
    start_of_frame,
    start_of_opening,
    start_of_query,
)
from gateway.state import gateway_of, request_id_of
from policy.errors import Invalid
from policy.identity import Caller
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
        match event:
            case Partial():
                return _partial(event) if self._start.partials else None
            case Delta():
                return _delta(event) if self._start.partials or self._start.deltas else None
            case Final():
                return _final(event, with_words=self._start.words)
            case SpeechStarted(utterance, start_ms, channel):
                return {"type": "speech_started", "utterance": utterance, "start_ms": start_ms} | _channel(channel)
            case Gap(start_ms, end_ms, reason, channel):
                return {"type": "gap", "start_ms": start_ms, "end_ms": end_ms, "reason": reason} | _channel(channel)
            case Flushed(accepted_ms):
                return {"type": "flushed", "accepted_ms": accepted_ms}
            case Cleared(accepted_ms):
                return {"type": "cleared", "accepted_ms": accepted_ms}
            case Used():
                return _usage(event)
            case Notice() | StreamError():
                return _told(event)

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
        return _warning(error.code, error.message)

    def error(self, error: StenogateError, *, fatal: bool) -> Message:
        return _error(error.code, error.message, retryable=error.retryable, fatal=fatal)

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


def _heard(kind: str, event: Partial | Delta | Final) -> dict[str, Any]:
    message = {"type": kind, "utterance": event.utterance, "start_ms": event.start_ms, "end_ms": event.end_ms}
    return message | _channel(event.channel)


def _channel(channel: int | None) -> dict[str, int]:
    """Only told where each channel is transcribed for itself."""
    return {} if channel is None else {"channel": channel}


def _partial(partial: Partial) -> Message:
    return _heard("partial", partial) | {"text": partial.text, "stable": partial.stable}


def _delta(delta: Delta) -> Message:
    return _heard("delta", delta) | {"text": delta.text}


def _final(final: Final, *, with_words: bool) -> Message:
    message = _heard("final", final) | {
        "text": final.text,
        "language": final.language,
        "confidence": round(final.confidence, 4),
        "revised": final.revised,
    }
    if with_words:
        message["words"] = [_word(word) for word in final.words]
    if final.speaker is not None:
        message["speaker"] = final.speaker
    return message


def _usage(used: Used) -> Message:
    message = {"type": "usage", "accepted_ms": used.accepted_ms, "billed_ms": used.billed_ms}
    if used.budget_remaining_ms is not None:
        message["budget_remaining_ms"] = used.budget_remaining_ms
    return message


def _word(word: Word) -> dict[str, Any]:
    return {
        "word": word.text,
        "start_ms": word.start_ms,
        "end_ms": word.end_ms,
        "confidence": round(word.confidence, 4),
    }


def _told(event: Notice | StreamError) -> Message:
    if isinstance(event, Notice):
        return _warning(event.code, event.message)
    error = _error(event.code, event.message, retryable=event.retryable, fatal=event.fatal)
    return error | _channel(event.channel)


def _warning(code: str, message: str) -> Message:
    return {"type": "warning", "code": code, "message": message}


def _error(code: str, message: str, *, retryable: bool, fatal: bool) -> dict[str, Any]:
    return {"type": "error", "code": code, "message": message, "retryable": retryable, "fatal": fatal}


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


async def stream(websocket: WebSocket) -> None:
    """The route. A refusal before the upgrade is an HTTP status with a problem."""
    gateway = gateway_of(websocket)
    request_id = request_id_of(websocket)
    settings = gateway.settings
    frames = Frames(websocket, send_s=min(SEND_S, settings.stream_idle_s), pace=Pace(settings.stream_frames_per_s))
    try:
        with ExitStack() as seats:
            resuming = resume_of_query(websocket.query_params)
            if resuming is None:
                seats.enter_context(let_in(websocket))
            else:  # its session has its seats, unless it comes from another process
                check_origin(websocket, settings.origins)
            caller, fixed = await _caller(websocket)
            gateway.roster.refuse_when_draining()
            codec = Native(request_id)
            opening = resuming or codec.setup_of_query(websocket.query_params, fixed)
            offered = cast(Sequence[str], websocket.scope.get("subprotocols") or ())
            await converse(
                frames,
                House(
                    gateway.roster,
                    gateway.door,
                    gateway.resources.coordination,
                    settings.stream_idle_s,
                    settings.stream_resume_s,
                    settings.max_streams,
                    lambda: let_in(websocket),
                ),
                caller,
                codec,
                opening,
                seats=seats,
                subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None,
            )
    except Exception as exc:
        if frames.accepted:
            raise
        await frames.deny(known(exc), request_id)


async def _caller(websocket: WebSocket) -> tuple[Caller, Mapping[str, Any]]:
    """Who calls, and the fields of `start` that a ticket fixed. A ticket counts where no token was sent."""
    ticket = websocket.query_params.get("ticket")
    if ticket is not None and bearer_token(websocket) is None:
        redeemed = await ticket_holder(websocket, ticket, "transcribe")
        return redeemed.caller, redeemed.start
    in_url = websocket.query_params.get("token") if gateway_of(websocket).settings.token_in_url else None
    return await caller_of(websocket, "transcribe", token=in_url), {}


routes: list[BaseRoute] = [WebSocketRoute("/v1/stream", stream)]
