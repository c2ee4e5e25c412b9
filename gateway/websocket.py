"""WebSockets on uvicorn, for connections of many small messages.

Whole binary messages, which is what audio comes in, are read here where they lie. All else is left to uvicorn's own
protocol and the parser of `websockets`: the handshake, text, fragments, control frames, closing, and whatever is wrong.
It gets whole frames (RFC 6455, section 5.2), so it stands between two of them whenever one is read here.
"""

from __future__ import annotations

import struct
import sys
from typing import TYPE_CHECKING

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode
from websockets.protocol import OPEN

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveEvent, ASGISendEvent

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform for which it is not compiled
    from websockets.utils import apply_mask

READ_AHEAD_BYTES = 64 * 1024
"""What may wait for the application. Beyond it the socket is not read, which its sender feels as back-pressure."""
FRAGMENTS_MOST = 4096
"""Of one message, for they may be empty."""

_WHOLE_TEXT, _WHOLE_BINARY = 0x81, 0x82
_MASKED = 0x80
_MASK_BYTES = 4


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """One connection. uvicorn's by itself stops reading at every message, and begins again for the next."""

    _held: bytes | bytearray = b""  # a frame of which more is to come
    _needed = 0  # how much of it must be there before it is looked at again
    _waiting_bytes = 0

    def data_received(self, data: bytes) -> None:
        if not self.handshake_initiated:
            super().data_received(data)
            return
        if self._held:
            self._held += data
            if len(self._held) < self._needed:
                return
            data, self._held = bytes(self._held), b""
        at = 0
        while at < len(data) and not self.transport.is_closing():
            begin, end = _payload(data, at)
            if end - begin > self.config.ws_max_size:
                super().data_received(data[at:])  # which refuses it by its header
                return
            if end > len(data):
                self._held, self._needed = bytearray(data[at:]), end - at
                return
            if data[at] == _WHOLE_BINARY and self.conn.state is OPEN and not self.frames:
                self._hear(apply_mask(data[begin:end], data[begin - _MASK_BYTES : begin]), end - at)
            else:
                super().data_received(data[at:end])
                self._bound()
            at = end

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.queue.empty():
            self._read_on()

    async def receive(self) -> ASGIReceiveEvent:
        message = await self.queue.get()
        if self.queue.empty():
            self._waiting_bytes = 0
            if self.writable.is_set():
                self._read_on()
        return message

    async def send(self, message: ASGISendEvent) -> None:
        text = message.get("text") if message["type"] == "websocket.send" else None
        if isinstance(text, str) and self.conn.state is OPEN and self.writable.is_set() and not self.disconnected:
            self.transport.write(_frame(text.encode()))
        else:
            await super().send(message)

    def _hear(self, audio: bytes, size: int) -> None:
        self.queue.put_nowait({"type": "websocket.receive", "bytes": audio})
        self._waiting_bytes += size
        if self._waiting_bytes > READ_AHEAD_BYTES:
            self._pause()

    def _bound(self) -> None:
        """What the library does not: a message of ever more fragments, and pongs that are asked for and never read."""
        if self.transport.is_closing():
            return
        if len(self.frames) > FRAGMENTS_MOST:
            self.conn.fail(CloseCode.MESSAGE_TOO_BIG)
            self.handle_parser_exception()
        elif not self.writable.is_set():
            self._pause()

    def _pause(self) -> None:
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()

    def _read_on(self) -> None:
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()


def _payload(data: bytes, at: int) -> tuple[int, int]:
    """Where the payload of the frame at `at` begins and ends; while its header is incomplete, how far that goes. A
    client's frame without a mask has no end: it is to be refused."""
    begin = at + 2
    if begin > len(data):
        return begin, begin
    if not data[at + 1] & _MASKED:
        return begin, sys.maxsize
    size = data[at + 1] & ~_MASKED
    if size >= 126:
        begin += 2 if size == 126 else 8
        if begin > len(data):
            return begin, begin
        size = int.from_bytes(data[at + 2 : begin], "big")
    begin += _MASK_BYTES
    return begin, begin + size


def _frame(text: bytes) -> bytes:
    """A whole text message."""
    size = len(text)
    if size < 126:
        return struct.pack("!BB", _WHOLE_TEXT, size) + text
    if size < 1 << 16:
        return struct.pack("!BBH", _WHOLE_TEXT, 126, size) + text
    return struct.pack("!BBQ", _WHOLE_TEXT, 127, size) + text
