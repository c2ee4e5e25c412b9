"""Our reading of WebSocket frames, however the network cuts them, against that of `websockets`, given one at a time."""

from __future__ import annotations

import asyncio
import random
import struct
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.utils import apply_mask

from gateway.websocket import FRAGMENTS_MOST, READ_AHEAD_BYTES, WebSocketProtocol

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
MAX_SIZE = 70_000
TEXT, BINARY, CONTINUED, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closing = False
        self.reading = True

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Connection:
    """An accepted connection whose application has not asked for anything yet."""

    def __init__(self, protocol: type[WebSocketsSansIOProtocol]):
        config = uvicorn.Config(
            self._app,
            interface="asgi3",
            ws=protocol,
            ws_max_size=MAX_SIZE,
            ws_per_message_deflate=False,
            log_config=None,
        )
        config.load()
        self.wire = Wire()
        self.protocol = protocol(config, ServerState(), {})
        self._accepted = asyncio.Event()
        self._over = asyncio.Event()

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        self._accepted.set()
        await self._over.wait()

    async def opened(self) -> Connection:
        self.protocol.connection_made(self.wire)
        self.protocol.data_received(UPGRADE)
        await self._accepted.wait()
        self.wire.written = b""
        return self

    @property
    def heard(self) -> list[Any]:
        return list(self.protocol.queue._queue)  # type: ignore[attr-defined]

    async def end(self) -> None:
        self.protocol.stop_keepalive()
        self._over.set()
        await asyncio.gather(*self.protocol.tasks)


def frame(
    opcode: int, payload: bytes, *, fin: bool = True, reserved: int = 0, masked: bool = True, wide: bool = False
) -> bytes:
    head = bytes([(0x80 if fin else 0) | reserved << 4 | opcode])
    size, mask = len(payload), 0x80 if masked else 0
    if size < 126 and not wide:
        head += bytes([mask | size])
    elif size < 1 << 16:
        head += struct.pack("!BH", mask | 126, size)
    else:
        head += struct.pack("!BQ", mask | 127, size)
    key = random.Random(size).randbytes(4)
    return head + key + apply_mask(payload, key) if masked else head + payload


def sizes() -> st.SearchStrategy[int]:
    return st.one_of(st.integers(0, 300), st.sampled_from([3200, 65_535, 65_536, MAX_SIZE, MAX_SIZE + 1]))


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    opcode = draw(st.sampled_from([BINARY] * 6 + [TEXT, CONTINUED, PING, PONG, CLOSE, 3]))
    payload = draw(st.binary(max_size=8)) * draw(sizes())
    return frame(
        opcode,
        payload[: draw(sizes())],
        fin=draw(st.sampled_from([True] * 6 + [False])),
        reserved=draw(st.sampled_from([0] * 12 + [1, 4])),
        masked=draw(st.sampled_from([True] * 12 + [False])),
        wide=draw(st.booleans()),
    )


async def outcome(protocol: type[WebSocketsSansIOProtocol], pieces: list[bytes]) -> tuple[Any, bytes, bool]:
    connection = await Connection(protocol).opened()
    for piece in pieces:
        if connection.wire.closing:  # a closing transport reads nothing
            break
        connection.protocol.data_received(piece)
    what = connection.heard, connection.wire.written, connection.wire.closing
    await connection.end()
    return what


@given(st.lists(frames(), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_as_the_library_reads_it(sent: list[bytes], chance: random.Random) -> None:
    data = b"".join(sent)
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(12)))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if b > a]
    assert asyncio.run(outcome(WebSocketProtocol, pieces)) == asyncio.run(outcome(WebSocketsSansIOProtocol, sent))


def test_byte_by_byte() -> None:
    data = frame(BINARY, bytes(range(200))) + frame(TEXT, b"so") + frame(BINARY, b"a", fin=False) + frame(0, b"b")
    [heard, written, closing] = asyncio.run(outcome(WebSocketProtocol, [bytes([byte]) for byte in data]))
    assert [item.get("bytes", item.get("text")) for item in heard] == [bytes(range(200)), "so", b"ab"]
    assert (written, closing) == (b"", False)


@pytest.mark.parametrize("start", [frame(BINARY, bytes(MAX_SIZE + 1))[:14], b"\x82\x05hel"])
def test_what_is_refused_is_refused_by_its_header(start: bytes) -> None:
    _, written, closing = asyncio.run(outcome(WebSocketProtocol, [start[:1], start[1:]]))
    assert closing
    assert written[0] == 0x80 | CLOSE


def test_no_more_is_read_than_may_wait() -> None:
    async def flood() -> None:
        connection = await Connection(WebSocketProtocol).opened()
        message = frame(BINARY, bytes(3200))
        sent = 0
        while connection.wire.reading:
            connection.protocol.data_received(message)
            sent += 1
        assert (sent - 1) * len(message) <= READ_AHEAD_BYTES < sent * len(message)
        for _ in range(sent):
            assert not connection.wire.reading
            assert len((await connection.protocol.receive())["bytes"]) == 3200  # type: ignore[typeddict-item]
        assert connection.wire.reading
        await connection.end()

    asyncio.run(flood())


def test_who_does_not_read_pongs_is_not_read() -> None:
    async def ping() -> None:
        connection = await Connection(WebSocketProtocol).opened()
        connection.protocol.data_received(frame(PING, b"there?"))
        assert connection.wire.reading
        connection.protocol.pause_writing()  # by the transport
        connection.protocol.data_received(frame(BINARY, b"a") + frame(PING, b"there?"))
        assert not connection.wire.reading
        await connection.protocol.receive()
        assert not connection.wire.reading
        connection.protocol.resume_writing()
        assert connection.wire.reading
        await connection.end()

    asyncio.run(ping())


def test_a_message_has_so_many_fragments_at_most() -> None:
    data = frame(BINARY, b"", fin=False) + FRAGMENTS_MOST * frame(CONTINUED, b"", fin=False)
    heard, written, closing = asyncio.run(outcome(WebSocketProtocol, [data[:-6], data[-6:]]))
    assert (closing, [item["code"] for item in heard]) == (True, [1009])
    assert written[0] == 0x80 | CLOSE


@pytest.mark.parametrize("size", [0, 125, 126, 65_535, 65_536])
def test_text_goes_out_as_the_library_sends_it(size: int) -> None:
    async def sent(protocol: type[WebSocketsSansIOProtocol]) -> bytes:
        connection = await Connection(protocol).opened()
        await connection.protocol.send({"type": "websocket.send", "text": "x" * size})
        await connection.end()
        return connection.wire.written

    assert asyncio.run(sent(WebSocketProtocol)) == asyncio.run(sent(WebSocketsSansIOProtocol))
