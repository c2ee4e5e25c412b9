"""Relays to providers with OpenAI's API, over real sockets: what is sent, what comes of each answer, and that nothing
hangs, leaks or tells secrets, whatever the provider does."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import groq
import httpx
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI

from dispatchers.audio.decode import load
from dispatchers.backends import relay as relays
from dispatchers.backends.local import LocalBackend
from dispatchers.backends.openai import OpenAIRelay, Patience, Quirks
from dispatchers.backends.relay import Account
from dispatchers.engine.models import MICRO, MICRO_SAMPLES
from dispatchers.engine.server import EngineServer
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
from dispatchers.interface import Options, Samples, Segment, Transcript, Word
from dispatchers.providers import PROVIDERS, open_relay
from tests.integration.test_engine_server import serving
from tests.providers.http import FAULTS, Answer, Fault, closed, deaf
from tests.providers.openai import GROQ, KEY, OPENAI, SCRIPT, VLLM, Flavour, OpenAIServer, openai_server

WAV = MICRO_SAMPLES / "clip09.wav"
CLIP = load(WAV)
SECONDS_5 = np.zeros(5 * 16_000, np.int16)
MINUTES_2 = np.tile(load(MICRO_SAMPLES / "long.wav"), 2)[: 120 * 16_000]
MIB = 1024 * 1024
SAID = "The quick brown fox jumps, and the dog sleeps. The quick brown"
IMPATIENT = Patience(connect_s=0.3, silent_s=0.3, whole_s=1.0)


def quirks_of(provider: str) -> Quirks:
    quirks = PROVIDERS[provider].quirks
    assert quirks is not None
    return quirks


@asynccontextmanager
async def relay_to(
    server: OpenAIServer, provider: str = "openai", patience: Patience = IMPATIENT, **account: Any
) -> AsyncIterator[OpenAIRelay]:
    relay = OpenAIRelay(server.account(**account), quirks_of(provider), patience)
    try:
        yield relay
    finally:
        await relay.aclose()


@asynccontextmanager
async def speaking(provider: str, flavour: Flavour, **server: Any) -> AsyncIterator[tuple[OpenAIRelay, OpenAIServer]]:
    async with openai_server(flavour, **server) as opened, relay_to(opened, provider, Patience()) as relay:
        yield relay, opened


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[OpenAIServer]:
    async with openai_server() as opened:
        yield opened


@pytest.fixture
async def relay(server: OpenAIServer) -> AsyncIterator[OpenAIRelay]:
    server.asked.clear()
    server.http.requests.clear()
    server.http.fault = None
    async with relay_to(server) as opened:
        yield opened
    server.http.fault = None


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
async def test_options_become_fields(relay: OpenAIRelay, server: OpenAIServer, name: str) -> None:
    options, fields = SENT[name]
    await relay.transcribe(CLIP, options)
    (form,), (request,) = server.asked, server.http.requests
    assert form.fields == fields
    assert request.path == f"/v1/audio/{'translations' if options.task == 'translate' else 'transcriptions'}"
    assert (form.filename, form.media_type) == ("audio.wav", "audio/wav")
    assert "cookie" not in request.headers


async def test_the_file_comes_last_and_whole(relay: OpenAIRelay, server: OpenAIServer, tmp_path: Path) -> None:
    for audio, suffix in ((CLIP, "wav"), (MINUTES_2, "flac")):
        await relay.transcribe(audio, Options())
        form, request = server.asked[-1], server.http.requests[-1]
        assert form.file is not None
        assert request.body.endswith(form.file + request.body[-38:])
        assert (form.filename, form.media_type) == (f"audio.{suffix}", f"audio/{suffix}")
        path = tmp_path / form.filename
        path.write_bytes(form.file)
        assert np.array_equal(load(path), audio)
    assert form.file is not None
    assert len(form.file) < 0.7 * MINUTES_2.nbytes


async def test_of_a_prompt_the_end_is_sent() -> None:
    async with speaking("groq", GROQ) as (relay, server):
        await relay.transcribe(CLIP, Options(prompt="x" * 2_000 + " the end", hotwords=("word",)))
        sent = server.asked[0].one("prompt")
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
    relay: OpenAIRelay, server: OpenAIServer, options: Options, param: str
) -> None:
    with pytest.raises(UnsupportedOption) as refused:
        await relay.transcribe(CLIP, options)
    assert refused.value.param == param
    assert server.http.requests == []


async def test_what_a_model_is_not_offered_is_not_asked(relay: OpenAIRelay, server: OpenAIServer) -> None:
    with pytest.raises(UnknownModel):
        await relay.transcribe(CLIP, Options(model="gpt-4o-transcribe-diarize"))
    with pytest.raises(UnsupportedOption):
        relay.stream(nobody(), Options())
    assert server.http.requests == []


async def nobody() -> AsyncIterator[Any]:
    return
    yield


async def test_what_is_too_long_is_not_sent(relay: OpenAIRelay, server: OpenAIServer) -> None:
    longest_ms = relay.capabilities.longest_ms
    assert longest_ms is not None
    with pytest.raises(AudioTooLong, match="openai takes 13 minutes"):
        await relay.transcribe(np.zeros((longest_ms + 1) * 16, np.int16), Options())
    assert server.http.requests == []
    noise = np.random.default_rng(1).integers(-32768, 32767, longest_ms * 16).astype(np.int16)  # does not pack
    server.http.fault = Fault(answer=Answer(b'{"text":"yes"}'))
    assert (await OpenAIRelay.transcribe(relay, noise, Options())).text == "yes"
    assert len(server.http.requests[0].body) <= 25 * MIB


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
    assert words[4] == Word("jumps,", 1_600, 2_000, pytest.approx(0.8106, abs=1e-4))
    assert [len(segment.words) for segment in answer.segments] == [8, 4]
    first = answer.segments[0]
    assert (first.avg_logprob, first.no_speech_prob, first.tokens) == (-0.21, 0.01, (50364, 2425))


async def test_a_text_without_times_is_one_segment(relay: OpenAIRelay) -> None:
    answer = await relay.transcribe(SECONDS_5, Options(model="gpt-4o-transcribe"))
    assert answer.segments == (Segment(0, 5_000, SAID),)
    assert (answer.text, answer.language) == (SAID, "und")
    assert (await relay.transcribe(SECONDS_5, Options(model="gpt-4o-transcribe", language="de"))).language == "de"
    assert (await relay.transcribe(SECONDS_5, Options(model="gpt-transcribe"))).language == "en"


async def test_silence_is_no_text(server: OpenAIServer, relay: OpenAIRelay) -> None:
    for text in ("", "  ", "\\n"):
        server.http.fault = Fault(answer=Answer(f'{{"text":"{text}","segments":[]}}'.encode()))
        answer = await relay.transcribe(SECONDS_5, Options(language="en", words=True))
        assert (answer.text, answer.segments) == ("", ())


async def test_sentences_are_told_as_they_come(server: OpenAIServer, relay: OpenAIRelay) -> None:
    heard: list[Segment] = []
    answer = await relay.transcribe(SECONDS_5, Options(model="gpt-transcribe"), heard.append)
    assert [segment.text for segment in heard] == ["The quick brown fox jumps, and the dog sleeps.", "The quick brown"]
    assert (answer.text, answer.language, answer.segments) == (SAID, "en", tuple(heard))
    assert [(segment.start_ms, segment.end_ms) for segment in heard] == [(0, 0), (0, 5_000)]
    assert server.asked[-1].one("stream") == "true"
    server.http.fault = Fault(piece_bytes=7)  # cut anywhere
    assert (await relay.transcribe(SECONDS_5, Options(model="gpt-transcribe"), heard.append)) == answer


def sse(*events: dict[str, Any] | str) -> Fault:
    lines = [event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n" for event in events]
    return Fault(answer=Answer(pieces=tuple(line.encode() for line in lines), media_type="text/event-stream"))


def delta(text: str) -> dict[str, Any]:
    return {"type": "transcript.text.delta", "delta": text}


DONE = {"type": "transcript.text.done", "text": "Hello there. Bye."}


@pytest.mark.parametrize(
    ("fault", "texts"),
    [
        (sse(": ping\n\n", "event: x\r\n", delta("Hello there."), delta(" Bye."), DONE), ["Hello there.", "Bye."]),
        (sse(DONE), ["Hello there. Bye."]),
        (sse(delta("你好。再见。"), DONE), ["你好。", "再见。"]),
        (sse(delta("3.5 a 4."), DONE, delta("after the end")), ["3.5 a 4."]),
        (sse(delta("word " * 150), DONE), [("word " * 101)[:501].strip(), ("word " * 49).strip()]),
        (sse({"type": "transcript.text.delta"}, {"type": "new"}, delta("a\x00b"), DONE), ["ab"]),
        (Fault(answer=Answer(b'{"text":"Whole."}')), ["Whole."]),  # it does not stream, whatever was asked
    ],
)
async def test_events_become_sentences(
    server: OpenAIServer, relay: OpenAIRelay, fault: Fault, texts: list[str]
) -> None:
    server.http.fault = fault
    heard: list[Segment] = []
    answer = await relay.transcribe(np.zeros(60 * 16_000, np.int16), Options(model="gpt-transcribe"), heard.append)
    assert [segment.text for segment in heard] == texts
    assert answer.segments == tuple(heard)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (sse(delta("Hello. "), delta("and")), BadAnswer),
        (sse(delta("Hello. "), {"error": {"message": "the-secret"}}), BackendFailed),
        (sse(delta("Hello. "), "data: the-secret\n\n"), BadAnswer),
        (sse(delta("Hello. "), delta("the-secret" * 2_000)), BadAnswer),
        (sse(*[delta("")] * 90_000), BadAnswer),
        (sse("data: " + "a" * 5_000_000), BadAnswer),
        (replace(sse(delta("Hello. "), DONE), most_bytes=80), BackendFailed),
        (replace(sse(delta("Hello. "), DONE), most_bytes=80, ending="silence"), BackendTimeout),
    ],
)
async def test_events_that_go_wrong(
    server: OpenAIServer, relay: OpenAIRelay, fault: Fault, error: type[BackendError]
) -> None:
    server.http.fault = fault
    with pytest.raises(BackendError) as failed:
        await relay.transcribe(SECONDS_5, Options(model="gpt-transcribe"), lambda _: None)
    assert type(failed.value) is error
    tells_nothing(failed.value)


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
    async with speaking("openai-compatible", OPENAI) as (relay, server):
        server.http.fault = Fault(answer=Answer(b'{"text":"a","segments":[{"text":"a","start":0,"end":1}]}'))
        with pytest.raises(UnsupportedOption):
            await relay.transcribe(SECONDS_5, Options(words=True))


@pytest.mark.parametrize(
    ("text", "words", "tokens"),
    [
        ('He said: "Well-known, I am!" (Yes)', "He said Well-known I am Yes", 'He said: "Well-known, I am!" (Yes)'),
        ("a an a", "a an a", "a an a"),
        ("你好世界", "你好 世界", "你好 世界"),
        ("It costs $5 - or 6.", "It costs 5 or 6", "It costs $5 - or 6."),
        ("something else", "not what it says", "not what it says"),
    ],
)
async def test_words_in_a_text(server: OpenAIServer, relay: OpenAIRelay, text: str, words: str, tokens: str) -> None:
    said = [{"word": f" {word}", "start": at, "end": at + 0.5} for at, word in enumerate(words.split())]
    body = {"text": text, "segments": [{"text": f" {text}", "start": 0, "end": 9}], "words": said}
    server.http.fault = Fault(answer=Answer(json.dumps(body).encode()))
    answer = await relay.transcribe(np.zeros(160_000, np.int16), Options(words=True))
    assert [word.text for word in answer.segments[0].words] == [
        *(token for token in ([tokens[:-1]] if False else tokens.split(" ")) if token)
    ] or " ".join(word.text for word in answer.segments[0].words) == tokens


# --- hostile answers ----------------------------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "text is a number": {"text": 5},
    "text is missing": {"segments": []},
    "text is null": {"text": None},
    "text is an object": {"text": {"a": "the-secret"}},
    "segments is a string": {"text": "a", "segments": "the-secret"},
    "a segment is a string": {"text": "a", "segments": ["the-secret"]},
    "a segment has no times": {"text": "a", "segments": [{"text": "the-secret"}]},
    "a time is a string": {"text": "a", "segments": [{"text": "the-secret", "start": "0", "end": 1}]},
    "a time is NaN": {"text": "a", "segments": [{"text": "the-secret", "start": float("nan"), "end": 1}]},
    "a time is infinite": {"text": "a", "segments": [{"text": "the-secret", "start": 0, "end": float("inf")}]},
    "a token is negative": {"text": "a", "segments": [{"text": "the-secret", "start": 0, "end": 1, "tokens": [-1]}]},
    "a word is null": {"text": "a", "words": [{"word": None, "start": 0, "end": 1}]},
    "a language is an object": {"text": "a", "language": {}},
    "a language is a novel": {"text": "a", "language": "the-secret" * 1_000},
    "more than can be said": {"text": "the-secret" * 1_000},
    "more than can be said, in segments": {
        "text": "a",
        "segments": [{"text": "the-secret" * 100, "start": 0, "end": 1}] * 10,
    },
}
UNEXPECTED = {
    **{name: replace(FAULTS["html"], answer=Answer(json.dumps(body).encode())) for name, body in WRONG.items()},
    **{name: FAULTS[name] for name in FAULTS if FAULTS[name].wait_s == 0},
}
UNLIKE_BAD_ANSWER: dict[str, type[BackendError]] = {
    "broken off": BackendFailed,
    "reset": BackendFailed,
    "closed before the answer": BackendFailed,
    "unauthorised": CredentialRefused,
    "forbidden": CredentialRefused,
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


def tells_nothing(error: BaseException) -> None:
    told = "".join(traceback.format_exception(error)) + repr(error)
    assert "the-secret" not in told
    assert KEY not in told


@pytest.mark.parametrize("name", UNEXPECTED)
async def test_whatever_the_provider_answers(
    server: OpenAIServer, relay: OpenAIRelay, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.http.fault = UNEXPECTED[name]
    with pytest.raises(BackendError) as failed:
        await relay.transcribe(SECONDS_5, Options())
    error = failed.value
    assert type(error) is UNLIKE_BAD_ANSWER.get(name, BadAnswer)
    assert error.retryable == (type(error) not in (CredentialRefused, BackendRefused))
    assert error.elsewhere == (type(error) is not BackendRefused)
    tells_nothing(error)
    assert "the-secret" not in caplog.text
    server.http.fault = None
    assert (await relay.transcribe(SECONDS_5, Options())).text == SAID


async def test_how_long_to_wait_is_told(server: OpenAIServer, relay: OpenAIRelay) -> None:
    for name, wait_s in (
        ("too many", 7),
        ("too many until", 300),
        ("too many, and nonsense", None),
        ("unavailable", 2),
    ):
        server.http.fault = FAULTS[name]
        with pytest.raises(BackendError) as failed:
            await relay.transcribe(SECONDS_5, Options())
        assert failed.value.retry_after_s == wait_s


async def test_the_credential_is_named_by_its_beginning(server: OpenAIServer) -> None:
    async with relay_to(server, key="sk-wrong-one") as relay:
        with pytest.raises(CredentialRefused, match="credential sk-wron "):
            await relay.transcribe(CLIP, Options())
    assert "sk-wrong-one" not in repr(server.account(key="sk-wrong-one"))


async def test_a_model_that_the_provider_has_not(server: OpenAIServer) -> None:
    async with relay_to(server, models=("whisper-9",)) as relay:
        with pytest.raises(BackendUnavailable, match="The operator must look"):
            await relay.transcribe(CLIP, Options())


@pytest.mark.parametrize(("start", "end"), [(-5, 1e300), (4, 2), (9e9, -9e9)])
async def test_times_stay_within_the_recording(
    server: OpenAIServer, relay: OpenAIRelay, start: float, end: float
) -> None:
    word = {"word": "a", "start": start, "end": end}
    segment = {"text": "a", "start": start, "end": end}
    body = {"text": "a a", "segments": [segment, segment], "words": [word, word]}
    server.http.fault = Fault(answer=Answer(json.dumps(body).encode()))
    answer = await relay.transcribe(SECONDS_5, Options(words=True))
    edges = [edge for each in answer.segments for edge in (each.start_ms, each.end_ms)]
    assert edges == sorted(edges)
    words = [word for each in answer.segments for word in each.words]
    assert [word.text for word in words] == ["a", "a"]
    for edge in edges + [edge for word in words for edge in (word.start_ms, word.end_ms)]:
        assert 0 <= edge <= 5_000


async def test_control_characters_are_left_out(server: OpenAIServer, relay: OpenAIRelay) -> None:
    body = {"text": "a\x00b\x1b[31m c\u0085", "segments": [{"text": "a\x00b\x1b[31m c\u0085", "start": 0, "end": 1}]}
    server.http.fault = Fault(answer=Answer(json.dumps(body).encode()))
    assert (await relay.transcribe(SECONDS_5, Options())).text == "ab[31m c"


async def test_a_redirect_is_not_followed(server: OpenAIServer, relay: OpenAIRelay) -> None:
    async with openai_server() as other:
        for status in (301, 302, 303, 307, 308):
            elsewhere = {"location": f"{other.base_url}/audio/transcriptions"}
            server.http.fault = Fault(answer=Answer(status=status, headers=elsewhere))
            with pytest.raises(BadAnswer):
                await relay.transcribe(CLIP, Options())
        assert other.http.opened == 0


async def test_a_cookie_is_not_kept(server: OpenAIServer, relay: OpenAIRelay) -> None:
    server.http.fault = Fault(headers={"set-cookie": "session=1; Path=/"})
    await relay.transcribe(CLIP, Options())
    await relay.transcribe(CLIP, Options())
    assert ["cookie" in request.headers for request in server.http.requests] == [False, False]


# --- time and connections -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["silent", "never reads"])
@pytest.mark.parametrize(
    "audio", [CLIP, np.random.default_rng(1).integers(-32768, 32767, 16 * 400_000).astype(np.int16)]
)
async def test_a_provider_that_says_nothing(
    server: OpenAIServer, relay: OpenAIRelay, name: str, audio: Samples
) -> None:
    server.http.fault = FAULTS[name]
    with pytest.raises(BackendTimeout, match="openai did not answer in time"):
        await relay.transcribe(audio, Options())


async def connecting_to(address: str) -> Transcript:
    relay = OpenAIRelay(Account("openai", f"{address}/v1", KEY, KEY[:7], ("whisper-1",)), Quirks("openai"), IMPATIENT)
    try:
        return await relay.transcribe(CLIP, Options())
    finally:
        await relay.aclose()


async def test_a_provider_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="openai cannot be reached"):
        await connecting_to(closed())
    async with deaf() as address:
        with pytest.raises(BackendTimeout):
            await connecting_to(address)
    async with openai_server() as server:
        with pytest.raises(BackendUnavailable):  # it speaks no TLS
            await connecting_to(server.http.url.replace("http:", "https:"))

    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(BackendUnavailable) as failed:
        await connecting_to("http://provider.invalid")
    tells_nothing(failed.value)


async def test_what_is_not_http(relay: OpenAIRelay) -> None:
    async def babble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.6 the-secret\r\n" * 10)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as listening:
        with pytest.raises(BackendFailed) as failed:
            await connecting_to(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
    assert "the-secret" not in str(failed.value)


async def test_connections_are_kept(server: OpenAIServer, relay: OpenAIRelay) -> None:
    before = server.http.opened
    for _ in range(20):
        await relay.transcribe(CLIP, Options())
    assert server.http.opened == before + 1


async def test_no_slot_is_lost_to_those_who_leave(
    server: OpenAIServer, relay: OpenAIRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand leave at random moments of a request; then as many as there are slots find one each."""
    monkeypatch.setattr(relays, "MOST_CONNECTIONS", 8)
    chance = random.Random(4)
    server.http.fault = Fault(wait_s=0.002, piece_bytes=100, pause_s=0.001)
    left = 0

    async def leave_early() -> None:
        nonlocal left
        asked = asyncio.create_task(relay.transcribe(CLIP, Options()))
        await asyncio.sleep(chance.uniform(0, 0.03))
        asked.cancel()
        try:
            await asked
        except (asyncio.CancelledError, BackendTimeout):
            left += 1

    for _ in range(1_000 // 20):
        await asyncio.gather(*(leave_early() for _ in range(20)))
    assert left > 500
    server.http.fault = Fault(wait_s=2.5 * IMPATIENT.connect_s)  # longer than anybody waits for a slot
    async with relay_to(server, patience=Patience(connect_s=IMPATIENT.connect_s, silent_s=5, whole_s=5)) as fresh:
        fresh._http = relay._http
        fresh._http.timeout = httpx.Timeout(5, connect=IMPATIENT.connect_s, pool=IMPATIENT.connect_s)
        answers = await asyncio.gather(*(fresh.transcribe(SECONDS_5, Options()) for _ in range(8)))
    assert [answer.text for answer in answers] == [SAID] * 8
    assert server.http.open <= 8


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


# --- the stand-in speaks true -------------------------------------------------------------------------------------


@pytest.fixture
async def client(server: OpenAIServer) -> AsyncIterator[AsyncOpenAI]:
    server.http.fault = None
    async with AsyncOpenAI(base_url=server.base_url, api_key=KEY, max_retries=0) as opened:
        yield opened


async def test_openais_client_understands_the_stand_in(client: AsyncOpenAI) -> None:
    create = client.audio.transcriptions.create
    said = " ".join(SCRIPT[:5])
    plain = await create(file=WAV, model="whisper-1")
    assert (plain.text, plain.usage and plain.usage.type) == (said, "duration")
    verbose = await create(
        file=WAV, model="whisper-1", response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert (verbose.text, verbose.language, verbose.duration) == (f" {said}", "english", 2.378)
    assert verbose.words is not None
    assert verbose.segments is not None
    assert [word.word for word in verbose.words] == ["The", "quick", "brown", "fox", "jumps"]
    assert verbose.segments[0].text == f" {said}"
    for fmt in ("text", "srt", "vtt"):
        assert said in await create(file=WAV, model="whisper-1", response_format=fmt)  # type: ignore[call-overload]
    tokens = await create(file=WAV, model="gpt-4o-transcribe")
    assert tokens.usage
    assert tokens.usage.type == "tokens"
    events = [event async for event in await create(file=WAV, model="gpt-transcribe", stream=True)]
    assert "".join(event.delta for event in events if event.type == "transcript.text.delta") == said
    assert events[-1].type == "transcript.text.done"
    assert (await client.audio.translations.create(file=WAV, model="whisper-1")).text == said
    assert (await client.models.list()).data[0].id == "whisper-1"


async def test_openais_client_understands_its_refusals(server: OpenAIServer, client: AsyncOpenAI) -> None:
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
    async with openai_server(GROQ) as server:
        async with groq.AsyncGroq(api_key=KEY, base_url=server.http.url, max_retries=0) as client:
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
