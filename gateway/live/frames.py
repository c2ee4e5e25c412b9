"""One WebSocket with this product's manners: bounded frames, a peer that must read.

LiveError
├── Idle · SessionTooLong                                              time
├── UnsupportedFrame · Undecodable · UnknownMessage · MessageTooBig    what was sent
├── NotReading                                                         what was not taken
└── Restarting · ResumeFailed                                          the session is, or is wanted, elsewhere
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeAlias

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from gateway.errors import EdgeError, problem_response
from gateway.live.pace import Pace
from gateway.live.patience import Patience
from runtime.errors import StenogateError

MAX_FRAME_BYTES = 256 * 1024
SEND_S = 10.0
CLOSE_S = 1.0
LEFT = 1000

Message: TypeAlias = Mapping[str, Any]


class LiveError(EdgeError):
    """The live session cannot go on."""


class Idle(LiveError):
    """Nothing was received for too long."""

    code = "IDLE"


class SessionTooLong(LiveError):
    """The session has reached the longest duration that the tenant's policy allows."""

    code = "SESSION_TOO_LONG"


class MessageTooBig(LiveError):
    """A frame may have at most 256 KiB."""

    code = "MESSAGE_TOO_BIG"


class UnsupportedFrame(LiveError):
    """This kind of frame is not understood here."""

    code = "UNSUPPORTED_FRAME"


class Undecodable(LiveError):
    """A text frame must be one JSON object."""

    code = "UNDECODABLE"


class UnknownMessage(LiveError):
    """There is no such message type."""

    code = "UNKNOWN_MESSAGE"


class NotReading(LiveError):
    """The events were not read fast enough."""

    code = "NOT_READING"


class Restarting(LiveError):
    """The gateway is being restarted. Resume the session, or open another, in a moment."""

    code = "RESTARTING"
    retryable = True


class ResumeFailed(LiveError):
    """There is no session to resume: the token is unknown or used, or it is too late. Open another session."""

    code = "RESUME_FAILED"


class Gone(Exception):
    """The peer has left: on `purpose` (close 1000), or its connection broke."""

    def __init__(self, *, purpose: bool = False):
        super().__init__()
        self.purpose = purpose


class Frames:
    """Frames in, messages out, one sender at a time.

    Once the peer is known to be gone, or not to read, sending does nothing: what is under way finishes for the record.
    """

    def __init__(self, websocket: WebSocket, *, pace: Pace, send_s: float = SEND_S):
        self.gone = False
        self.left = asyncio.Event()  # nothing more is to be done with it
        self._websocket = websocket
        self._pace = pace
        self._hearing = Patience()
        self._telling = Patience()
        self._send_s = send_s

    @property
    def accepted(self) -> bool:
        return self._websocket.application_state is not WebSocketState.CONNECTING

    async def accept(self, subprotocol: str | None) -> None:
        """Raises `Gone`."""
        try:
            await self._websocket.accept(subprotocol)
        except (OSError, RuntimeError) as error:
            self.gone = True
            raise Gone from error

    async def receive(self, timeout_s: float | None) -> str | bytes:
        """The next frame, when its turn has come. Raises `Idle`, `Gone` and what is wrong with the frame."""
        if wait_s := self._pace.wait_s():
            await asyncio.sleep(wait_s)
        try:
            message = await self._hearing.wait(self._websocket.receive(), timeout_s)
        except TimeoutError:
            raise Idle from None
        if message["type"] == "websocket.disconnect":
            self.gone = True
            self._leave()
            raise Gone(purpose=message.get("code") == LEFT)
        frame: str | bytes | None = message.get("bytes")
        frame = frame if frame is not None else message.get("text")
        if frame is None:
            raise UnsupportedFrame
        if len(frame) > MAX_FRAME_BYTES:
            raise MessageTooBig
        return frame

    async def send(self, text: str) -> None:
        """Raises `NotReading` when it cannot be got rid of."""
        if self.gone:
            return
        try:
            await self._telling.wait(self._websocket.send_text(text), self._send_s)
        except TimeoutError:
            if not self.gone:
                self.gone = True
                raise NotReading from None
        except (WebSocketDisconnect, OSError, RuntimeError):
            self.gone = True

    def give_up(self) -> None:
        """Waits no longer for a peer that does not take what is being sent."""
        if self._telling.lose():
            self.gone = True

    async def close(self, code: int, reason: str = "") -> None:
        """Says why, where the peer can still hear it."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._websocket.close(code, reason)
        except (TimeoutError, WebSocketDisconnect, OSError, RuntimeError):
            self.gone = True
        finally:
            self._leave()

    async def deny(self, error: StenogateError, request_id: str) -> None:
        """Refuses the upgrade with an HTTP status and a problem (ASGI's `websocket.http.response`)."""
        try:
            await self._websocket.send_denial_response(problem_response(error, request_id))
        except OSError:
            self.gone = True

    def _leave(self) -> None:
        self.left.set()
        self._hearing.end()
        self._telling.end()
