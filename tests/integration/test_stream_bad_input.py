"""What a live client may do wrong: it is told what, by event and close code, and nothing heard before is lost."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from sqlalchemy import text

from dispatchers.interface import to_ms
from gateway.live.seats import SEATS
from policy import tenants
from runtime.settings import Settings
from tests.server import Served, serving
from tests.streaming import assert_well_formed, clip, denial, encoded, refused, talking

SILENCE = np.zeros(16_000, np.int16).tobytes()
TOO_BIG = bytes(256 * 1024 + 1)


@pytest.fixture(scope="module")
async def server(settings: Settings) -> AsyncIterator[Served]:
    changes = {"stream_frames_per_s": 100_000, "stream_resume_s": 0.2}  # some send single bytes
    async with serving(settings, backend="scripted", **changes) as running:
        yield running
    assert SEATS.taken == 0


@pytest.fixture(scope="module")
async def impatient(settings: Settings) -> AsyncIterator[Served]:
    """Waits for nothing longer than half a second, and takes its token from the address if need be."""
    changes: dict[str, Any] = {"stream_idle_s": 0.5, "token_in_url": True, "stream_frames_per_s": 100_000}
    async with serving(settings, backend="scripted", **changes) as running:
        yield running


@pytest.fixture
async def token(server: Served) -> AsyncIterator[str]:
    """A fresh tenant's; afterwards the server still serves it."""
    mine = server.token(await server.tenant())
    yield mine
    samples, _ = clip("clip05.wav")
    async with talking(server, mine) as talk:
        await talk.say("start")
        await talk.speak(samples.tobytes())
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert talk.text


async def last_error(talk: Any) -> tuple[str, bool]:
    error = talk.events[-1]
    assert error["type"] == "error"
    assert "Traceback" not in error["message"]
    return error["code"], error["fatal"]


# --- refused before the upgrade -----------------------------------------------------------------------------------


async def test_without_a_token(server: Served) -> None:
    response = await denial(server, None)
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert json.loads(response.body or b"")["code"] == "TOKEN_MISSING"
    assert await refused(server, None, "?language=en") == (401, "TOKEN_MISSING")


async def test_with_a_bad_token(server: Served) -> None:
    tenant = await server.tenant()
    good = server.token(tenant)
    assert await refused(server, "rubbish") == (401, "TOKEN_INVALID")
    assert await refused(server, good[:-3] + "AAA") == (401, "TOKEN_INVALID")
    assert await refused(server, server.token(tenant, ["usage"])) == (403, "FORBIDDEN")
    async with server.gateway.resources.database.across_tenants("test") as tx:
        await tenants.set_status(tx, tenant.id, "suspended", actor="test")
    assert await refused(server, good) == (403, "TENANT_SUSPENDED")


async def test_a_token_in_the_address_counts_only_where_allowed(server: Served, impatient: Served) -> None:
    assert await refused(server, None, f"?token={server.token(await server.tenant())}") == (401, "TOKEN_MISSING")
    async with talking(impatient, None, f"?token={impatient.token(await impatient.tenant())}") as talk:
        await talk.say("start")  # the token alone is no field of it
        await talk.until("ready")


async def test_bad_fields_in_the_address(server: Served, token: str) -> None:
    assert await refused(server, token, "?sample_rate=7999") == (400, "BAD_PARAMETERS")
    assert await refused(server, token, "?metadata=nonsense") == (400, "BAD_PARAMETERS")
    assert await refused(server, token, "?resume_token=x") == (400, "BAD_PARAMETERS")
    assert await refused(server, token, "?model=nothing-like-it") == (404, "MODEL_NOT_FOUND")


async def test_a_full_process_says_when_to_come_back(settings: Settings) -> None:
    async with serving(settings, backend="scripted", max_streams=1) as small:
        token = small.token(await small.tenant())
        async with talking(small, token) as first:
            await first.say("start")
            await first.until("ready")
            response = await denial(small, token)
            assert (response.status_code, response.headers["retry-after"]) == (503, "5")
            assert json.loads(response.body or b"")["code"] == "NO_SEAT"
            await first.say("stop")
            assert await first.end() == (1000, "")
        async with talking(small, token) as second:
            await second.say("start")
            await second.until("ready")


# --- a bad start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("encoding", "aac"),
        ("encoding", 1),
        ("sample_rate", 7_999),
        ("sample_rate", 48_001),
        ("sample_rate", "16000"),
        ("channels", 3),
        ("language", "klingon"),
        ("model", ""),
        ("backend_preference", "cheap"),
        ("partials", "yes"),
        ("prompt", "x" * 4_001),
        ("hotwords", "dog"),
        ("hotwords", ["x" * 101]),
        ("customer", "\x00"),
        ("metadata", {"a": 1}),
        ("metadata", {str(at): "" for at in range(17)}),
        ("vad.threshold", 0.95),
        ("vad.silence_ms", 99),
        ("vad.min_speech_ms", 2_001),
        ("vad.max_utterance_ms", 999),
        ("vad.colour", "red"),
        ("last_seq", 1),
        ("colour", "red"),
    ],
)
async def test_a_field_out_of_bounds_is_named(server: Served, field: str, value: object) -> None:
    outer, _, inner = field.partition(".")
    async with talking(server, server.token(await server.tenant())) as talk:
        await talk.say("start", **{outer: {inner: value} if inner else value})
        assert await talk.end() == (4400, "BAD_PARAMETERS")
    assert await last_error(talk) == ("BAD_PARAMETERS", True)
    assert f"`{field}" in talk.events[-1]["message"]


async def test_a_telephone_encoding_has_its_rate(server: Served, token: str) -> None:
    async with talking(server, token) as talk:
        await talk.say("start", encoding="mulaw", sample_rate=16_000)
        assert await talk.end() == (4400, "BAD_PARAMETERS")
    assert "8000" in talk.events[-1]["message"]


@pytest.mark.parametrize(
    ("frame", "close", "code"),
    [
        (b"\x00\x00", 4400, "BAD_PARAMETERS"),
        (b"", 4400, "BAD_PARAMETERS"),
        ("garbage {", 1007, "UNDECODABLE"),
        ("[1]", 1007, "UNDECODABLE"),
        ("null", 1007, "UNDECODABLE"),
        ("[" * 100_000, 1007, "UNDECODABLE"),
        ('{"type":"start","prompt":"\\ud800"}', 1007, "UNDECODABLE"),
        ('{"type":"start","vad":{"threshold":NaN}}', 1007, "UNDECODABLE"),
        ('{"type":"flush"}', 4400, "BAD_PARAMETERS"),
        ("{}", 4400, "BAD_PARAMETERS"),
        (TOO_BIG, 1009, "MESSAGE_TOO_BIG"),
        ("x" * len(TOO_BIG), 1009, "MESSAGE_TOO_BIG"),
    ],
)
async def test_a_bad_first_frame(server: Served, token: str, frame: str | bytes, close: int, code: str) -> None:
    async with talking(server, token) as talk:
        await talk.socket.send(frame)
        assert await talk.end() == (close, code)
    assert [event["type"] for event in talk.events] == ["error"]
    assert await last_error(talk) == (code, True)


async def test_no_first_frame(impatient: Served) -> None:
    async with talking(impatient, impatient.token(await impatient.tenant())) as talk:
        assert await talk.end() == (4408, "IDLE")
    assert await last_error(talk) == ("IDLE", True)


async def test_an_unknown_model(server: Served, token: str) -> None:
    async with talking(server, token) as talk:
        await talk.say("start", model="nothing-like-it")
        assert await talk.end() == (4400, "MODEL_NOT_FOUND")


# --- in the middle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "close", "code"),
    [
        ("garbage", 1007, "UNDECODABLE"),
        ('"text"', 1007, "UNDECODABLE"),
        ('{"type":"start"}', 4400, "BAD_PARAMETERS"),
        (json.dumps({"type": "ping", "id": "x" * 300}), 4400, "BAD_PARAMETERS"),
        (TOO_BIG, 1009, "MESSAGE_TOO_BIG"),
    ],
)
async def test_what_was_heard_before_is_still_told(
    server: Served, token: str, frame: str | bytes, close: int, code: str
) -> None:
    samples, _ = clip("clip05.wav")
    async with talking(server, token) as talk:
        await talk.say("start")
        await talk.speak(samples.tobytes())
        await talk.socket.send(frame)
        assert await talk.end() == (close, code)
    assert talk.text
    assert_well_formed(talk.events)
    assert await last_error(talk) == (code, True)


@pytest.mark.parametrize("encoding", ["opus", "flac", "wav", "mp3"])
async def test_a_container_that_is_none_is_refused(server: Served, token: str, encoding: str) -> None:
    async with talking(server, token) as talk:
        await talk.say("start", encoding=encoding)
        await talk.until("ready")
        await talk.speak(os.urandom(20_000), step=100)
        assert await talk.end() == (1007, "UNDECODABLE")
        assert await last_error(talk) == ("UNDECODABLE", True)


async def test_what_was_heard_before_the_damage_is_still_told(server: Served) -> None:
    samples, _ = clip("clip05.wav")
    flac = encoded(samples, "flac", "flac", 16_000)
    async with talking(server, server.token(await server.tenant())) as talk:
        await talk.say("start", encoding="flac")
        await talk.speak(flac)
        await talk.speak(bytes(3_000_000), step=200_000)
        assert await talk.end() == (1007, "UNDECODABLE")
    assert_well_formed(talk.events)
    assert talk.text


async def test_a_start_after_the_address_said_it_all(server: Served, token: str) -> None:
    async with talking(server, token, "?language=en") as talk:
        await talk.say("start")
        assert await talk.end() == (4400, "BAD_PARAMETERS")


async def test_an_unknown_message_ends_nothing(server: Served, token: str) -> None:
    samples, _ = clip("clip05.wav")
    async with talking(server, token) as talk:
        await talk.say("start")
        for strange in ('{"type":"dance"}', '{"type":7}', "{}"):
            await talk.socket.send(strange)
        await talk.until("error", 3)
        assert await last_error(talk) == ("UNKNOWN_MESSAGE", False)
        await talk.speak(samples.tobytes())
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert talk.text
    assert_well_formed(talk.events)


async def test_audio_after_stop_is_not_accepted(server: Served, token: str) -> None:
    samples, _ = clip("clip05.wav")
    async with talking(server, token) as talk:
        await talk.say("start")
        await talk.speak(samples.tobytes())
        await talk.say("stop")
        await talk.speak(SILENCE[:100])
        assert await talk.end() == (1000, "")
    assert talk.events[-1]["accepted_ms"] == to_ms(len(samples))


@pytest.mark.parametrize("step", [1, 3, 1_001])
async def test_odd_byte_counts_shift_nothing(server: Served, token: str, step: int) -> None:
    samples, _ = clip("clip05.wav")
    data = samples[:16_000].tobytes() if step < 100 else samples.tobytes()
    async with talking(server, token) as talk:
        await talk.say("start")
        await talk.speak(data, step=step)
        await talk.socket.send(b"")
        await talk.say("flush")  # between the halves of no sample
        await talk.until("flushed")
        await talk.socket.send(b"\x00")  # half a sample at the end is none
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert talk.events[-1]["accepted_ms"] == len(data) // 32
    assert talk.text


async def test_silence_of_the_client_ends_the_session(impatient: Served) -> None:
    samples, _ = clip("clip05.wav")
    async with talking(impatient, impatient.token(await impatient.tenant())) as talk:
        await talk.say("start")
        await talk.speak(samples.tobytes())
        assert await talk.end() == (4408, "IDLE")
    assert talk.text
    assert await last_error(talk) == ("IDLE", True)


# --- clients that are not there -----------------------------------------------------------------------------------


async def test_a_client_that_leaves_before_start(server: Served, token: str) -> None:
    async with talking(server, token) as talk:
        talk.socket.transport.abort()
    await no_seat_taken()


async def test_a_client_that_leaves_right_after_start(server: Served) -> None:
    tenant = await server.tenant()
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start")
        await talk.until("ready")
        talk.socket.transport.abort()
    await no_seat_taken()
    async with server.gateway.resources.database.tenant(tenant.id) as tx:
        row = (await tx.execute(text("select status, billed_ms from sessions"))).one()
    assert tuple(row) == ("completed", 0)


async def test_a_client_that_does_not_read_is_let_go(impatient: Served) -> None:
    tenant = await impatient.tenant()
    writer = await upgraded(impatient, impatient.token(tenant))
    writer.write(masked(b'{"type":"start"}'))
    question = masked(json.dumps({"type": "ping", "id": "x" * 200}).encode())
    with pytest.raises(TimeoutError):  # the answers fill every buffer between us, then the server reads no more
        async with asyncio.timeout(20):
            while True:
                writer.write(question * 2_000)
                await asyncio.wait_for(writer.drain(), 0.2)
    await no_seat_taken()
    writer.transport.abort()
    async with impatient.gateway.resources.database.tenant(tenant.id) as tx:
        row = (await tx.execute(text("select status, code from sessions"))).one()
    assert tuple(row) == ("interrupted", "NOT_READING")


async def no_seat_taken() -> None:
    async with asyncio.timeout(30):
        while SEATS.taken:  # noqa: ASYNC110 — it is told to nobody
            await asyncio.sleep(0.02)


async def upgraded(server: Served, token: str) -> asyncio.StreamWriter:
    """A connection upgraded by hand, so that nothing reads from it behind our back."""
    address = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        "GET /v1/stream HTTP/1.1",
        f"Host: {address.netloc}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {key}",
        f"Authorization: Bearer {token}",
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    return writer


def masked(payload: bytes) -> bytes:
    """A text frame of a client (RFC 6455, section 5.2), under a mask of zeros."""
    assert len(payload) < 126 or 125 < len(payload) < 65_536
    size = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + len(payload).to_bytes(2, "big")
    return b"\x81" + size + bytes(4) + payload


async def test_a_stream_at_no_address_gets_a_problem(server: Served, token: str) -> None:
    response = await denial(server, token, path="/v1/nowhere")
    assert (response.status_code, json.loads(response.body or b"")["code"]) == (404, "NOT_FOUND")
