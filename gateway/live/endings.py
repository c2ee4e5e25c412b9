"""Why a live session ended, as one of ours."""

from __future__ import annotations

import traceback

import structlog

from gateway.errors import known
from runtime.errors import StenogateError

log = structlog.get_logger()

GOING_AWAY = 1001
OUR_FAULT = 1011


def reason_of(error: StenogateError) -> str:
    """Of a close: the seconds to wait where they are known, else the code."""
    return str(error.retry_after_s) if error.retry_after_s is not None else error.code


def admitted(exc: Exception) -> StenogateError:
    """The failure as one of ours. What nobody foresaw is logged by kind and place: its message may quote a text."""
    error = known(exc)
    if error is not exc:
        frames = traceback.extract_tb(exc.__traceback__)[-5:]
        log.error(
            "stream.failed", error=type(exc).__name__, at=[f"{frame.filename}:{frame.lineno}" for frame in frames]
        )
    return error
