"""`/v1/admin`: the operator's view of this installation, for holders of an operator's token alone."""

from __future__ import annotations

import os
import socket
from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from gateway.auth import operator_of
from gateway.bodies import json_object
from gateway.live.gauges import seats_free
from gateway.live.sight import Sight
from gateway.live_settings import LiveSettings
from gateway.state import gateway_of, request_id_of
from policy.overrides import as_json
from runtime.ids import show
from runtime.settings import CHANGEABLE, Settings

_NO_STORE = {"cache-control": "no-store"}


async def config(request: Request) -> Response:
    """Every setting that a running gateway changes. The others, secrets among them, are not told."""
    await operator_of(request)
    return _told(gateway_of(request).live_settings)


async def change_config(request: Request) -> Response:
    """A JSON object of settings and values; null gives a setting back to the environment. All of it or none."""
    operator = await operator_of(request)
    gateway = gateway_of(request)
    changes = await json_object(request, idle_s=gateway.settings.upload_idle_s)
    await gateway.live_settings.change(changes, actor=operator.actor, request_id=request_id_of(request))
    return _told(gateway.live_settings)


async def streams(request: Request) -> Response:
    """The live sessions of this process, of every tenant."""
    await operator_of(request)
    gateway = gateway_of(request)
    seen = [sight for session in gateway.roster.sessions if (sight := session.seen()) is not None]
    answer = {
        "object": "list",
        "process": f"{socket.gethostname()}:{os.getpid()}",
        "seats_free": seats_free(gateway),
        "data": [_stream(sight) for sight in seen],
    }
    return JSONResponse(answer, headers=_NO_STORE)


def _told(settings: LiveSettings) -> Response:
    data = [_setting(settings, name) for name in CHANGEABLE]
    return JSONResponse({"object": "admin.config", "data": data}, headers=_NO_STORE)


def _setting(settings: LiveSettings, name: str) -> dict[str, Any]:
    about = {key: value for key, value in _schema()[name].items() if key != "title"}
    value = as_json(getattr(settings.current, name))
    return {"name": name, "value": value, "source": settings.source(name), **about}


@cache
def _schema() -> dict[str, dict[str, Any]]:
    """What JSON Schema says of each setting: type, bounds, default, description; and its `change`."""
    properties: dict[str, dict[str, Any]] = Settings.model_json_schema()["properties"]
    return properties


def _stream(sight: Sight) -> dict[str, Any]:
    return {
        "id": show("sess", sight.session_id),
        "tenant": sight.tenant,
        "started_at": (sight.session_id.int >> 80) // 1000,  # a UUIDv7's milliseconds
        "connected": sight.connected,
        "backend": sight.origin.backend,
        "engine": sight.origin.engine,
        "model": sight.origin.model,
        "accepted_ms": sight.heard_ms,
        "lag_ms": sight.lag_ms,
    }


routes: list[BaseRoute] = [
    Route("/v1/admin/config", config, methods=["GET"]),
    Route("/v1/admin/config", change_config, methods=["PATCH"]),
    Route("/v1/admin/streams", streams),
]
