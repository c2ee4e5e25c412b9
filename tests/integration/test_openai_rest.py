"""The batch API by hand, over a real socket, with the micro model."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest

from dispatchers.backends.scripted import Scripted
from dispatchers.errors import BackendFailed
from policy import sessions
from runtime.ids import read
from runtime.settings import Settings
from tests.server import CLIP, CLIP_MS, CLIP_TEXT, LONG, Served, assert_problem, post, serving


async def test_json_with_who_did_it_and_what_it_cost(http: httpx.AsyncClient) -> None:
    response = await post(http)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {"text": CLIP_TEXT, "usage": {"type": "duration", "seconds": 4}}
    assert response.headers["x-stenogate-backend"] == "self_hosted"
    assert response.headers["x-stenogate-engine"] == "faster-whisper"
    assert response.headers["x-stenogate-model"] == "micro"
    assert abs(int(response.headers["x-stenogate-billed-ms"]) - CLIP_MS) <= 10
    assert re.fullmatch("req_[0-9a-f]{32}", response.headers["x-request-id"])
    assert response.headers["x-content-type-options"] == "nosniff"


async def test_text(http: httpx.AsyncClient) -> None:
    response = await post(http, response_format="text")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.text == f"{CLIP_TEXT}\n"


async def test_srt_and_vtt(http: httpx.AsyncClient) -> None:
    srt = await post(http, response_format="srt")
    assert srt.headers["content-type"] == "text/plain; charset=utf-8"
    assert re.match(r"1\n00:00:0\d,\d{3} --> 00:00:0\d,\d{3}\n", srt.text)
    vtt = await post(http, response_format="vtt")
    assert vtt.headers["content-type"] == "text/vtt; charset=utf-8"
    assert re.match(r"WEBVTT\n\n00:00:0\d\.\d{3} --> 00:00:0\d\.\d{3}\n", vtt.text)


@pytest.mark.parametrize(
    ("granularities", "shown"),
    [
        ({}, {"segments"}),
        ({"timestamp_granularities[]": ["word"]}, {"words"}),
        ({"timestamp_granularities[]": ["word", "segment"]}, {"words", "segments"}),
        ({"timestamp_granularities": "segment"}, {"segments"}),
        ({"timestamp_granularities": '["word"]'}, {"words"}),
    ],
)
async def test_verbose_json(http: httpx.AsyncClient, granularities: dict[str, Any], shown: set[str]) -> None:
    body = (await post(http, response_format="verbose_json", **granularities)).json()
    assert {name for name in ("words", "segments") if name in body} == shown
    assert (body["task"], body["language"], body["text"]) == ("transcribe", "english", CLIP_TEXT)
    assert abs(body["duration"] - CLIP_MS / 1000) < 0.02
    if "words" in shown:
        assert [word["word"] for word in body["words"]] == CLIP_TEXT.split()


async def test_every_field_at_once(http: httpx.AsyncClient, served: Served) -> None:
    response = await post(
        http,
        language="en",
        prompt="An address.",
        temperature="0",
        customer="acme",
        metadata='{"case": "7"}',
        backend_preference="prefer_self_hosted",
        keywords="friday",
        unknown_field="ignored",
        **{"include[]": "logprobs", "chunking_strategy[type]": "server_vad", "async": "auto"},
        headers={"x-request-id": "my-id.1", "prefer": "wait=10"},
    )
    assert response.status_code == 200
    assert response.headers["x-request-id"] == "my-id.1"
    listing = (await http.get("/v1/sessions")).json()["data"]
    assert (listing[0]["customer"], listing[0]["metadata"], listing[0]["request_id"]) == (
        "acme",
        {"case": "7"},
        "my-id.1",
    )
    single = (await http.get(f"/v1/sessions/{listing[0]['id']}")).json()
    assert single["text"] == CLIP_TEXT
    assert single["decision"]["candidates"][0]["model"] == "micro"


async def test_an_unsafe_request_id_is_replaced(http: httpx.AsyncClient) -> None:
    for bad in ("x" * 129, "a b", "a\tb"):
        response = await http.get("/livez", headers={"x-request-id": bad})
        assert response.headers["x-request-id"].startswith("req_")


async def test_whisper_1_is_the_tenants_default(http: httpx.AsyncClient) -> None:
    assert (await post(http, model="whisper-1")).headers["x-stenogate-model"] == "micro"


async def test_the_file_may_come_first_and_in_a_chunked_body(http: httpx.AsyncClient) -> None:
    async def body() -> Any:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="upload"\r\n\r\n'
        data = CLIP.read_bytes()
        for at in range(0, len(data), 1000):
            yield data[at : at + 1000]
        yield b'\r\n--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nmicro\r\n--b--\r\n'

    response = await http.post(
        "/v1/audio/transcriptions",
        content=body(),
        headers={"content-type": "multipart/form-data; boundary=b"},
    )
    assert response.json()["text"] == CLIP_TEXT


# --- streaming ----------------------------------------------------------------------------------------------------


async def stream(http: httpx.AsyncClient, audio: bytes | None = None, **fields: str) -> list[dict[str, Any]]:
    """The events of a streamed transcription, after the checks that hold for all of them."""
    response = await post(http, audio, stream="true", **fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    assert blocks[-1] == "data: [DONE]"
    events = [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]
    assert [event["type"] for event in events].count("transcript.text.done") == 1
    assert events[-1]["type"] == "transcript.text.done"
    assert {event["type"] for event in events[:-1]} == {"transcript.text.delta"}
    assert "".join(event["delta"] for event in events[:-1]) == events[-1]["text"] != ""
    return events


async def test_stream(http: httpx.AsyncClient) -> None:
    done = (await stream(http))[-1]
    assert done["text"] == CLIP_TEXT
    assert done["usage"] == {"type": "duration", "seconds": 4}
    assert done["stenogate"]["model"] == "micro"


async def test_streaming_a_long_recording_waits_on_its_job(http: httpx.AsyncClient) -> None:
    events = await stream(http, LONG.read_bytes(), response_format="text")
    assert len(events) > 3
    assert [job["status"] for job in (await http.get("/v1/jobs")).json()["data"]] == ["completed"]


@pytest.mark.parametrize("fmt", ["srt", "vtt", "verbose_json"])
async def test_what_cannot_be_streamed(http: httpx.AsyncClient, fmt: str) -> None:
    body = assert_problem(await post(http, stream="true", response_format=fmt), 400, "UNSUPPORTED_OPTION")
    assert body["param"] == body["error"]["param"] == "response_format"


async def test_segments_are_told_as_they_are_heard_and_silence_is_bridged(settings: Settings) -> None:
    backend = Scripted(delay_s=0.05)
    async with serving(settings, recogniser=backend, backend="scripted") as running:
        async with running.http(running.token(await running.tenant())) as http:
            events = await stream(http, LONG.read_bytes(), model="scripted")
    assert len(events) > 5


async def test_a_failure_before_the_first_word_is_an_http_error(settings: Settings) -> None:
    async with serving(settings, recogniser=Scripted(fail=BackendFailed), backend="scripted") as running:
        async with running.http(running.token(await running.tenant())) as http:
            assert_problem(await post(http, model="whisper-1", stream="true"), 502, "BACKEND_FAILED")


async def test_a_failure_after_the_first_word_is_an_error_event(settings: Settings) -> None:
    backend = Scripted(delay_s=0.05, fail=BackendFailed, fail_after=1)
    async with serving(settings, recogniser=backend, backend="scripted") as running:
        async with running.http(running.token(await running.tenant())) as http:
            response = await post(http, LONG.read_bytes(), model="whisper-1", stream="true")
    assert response.status_code == 200
    last = response.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


# --- who goes away ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", ["false", "true"])
async def test_a_client_that_leaves_ends_the_work(settings: Settings, streamed: str) -> None:
    backend = Scripted(delay_s=30)
    async with serving(settings, recogniser=backend, backend="scripted") as running:
        tenant = await running.tenant()
        async with running.http(running.token(tenant)) as http:
            leaving = asyncio.create_task(post(http, model="whisper-1", stream=streamed))
            assert (await first_session(running, tenant.id)).status == "open"
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
        async with asyncio.timeout(10):
            while (session := await first_session(running, tenant.id)).status == "open":  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert session.billed_ms == 0
        assert not list((running.gateway.settings.data_dir / "uploads").iterdir())


async def first_session(running: Served, tenant_id: Any) -> sessions.Session:
    async with asyncio.timeout(10):
        while True:
            async with running.gateway.resources.database.tenant(tenant_id) as tx:
                page = await sessions.listing(tx, tenant_id)
            if page.items:
                return page.items[0]
            await asyncio.sleep(0.05)


# --- models -------------------------------------------------------------------------------------------------------


async def test_models(http: httpx.AsyncClient) -> None:
    models = (await http.get("/v1/models")).json()
    assert models["object"] == "list"
    assert [model["id"] for model in models["data"]][:2] == ["micro", "whisper-1"]
    assert models["data"][1]["alias_of"] == "micro"
    assert models["data"][0]["status"] == "ready"
    assert (await http.get("/v1/models/micro")).json() == models["data"][0]
    assert_problem(await http.get("/v1/models/none"), 404, "MODEL_NOT_FOUND")


async def test_models_that_the_policy_forbids_are_not_listed(served: Served) -> None:
    async with served.http(served.token(await served.tenant(models=["other"]))) as http:
        assert (await http.get("/v1/models")).json()["data"] == []


async def test_scripted_is_never_listed(settings: Settings) -> None:
    async with serving(settings, backend="scripted") as running:
        async with running.http(running.token(await running.tenant())) as http:
            assert (await post(http, model="whisper-1")).headers["x-stenogate-model"] == "scripted"
            assert "scripted" not in (await http.get("/v1/models")).text


# --- money --------------------------------------------------------------------------------------------------------


async def test_usage_and_sessions_agree_to_the_millisecond(served: Served) -> None:
    tenant = await served.tenant()
    async with served.http(served.token(tenant)) as http:
        for _ in range(2):
            await post(http, customer="acme")
        usage = (await http.get("/v1/usage", params={"group_by": "day,model,customer"})).json()
        rows = (await http.get("/v1/sessions")).json()["data"]
    assert usage["currency"] == "USD"
    assert len(usage["data"]) == 1
    row = usage["data"][0]
    assert (row["model"], row["customer"], row["requests"]) == ("micro", "acme", 2)
    assert row["billed_ms"] == sum(session["billed_ms"] for session in rows)
    assert all(read("sess", session["id"]) for session in rows)


async def test_a_budget_that_does_not_cover_it(served: Served) -> None:
    async with served.http(served.token(await served.tenant(budget_nano=10))) as http:
        body = assert_problem(await post(http), 402, "BUDGET_EXHAUSTED")
    assert body["error"]["code"] == "insufficient_quota"


async def test_a_policys_aliases_are_listed_and_served(served: Served) -> None:
    tenant = await served.tenant(aliases={"best": "good", "good": "self_hosted/micro", "whisper-1": "micro"})
    async with served.http(served.token(tenant)) as http:
        models = {entry["id"]: entry for entry in (await http.get("/v1/models")).json()["data"]}
        told = {name: models[name]["alias_of"] for name in ("best", "good", "whisper-1")}
        assert told == {"best": "self_hosted/micro", "good": "self_hosted/micro", "whisper-1": "micro"}
        assert (await http.get("/v1/models/best")).json()["engine"] == models["micro"]["engine"]
        response = await post(http, model="best")
        assert (response.json()["text"], response.headers["x-stenogate-model"]) == (CLIP_TEXT, "micro")


async def test_explain(http: httpx.AsyncClient) -> None:
    decision = (await http.post("/v1/policy/explain", json={"kind": "stream"})).json()
    assert decision["candidates"][0]["backend"] == "self_hosted"
    assert_problem(await http.post("/v1/policy/explain", json={"model": "none"}), 404, "MODEL_NOT_FOUND")
    body = assert_problem(await http.post("/v1/policy/explain", json={"kind": 7}), 400, "BAD_PARAMETERS")
    assert body["param"] == "kind"
