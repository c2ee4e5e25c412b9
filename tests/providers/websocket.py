"""The server's end of a WebSocket, which a test can break wherever it likes."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request as Handshake
from websockets.server import ServerProtocol

_READ_BYTES = 256 * 1024


@dataclass
class Socket:
    """Messages must come unfragmented, as those of our clients do. Pings are answered while somebody receives."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    _protocol: ServerProtocol
    closed: Close | None = None

    @classmethod
    async def accepted(
        cls, head: bytes, headers: Mapping[str, str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Socket:
        """After a handshake with this head."""
        protocol = ServerProtocol(max_size=None)
        protocol.receive_data(head)
        (handshake,) = protocol.events_received()
        assert isinstance(handshake, Handshake)
        response = protocol.accept(handshake)
        for name, value in headers.items():
            response.headers[name] = value
        protocol.send_response(response)
        opened = cls(reader, writer, protocol)
        await opened._write()
        return opened

    async def receive(self) -> list[str | bytes]:
        """The next messages; none: the client has closed, with the code `closed`, or is gone."""
        while True:
            data = await self.reader.read(_READ_BYTES)
            if data:
                self._protocol.receive_data(data)
            else:
                self._protocol.receive_eof()
            messages: list[str | bytes] = []
            for event in self._protocol.events_received():
                assert isinstance(event, Frame)
                if event.opcode in (Opcode.TEXT, Opcode.BINARY):
                    messages.append(event.data.decode() if event.opcode is Opcode.TEXT else bytes(event.data))
                elif event.opcode is Opcode.CLOSE:
                    self.closed = self._protocol.close_rcvd
            await self._write()
            if messages or self.closed or not data:
                return messages

    async def send(self, message: str | bytes) -> None:
        if isinstance(message, str):
            self._protocol.send_text(message.encode())
        else:
            self._protocol.send_binary(message)
        await self._write()

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Says goodbye, and hears the client out."""
        self._protocol.send_close(code, reason)
        await self._write()
        while await self.receive():
            pass

    def reset(self) -> None:
        """Without a goodbye: the peer sees a broken connection."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def half_close(self) -> None:
        """Nothing more will be said, though everything is still read."""
        self.writer.write_eof()

    async def raw(self, data: bytes) -> None:
        """Bytes that need not be a WebSocket's."""
        self.writer.write(data)
        await self.writer.drain()

    async def _write(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self.writer.write(data)
        await self.writer.drain()
