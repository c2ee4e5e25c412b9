"""Bad input gets a clear refusal, and the gateway goes on serving."""

from __future__ import annotations

import asyncio
import io
import struct
import wave
import zipfile
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from policy import tenants
from runtime.settings import Settings
from tests.server import CLIP, FIXTURES, Served, assert_problem, post, serving

URL = "/v1/audio/transcriptions"


@pytest.fixture(autouse=True)
async def afterwards_it_serves(served: Served, mine: str) -> AsyncIterator[None]:
    yield
    await served.still_serves(mine)
    assert not list((served.gateway.settings.data_dir / "uploads").iterdir())


def wav(*, rate: int = 16_000, channels: int = 1, frames: int = 16_000) -> bytes:
    """A silent WAV file whose header may say anything."""
    data = bytes(frames * channels * 2)
    form = (16, 1, channels, rate, rate * channels * 2, channels * 2, 16)
    head = struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVEfmt ", *form, b"data", len(data))
    return head + data


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.wav", CLIP.read_bytes())
    return buffer.getvalue()


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c636060606000000005"
    "0001a5f645400000000049454e44ae426082"
)

NOT_AUDIO = {
    "text": b"this is no audio",
    "png": PNG,
    "zip": zipped(),
    "zeros": bytes(100_000),
    "html": b"<!doctype html><html>" * 100,
    "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "header only": wav(frames=0),
    "half a header": wav()[:30],
}


@pytest.mark.parametrize("data", NOT_AUDIO.values(), ids=NOT_AUDIO.keys())
async def test_not_audio(http: httpx.AsyncClient, data: bytes) -> None:
    body = assert_problem(await post(http, data), 400, "UNDECODABLE")
    assert body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", sorted(path.name for path in (FIXTURES / "malformed").iterdir()))
async def test_malformed_recordings(http: httpx.AsyncClient, name: str) -> None:
    response = await post(http, (FIXTURES / "malformed" / name).read_bytes())
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert response.json()["code"] in ("UNDECODABLE", "UNSUPPORTED_AUDIO", "AUDIO_TOO_SHORT", "EMPTY_AUDIO")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "EMPTY_AUDIO"),
        (wav(frames=1_000), "AUDIO_TOO_SHORT"),
        (wav(channels=9), "UNSUPPORTED_AUDIO"),
        (wav(rate=0), None),
        (wav(rate=4_000), "UNSUPPORTED_AUDIO"),
    ],
    ids=["zero length", "too short", "9 channels", "0 Hz", "4 kHz"],
)
async def test_audio_that_cannot_be_used(http: httpx.AsyncClient, data: bytes, code: str | None) -> None:
    response = await post(http, data)
    assert_problem(response, 400, code or response.json()["code"])


async def test_a_truncated_file_gives_what_it_has(http: httpx.AsyncClient) -> None:
    data = CLIP.read_bytes()
    response = await post(http, data[: len(data) // 2])
    assert response.status_code == 200
    assert response.json()["text"]


async def test_as_a_job_it_is_refused_at_once_just_the_same(http: httpx.AsyncClient) -> None:
    assert_problem(await post(http, PNG, **{"async": "true"}), 400, "UNDECODABLE")
    assert (await http.get("/v1/jobs")).json()["data"] == []


# --- the form -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "content"),
    [
        ({}, b""),
        ({"content-type": "application/json"}, b'{"model": "micro"}'),
        ({"content-type": "multipart/form-data"}, b"--b--"),
        ({"content-type": "audio/wav"}, b"RIFF"),
    ],
)
async def test_no_form(http: httpx.AsyncClient, headers: dict[str, str], content: bytes) -> None:
    assert_problem(await http.post(URL, content=content, headers=headers), 400, "UNSUPPORTED_MEDIA_TYPE")


@pytest.mark.parametrize("content", [b"", b"garbage", b"--b\r\n\r\n\r\n", b"--b\r\nContent-Disposition: form-data"])
async def test_a_form_that_is_none(http: httpx.AsyncClient, content: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert_problem(await http.post(URL, content=content, headers=headers), 400, "BAD_REQUEST")


async def test_no_file_part(http: httpx.AsyncClient) -> None:
    body = assert_problem(await http.post(URL, files={"model": (None, "micro")}), 400, "BAD_PARAMETERS")
    assert body["error"]["param"] == "file"


async def test_a_file_that_is_text(http: httpx.AsyncClient) -> None:
    body = assert_problem(
        await http.post(URL, files={"model": (None, "micro"), "file": (None, "a.wav")}), 400, "BAD_PARAMETERS"
    )
    assert body["error"]["param"] == "file"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", "docx"),
        ("response_format", "diarized_json"),
        ("temperature", "hot"),
        ("temperature", "1.5"),
        ("temperature", "nan"),
        ("temperature", "-0.1"),
        ("language", "klingon"),
        ("language", "xx"),
        ("stream", "maybe"),
        ("async", "sometimes"),
        ("backend_preference", "fastest"),
        ("timestamp_granularities", "letter"),
        ("metadata", "[1]"),
        ("metadata", "{"),
        ("metadata", '{"a": 1}'),
        ("metadata", '{"a": "\\u0000"}'),
        ("metadata", '{"a": "' + "x" * 600 + '"}'),
        ("metadata", "[" * 50_000),
        ("customer", "x" * 200),
        ("prompt", "x" * 5_000),
        ("model", ["micro", "other"]),
        ("model", ""),
    ],
)
async def test_wrong_values_name_their_field(http: httpx.AsyncClient, field: str, value: Any) -> None:
    body = assert_problem(await post(http, **{field: value}), 400, "BAD_PARAMETERS")
    assert body["param"] == body["error"]["param"] == field


async def test_granularities_without_verbose_json(http: httpx.AsyncClient) -> None:
    response = await post(http, **{"timestamp_granularities[]": "word"})
    assert_problem(response, 400, "UNSUPPORTED_OPTION")


async def test_an_unknown_model_is_refused_before_anything_is_decoded(http: httpx.AsyncClient) -> None:
    body = assert_problem(await post(http, PNG, model="gpt-9"), 404, "MODEL_NOT_FOUND")
    assert body["error"]["code"] == "model_not_found"


async def test_what_is_beyond_the_policy(served: Served) -> None:
    tenant = await served.tenant(max_upload_bytes=10_000, languages=["en"], features=[])
    async with served.http(served.token(tenant)) as http:
        assert_problem(await post(http), 413, "TOO_LARGE")
        assert_problem(await post(http, b"RIFF", language="de"), 403, "FORBIDDEN")
        assert_problem(await post(http, b"RIFF", path="/v1/audio/translations"), 403, "FORBIDDEN")
    async with served.http(served.token(await served.tenant(max_file_ms=1_000))) as http:
        assert_problem(await post(http), 400, "AUDIO_TOO_LONG")


# --- size and time ------------------------------------------------------------------------------------------------


async def talk(served: Served, *pieces: bytes, end: bool = True) -> bytes:
    """What a server answers to these bytes, until it closes the connection."""
    port = int(served.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if not end:
            return b""
        async with asyncio.timeout(20):
            return await reader.read()
    finally:
        writer.close()


def head(token: str, *more: str) -> bytes:
    lines = [f"POST {URL} HTTP/1.1", "Host: test", f"Authorization: Bearer {token}", *more]
    return "\r\n".join([*lines, "Content-Type: multipart/form-data; boundary=b", "", ""]).encode()


async def test_ten_gigabytes_claimed_are_refused_unread(served: Served, mine: str) -> None:
    answer = await talk(served, head(mine, "Content-Length: 10737418240"))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"Maximum content size limit" in answer


async def test_an_upload_that_stalls_is_cut_off(served: Served, mine: str) -> None:
    answer = await talk(served, head(mine, "Content-Length: 100000"), b"--b\r\n")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"UPLOAD_STALLED" in answer


async def test_a_bad_token_is_refused_before_the_body(served: Served) -> None:
    answer = await talk(served, head("nonsense", "Content-Length: 100000000"), b"x" * 100_000)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"www-authenticate: Bearer" in answer


async def test_a_refusal_reaches_a_client_that_is_still_sending(served: Served) -> None:
    """Closing on it would reset the connection and lose the answer."""
    async with served.http("nonsense") as http:
        assert_problem(await post(http, bytes(20_000_000)), 401, "TOKEN_INVALID")


async def test_a_client_that_vanishes(served: Served, mine: str) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 2_000_000
    await talk(served, head(mine, "Content-Length: 100000000"), part, end=False)
    uploads = served.gateway.settings.data_dir / "uploads"
    async with asyncio.timeout(10):
        while list(uploads.iterdir()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "sent", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n"]
)
async def test_what_is_not_http(served: Served, sent: bytes) -> None:
    assert (await talk(served, sent)).startswith(b"HTTP/1.1 400 ")


# --- everything else ----------------------------------------------------------------------------------------------


async def test_who_is_calling(served: Served) -> None:
    async with served.http() as http:
        for path in ("/v1/models", "/v1/jobs", "/v1/sessions", "/v1/usage", "/v1/jobs/job_1/events"):
            assert_problem(await http.get(path), 401, "TOKEN_MISSING")
        assert_problem(await post(http), 401, "TOKEN_MISSING")
        for bad in ("Basic eDp5", "Bearer", "Bearer a b", "Bearer " + "x" * 20_000, "bearer e30.e30."):
            response = await http.get("/v1/models", headers={"authorization": bad})
            assert response.status_code == 401


async def test_scopes(served: Served) -> None:
    tenant = await served.tenant()
    needed = {"/v1/models": "transcribe", "/v1/jobs": "jobs", "/v1/sessions": "usage", "/v1/usage": "usage"}
    for path, scope in needed.items():
        async with served.http(served.token(tenant, [scope])) as http:
            assert (await http.get(path)).status_code == 200
        async with served.http(served.token(tenant, {"transcribe", "jobs", "usage"} - {scope})) as http:
            assert_problem(await http.get(path), 403, "FORBIDDEN")


async def test_addresses_and_methods_that_are_not_there(http: httpx.AsyncClient) -> None:
    for path in ("/nothing", "/v1/audio/nothing", "/v1/jobs/", "/%00", "/v1/../etc/passwd"):
        assert_problem(await http.get(path), 404, "NOT_FOUND")
    assert_problem(await http.get(URL), 405, "METHOD_NOT_ALLOWED")
    assert_problem(await http.delete("/v1/usage"), 405, "METHOD_NOT_ALLOWED")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000, b'"x"', b"NaN"])
async def test_json_that_is_none(http: httpx.AsyncClient, content: bytes) -> None:
    assert_problem(await http.post("/v1/policy/explain", content=content), 400, "BAD_REQUEST")


async def test_a_json_body_that_is_too_large(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/policy/explain", content=b'{"model": "' + b"x" * 300_000 + b'"}')
    assert_problem(response, 413, "TOO_LARGE")


@pytest.mark.parametrize(
    ("path", "params"),
    [
        ("/v1/usage", {"from": "yesterday"}),
        ("/v1/usage", {"to": "2026-13-01"}),
        ("/v1/usage", {"group_by": "price"}),
        ("/v1/sessions", {"limit": "9999"}),
        ("/v1/sessions", {"limit": "²"}),
        ("/v1/sessions", {"kind": "video"}),
        ("/v1/sessions", {"cursor": "%%%"}),
        ("/v1/sessions", {"cursor": "AAAA"}),
    ],
)
async def test_queries_that_make_no_sense(http: httpx.AsyncClient, path: str, params: dict[str, str]) -> None:
    body = assert_problem(await http.get(path, params=params), 400, "BAD_PARAMETERS")
    assert body["param"] == next(iter(params))


async def test_a_tenant_that_is_suspended(served: Served) -> None:
    tenant = await served.tenant()
    async with served.gateway.resources.database.across_tenants("test") as tx:
        await tenants.set_status(tx, tenant.id, "suspended", actor="test")
    async with served.http(served.token(tenant)) as http:
        assert_problem(await http.get("/v1/models"), 403, "TENANT_SUSPENDED")


async def test_a_database_that_is_away(settings: Settings) -> None:
    nowhere = SecretStr("postgresql://nobody@127.0.0.1:1/nothing")
    away = {"database_url": nowhere, "system_database_url": nowhere}
    async with serving(settings, backend="scripted", **away) as running, running.http("some.to.ken") as http:
        assert (await http.get("/livez")).status_code == 200
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.json()["checks"]["database"]) == (503, "unreachable")


async def test_health_and_figures_need_no_token(served: Served) -> None:
    async with served.http() as http:
        assert (await http.get("/livez")).json() == {"status": "ok"}
        ready = (await http.get("/readyz")).json()
        assert (ready["status"], ready["checks"]["models"]["micro"]) == ("ready", "ready")
        text = (await http.get("/metrics")).text
        assert 'stenogate_requests_total{method="GET",route="/livez",status="200"}' in text
        figures = (await http.get("/metrics.json")).json()
    assert any(value["value"] >= 1 for value in figures["stenogate_requests"]["values"])


def test_a_wav_made_here_is_one() -> None:
    with wave.open(io.BytesIO(wav())) as read:
        assert (read.getframerate(), read.getnchannels(), read.getnframes()) == (16_000, 1, 16_000)
