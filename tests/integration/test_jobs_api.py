"""Long recordings over the API: accepted, followed, fetched."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from dispatchers.backends.scripted import Scripted
from dispatchers.errors import BackendRefused
from dispatchers.wer import word_errors
from runtime.settings import Settings
from tests.server import LONG, SAMPLES, Served, assert_problem, post, serving

ENDED = {"completed", "failed", "cancelled"}
LONG_SAID = " ".join(line.split("\t")[-1] for line in (SAMPLES / "long.tsv").read_text().splitlines()[1:])


async def submitted(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """The 202 of a long recording."""
    response = await post(http, LONG.read_bytes(), **fields)
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    assert job["object"] == "transcription.job"
    assert job["status"] in ("queued", "running")
    assert job["links"]["self"] == f"/v1/jobs/{job['id']}" == response.headers["location"]
    assert job["links"]["events"] == f"/v1/jobs/{job['id']}/events"
    return job


async def ended(http: httpx.AsyncClient, job: dict[str, Any]) -> dict[str, Any]:
    response = await http.get(job["links"]["self"], params={"wait": "60"})
    body: dict[str, Any] = response.json()
    assert body["status"] in ENDED
    return body


async def test_above_the_threshold_a_recording_becomes_a_job(http: httpx.AsyncClient) -> None:
    job = await ended(http, await submitted(http, customer="acme", metadata='{"a": "b"}'))
    assert (job["status"], job["progress"], job["error"]) == ("completed", 1.0, None)
    assert job["audio_ms"] == job["billed_ms"] > 20_000
    assert (job["backend"], job["model"]) == ("self_hosted", "micro")
    assert (job["customer"], job["metadata"], job["filename"]) == ("acme", {"a": "b"}, "a.wav")
    text = (await http.get(job["links"]["transcript"], params={"format": "text"})).text
    errors, words = word_errors(LONG_SAID, text)
    assert errors < 0.1 * words


async def test_a_transcript_in_every_format(http: httpx.AsyncClient) -> None:
    job = await ended(http, await submitted(http, response_format="srt"))
    address = job["links"]["transcript"]
    plain = (await http.get(address)).json()["text"]
    kinds = {}
    for fmt in ("json", "verbose_json", "text", "srt", "vtt"):
        response = await http.get(address, params={"format": fmt})
        kinds[fmt] = response.headers["content-type"].split(";")[0]
        assert plain.split()[0] in response.text
    assert kinds == {
        "json": "application/json",
        "verbose_json": "application/json",
        "text": "text/plain",
        "srt": "text/plain",
        "vtt": "text/vtt",
    }
    verbose = (await http.get(address, params={"format": "verbose_json"})).json()
    assert verbose["segments"][-1]["end"] <= verbose["duration"]
    body = assert_problem(await http.get(address, params={"format": "docx"}), 400, "BAD_PARAMETERS")
    assert body["param"] == "format"


@pytest.mark.parametrize(
    "asked", [{"async": "true"}, {"headers": {"prefer": "respond-async"}}], ids=["field", "Prefer"]
)
async def test_a_short_recording_becomes_a_job_when_asked(http: httpx.AsyncClient, asked: dict[str, Any]) -> None:
    response = await post(http, **asked)
    assert response.status_code == 202
    assert (await ended(http, response.json()))["status"] == "completed"


async def test_async_false_always_waits(http: httpx.AsyncClient) -> None:
    response = await post(http, LONG.read_bytes(), **{"async": "false"})
    assert response.status_code == 200
    assert response.headers["x-stenogate-model"] == "micro"
    assert int(response.headers["x-stenogate-billed-ms"]) > 20_000


async def test_who_may_not_poll_is_kept_waiting(served: Served) -> None:
    token = served.token(await served.tenant(), ["transcribe"])
    async with served.http(token) as http:
        assert (await post(http, LONG.read_bytes())).status_code == 200
        assert_problem(await post(http, **{"async": "true"}), 403, "FORBIDDEN")


async def test_the_tenants_own_threshold(served: Served) -> None:
    async with served.http(served.token(await served.tenant(job_threshold_bytes=1000))) as http:
        assert (await post(http)).status_code == 202
    async with served.http(served.token(await served.tenant(job_threshold_ms=600_000))) as http:
        assert (await post(http, LONG.read_bytes())).status_code == 200


async def test_events_tell_each_change_until_the_end(http: httpx.AsyncClient) -> None:
    job = await submitted(http)
    response = await http.get(job["links"]["events"])
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in response.text.strip().split("\n\n")]
    assert all(block[0] == "event: job" for block in blocks)
    told = [json.loads(block[1].removeprefix("data: ")) for block in blocks]
    assert {event["id"] for event in told} == {job["id"]}
    assert told[-1]["status"] == "completed"
    assert [event["progress"] for event in told] == sorted(event["progress"] for event in told)


async def test_pages(http: httpx.AsyncClient) -> None:
    ids = []
    for _ in range(3):
        ids.append((await post(http, **{"async": "true"})).json()["id"])
        await ended(http, {"links": {"self": f"/v1/jobs/{ids[-1]}"}})
    first = (await http.get("/v1/jobs", params={"limit": "2"})).json()
    second = (await http.get("/v1/jobs", params={"limit": "2", "cursor": first["next_cursor"]})).json()
    assert [job["id"] for job in first["data"] + second["data"]] == ids[::-1]
    assert second["next_cursor"] is None
    assert (await http.get("/v1/jobs", params={"status": "failed"})).json()["data"] == []
    for name, bad in (("limit", "0"), ("limit", "x"), ("cursor", "nonsense"), ("status", "gone")):
        body = assert_problem(await http.get("/v1/jobs", params={name: bad}), 400, "BAD_PARAMETERS")
        assert body["param"] == name


async def test_a_transcript_that_is_not_there_yet_and_a_wait_that_ends(settings: Settings) -> None:
    async with serving(settings, recogniser=Scripted(delay_s=30), backend="scripted") as running:
        async with running.http(running.token(await running.tenant())) as http:
            job = (await post(http, model="whisper-1", **{"async": "true"})).json()
            problem = assert_problem(await http.get(f"/v1/jobs/{job['id']}/transcript"), 409, "JOB_NOT_READY")
            assert problem["retryable"]
            waited = await http.get(f"/v1/jobs/{job['id']}", params={"wait": "0.3"})
            assert waited.json()["status"] in ("queued", "running")
            for bad in ("-1", "61", "x", "nan"):
                assert_problem(await http.get(f"/v1/jobs/{job['id']}", params={"wait": bad}), 400, "BAD_PARAMETERS")


async def test_a_job_that_fails_says_why_to_who_polls_and_to_who_waits(settings: Settings) -> None:
    async with serving(settings, recogniser=Scripted(fail=BackendRefused), backend="scripted") as running:
        async with running.http(running.token(await running.tenant())) as http:
            job = await ended(http, (await post(http, model="whisper-1", **{"async": "true"})).json())
            assert job["status"] == "failed"
            assert job["error"]["code"] == "BACKEND_REFUSED"
            assert job["billed_ms"] == 0
            assert_problem(await http.get(f"/v1/jobs/{job['id']}/transcript"), 409, "JOB_FAILED")
            response = await post(http, LONG.read_bytes(), model="whisper-1", **{"async": "false"})
            # Below the installation's threshold it runs inline; above it, on a job: the same refusal either way.
            assert_problem(response, 502, "BACKEND_REFUSED")


async def test_a_client_that_stops_waiting_does_not_stop_the_job(http: httpx.AsyncClient) -> None:
    leaving = asyncio.create_task(post(http, LONG.read_bytes(), **{"async": "false"}))
    async with asyncio.timeout(30):
        while not (jobs := (await http.get("/v1/jobs")).json()["data"]):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert (await ended(http, jobs[0]))["status"] == "completed"
