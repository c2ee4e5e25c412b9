"""The official client, unchanged, against the whole gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from dispatchers.backends.scripted import Scripted
from dispatchers.errors import BackendFailed
from runtime.settings import Settings
from tests.server import CLIP, CLIP_TEXT, LONG, Served, serving

AUDIO = ("clip.wav", CLIP.read_bytes(), "audio/wav")


@pytest.fixture
async def client(served: Served, mine: str) -> AsyncIterator[AsyncOpenAI]:
    async with served.openai(mine) as opened:
        yield opened


async def test_json(client: AsyncOpenAI) -> None:
    made = await client.audio.transcriptions.create(file=AUDIO, model="micro")
    assert made.text == CLIP_TEXT
    assert made.usage is not None
    assert made.usage.type == "duration"
    assert made._request_id is not None


async def test_verbose_json(client: AsyncOpenAI) -> None:
    made = await client.audio.transcriptions.create(
        file=AUDIO,
        model="whisper-1",
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
        language="en",
        prompt="An address.",
        temperature=0.0,
    )
    assert made.text == CLIP_TEXT
    assert made.words is not None
    assert [word.word for word in made.words] == CLIP_TEXT.split()
    assert made.segments is not None
    assert made.segments[0].text.strip() == CLIP_TEXT
    assert made.language == "english"


@pytest.mark.parametrize("fmt", ["text", "srt", "vtt"])
async def test_text_formats_are_strings(client: AsyncOpenAI, fmt: Literal["text", "srt", "vtt"]) -> None:
    made: Any = await client.audio.transcriptions.create(file=AUDIO, model="micro", response_format=fmt)
    assert isinstance(made, str)
    assert CLIP_TEXT in " ".join(made.split())


async def test_what_else_a_caller_may_pass(client: AsyncOpenAI) -> None:
    made = await client.audio.transcriptions.create(
        file=CLIP.read_bytes(),
        model="micro",
        chunking_strategy={"type": "server_vad"},
        include=["logprobs"],
        extra_body={"metadata": {"case": "7"}, "customer": "acme", "backend_preference": "any"},
    )
    assert made.text == CLIP_TEXT


async def test_a_body_that_cannot_be_rewound_is_sent_in_chunks(client: AsyncOpenAI) -> None:
    made = await client.audio.transcriptions.create(file=Path(CLIP), model="micro")
    assert made.text == CLIP_TEXT


async def test_stream(client: AsyncOpenAI) -> None:
    events = [event async for event in await client.audio.transcriptions.create(file=AUDIO, model="micro", stream=True)]
    deltas = "".join(event.delta for event in events if event.type == "transcript.text.delta")
    last = events[-1]
    assert last.type == "transcript.text.done"
    assert deltas == last.text == CLIP_TEXT


async def test_raw_response(client: AsyncOpenAI) -> None:
    raw = await client.audio.transcriptions.with_raw_response.create(file=AUDIO, model="micro")
    assert raw.request_id == raw.headers["x-request-id"]
    assert raw.parse().text == CLIP_TEXT


async def test_models(client: AsyncOpenAI) -> None:
    listed = [model.id async for model in await client.models.list()]
    assert listed[:2] == ["micro", "whisper-1"]
    assert (await client.models.retrieve("micro")).owned_by == "stenogate"


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the client's own
async def test_translation(settings: Settings) -> None:
    async with serving(settings, recogniser=Scripted(), backend="scripted") as running:
        async with running.openai(running.token(await running.tenant())) as client:
            made = await client.audio.translations.create(file=AUDIO, model="whisper-1", response_format="verbose_json")
    assert made.text.startswith("the quick brown fox")
    assert made.language == "english"


async def test_a_long_recording_is_waited_for(client: AsyncOpenAI, mine: str, served: Served) -> None:
    made = await client.audio.transcriptions.create(file=("long.wav", LONG.read_bytes()), model="micro")
    assert len(made.text.split()) > 20
    async with served.http(mine) as http:
        jobs = (await http.get("/v1/jobs")).json()["data"]
    assert [job["status"] for job in jobs] == ["completed"]


async def test_a_retry_joins_the_running_job(served: Served) -> None:
    """One transcript, one charge, however often the client lost the line."""
    tenant = await served.tenant()
    token = served.token(tenant)
    again = {"x-stainless-retry-count": "1"}
    async with served.openai(token) as client:
        first = await client.audio.transcriptions.create(file=LONG, model="micro")
        second = await client.audio.transcriptions.create(file=LONG, model="micro", extra_headers=again)
    assert first.text == second.text
    async with served.http(token) as http:
        assert len((await http.get("/v1/jobs")).json()["data"]) == 1
        usage = (await http.get("/v1/usage")).json()["data"]
    assert [row["requests"] for row in usage] == [1]


# --- errors -------------------------------------------------------------------------------------------------------


async def test_a_bad_token(served: Served) -> None:
    async with served.openai("nonsense") as client:
        with pytest.raises(openai.AuthenticationError) as raised:
            await client.audio.transcriptions.create(file=AUDIO, model="micro")
    assert raised.value.code == "invalid_api_key"
    assert raised.value.request_id is not None


async def test_a_missing_scope(served: Served) -> None:
    token = served.token(await served.tenant(), ["usage"])
    async with served.openai(token) as client:
        with pytest.raises(openai.PermissionDeniedError):
            await client.audio.transcriptions.create(file=AUDIO, model="micro")


async def test_an_unknown_model(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        await client.audio.transcriptions.create(file=AUDIO, model="gpt-9")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-9")


async def test_a_file_that_is_no_audio(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await client.audio.transcriptions.create(file=("a.png", b"\x89PNG\r\n\x1a\n" + b"0" * 5000), model="micro")
    assert raised.value.code == "undecodable"
    assert isinstance(raised.value.body, dict)
    assert raised.value.body["type"] == "invalid_request_error"


async def test_too_many_requests(served: Served) -> None:
    token = served.token(await served.tenant(requests_per_minute=1))
    async with served.openai(token) as client:
        await client.audio.transcriptions.create(file=AUDIO, model="micro")
        with pytest.raises(openai.RateLimitError) as raised:
            await client.audio.transcriptions.create(file=AUDIO, model="micro")
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 120


class Counted(httpx.AsyncHTTPTransport):
    """Counts what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.sent += 1
        response = await super().handle_async_request(request)
        response.headers["retry-after-ms"] = "1"  # tests do not wait
        return response


async def test_what_may_succeed_later_is_retried_and_what_may_not_is_not(settings: Settings) -> None:
    async with serving(settings, recogniser=Scripted(fail=BackendFailed), backend="scripted") as running:
        token = running.token(await running.tenant())
        for model, error, times in (("whisper-1", openai.InternalServerError, 3), ("none", openai.NotFoundError, 1)):
            transport = Counted()
            http_client = httpx.AsyncClient(transport=transport)
            async with running.openai(token, http_client=http_client, max_retries=2) as client:
                with pytest.raises(error):
                    await client.audio.transcriptions.create(file=AUDIO, model=model)
            assert transport.sent == times


async def test_a_late_failure_raises_in_the_stream(settings: Settings) -> None:
    backend = Scripted(delay_s=0.05, fail=BackendFailed, fail_after=1)
    async with serving(settings, recogniser=backend, backend="scripted") as running:
        async with running.openai(running.token(await running.tenant())) as client:
            stream = await client.audio.transcriptions.create(file=LONG, model="whisper-1", stream=True)
            with pytest.raises(openai.APIError):
                async for _ in stream:
                    pass


# --- the blocking client ------------------------------------------------------------------------------------------


async def test_the_blocking_client(served: Served, mine: str) -> None:
    def use() -> list[str]:
        with OpenAI(
            api_key=mine, base_url=f"{served.url}/v1", max_retries=0, http_client=httpx.Client(trust_env=False)
        ) as client:
            make = client.audio.transcriptions.create
            texts = [make(file=AUDIO, model="micro").text, make(file=AUDIO, model="micro", response_format="text")]
            texts.append(make(file=AUDIO, model="micro", response_format="verbose_json").text)
            events = make(file=AUDIO, model="micro", stream=True)
            texts += [event.text for event in events if event.type == "transcript.text.done"]
            try:
                make(file=AUDIO, model="none")
            except openai.NotFoundError as error:
                texts.append(json.dumps(error.code))
            return [str(text).strip() for text in texts]

    assert await asyncio.to_thread(use) == [CLIP_TEXT] * 4 + ['"model_not_found"']
