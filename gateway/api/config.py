"""`/v1/config`: what this installation offers and allows; for everybody, so it says nothing of any tenant."""

from __future__ import annotations

from typing import Any, get_args

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from dispatchers.audio.live import Encoding
from dispatchers.audio.resample import RATES_HZ
from dispatchers.dispatch import Door
from gateway.auth import SUBPROTOCOL
from gateway.live.frames import MAX_FRAME_BYTES
from gateway.live.intake import AHEAD_MS
from gateway.live.reception import START_S
from gateway.state import gateway_of
from policy import tickets
from runtime.settings import Settings


async def config(request: Request) -> Response:
    """Names and limits. What a tenant may use of it is its policy's to say."""
    gateway = gateway_of(request)
    answer = {
        "object": "config",
        "protocol": SUBPROTOCOL,
        "encodings": list(get_args(Encoding)),
        "sample_rates": {"least": RATES_HZ.start, "most": RATES_HZ.stop - 1},
        "languages": _languages(gateway.door),
        "models": [card.name for card in gateway.catalogue()],
        "limits": _limits(gateway.settings),
    }
    return JSONResponse(answer)


def _languages(door: Door) -> list[str] | None:
    """None means any."""
    spoken = [offer.languages for offer in door.offers()]
    known = [languages for languages in spoken if languages is not None]
    return sorted(frozenset[str]().union(*known)) if len(known) == len(spoken) else None


def _limits(settings: Settings) -> dict[str, Any]:
    return {
        "frame_bytes": MAX_FRAME_BYTES,
        "frames_per_s": settings.stream_frames_per_s,
        "ahead_ms": AHEAD_MS,
        "start_ms": round(START_S * 1000),
        "idle_ms": round(settings.stream_idle_s * 1000),
        "streams_per_address": settings.max_streams_per_address,
        "ticket_s": tickets.LONGEST_S,
        "upload_bytes": settings.max_upload_bytes,
    }


routes: list[BaseRoute] = [Route("/v1/config", config)]
