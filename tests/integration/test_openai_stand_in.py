"""The provider that the tests of relays stand on speaks true: the official clients understand it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import groq
import openai
import pytest
from openai import AsyncOpenAI

from tests.openai_relays import MIB, WAV
from tests.providers.openai import GROQ, KEY, SCRIPT, OpenAIServer, openai_server


@pytest.fixture
async def client(provider: OpenAIServer) -> AsyncIterator[AsyncOpenAI]:
    provider.http.fault = None
    async with AsyncOpenAI(base_url=provider.base_url, api_key=KEY, max_retries=0) as opened:
        yield opened


async def test_openais_client_understands_the_stand_in(client: AsyncOpenAI) -> None:
    create = client.audio.transcriptions.create
    said = " ".join(SCRIPT[:5])
    plain = await create(file=WAV, model="whisper-1")
    assert plain.text == said
    assert plain.usage
    assert plain.usage.type == "duration"
    verbose = await create(
        file=WAV, model="whisper-1", response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert (verbose.text, verbose.language, verbose.duration) == (f" {said}", "english", 2.378)
    assert verbose.words is not None
    assert verbose.segments is not None
    assert [word.word for word in verbose.words] == ["The", "quick", "brown", "fox", "jumps"]
    assert verbose.segments[0].text == f" {said}"
    for fmt in ("text", "srt", "vtt"):
        assert said in await create(file=WAV, model="whisper-1", response_format=fmt)
    tokens = await create(file=WAV, model="gpt-4o-transcribe")
    assert tokens.usage
    assert tokens.usage.type == "tokens"
    events = [event async for event in await create(file=WAV, model="gpt-transcribe", stream=True)]
    assert "".join(event.delta for event in events if event.type == "transcript.text.delta") == said
    assert events[-1].type == "transcript.text.done"
    with pytest.deprecated_call():
        assert (await client.audio.translations.create(file=WAV, model="whisper-1")).text == said
    assert (await client.models.list()).data[0].id == "whisper-1"


async def test_openais_client_understands_its_refusals(provider: OpenAIServer, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.audio.transcriptions.create(file=WAV, model="nonsense")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert unknown.value.request_id
    with pytest.raises(openai.BadRequestError) as unfit:
        await client.audio.transcriptions.create(file=WAV, model="gpt-transcribe", response_format="srt")
    assert unfit.value.code == "unsupported_value"
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="other").models.list()
    with pytest.raises(openai.APIStatusError) as large:
        await client.audio.transcriptions.create(file=bytes(26 * MIB), model="whisper-1")
    assert large.value.status_code == 413


async def test_groqs_client_understands_the_stand_in() -> None:
    async with openai_server(GROQ) as provider:
        async with groq.AsyncGroq(api_key=KEY, base_url=provider.http.url, max_retries=0) as client:
            create = client.audio.transcriptions.create
            said = " ".join(SCRIPT[:5])
            answer = await create(file=WAV, model="whisper-large-v3-turbo")
            assert answer.text == said
            assert answer.model_extra is not None
            assert answer.model_extra["x_groq"]["id"].startswith("req_")
            verbose = await create(file=WAV, model="whisper-large-v3", response_format="verbose_json")
            assert verbose.model_extra is not None
            assert verbose.model_extra["language"] == "English"
            assert (await client.audio.translations.create(file=WAV, model="whisper-large-v3")).text == said
            with pytest.raises(groq.BadRequestError, match="896 characters or fewer"):
                await create(file=WAV, model="whisper-large-v3", prompt="x" * 897)
            with pytest.raises(groq.APIStatusError) as large:
                await create(file=bytes(26 * MIB), model="whisper-large-v3")
            assert large.value.body == {
                "error": {
                    "message": "Request Entity Too Large",
                    "type": "invalid_request_error",
                    "code": "request_too_large",
                }
            }
