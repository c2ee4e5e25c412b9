"""Recordings to AssemblyAI over real sockets: what is asked, what comes of each answer, that nothing is left there, and
that nothing hangs or tells secrets, whatever it does."""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Any

import numpy as np
import pytest

from dispatchers.audio.encode import encoder
from dispatchers.backends.assemblyai import BASE_URL, MODELS, AssemblyAIRelay
from dispatchers.backends.assemblyai_live import Patience
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
from tests.providers.assemblyai import KEY, AssemblyAIServer, assemblyai_server
from tests.providers.http import FAULTS, Answer, Fault, closed, deaf
from tests.providers.script import sound

IMPATIENT = Patience(connect_s=0.3, recorded_s=1.5, silent_s=0.4, look_s=0.01, delete_s=(0.0, 0.05, 0.1))
SECONDS_6 = sound(6)
TEXT = "Tell me more. And then, where did it go?"


@asynccontextmanager
async def relay_to(
    server: AssemblyAIServer, patience: Patience = IMPATIENT, **account: Any
) -> AsyncIterator[AssemblyAIRelay]:
    relay = AssemblyAIRelay(server.account(**account), patience)
    try:
        yield relay
    finally:
        await relay.aclose()


@pytest.fixture
async def server() -> AsyncIterator[AssemblyAIServer]:
    async with assemblyai_server() as opened:
        yield opened


@pytest.fixture
async def relay(server: AssemblyAIServer) -> AsyncIterator[AssemblyAIRelay]:
    async with relay_to(server) as opened:
        yield opened


def tells_nothing(error: BaseException) -> None:
    told = "".join(traceback.format_exception(error)) + repr(error)
    assert "the-secret" not in told
    assert KEY not in told


# --- what is asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (Options(), {"speech_models": ["universal-3-pro"], "language_detection": True}),
        (Options(language="de", words=True), {"speech_models": ["universal-3-pro"], "language_code": "de"}),
        (
            Options(language="en", hotwords=("Zoë & Łódź", "a=b"), temperature=0.25),
            {
                "speech_models": ["universal-3-pro"],
                "language_code": "en",
                "keyterms_prompt": ["Zoë & Łódź", "a=b"],
                "temperature": 0.25,
            },
        ),
        (
            Options(language="en", prompt="A talk about tea.", hotwords=("Assam", "Ceylon")),
            {
                "speech_models": ["universal-3-pro"],
                "language_code": "en",
                "prompt": "A talk about tea.\n\nContext: Assam, Ceylon",
            },
        ),
        (
            Options(model="universal-2", language="ja", hotwords=("a",), temperature=0.0),
            {"speech_models": ["universal-2"], "language_code": "ja", "keyterms_prompt": ["a"]},
        ),
    ],
)
async def test_options_become_members(
    relay: AssemblyAIRelay, server: AssemblyAIServer, options: Options, asked: dict[str, Any]
) -> None:
    assert (await relay.transcribe(SECONDS_6, options)).text == TEXT
    (job,) = server.transcripts.values()
    assert {name: member for name, member in job.asked.items() if name != "audio_url"} == asked
    upload, submission, look, *_ = server.http.requests
    assert "content-type" not in upload.headers
    assert submission.headers["content-type"] == "application/json"
    for request in (upload, submission, look):
        assert request.headers["authorization"] == KEY
        assert "cookie" not in request.headers


async def test_long_audio_is_packed(relay: AssemblyAIRelay, server: AssemblyAIServer) -> None:
    minutes_2 = np.concatenate([SECONDS_6, np.zeros(114 * 16_000, np.int16)])
    transcript = await relay.transcribe(minutes_2, Options())
    assert (transcript.text, transcript.duration_ms) == (TEXT, 120_000)
    assert server.http.requests[0].body.startswith(b"fLaC")
    assert len(server.http.requests[0].body) < minutes_2.nbytes / 2


@pytest.mark.parametrize(
    ("options", "param"),
    [
        (Options(task="translate"), "task"),
        (Options(model="universal-2", prompt="A talk about tea."), "prompt"),
        (Options(model="universal-2", temperature=0.5), "temperature"),
        (Options(language="ja"), "language"),
        (Options(model="universal-2", language="yue"), "language"),
        (Options(hotwords=("a",) * 1001), "hotwords"),
    ],
)
async def test_what_it_cannot_is_not_asked(
    relay: AssemblyAIRelay, server: AssemblyAIServer, options: Options, param: str
) -> None:
    for asked in (relay.transcribe(SECONDS_6, options), _nothing_live(relay, options)):
        with pytest.raises(UnsupportedOption) as refused:
            await asked
        assert refused.value.param == param
    assert server.http.requests == []


async def test_what_is_not_offered_is_not_asked(relay: AssemblyAIRelay, server: AssemblyAIServer) -> None:
    for asked in (relay.transcribe(SECONDS_6, Options(model="nano")), _nothing_live(relay, Options(model="nano"))):
        with pytest.raises(UnknownModel):
            await asked
    with pytest.raises(AudioTooLong, match="takes 60 minutes"):
        await relay.transcribe(np.zeros(3_600_001 * 16, np.int16), Options())
    assert server.http.requests == []


async def _nothing_live(relay: AssemblyAIRelay, options: Options) -> None:
    async def nothing() -> AsyncIterator[Any]:
        return
        yield

    async with relay.stream(nothing(), options) as events:
        assert [event async for event in events] == []


# --- what is answered ---------------------------------------------------------------------------------------------


async def test_words_become_segments(relay: AssemblyAIRelay) -> None:
    heard: list[Segment] = []
    transcript = await relay.transcribe(SECONDS_6, Options(words=True), heard.append)
    assert transcript.text == TEXT
    assert (transcript.language, transcript.duration_ms) == ("en", 6_000)
    assert transcript.origin == Origin("assemblyai", "assemblyai", "universal-3-pro")
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


async def test_it_is_asked_until_it_is_there(server: AssemblyAIServer, relay: AssemblyAIRelay) -> None:
    server.looks = 6
    assert (await relay.transcribe(SECONDS_6, Options())).text == TEXT
    assert [request.method for request in server.http.requests].count("GET") == 6


async def test_silence_is_no_text(server: AssemblyAIServer, relay: AssemblyAIRelay) -> None:
    """Not even where AssemblyAI takes it for an error."""
    silence = np.zeros(32_000, np.int16)
    transcript = await relay.transcribe(silence, Options(language="de", words=True))
    assert (transcript.text, transcript.segments, transcript.language) == ("", (), "de")
    transcript = await relay.transcribe(silence, Options(words=True))
    assert (transcript.text, transcript.segments, transcript.language) == ("", (), "und")
    await until(lambda: server.kept == [])


async def test_a_transcription_that_fails(server: AssemblyAIServer, relay: AssemblyAIRelay) -> None:
    server.http.faults = [Fault(answer=Answer(b'{"upload_url": "https://cdn.example/upload/0"}'))]
    server.uploads.append(None)
    with pytest.raises(BackendFailed, match="could not transcribe"):
        await relay.transcribe(SECONDS_6, Options())
    await until(lambda: server.kept == [])


def done(text: Any, *words: Any, **more: Any) -> dict[str, Any]:
    return {"id": "t-0", "status": "completed", "audio_url": "…", "text": text, "words": list(words), **more}


def word(text: Any = "a", start: Any = 0, end: Any = 1000, **more: Any) -> dict[str, Any]:
    return {"text": text, "start": start, "end": end, "confidence": 0.9, **more}


def looking(body: Any) -> list[Fault | None]:
    return [None, None, Fault(answer=Answer(json.dumps(body).encode()))]


async def answered(server: AssemblyAIServer, relay: AssemblyAIRelay, body: Any) -> tuple[Segment, ...]:
    server.http.faults = looking(body)
    return (await relay.transcribe(SECONDS_6, Options(words=True))).segments


async def test_the_text_is_kept_as_it_is_written(server: AssemblyAIServer, relay: AssemblyAIRelay) -> None:
    parted = await answered(
        server, relay, done("A-B: c.  D?", word("A", 0, 100), word("c.", 200, 300), word("D?", 900))
    )
    assert [segment.text for segment in parted] == ["A-B: c.", "D?"]
    (whole,) = await answered(server, relay, done("A b.", word("else", 500, 700)))
    assert whole == Segment(0, 6_000, "A b.", words=(Word("else", 500, 700, 0.9),))
    (whole,) = await answered(server, relay, done("A b."))
    assert whole == Segment(0, 6_000, "A b.")
    (whole,) = await answered(server, relay, done("你好世界", word("你好", 0, 300), word("世界", 300, 600)))
    assert (whole.text, whole.start_ms, whole.end_ms) == ("你好世界", 0, 600)


@pytest.mark.parametrize(
    ("said", "language"), [("de", "de"), ("en_us", "en"), ("pt-BR", "pt"), ("tlh", "und"), (None, "und")]
)
async def test_the_language_is_a_code_we_know(
    server: AssemblyAIServer, relay: AssemblyAIRelay, said: str | None, language: str
) -> None:
    server.http.faults = looking(done("a", language_code=said))
    assert (await relay.transcribe(SECONDS_6, Options())).language == language


@pytest.mark.parametrize(("start", "end"), [(-5, 10**30), (4_000, 2_000), (9_000_000, -9_000_000)])
async def test_times_stay_within_the_recording(
    server: AssemblyAIServer, relay: AssemblyAIRelay, start: int, end: int
) -> None:
    segments = await answered(
        server, relay, done("a a. a", word("a", start, end), word("a.", 100, end), word("a", start))
    )
    edges = [edge for each in segments for edge in (each.start_ms, each.end_ms)]
    assert edges == sorted(edges)
    words = [each for segment in segments for each in segment.words]
    assert len(words) == 3
    for edge in edges + [edge for each in words for edge in (each.start_ms, each.end_ms)]:
        assert 0 <= edge <= 6_000


async def test_control_characters_are_left_out(server: AssemblyAIServer, relay: AssemblyAIRelay) -> None:
    (segment,) = await answered(server, relay, done("a\x00b\x1b[31m\n c", word("a\x00b\x1b[31m\n"), word("c")))
    assert segment.text == "ab[31m c"


# --- nothing is left there ----------------------------------------------------------------------------------------


async def test_what_was_transcribed_is_deleted(server: AssemblyAIServer, relay: AssemblyAIRelay) -> None:
    await relay.transcribe(SECONDS_6, Options())
    await until(lambda: server.kept == [])


async def test_what_nobody_waits_for_is_deleted_when_it_can_be(server: AssemblyAIServer) -> None:
    server.looks = 1_000
    async with relay_to(server) as relay:
        asked = asyncio.create_task(relay.transcribe(SECONDS_6, Options()))
        await until(lambda: bool(server.transcripts))
        await until(lambda: server.http.requests[-1].method == "GET")
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await until(lambda: server.http.requests[-1].method == "DELETE")
        server.transcripts["t-0"].looks = 0
        await until(lambda: server.kept == [])


@pytest.mark.parametrize("name", ["failed", "html", "silent", "unauthorised", "reset"])
async def test_what_cannot_be_deleted_is_told_to_the_operator(
    server: AssemblyAIServer, name: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    async with relay_to(server) as relay:
        server.http.faults = [None, None, None, *[FAULTS[name]] * 3]
        assert (await relay.transcribe(SECONDS_6, Options())).text == TEXT
        await until(lambda: len(server.http.requests) == 6)
        await until(lambda: not relay._deleting)
    told = capsys.readouterr().out + caplog.text
    assert "relay.kept" in told
    assert "t-0" in told
    assert "the-secret" not in told


async def test_closing_does_not_wait_for_ever(server: AssemblyAIServer) -> None:
    async with relay_to(server, Patience(delete_s=(3600.0,))) as relay:
        await relay.transcribe(SECONDS_6, Options())
        async with asyncio.timeout(10):
            await relay.aclose()


# --- hostile answers ----------------------------------------------------------------------------------------------

STAGES = {"upload": 0, "submission": 1, "look": 2}
WRONG: dict[str, dict[str, Any]] = {
    "upload": {
        "no address": {"status": "ok"},
        "an address that is a number": {"upload_url": 5},
        "an address that is none": {"upload_url": ""},
        "an address that is a novel": {"upload_url": "the-secret" * 1_000},
    },
    "submission": {
        "no id": {"status": "queued"},
        "an id that leads elsewhere": {"id": "../../v2/the-secret", "status": "queued"},
        "an id that is a number": {"id": 5, "status": "queued"},
        "a status that there is not": {"id": "t", "status": "the-secret"},
    },
    "look": {
        "no status": {"id": "t"},
        "a status that there is not": {"id": "t", "status": "the-secret"},
        "text is a number": done(5),
        "words is an object": {"id": "t", "status": "completed", "text": "a", "words": {"the-secret": 1}},
        "a word is a string": done("a", "the-secret"),
        "a word is null": done("a", word(None)),
        "a time is a string": done("a", word("the-secret", "0")),
        "a time is a fraction": done("a", word("the-secret", 0.5)),
        "a time is missing": done("a", {"text": "the-secret", "start": 0}),
        "a confidence is NaN": done("a", word("the-secret", confidence=float("nan"))),
        "a language is a novel": done("a", language_code="the-secret" * 1_000),
        "more than can be said": done("the-secret " * 500),
        "more words than can be said": done("a", *[word("the-secret")] * 500),
    },
}
FAULTY = {
    stage: {
        **{name: Fault(answer=Answer(json.dumps(body).encode())) for name, body in WRONG[stage].items()},
        **FAULTS,
        "no credit": Fault(answer=Answer(b"{}", 402)),
    }
    for stage in STAGES
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
    "silent": BackendTimeout,
    "silent in the answer": BackendTimeout,
    "a byte now and then": BackendTimeout,
    "never reads": BackendTimeout,
}
WAITED_FOR = {"too many", "too many until", "unavailable"}
"""What asks for more time than there is, where it is tried again."""


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage in STAGES for name in FAULTY[stage]])
async def test_whatever_it_answers(
    server: AssemblyAIServer, relay: AssemblyAIRelay, stage: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.http.faults = [*[None] * STAGES[stage], *[FAULTY[stage][name]] * (8 if stage == "look" else 1)]
    with pytest.raises(BackendError) as failed:
        await relay.transcribe(SECONDS_6, Options())
    expected = UNLIKE_BAD_ANSWER.get(name, BadAnswer)
    assert type(failed.value) is (BackendTimeout if stage == "look" and name in WAITED_FOR else expected)
    tells_nothing(failed.value)
    assert "the-secret" not in caplog.text
    server.http.faults.clear()
    assert (await relay.transcribe(SECONDS_6, Options())).text == TEXT


@pytest.mark.parametrize("name", ["reset", "failed", "html", "bad gateway", "silent", "too many, and nonsense"])
async def test_a_hiccup_does_not_waste_what_was_uploaded(
    server: AssemblyAIServer, relay: AssemblyAIRelay, name: str
) -> None:
    server.http.faults = [None, None, FAULTS[name], FAULTS[name]]
    assert (await relay.transcribe(SECONDS_6, Options())).text == TEXT
    assert len(server.uploads) == 1


async def test_a_transcription_that_is_never_done(server: AssemblyAIServer, relay: AssemblyAIRelay) -> None:
    server.looks = 1_000_000
    with pytest.raises(BackendTimeout, match="assemblyai did not answer in time"):
        await relay.transcribe(SECONDS_6, Options())


async def test_a_provider_that_does_not_read(server: AssemblyAIServer, relay: AssemblyAIRelay) -> None:
    noise = np.random.default_rng(1).integers(-32768, 32767, 16 * 400_000).astype(np.int16)
    server.http.fault = FAULTS["never reads"]
    with pytest.raises(BackendTimeout):
        await relay.transcribe(noise, Options())


async def test_the_credential_is_named_by_its_beginning(server: AssemblyAIServer) -> None:
    async with relay_to(server, key="wrong-and-secret") as relay:
        with pytest.raises(CredentialRefused, match="credential wrong-a ") as refused:
            await relay.transcribe(SECONDS_6, Options())
        assert "wrong-and-secret" not in "".join(traceback.format_exception(refused.value)) + repr(relay)


async def transcribed_at(address: str) -> None:
    relay = AssemblyAIRelay(Account("assemblyai", address, KEY, KEY[:7], MODELS), IMPATIENT)
    try:
        await relay.transcribe(SECONDS_6, Options())
    finally:
        await relay.aclose()


async def test_a_provider_that_cannot_be_reached() -> None:
    with pytest.raises(BackendUnavailable, match="assemblyai cannot be reached"):
        await transcribed_at(closed())
    async with deaf() as address:
        with pytest.raises(BackendTimeout):
            await transcribed_at(address)


async def test_what_is_offered_is_what_is_known_of_it(server: AssemblyAIServer) -> None:
    relay = open_relay("assemblyai", server.account(backend="assemblyai-eu"))
    try:
        assert relay.origin("") == Origin("assemblyai-eu", "assemblyai", "universal-3-pro")
        assert (PROVIDERS["assemblyai"].base_url, PROVIDERS["assemblyai"].models) == (BASE_URL, MODELS)
        able = relay.capabilities
        assert able.models == MODELS
        assert able.languages == {"en", "es", "de", "fr", "it", "pt"}
        assert able.prompt
    finally:
        await relay.aclose()
    async with relay_to(server, models=("universal-2",)) as many:
        assert many.capabilities.languages is not None
        assert len(many.capabilities.languages) == 99
        assert not many.capabilities.prompt


# --- the test server speaks true ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")  # the client's own doing
async def test_the_official_client_understands_the_test_server(server: AssemblyAIServer) -> None:
    await asyncio.to_thread(_with_the_official_client, server.http.url)
    assert [transcript.deleted for transcript in server.transcripts.values()] == [True, False, False]


def _with_the_official_client(url: str) -> None:
    import assemblyai as aai
    from assemblyai.prerecorded.v2.api import delete_transcript

    client = aai.Client(settings=aai.Settings(api_key=KEY, base_url=url, polling_interval=0.05))
    with closing(client.http_client):
        transcriber = aai.Transcriber(client=client)
        config = aai.TranscriptionConfig(speech_models=["universal-3-pro"], language_detection=True)
        transcript = transcriber.transcribe(wav_of(SECONDS_6), config=config)
        assert (transcript.text, transcript.status) == (TEXT, aai.TranscriptStatus.completed)
        assert [word.text for word in transcript.words or ()] == TEXT.split()
        assert transcript.id is not None
        assert delete_transcript(client.http_client, transcript.id).text == "Deleted by user."
        silent = transcriber.transcribe(wav_of(np.zeros(32_000, np.int16)), config=config)
        assert silent.status == aai.TranscriptStatus.error
        assert "no spoken audio" in (silent.error or "")
        assert transcriber.transcribe(b"no audio", config=config).status == aai.TranscriptStatus.error
        both = aai.TranscriptionConfig(speech_models=["universal-3-pro"], language_code="en", prompt="a")
        both.set_custom_spelling({"a": ["b"]})
        with pytest.raises(aai.types.TranscriptError, match="Invalid endpoint schema"):
            transcriber.submit(wav_of(SECONDS_6), config=both)


def wav_of(audio: Samples) -> bytes:
    wav = encoder("wav", len(audio))
    return wav.feed(audio) + wav.end()
