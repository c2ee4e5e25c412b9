"""Relays to providers with OpenAI's API, over real sockets: what is sent, and what comes of each answer."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dispatchers.audio.decode import load
from dispatchers.backends.local import LocalBackend
from dispatchers.backends.openai import OpenAIRelay, Patience
from dispatchers.engine.models import MICRO
from dispatchers.engine.server import EngineServer
from dispatchers.errors import (
    AudioTooLong,
    UnknownModel,
    UnsupportedOption,
)
from dispatchers.interface import Options, Segment, Word
from dispatchers.providers import PROVIDERS, open_relay
from tests.integration.test_engine_server import serving
from tests.openai_relays import CLIP, MIB, MINUTES_2, SAID, SECONDS_5, relay_to, speaking
from tests.providers.http import Answer, Fault
from tests.providers.openai import GROQ, KEY, OPENAI, VLLM, OpenAIServer

# --- what is asked ------------------------------------------------------------------------------------------------

SENT: dict[str, tuple[Options, dict[str, tuple[str, ...]]]] = {
    "nothing in particular": (
        Options(),
        {
            "model": ("whisper-1",),
            "response_format": ("verbose_json",),
            "timestamp_granularities[]": ("segment",),
        },
    ),
    "everything": (
        Options(model="whisper-1", language="en", prompt="Dr Zoë", hotwords=("Łódź", "a"), temperature=0.2, words=True),
        {
            "model": ("whisper-1",),
            "response_format": ("verbose_json",),
            "language": ("en",),
            "prompt": ("Dr Zoë Łódź, a",),
            "temperature": ("0.2",),
            "timestamp_granularities[]": ("word", "segment"),
        },
    ),
    "translation": (
        Options(task="translate", language="de"),
        {"model": ("whisper-1",), "response_format": ("verbose_json",)},
    ),
    "a model without times": (
        Options(model="gpt-4o-transcribe", hotwords=("a", "b")),
        {"model": ("gpt-4o-transcribe",), "response_format": ("json",), "prompt": ("a, b",)},
    ),
    "a model with keywords": (
        Options(model="gpt-transcribe", hotwords=("a", "b"), prompt="c"),
        {"model": ("gpt-transcribe",), "response_format": ("json",), "prompt": ("c",), "keywords[]": ("a", "b")},
    ),
    "what looks like the end of a part": (
        Options(prompt='x"\r\n--\r\nContent-Disposition: form-data; name="model"\r\n\r\nother'),
        {
            "model": ("whisper-1",),
            "response_format": ("verbose_json",),
            "prompt": ('x"\r\n--\r\nContent-Disposition: form-data; name="model"\r\n\r\nother',),
            "timestamp_granularities[]": ("segment",),
        },
    ),
}


@pytest.mark.parametrize("name", SENT)
async def test_options_become_fields(relay: OpenAIRelay, provider: OpenAIServer, name: str) -> None:
    options, fields = SENT[name]
    await relay.transcribe(CLIP, options)
    (form,), (request,) = provider.asked, provider.http.requests
    assert form.fields == fields
    assert request.path == f"/v1/audio/{'translations' if options.task == 'translate' else 'transcriptions'}"
    assert (form.filename, form.media_type) == ("audio.wav", "audio/wav")
    assert "cookie" not in request.headers


async def test_the_file_comes_last_and_whole(relay: OpenAIRelay, provider: OpenAIServer, tmp_path: Path) -> None:
    for audio, suffix in ((CLIP, "wav"), (MINUTES_2, "flac")):
        await relay.transcribe(audio, Options())
        form, request = provider.asked[-1], provider.http.requests[-1]
        assert form.file is not None
        assert request.body.endswith(form.file + request.body[-40:])
        assert (form.filename, form.media_type) == (f"audio.{suffix}", f"audio/{suffix}")
        path = tmp_path / form.filename
        path.write_bytes(form.file)
        assert np.array_equal(load(path), audio)
    assert form.file is not None
    assert len(form.file) < 0.7 * MINUTES_2.nbytes


async def test_of_a_prompt_the_end_is_sent() -> None:
    async with speaking("groq", GROQ) as (relay, provider):
        await relay.transcribe(CLIP, Options(prompt="x" * 2_000 + " the end", hotwords=("word",)))
        sent = provider.asked[0].one("prompt")
        assert len(sent) == 896
        assert sent.endswith(" the end word")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        (Options(model="gpt-4o-transcribe", words=True), "timestamp_granularities"),
        (Options(task="translate", words=True), "timestamp_granularities"),
        (Options(model="gpt-transcribe", task="translate"), "task"),
        (Options(language="haw"), "language"),
    ],
)
async def test_what_a_model_cannot_is_not_asked(
    relay: OpenAIRelay, provider: OpenAIServer, options: Options, param: str
) -> None:
    with pytest.raises(UnsupportedOption) as refused:
        await relay.transcribe(CLIP, options)
    assert refused.value.param == param
    assert provider.http.requests == []


async def test_what_a_model_is_not_offered_is_not_asked(relay: OpenAIRelay, provider: OpenAIServer) -> None:
    with pytest.raises(UnknownModel):
        await relay.transcribe(CLIP, Options(model="gpt-4o-transcribe-diarize"))
    with pytest.raises(UnsupportedOption):
        relay.stream(nobody(), Options())
    assert provider.http.requests == []


async def nobody() -> AsyncIterator[Any]:
    return
    yield


async def test_what_is_too_long_is_not_sent(relay: OpenAIRelay, provider: OpenAIServer) -> None:
    longest_ms = relay.capabilities.longest_ms
    assert longest_ms is not None
    with pytest.raises(AudioTooLong, match="openai takes 13 minutes"):
        await relay.transcribe(np.zeros((longest_ms + 1) * 16, np.int16), Options())
    assert provider.http.requests == []
    noise = np.random.default_rng(1).integers(-32768, 32767, longest_ms * 16).astype(np.int16)  # does not pack
    provider.http.fault = Fault(answer=Answer(b'{"text":"yes"}'))
    async with relay_to(provider, patience=Patience()) as patient:
        assert (await patient.transcribe(noise, Options())).text == "yes"
    assert len(provider.http.requests[0].body) <= 25 * MIB


# --- what is answered ---------------------------------------------------------------------------------------------


async def test_words_have_the_punctuation_of_the_text(relay: OpenAIRelay) -> None:
    answer = await relay.transcribe(SECONDS_5, Options(words=True))
    assert answer.text == SAID
    assert answer.language == "en"
    assert [segment.text for segment in answer.segments] == [
        "The quick brown fox jumps, and the dog",
        "sleeps. The quick brown",
    ]
    words = [word for segment in answer.segments for word in segment.words]
    assert [word.text for word in words] == SAID.split()
    assert words[4] == Word("jumps,", 1_600, 2_000, confidence=math.exp(-0.21))
    assert [len(segment.words) for segment in answer.segments] == [8, 4]
    first = answer.segments[0]
    assert (first.avg_logprob, first.no_speech_prob, first.tokens) == (-0.21, 0.01, (50364, 2425))


async def test_a_text_without_times_is_one_segment(relay: OpenAIRelay) -> None:
    answer = await relay.transcribe(SECONDS_5, Options(model="gpt-4o-transcribe"))
    assert answer.segments == (Segment(0, 5_000, SAID),)
    assert (answer.text, answer.language) == (SAID, "und")
    assert (await relay.transcribe(SECONDS_5, Options(model="gpt-4o-transcribe", language="de"))).language == "de"
    assert (await relay.transcribe(SECONDS_5, Options(model="gpt-transcribe"))).language == "en"


async def test_silence_is_no_text(provider: OpenAIServer, relay: OpenAIRelay) -> None:
    for text in ("", "  ", "\\n"):
        provider.http.fault = Fault(answer=Answer(f'{{"text":"{text}","segments":[]}}'.encode()))
        answer = await relay.transcribe(SECONDS_5, Options(language="en", words=True))
        assert (answer.text, answer.segments) == ("", ())


async def test_other_providers(tmp_path: Path) -> None:
    async with speaking("groq", GROQ) as (relay, _):
        assert relay.capabilities.least_billed_ms == 10_000
        answer = await relay.transcribe(SECONDS_5, Options(words=True))
        assert (answer.text, answer.language, answer.origin.engine) == (SAID, "en", "groq")
        assert not relay.capabilities.translate
        translated = await relay.transcribe(SECONDS_5, Options(task="translate", model="whisper-large-v3"))
        assert (translated.task, translated.language) == ("translate", "en")
    async with speaking("vllm", VLLM) as (relay, _):
        answer = await relay.transcribe(SECONDS_5, Options())
        assert (answer.text, answer.language, len(answer.segments)) == (SAID, "en", 2)
        assert not relay.capabilities.words


async def test_a_server_without_word_times_is_found_out() -> None:
    async with speaking("openai-compatible", OPENAI) as (relay, provider):
        provider.http.fault = Fault(answer=Answer(b'{"text":"a","segments":[{"text":"a","start":0,"end":1}]}'))
        with pytest.raises(UnsupportedOption):
            await relay.transcribe(SECONDS_5, Options(words=True))


@pytest.mark.parametrize(
    ("text", "words", "tokens"),
    [
        (
            'He said: "Well-known, I am!" (Yes)',
            "He said Well-known I am Yes",
            ["He", "said:", '"Well-known,', "I", 'am!"', "(Yes)"],
        ),
        ("a an a", "a an a", ["a", "an", "a"]),
        ("你好世界。", "你好 世界", ["你好", "世界。"]),
        ("It costs $5 – or 6.", "It costs 5 or 6", ["It", "costs", "$5 –", "or", "6."]),
        ("something else", "not what it says", ["not", "what", "it", "says"]),
    ],
)
async def test_words_in_a_text(
    provider: OpenAIServer, relay: OpenAIRelay, text: str, words: str, tokens: list[str]
) -> None:
    said = [{"word": f" {word}", "start": at, "end": at + 0.5} for at, word in enumerate(words.split())]
    body = {"text": text, "segments": [{"text": f" {text}", "start": 0, "end": 9}], "words": said}
    provider.http.fault = Fault(answer=Answer(json.dumps(body).encode()))
    answer = await relay.transcribe(np.zeros(160_000, np.int16), Options(words=True))
    assert [word.text for word in answer.segments[0].words] == tokens


# --- our own engine -----------------------------------------------------------------------------------------------


async def test_an_engine_of_ours_says_what_it_says_itself() -> None:
    local = LocalBackend(MICRO, workers=2, device="cpu")
    server = EngineServer(lambda: local, token="the token", max_upload_bytes=64 * MIB)
    async with serving(server) as address:
        await server.load()
        account = PROVIDERS["openai-compatible"].account(
            backend="pod", key="the token", shown="the", base_url=f"{address}/v1", models=("micro",)
        )
        relay = open_relay("openai-compatible", account)
        options = Options(language="en", words=True)
        for audio in (CLIP, MINUTES_2):
            far, near = await relay.transcribe(audio, options), await local.transcribe(audio, options)
            assert far.text == near.text
            assert [segment.text for segment in far.segments] == [segment.text for segment in near.segments]
            assert [(word.text, word.start_ms, word.end_ms) for segment in far.segments for word in segment.words] == [
                (word.text, word.start_ms, word.end_ms) for segment in near.segments for word in segment.words
            ]
        await relay.aclose()


# --- providers ----------------------------------------------------------------------------------------------------


def test_an_account_has_an_address_and_models() -> None:
    given = {"backend": "a", "key": KEY, "shown": "sk"}
    assert PROVIDERS["openai"].account(**given).base_url == "https://api.openai.com/v1"
    assert PROVIDERS["openai"].account(**given, region="eu").base_url == "https://eu.api.openai.com/v1"
    assert PROVIDERS["openai"].account(**given, models=["x"]).models == ("x",)
    with pytest.raises(ValueError, match="base_url"):
        PROVIDERS["vllm"].account(**given)
    with pytest.raises(ValueError, match="models to offer"):
        PROVIDERS["vllm"].account(**given, base_url="http://127.0.0.1:1/v1")
    with pytest.raises(ValueError, match="no provider `nonsense`"):
        open_relay("nonsense", PROVIDERS["openai"].account(**given))
