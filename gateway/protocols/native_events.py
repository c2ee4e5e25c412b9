"""What the native protocol tells of events (docs/stream.md)."""

from __future__ import annotations

from typing import Any

from dispatchers.interface import (
    Cleared,
    Delta,
    Event,
    Final,
    Flushed,
    Gap,
    Notice,
    Partial,
    SpeechStarted,
    StreamError,
    Used,
    Word,
)
from gateway.live.frames import Message
from gateway.protocols.native_start import Start


def message_of(event: Event, start: Start) -> Message | None:
    """None: a session opened so is not told."""
    match event:
        case Partial():
            return _partial(event) if start.partials else None
        case Delta():
            return _delta(event) if start.partials or start.deltas else None
        case Final():
            return _final(event, with_words=start.words)
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


def warning_message(code: str, message: str) -> Message:
    return {"type": "warning", "code": code, "message": message}


def error_message(code: str, message: str, *, retryable: bool, fatal: bool) -> dict[str, Any]:
    return {"type": "error", "code": code, "message": message, "retryable": retryable, "fatal": fatal}


def _heard(kind: str, event: Partial | Delta | Final) -> dict[str, Any]:
    message = {"type": kind, "utterance": event.utterance, "start_ms": event.start_ms, "end_ms": event.end_ms}
    return message | _channel(event.channel)


def _channel(channel: int | None) -> dict[str, int]:
    """Only told where each channel is transcribed for itself."""
    return {} if channel is None else {"channel": channel}


def _partial(event: Partial) -> Message:
    return _heard("partial", event) | {"text": event.text, "stable": event.stable}


def _delta(event: Delta) -> Message:
    return _heard("delta", event) | {"text": event.text}


def _final(event: Final, *, with_words: bool) -> Message:
    message = _heard("final", event) | {
        "text": event.text,
        "language": event.language,
        "confidence": round(event.confidence, 4),
        "revised": event.revised,
    }
    if with_words:
        message["words"] = [_word(word) for word in event.words]
    if event.speaker is not None:
        message["speaker"] = event.speaker
    return message


def _usage(event: Used) -> Message:
    message = {"type": "usage", "accepted_ms": event.accepted_ms, "billed_ms": event.billed_ms}
    if event.budget_remaining_ms is not None:
        message["budget_remaining_ms"] = event.budget_remaining_ms
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
        return warning_message(event.code, event.message)
    message = error_message(event.code, event.message, retryable=event.retryable, fatal=event.fatal)
    return message | _channel(event.channel)
