"""`/v1/stream`: Stenogate's own live protocol, as JSON text frames and binary audio (docs/stream.md)."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket

from gateway.auth import SUBPROTOCOL, bearer_token, caller_of, ticket_holder
from gateway.errors import known
from gateway.live.entrance import check_origin, let_in
from gateway.live.frames import SEND_S, Frames
from gateway.live.pace import Pace
from gateway.live.reception import House, converse
from gateway.protocols.native_codec import Native
from gateway.protocols.native_start import resume_of_query
from gateway.state import gateway_of, request_id_of
from policy.identity import Caller


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
