"""Whether this process lives, whether it should get work, and its figures."""

from __future__ import annotations

import asyncio

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from gateway.state import gateway_of
from runtime.telemetry import as_json, exposition

log = structlog.get_logger()

PING_S = 3.0


async def livez(request: Request) -> Response:
    """The process answers."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    """503 while Postgres cannot be reached or the engine's process is away, and once the process has been asked to end.
    The states of single models are told, and do not decide. Nor do engines elsewhere, which all gateways share."""
    gateway = gateway_of(request)
    models = {card.name: card.status for card in gateway.catalogue()}
    if gateway.roster.draining:
        return JSONResponse({"status": "draining", "checks": {"models": models}}, 503, {"retry-after": "5"})
    try:
        async with asyncio.timeout(PING_S):
            await gateway.resources.database.ping()
    except Exception as exc:  # noqa: BLE001 — whatever the driver raises means the same here
        log.warning("health.database_unreachable", error=type(exc).__name__)
        checks = {"database": "unreachable", "models": models}
        return JSONResponse({"status": "not_ready", "checks": checks}, 503, {"retry-after": "5"})
    checks = {"database": "ok", "engine": "ok" if gateway.engine_up() else "away", "models": models}
    if not gateway.engine_up() and not gateway.settings.engines:
        return JSONResponse({"status": "not_ready", "checks": checks}, 503, {"retry-after": "5"})
    return JSONResponse({"status": "ready", "checks": checks})


async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    await gateway_of(request).tell_figures()
    body, content_type = exposition()
    return Response(body, media_type=content_type)


async def metrics_json(request: Request) -> Response:
    """The same figures for people and scripts."""
    await gateway_of(request).tell_figures()
    return JSONResponse(as_json())


routes: list[BaseRoute] = [
    Route("/livez", livez),
    Route("/readyz", readyz),
    Route("/metrics", metrics),
    Route("/metrics.json", metrics_json),
]
