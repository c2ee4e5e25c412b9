"""Recordings to Deepgram over real sockets: what is asked, what comes of each answer, and that nothing hangs or tells
secrets, whatever it does."""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from dispatchers.audio.encode import encoder
from dispatchers.backends.deepgram import BASE_URL, MODELS, DeepgramRelay
from dispatchers.backends.deepgram_live import Patience
from dispatchers.backends.relay import Account
from dispatchers.errors import (
    AudioTooLong,
    BackendError,
    BackendFailed,
    BackendRefused,
    BackendTimeout,
    BackendUnavailable,
    BadAnswer,
    CredentialRefused,
    Throttled,
    UnknownModel,
    UnsupportedOption,
)
from dispatchers.interface import Options, Origin, Samples, Segment, Word
from dispatchers.providers import PROVIDERS, open_relay
from tests.integration.test_engine_server import until
from tests.providers.deepgram import KEY, DeepgramServer, deepgram_server
from tests.providers.http import FAULTS, Answer, Fault, closed, deaf
from tests.providers.script import sound

IMPATIENT = Patience(connect_s=0.3, recorded_s=1.0)
SECONDS_6 = sound(6)
TEXT = "Tell me more. And then, where did it go?"


@asynccontextmanager
async def relay_to(
    server: DeepgramServer, patience: Patience = IMPATIENT, **account: Any
) -> AsyncIterator[DeepgramRelay]:
    relay = DeepgramRelay(server.account(**account), patience)
    try:
        yield relay
    finally:
        await relay.aclose()


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[DeepgramServer]:
    async with deepgram_server() as opened:
        yield opened


@pytest.fixture
async def relay(server: DeepgramServer) -> AsyncIterator[DeepgramRelay]:
    server.queries.clear()
    server.bodies.clear()
    server.http.requests.clear()
    server.http.fault = None
    async with relay_to(server) as opened:
        yield opened
    server.http.fault = None


def tells_nothing(error: BaseException) -> None:
    told = "".join(traceback.format_exception(error)) + repr(error)
    assert "the-secret" not in told
    assert KEY not in told


# --- what is asked ------------------------------------------------------------------------------------------------

FIXED = {"punctuate": ("true",), "utterances": ("true",)}


@pytest.mark.parametrize(
    ("options", "query"),
    [
        (Options(), {"model": ("nova-3",), "detect_language": ("true",)}),
        (Options(language="de", words=True), {"model": ("nova-3",), "language": ("de",)}),
        (Options(language="yue"), {"model": ("nova-3",), "language": ("zh-HK",)}),
        (
            Options(language="en", hotwords=("Zoë & Łódź", "a=b"), temperature=0.0, prompt=""),
            {"model": ("nova-3",), "language": ("en",), "keyterm": ("Zoë & Łódź", "a=b")},
        ),
        (
            Options(model="nova-2", language="en", hotwords=("kick:drum", "snare")),
            {"model": ("nova-2",), "language": ("en",), "keywords": ("kick drum", "snare")},
        ),
    ],
)
async def test_options_become_parameters(
    relay: DeepgramRelay, server: DeepgramServer, options: Options, query: dict[str, tuple[str, ...]]
) -> None:
    assert (await relay.transcribe(SECONDS_6, options)).text == TEXT
    assert server.queries == [FIXED | query]
    (request,) = server.bodies
    assert request.headers["authorization"] == f"Token {KEY}"
    assert request.headers["content-type"] == "audio/wav"
    assert "cookie" not in request.headers


async def test_long_audio_is_packed(relay: DeepgramRelay, server: DeepgramServer) -> None:
    minutes_2 = np.concatenate([SECONDS_6, np.zeros(114 * 16_000, np.int16)])
    transcript = await relay.transcribe(minutes_2, Options())
    assert (transcript.text, transcript.duration_ms) == (TEXT, 120_000)
    (request,) = server.bodies
    assert request.headers["content-type"] == "audio/flac"
    assert len(request.body) < minutes_2.nbytes / 2


@pytest.mark.parametrize(
    ("options", "param"),
    [
        (Options(task="translate"), "task"),
        (Options(prompt="A talk about tea."), "prompt"),
        (Options(temperature=0.5), "temperature"),
        (Options(language="haw"), "language"),
        (Options(hotwords=("a",) * 101), "hotwords"),
    ],
)
async def test_what_it_cannot_is_not_asked(
    relay: DeepgramRelay, server: DeepgramServer, options: Options, param: str
) -> None:
    for asked in (relay.transcribe(SECONDS_6, options), _nothing_live(relay, options)):
        with pytest.raises(UnsupportedOption) as refused:
            await asked
        assert refused.value.param == param
    assert server.http.requests == []


async def test_what_is_not_offered_is_not_asked(relay: DeepgramRelay, server: DeepgramServer) -> None:
    for asked in (
        relay.transcribe(SECONDS_6, Options(model="whisper-large")),
        _nothing_live(relay, Options(model="whisper-large")),
    ):
        with pytest.raises(UnknownModel):
            await asked
    with pytest.raises(AudioTooLong, match="takes 60 minutes"):
        await relay.transcribe(np.zeros(3_600_001 * 16, np.int16), Options())
    assert server.http.requests == []


async def _nothing_live(relay: DeepgramRelay, options: Options) -> None:
    async def nothing() -> AsyncIterator[Any]:
        return
        yield

    async with relay.stream(nothing(), options) as events:
        assert [event async for event in events] == []


# --- what is answered ---------------------------------------------------------------------------------------------


async def test_utterances_become_segments(relay: DeepgramRelay) -> None:
    heard: list[Segment] = []
    transcript = await relay.transcribe(SECONDS_6, Options(words=True), heard.append)
    assert transcript.text == TEXT
    assert (transcript.language, transcript.duration_ms) == ("en", 6_000)
    assert transcript.origin == Origin("deepgram", "deepgram", "nova-3")
    assert tuple(heard) == transcript.segments
    assert [(segment.text, segment.start_ms, segment.end_ms) for segment in heard] == [
        ("Tell me more.", 400, 1_600),
        ("And then, where did it go?", 2_800, 5_200),
    ]
    assert heard[0].words == (
        Word("Tell", 400, 800, 0.97),
        Word("me", 800, 1_200, 0.97),
        Word("more.", 1_200, 1_600, 0.97),
    )


async def test_silence_is_no_text(relay: DeepgramRelay) -> None:
    transcript = await relay.transcribe(np.zeros(32_000, np.int16), Options(language="de", words=True))
    assert (transcript.text, transcript.segments, transcript.language) == ("", (), "de")


def answering(channel: dict[str, Any], **results: Any) -> Fault:
    return Fault(answer=Answer(json.dumps({"results": {"channels": [channel], **results}}).encode()))


def heard(text: Any, *words: Any, **more: Any) -> dict[str, Any]:
    return {"alternatives": [{"transcript": text, "confidence": 0.9, "words": list(words)}], **more}


def word(text: Any = "a", start: Any = 0.0, end: Any = 1.0, **more: Any) -> dict[str, Any]:
    return {"word": text, "start": start, "end": end, **more}


async def test_without_utterances_all_is_one(server: DeepgramServer, relay: DeepgramRelay) -> None:
    server.http.fault = answering(heard("A b.", word("a", 0.5, 1), word("b", 1, 2.25, punctuated_word="b.")))
    transcript = await relay.transcribe(SECONDS_6, Options(words=True))
    assert [(each.text, each.start_ms, each.end_ms) for each in transcript.segments] == [("A b.", 500, 2_250)]
    assert [each.text for each in transcript.segments[0].words] == ["a", "b."]
    server.http.fault = answering(heard("A b."))
    transcript = await relay.transcribe(SECONDS_6, Options(words=True))
    assert transcript.segments == (Segment(0, 6_000, "A b."),)


@pytest.mark.parametrize(
    ("said", "language"), [("de", "de"), ("pt-BR", "pt"), ("zh-HK", "yue"), ("tlh", "und"), (None, "und")]
)
async def test_the_language_is_a_code_we_know(
    server: DeepgramServer, relay: DeepgramRelay, said: str | None, language: str
) -> None:
    server.http.fault = answering(heard("a", detected_language=said))
    assert (await relay.transcribe(SECONDS_6, Options())).language == language


@pytest.mark.parametrize(("start", "end"), [(-5, 1e300), (4, 2), (9e9, -9e9)])
async def test_times_stay_within_the_recording(
    server: DeepgramServer, relay: DeepgramRelay, start: float, end: float
) -> None:
    said = {"transcript": "a a", "start": start, "end": end, "words": [word("a", start, end)] * 2}
    server.http.fault = answering(heard("a a a a"), utterances=[said, said])
    transcript = await relay.transcribe(SECONDS_6, Options(words=True))
    edges = [edge for each in transcript.segments for edge in (each.start_ms, each.end_ms)]
    assert edges == sorted(edges)
    words = [each for segment in transcript.segments for each in segment.words]
    assert len(words) == 4
    for edge in edges + [edge for each in words for edge in (each.start_ms, each.end_ms)]:
        assert 0 <= edge <= 6_000


async def test_control_characters_are_left_out(server: DeepgramServer, relay: DeepgramRelay) -> None:
    server.http.fault = answering(heard("a\x00b\x1b[31m\n c"), utterances=[])
    assert (await relay.transcribe(SECONDS_6, Options())).text == "ab[31m c"


# --- hostile answers ----------------------------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "no results": {"metadata": {}},
    "an acknowledgement": {"request_id": "the-secret"},
    "no channels": {"results": {"channels": []}},
    "two channels": {"results": {"channels": [heard("a"), heard("the-secret")]}},
    "no alternatives": {"results": {"channels": [{"alternatives": []}]}},
    "text is a number": {"results": {"channels": [heard(5)]}},
    "text is null": {"results": {"channels": [heard(None)]}},
    "words is a string": {"results": {"channels": [{"alternatives": [{"transcript": "a", "words": "the-secret"}]}]}},
    "a word is a string": {"results": {"channels": [heard("a", "the-secret")]}},
    "a word is null": {"results": {"channels": [heard("a", word(None))]}},
    "a time is a string": {"results": {"channels": [heard("a", word("the-secret", "0"))]}},
    "a time is NaN": {"results": {"channels": [heard("a", word("the-secret", float("nan")))]}},
    "a time is infinite": {"results": {"channels": [heard("a", word("the-secret", 0, float("inf")))]}},
    "a confidence is NaN": {"results": {"channels": [heard("a", word("the-secret", confidence=float("nan")))]}},
    "a language is a novel": {"results": {"channels": [heard("a", detected_language="the-secret" * 1_000)]}},
    "utterances is an object": {"results": {"channels": [heard("a")], "utterances": {"the-secret": 1}}},
    "an utterance without times": {"results": {"channels": [heard("a")], "utterances": [{"transcript": "a"}]}},
    "more than can be said": {"results": {"channels": [heard("the-secret " * 500)]}},
}
UNEXPECTED = {
    **{name: Fault(answer=Answer(json.dumps(body).encode())) for name, body in WRONG.items()},
    **{name: FAULTS[name] for name in FAULTS if FAULTS[name].wait_s == 0},
    "no credit": Fault(answer=Answer(b"{}", 402)),
}
UNLIKE_BAD_ANSWER: dict[str, type[BackendError]] = {
    "broken off": BackendFailed,
    "reset": BackendFailed,
    "closed before the answer": BackendFailed,
    "unauthorised": CredentialRefused,
    "forbidden": CredentialRefused,
    "no credit": CredentialRefused,
    "too many": Throttled,
    "too many until": Throttled,
    "too many, and nonsense": Throttled,
    "bad request": BackendRefused,
    "too large": BackendRefused,
    "failed": BackendFailed,
    "bad gateway": BackendUnavailable,
    "unavailable": BackendUnavailable,
    "timed out": BackendUnavailable,
    "silent in the answer": BackendTimeout,
    "a byte now and then": BackendTimeout,
}


@pytest.mark.parametrize("name", UNEXPECTED)
async def test_whatever_it_answers(
    server: DeepgramServer, relay: DeepgramRelay, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.http.fault = UNEXPECTED[name]
    with pytest.raises(BackendError) as failed:
        await relay.transcribe(SECONDS_6, Options())
    assert type(failed.value) is UNLIKE_BAD_ANSWER.get(name, BadAnswer)
    tells_nothing(failed.value)
    assert "the-secret" not in caplog.text
    server.http.fault = None
    assert (await relay.transcribe(SECONDS_6, Options())).text == TEXT


async def test_the_credential_is_named_by_its_beginning(server: DeepgramServer) -> None:
    async with relay_to(server, key="wrong-and-secret") as relay:
        with pytest.raises(CredentialRefused, match="credential wrong-a ") as refused:
            await relay.transcribe(SECONDS_6, Options())
        assert "wrong-and-secret" not in "".join(traceback.format_exception(refused.value)) + repr(relay)


@pytest.mark.parametrize("name", ["silent", "never reads"])
async def test_a_provider_that_says_nothing(server: DeepgramServer, relay: DeepgramRelay, name: str) -> None:
    server.http.fault = FAULTS[name]
    noise = np.random.default_rng(1).integers(-32768, 32767, 16 * 400_000).astype(np.int16)
    for audio in (SECONDS_6, noise):
        with pytest.raises(BackendTimeout, match="deepgram did not answer in time"):
            await relay.transcribe(audio, Options())


async def transcribed_at(address: str, audio: Samples = SECONDS_6) -> None:
    relay = DeepgramRelay(Account("deepgram", address, KEY, KEY[:7], MODELS), IMPATIENT)
    try:
        await relay.transcribe(audio, Options())
    finally:
        await relay.aclose()


async def test_a_provider_that_cannot_be_reached() -> None:
    with pytest.raises(BackendUnavailable, match="deepgram cannot be reached"):
        await transcribed_at(closed())
    async with deaf() as address:
        with pytest.raises(BackendTimeout):
            await transcribed_at(address)


async def test_cancelling_leaves_no_connection(server: DeepgramServer, relay: DeepgramRelay) -> None:
    server.http.fault = FAULTS["silent"]
    asked = asyncio.create_task(relay.transcribe(SECONDS_6, Options()))
    await until(lambda: bool(server.http.requests))
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    server.http.fault = None
    assert (await relay.transcribe(SECONDS_6, Options())).text == TEXT


async def test_what_is_offered_is_what_is_known_of_it(server: DeepgramServer) -> None:
    relay = open_relay("deepgram", server.account(backend="deepgram-eu"))
    try:
        assert relay.origin("") == Origin("deepgram-eu", "deepgram", "nova-3")
        assert (PROVIDERS["deepgram"].base_url, PROVIDERS["deepgram"].models) == (BASE_URL, MODELS)
        assert relay.capabilities.models == MODELS
    finally:
        await relay.aclose()


# --- the test server speaks true ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:websockets:DeprecationWarning")  # the client imports deprecated parts of it
async def test_the_official_client_understands_the_test_server(server: DeepgramServer) -> None:
    from deepgram import AsyncDeepgramClient
    from deepgram.core.api_error import ApiError
    from deepgram.environment import DeepgramClientEnvironment
    from deepgram.errors import BadRequestError
    from deepgram.types import ListenV1Response

    url = server.http.url
    environment = DeepgramClientEnvironment(base=url, production=url, agent=url, agent_rest=url)
    server.http.fault = None
    async with httpx.AsyncClient() as http:
        known = {"environment": environment, "max_retries": 0, "httpx_client": http}
        listen = AsyncDeepgramClient(api_key=KEY, **known).listen.v1.media.transcribe_file
        stranger = AsyncDeepgramClient(api_key="wrong", **known).listen.v1.media.transcribe_file
        body = wav_of(SECONDS_6)
        for parameters in ({"detect_language": True}, {"language": "en", "keyterm": ["a b", "c"]}):
            answer = await listen(request=body, model="nova-3", punctuate=True, utterances=True, **parameters)
            whole = ListenV1Response.model_validate(answer.model_dump(mode="json"))  # the client itself does not check
            assert whole.results.channels[0].alternatives[0].transcript == TEXT
            utterances = [each.transcript for each in whole.results.utterances or ()]
            assert utterances == ["Tell me more.", "And then, where did it go?"]
        assert server.queries[-1]["keyterm"] == ("a b", "c")
        with pytest.raises(BadRequestError):
            await listen(request=body, model="nova-2", keyterm=["a"])
        with pytest.raises(ApiError) as refused:
            await stranger(request=body, model="nova-3")
        assert refused.value.status_code == 401


def wav_of(audio: Samples) -> bytes:
    wav = encoder("wav", len(audio))
    return wav.feed(audio) + wav.end()
