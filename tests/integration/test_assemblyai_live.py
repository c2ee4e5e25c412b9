"""Live streams to AssemblyAI over real sockets: what is said on them, what comes of it, and that whatever breaks them
is told as an error after which another backend can take over."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import numpy as np
import pytest

from dispatchers.backends.assemblyai import MODELS, AssemblyAIRelay
from dispatchers.backends.assemblyai_live import Patience, live_url
from dispatchers.backends.relay import Account
from dispatchers.errors import (
    BackendError,
    BackendFailed,
    BackendRefused,
    BackendTimeout,
    BackendUnavailable,
    BadAnswer,
    CredentialRefused,
    NotAudio,
    Throttled,
    UnsupportedOption,
)
from dispatchers.interface import (
    Clear,
    Cleared,
    Delta,
    Event,
    Final,
    Flush,
    Flushed,
    Gap,
    Options,
    Partial,
    Pcm,
    Samples,
    SpeechStarted,
    StreamInput,
    VadOptions,
    Word,
)
from tests.integration.test_engine_server import until
from tests.providers.assemblyai import KEY, AssemblyAIServer, Quirks, assemblyai_server
from tests.providers.http import FAULTS, Answer, Fault, closed, deaf, http_server
from tests.providers.script import said, sound
from tests.providers.websocket import Socket

IMPATIENT = Patience(
    connect_s=1.0,
    silent_s=1.0,
    begin_s=1.0,
    endpoint_s=0.3,
    quiet_s=0.3,
    format_s=0.3,
    drain_s=2.0,
    keep_alive_s=0.2,
)
FIRST, SECOND = "Tell me more.", "And then, where did it go?"
ENDLESS = said("on and on and on and on and on and on and on and on and on")
EN = Options(language="en", words=True)
CLASSIC = replace(EN, model="universal-2")
"""Its live models format the text of a turn when it has ended."""


@dataclass(frozen=True)
class Pause:
    """Nothing is sent for so long."""

    seconds: float


Part = Samples | Flush | Clear | Pause


async def spoken(*parts: Part, step: int = 1_600, pace_s: float = 0.002) -> AsyncIterator[StreamInput]:
    """100 ms at a time, much faster than life."""
    for part in parts:
        match part:
            case Pause(seconds):
                await asyncio.sleep(seconds)
            case Flush() | Clear():
                yield part
            case samples:
                for at in range(0, len(samples), step):
                    yield Pcm(samples[at : at + step])
                    await asyncio.sleep(pace_s)


@pytest.fixture
async def server() -> AsyncIterator[AssemblyAIServer]:
    async with assemblyai_server() as opened:
        yield opened


@dataclass
class Stream:
    """What came of a stream, and what ended it."""

    events: list[Event] = field(default_factory=list)
    failure: BackendError | None = None

    def all(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def texts(self) -> list[str]:
        return [final.text for final in self.all(Final)]


@asynccontextmanager
async def relay_to(account: Account, patience: Patience = IMPATIENT) -> AsyncIterator[AssemblyAIRelay]:
    relay = AssemblyAIRelay(account, patience)
    try:
        yield relay
    finally:
        await relay.aclose()


async def streamed(
    server: AssemblyAIServer, *parts: Part, options: Options = EN, patience: Patience = IMPATIENT, **account: Any
) -> Stream:
    stream = Stream()
    async with relay_to(server.account(**account), patience) as relay:
        try:
            async with relay.stream(spoken(*parts), options) as events:
                async for event in events:
                    stream.events.append(event)
        except BackendError as failure:
            stream.failure = failure
            tells_nothing(failure)
    await until(lambda: server.open == 0)
    return stream


def tells_nothing(error: BaseException) -> None:
    told = "".join(traceback.format_exception(error)) + repr(error)
    assert "the-secret" not in told
    assert KEY not in told


# --- what is said and heard ---------------------------------------------------------------------------------------

FIXED = {"encoding": "pcm_s16le", "sample_rate": "16000", "inactivity_timeout": "60"}
SILENCE = {"min_turn_silence": "550", "max_turn_silence": "550"}
MULTILINGUAL = {"speech_model": "universal-streaming-multilingual", "format_turns": "true"}


@pytest.mark.parametrize(
    ("options", "query"),
    [
        (Options(), SILENCE | {"speech_model": "u3-rt-pro", "language_detection": "true"}),
        (
            Options(language="de", hotwords=("a b", "ü"), vad=VadOptions(silence_ms=900)),
            {
                "speech_model": "u3-rt-pro",
                "language_codes": '["de"]',
                "keyterms_prompt": '["a b", "\\u00fc"]',
                "min_turn_silence": "900",
                "max_turn_silence": "900",
            },
        ),
        (
            Options(language="en", prompt="Tea.", hotwords=("Assam",)),
            SILENCE | {"speech_model": "u3-rt-pro", "language_codes": '["en"]', "prompt": "Tea.\n\nContext: Assam"},
        ),
        (Options(model="universal-2"), SILENCE | MULTILINGUAL | {"language_detection": "true"}),
        (Options(model="universal-2", language="de"), SILENCE | MULTILINGUAL | {"language_codes": '["de"]'}),
        (
            Options(model="universal-2", language="en"),
            SILENCE | {"speech_model": "universal-streaming-english", "format_turns": "true"},
        ),
        (
            Options(model="universal-2", language="ja"),
            SILENCE | {"speech_model": "whisper-rt", "language_codes": '["ja"]'},
        ),
    ],
)
async def test_options_become_parameters(server: AssemblyAIServer, options: Options, query: dict[str, str]) -> None:
    stream = await streamed(server, sound(6), options=options)
    assert stream.failure is None
    assert stream.texts == [FIRST, SECOND]
    assert server.queries == [FIXED | query]
    (request,) = server.http.requests
    assert request.headers["authorization"] == KEY
    assert "assemblyai-version" in request.headers


@pytest.mark.parametrize(
    ("options", "param"), [(Options(hotwords=("a",) * 101), "hotwords"), (Options(temperature=0.5), "temperature")]
)
async def test_what_it_cannot_is_not_asked(server: AssemblyAIServer, options: Options, param: str) -> None:
    with pytest.raises(UnsupportedOption) as refused:
        await streamed(server, sound(1), options=options)
    assert refused.value.param == param
    assert server.http.requests == []


async def test_a_stream_is_told_as_it_firms_up(server: AssemblyAIServer) -> None:
    stream = await streamed(server, sound(7), options=replace(EN, language=None))
    assert stream.failure is None
    first, second = stream.all(Final)
    assert first == Final(
        1,
        FIRST,
        400,
        1_600,
        language="en",
        confidence=pytest.approx(0.97),
        words=(Word("Tell", 400, 800, 0.97), Word("me", 800, 1_200, 0.97), Word("more.", 1_200, 1_600, 0.97)),
    )
    assert (second.text, second.start_ms, second.end_ms) == (SECOND, 2_800, 5_200)
    assert stream.all(SpeechStarted) == [SpeechStarted(1, 400), SpeechStarted(2, 2_800)]
    deltas = [delta for delta in stream.all(Delta) if delta.utterance == 1]
    assert len(deltas) > 1
    assert "".join(delta.text for delta in deltas) == FIRST
    assert "Tell m" in [partial.text for partial in stream.all(Partial)]
    assert server.heard["Terminate"] == 1
    assert server.closed_with == [1000]


async def test_what_is_formatted_later_revises(server: AssemblyAIServer) -> None:
    stream = await streamed(server, sound(7), options=CLASSIC)
    assert [(final.text, final.revised) for final in stream.all(Final)] == [(FIRST, True), (SECOND, True)]
    assert "".join(delta.text for delta in stream.all(Delta) if delta.utterance == 1) == "tell me more"
    assert [word.text for word in stream.all(Final)[0].words] == FIRST.split()


async def test_what_is_never_formatted_stays_as_it_is(server: AssemblyAIServer) -> None:
    server.quirks = Quirks(mangle=lambda message: [] if message.get("turn_is_formatted") else [json.dumps(message)])
    stream = await streamed(server, sound(2.5), Pause(0.5), sound(1), options=CLASSIC)
    assert stream.failure is None
    first = stream.all(Final)[0]
    assert (first.text, first.revised) == ("tell me more", False)
    assert stream.texts == ["tell me more", "and then"]


async def test_long_speech_is_cut() -> None:
    async with assemblyai_server(ENDLESS) as server:
        stream = await streamed(server, sound(8))
        (final,) = stream.all(Final)
        assert (
            "".join(delta.text for delta in stream.all(Delta)) == final.text == " ".join(word for word, *_ in ENDLESS)
        )
        for partial in stream.all(Partial):
            assert final.text.startswith(partial.text[: partial.stable])
        assert [word.text for word in final.words] == final.text.split()
        cut = await streamed(server, sound(8), options=replace(EN, vad=VadOptions(max_utterance_ms=3_000)))
        assert len(cut.all(Final)) >= 2
        assert len(" ".join(cut.texts).split()) >= len(final.text.split())
        assert 1 <= server.heard["ForceEndpoint"] <= len(cut.all(Final))


async def test_sound_without_words(server: AssemblyAIServer) -> None:
    assert (await streamed(server, np.zeros(32_000, np.int16))).events == []
    assert (await streamed(server, sound(0.02))).events == []


async def test_bursts_and_crumbs(server: AssemblyAIServer) -> None:
    """How the audio is cut does not matter; AssemblyAI gets it in pieces that it takes."""
    for step in (7, 160, 96_000):
        server.frames.clear()
        async with relay_to(server.account()) as relay:
            audio = spoken(sound(6)[:95_990], step=step, pace_s=0)
            async with relay.stream(audio, EN) as events:
                assert [event.text async for event in events if isinstance(event, Final)] == [FIRST, SECOND]
        assert all(50 <= ms <= 1000 for ms in server.frames)
        assert 5_999 <= sum(server.frames) <= 6_050


# --- commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [EN, CLASSIC])
async def test_a_flush_ends_the_utterance(server: AssemblyAIServer, options: Options) -> None:
    parts = [sound(1.0), Flush(), sound(1.5), Flush(), Flush(), sound(4), Flush()]
    stream = await streamed(server, *parts, options=options)
    assert stream.failure is None
    flushed = [event.accepted_ms for event in stream.all(Flushed)]
    assert flushed == [1_000, 2_500, 2_500, 6_500]
    first = stream.events.index(Flushed(1_000))
    assert isinstance(stream.events[first - 1], Final)
    assert stream.texts == ["Tell me", "more.", SECOND]
    assert server.heard["ForceEndpoint"] == 3


async def test_an_endpoint_that_is_not_answered(server: AssemblyAIServer) -> None:
    """What was told of the utterance is its text, and is not told again."""
    server.quirks = Quirks(ignored=frozenset({"ForceEndpoint"}))
    stream = await streamed(server, sound(1.3), Flush(), sound(4.7))
    assert stream.failure is None
    flushed = stream.events.index(Flushed(1_300))
    assert isinstance(stream.events[flushed - 1], Final)
    assert stream.texts[0] == "Tell me m"  # the last guess
    assert stream.texts[-1] == SECOND
    assert " ".join(stream.texts).count("Tell") == 1


async def test_what_is_cleared_is_not_told(server: AssemblyAIServer) -> None:
    stream = await streamed(server, sound(1.0), Clear(), sound(5))
    assert [event for event in stream.events if isinstance(event, Gap | Cleared)] == [
        Gap(400, 1_000, "cleared"),
        Cleared(1_000),
    ]
    assert stream.texts == ["more.", SECOND]
    after = stream.events[stream.events.index(Cleared(1_000)) :]
    assert not any("Tell" in event.text for event in after if isinstance(event, Partial | Final))
    stream = await streamed(server, sound(0.2), Clear(), Clear(), sound(5.8))
    assert stream.all(Gap) == []
    assert stream.all(Cleared) == [Cleared(200), Cleared(200)]
    assert stream.texts == [FIRST, SECOND]


async def test_before_the_first_audio_there_is_no_connection(server: AssemblyAIServer) -> None:
    stream = await streamed(server, Flush(), Clear(), Pause(0.3), np.zeros(0, np.int16))
    assert stream.events == [Flushed(0), Cleared(0)]
    assert server.http.opened == 0


async def test_pauses_are_survived(server: AssemblyAIServer) -> None:
    server.quirks = Quirks(idle_s=0.8)
    stream = await streamed(server, sound(2.7), Pause(1.5), sound(3.3))
    assert stream.failure is None
    assert stream.texts == [FIRST, SECOND]
    assert 2 <= server.heard["KeepAlive"] <= 10
    server.quirks = Quirks(idle_s=0.3)
    stopped = await streamed(server, sound(1), Pause(1), patience=Patience())
    assert type(stopped.failure) is BackendUnavailable


async def test_silence_is_no_failure(server: AssemblyAIServer) -> None:
    """AssemblyAI says nothing of it, for longer than it may take to take audio."""
    silence = np.zeros(16_000, np.int16)
    stream = await streamed(server, sound(2.7), *[silence, Pause(0.5)] * 4, silence, sound(1))
    assert stream.failure is None
    assert stream.texts == [FIRST]


async def test_audio_that_was_kept_back_is_sent_as_fast_as_it_takes_it(server: AssemblyAIServer) -> None:
    server.quirks = Quirks(ahead_s=4.0)
    assert type((await streamed(server, sound(6))).failure) is BackendFailed
    stream = await streamed(server, sound(6), patience=replace(IMPATIENT, ahead_s=3.5))
    assert stream.failure is None
    assert stream.texts == [FIRST, SECOND]


# --- what breaks --------------------------------------------------------------------------------------------------

ENDINGS: dict[str, type[BackendError]] = {
    "3005": BackendFailed,
    "3006": BackendFailed,
    "3007": BackendFailed,
    "3008": BackendUnavailable,
    "3009": Throttled,
    "4001": CredentialRefused,
    "4002": CredentialRefused,
    "4029": Throttled,
    "4031": BackendFailed,
    "4102": Throttled,
    "close 1008": CredentialRefused,
    "close 1011": BackendFailed,
    "close 1012": BackendUnavailable,
    "close 1013": BackendUnavailable,
    "close 3008": BackendUnavailable,
    "close 3009": Throttled,
    "close 1000": BackendFailed,
    "reset": BackendFailed,
    "half-closed": BackendFailed,
    "not a frame": BadAnswer,
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_socket_that_ends_in_an_utterance(server: AssemblyAIServer, ending: str) -> None:
    """What was final is told, what was not is for another backend to say."""
    server.quirks = Quirks(most_s=3.5, ending=ending)
    stream = await streamed(server, sound(6), Pause(0.3), sound(3))
    assert type(stream.failure) is ENDINGS[ending]
    assert stream.failure.retryable == (ENDINGS[ending] is not CredentialRefused)
    assert stream.failure.elsewhere
    assert stream.texts == [FIRST]
    assert stream.events[-1] == Partial(2, "And t", 0, 2_800, 3_250)
    server.quirks = Quirks()
    assert (await streamed(server, sound(6))).texts == [FIRST, SECOND]


async def test_an_end_that_is_not_told_is_none(server: AssemblyAIServer) -> None:
    """A close before `Termination` has cut something off."""
    server.quirks = Quirks(ignored=frozenset({"Terminate"}))
    assert type((await streamed(server, sound(6))).failure) is BackendTimeout
    server.quirks = Quirks(mangle=lambda message: [] if message["type"] == "Termination" else [json.dumps(message)])
    assert type((await streamed(server, sound(6))).failure) is BackendFailed


async def test_a_termination_before_the_end_is_not_the_end(server: AssemblyAIServer) -> None:
    over = json.dumps({"type": "Termination"})
    server.quirks = Quirks(mangle=lambda message: [json.dumps(message), over][: 1 if message["type"] == "Begin" else 2])
    assert (await streamed(server, sound(6))).texts[0] == FIRST


async def test_who_does_not_begin_is_not_waited_for(server: AssemblyAIServer) -> None:
    server.quirks = Quirks(mangle=lambda _: [])
    assert type((await streamed(server, sound(1), Pause(3))).failure) is BackendTimeout
    server.quirks = Quirks(mangle=lambda message: [] if message["type"] == "Begin" else [json.dumps(message)])
    assert type((await streamed(server, sound(6))).failure) is BadAnswer


def but(**changes: Any) -> Callable[[dict[str, Any]], list[str | bytes]]:
    """Every `Turn` with these members changed."""

    def mangle(message: dict[str, Any]) -> list[str | bytes]:
        return [json.dumps(message | changes if message["type"] == "Turn" else message)]

    return mangle


def instead(*frames: str | bytes) -> Callable[[dict[str, Any]], list[str | bytes]]:
    return lambda message: [json.dumps(message)] if message["type"] == "Begin" else list(frames)


def a_word(**members: Any) -> list[dict[str, Any]]:
    return [{"text": "the-secret", "start": 0, "end": 100, "confidence": 0.5, "word_is_final": True} | members]


UNREADABLE: dict[str, Callable[[dict[str, Any]], list[str | bytes]]] = {
    "html": instead("<html>the-secret</html>"),
    "truncated": lambda message: [json.dumps(message)[:-5]],
    "an array": instead("[]"),
    "a string": instead('"the-secret"'),
    "nothing": instead(""),
    "no type": instead('{"the-secret": 1}'),
    "a type that is a number": instead('{"type": 5}'),
    "bytes": instead(b"\x00\x01the-secret\xff"),
    "deep": instead("[" * 50_000 + "]" * 50_000),
    "five million signs": instead('{"type": "Turn", "transcript": "' + "a" * 5_000_000 + '"}'),
    "turn_order is a string": but(turn_order="0"),
    "turn_order is negative": but(turn_order=-1),
    "end_of_turn is a number": but(end_of_turn=1),
    "turn_is_formatted is null": but(turn_is_formatted=None),
    "text is a number": but(transcript=5),
    "no words": but(words=None),
    "words is an object": but(words={"the-secret": 1}),
    "a word is a string": but(words=["the-secret"]),
    "a word's time is null": but(words=a_word(start=None)),
    "a word's time is a fraction": but(words=a_word(end=0.5)),
    "a word's confidence is NaN": but(words=a_word(confidence=float("nan"))),
    "a word is a novel": but(words=a_word(text="the-secret" * 1_000)),
    "more than can be said": but(words=a_word() * 500),
}


@pytest.mark.parametrize("name", UNREADABLE)
async def test_messages_that_cannot_be_read(
    server: AssemblyAIServer, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.quirks = Quirks(mangle=UNREADABLE[name])
    stream = await streamed(server, sound(3), Pause(0.3))
    assert type(stream.failure) is BadAnswer
    assert not stream.all(Final)
    assert "the-secret" not in caplog.text


async def test_what_is_new_to_us_is_passed_over(server: AssemblyAIServer) -> None:
    new = [json.dumps({"type": "Heartbeat", "realtime_factor": 1.0}), json.dumps({"type": "Warning", "warning": [1]})]
    server.quirks = Quirks(mangle=lambda message: [json.dumps(message | {"new": {"a": 1}}), *new])
    assert (await streamed(server, sound(6))).texts == [FIRST, SECOND]


@pytest.mark.parametrize("shift", [-5_000, 10**30, 100_000])
async def test_times_that_cannot_be(server: AssemblyAIServer, shift: int) -> None:
    def shifted(message: dict[str, Any]) -> list[str | bytes]:
        for word in message.get("words", ()):
            word["start"], word["end"] = word["end"] + shift, word["start"] - shift
        return [json.dumps(message)]

    server.quirks = Quirks(mangle=shifted)
    stream = await streamed(server, sound(6))
    assert stream.failure is None
    edges = [edge for final in stream.all(Final) for edge in (final.start_ms, final.end_ms)]
    assert edges == sorted(edges)
    for final in stream.all(Final):
        assert 0 <= final.start_ms < final.end_ms <= 6_000
        assert all(final.start_ms <= word.start_ms <= word.end_ms <= final.end_ms for word in final.words)


async def test_control_characters_are_left_out(server: AssemblyAIServer) -> None:
    server.quirks = Quirks(
        mangle=but(transcript="a\x00b\x1b[31m\n c", words=a_word(text="a\x00b\x1b[31m") + a_word(text="c"))
    )
    stream = await streamed(server, sound(1), Flush())
    assert stream.texts == ["ab[31m c"]


# --- connecting ---------------------------------------------------------------------------------------------------

REFUSED: dict[str, type[BackendError]] = {
    "html": BadAnswer,
    "nothing": BadAnswer,
    "redirect": BadAnswer,
    "permanent redirect": BadAnswer,
    "closed before the answer": BadAnswer,
    "unauthorised": CredentialRefused,
    "forbidden": CredentialRefused,
    "too many": Throttled,
    "bad request": BackendRefused,
    "failed": BackendFailed,
    "bad gateway": BackendUnavailable,
    "unavailable": BackendUnavailable,
    "silent": BackendTimeout,
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_handshake_that_fails(server: AssemblyAIServer, name: str, caplog: pytest.LogCaptureFixture) -> None:
    server.http.fault = FAULTS[name]
    stream = await streamed(server, sound(1))
    assert type(stream.failure) is REFUSED[name]
    assert stream.events == []
    assert stream.failure.retry_after_s == {"too many": 7, "unavailable": 2}.get(name)
    assert "the-secret" not in caplog.text


async def test_a_redirect_is_not_followed(server: AssemblyAIServer) -> None:
    async with assemblyai_server() as other:
        elsewhere = {"location": other.http.url.replace("http", "ws") + "/v3/ws"}
        for status in (301, 302, 303, 307, 308):
            server.http.fault = Fault(answer=Answer(status=status, headers=elsewhere))
            assert type((await streamed(server, sound(1))).failure) is BadAnswer
        assert other.http.opened == 0


async def test_the_credential_is_named_by_its_beginning(server: AssemblyAIServer) -> None:
    stream = await streamed(server, sound(1), key="wrong-and-secret")
    assert type(stream.failure) is CredentialRefused
    assert "credential wrong-a " in stream.failure.message
    assert "wrong-and-secret" not in "".join(traceback.format_exception(stream.failure))


async def failing_at(address: str) -> BackendError:
    async with relay_to(Account("assemblyai", address, KEY, KEY[:7], MODELS)) as relay:
        with pytest.raises(BackendError) as failed:
            async with relay.stream(spoken(sound(1)), EN) as events:
                assert [event async for event in events] == []
    tells_nothing(failed.value)
    return failed.value


async def test_a_provider_that_cannot_be_reached() -> None:
    assert type(await failing_at(closed())) is BackendUnavailable
    assert type(await failing_at("http://provider.invalid")) is BackendUnavailable
    async with deaf() as address:
        assert type(await failing_at(address)) is BackendTimeout


@pytest.mark.parametrize(
    ("address", "live"),
    [
        ("https://api.assemblyai.com", "wss://streaming.assemblyai.com/v3/ws"),
        ("https://api.eu.assemblyai.com/", "wss://streaming.eu.assemblyai.com/v3/ws"),
        ("http://api.example:8080/aai", "ws://api.example:8080/aai/v3/ws"),
    ],
)
def test_where_live_audio_goes(address: str, live: str) -> None:
    assert live_url(address) == live


async def test_nothing_is_logged(server: AssemblyAIServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.WARNING, "websockets.server")  # the test server's
    await streamed(server, sound(6))
    assert KEY not in caplog.text
    assert "Tell" not in caplog.text


# --- pressure, and leaving ----------------------------------------------------------------------------------------


async def test_audio_is_taken_as_the_provider_takes_it() -> None:
    """From one that reads nothing, no more than sockets hold; and not for long."""
    taken = 0

    async def endless() -> AsyncIterator[StreamInput]:
        nonlocal taken
        while True:
            yield Pcm(sound(1))
            taken += 32_000

    async def deaf_to_audio(_: Any, head: bytes, reader: Any, writer: Any) -> None:
        socket = await Socket.accepted(head, {}, reader, writer)
        await socket.send(json.dumps({"type": "Begin", "id": "1", "expires_at": 1}))
        await asyncio.sleep(3600)

    async with http_server(lambda _: Answer(), deaf_to_audio) as http:
        account = Account("assemblyai", http.url, KEY, KEY[:7], MODELS)
        async with relay_to(account, replace(IMPATIENT, ahead_s=1e9)) as relay:
            with pytest.raises(BackendTimeout):
                async with relay.stream(endless(), EN) as events:
                    async for _ in events:
                        pass
    assert 0 < taken < 32_000_000


async def test_events_wait_for_their_reader(server: AssemblyAIServer) -> None:
    async with relay_to(server.account()) as relay:
        async with relay.stream(spoken(*[sound(6)] * 10, pace_s=0), EN) as events:
            await asyncio.sleep(1.5)  # longer than the provider may be silent
            texts = [event.text async for event in events if isinstance(event, Final)]
    assert texts == [FIRST, SECOND]


@pytest.mark.parametrize("quirks", [Quirks(), Quirks(most_s=1.0, ending="silence")])
async def test_leaving_early_leaves_nothing(server: AssemblyAIServer, quirks: Quirks) -> None:
    """Nor is it paid for any longer."""
    server.quirks = quirks
    before = asyncio.all_tasks()
    async with relay_to(server.account()) as relay:
        async with relay.stream(spoken(sound(60)), EN) as events:
            assert isinstance(await anext(events), SpeechStarted)
        await until(lambda: server.open == 0)
        assert asyncio.all_tasks() <= before
    if quirks.ending != "silence":
        assert server.heard["Terminate"] == 1


async def test_what_breaks_in_the_audio_is_told_as_it_is(server: AssemblyAIServer) -> None:
    async def breaking() -> AsyncIterator[StreamInput]:
        async for item in spoken(sound(1)):
            yield item
        raise NotAudio("The stream's FLAC is damaged.")

    async with relay_to(server.account()) as relay:
        with pytest.raises(NotAudio):
            async with relay.stream(breaking(), EN) as events:
                async for _ in events:
                    pass
    await until(lambda: server.heard["Terminate"] == 1)


# --- the test server speaks true ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["u3-rt-pro", "universal-streaming-english"])
async def test_the_official_client_understands_the_test_server(server: AssemblyAIServer, model: str) -> None:
    from assemblyai.streaming import v3

    async with httpx.AsyncClient(headers={"authorization": KEY}) as http:
        token = (await http.get(f"{server.http.url}/v3/token?expires_in_seconds=60")).json()["token"]
    told: dict[v3.RealTimeEvents, list[Any]] = {kind: [] for kind in v3.RealTimeEvents}
    host = server.http.url.replace("http", "ws")
    client = v3.AsyncRealTimeTranscriber(v3.RealTimeTranscriberOptions(api_host=host, token=token))
    for kind in v3.RealTimeEvents:
        client.on(kind, lambda _, event, kind=kind: told[kind].append(event))
    await client.connect(
        v3.RealTimeParameters(
            sample_rate=16_000,
            speech_model=v3.SpeechModel(model),
            format_turns=True,
            max_turn_silence=550,
            keyterms_prompt=["a b", "c"],
        )
    )
    audio = sound(6)
    for at in range(0, len(audio), 1_600):
        await client.stream(audio[at : at + 1_600].tobytes())
    await client.keep_alive()
    await client.set_params(v3.RealTimeSessionParameters(max_turn_silence=900))
    await client.force_endpoint()
    await client.disconnect(terminate=True)
    await until(lambda: server.open == 0)
    assert told[v3.RealTimeEvents.Error] == []
    assert len(told[v3.RealTimeEvents.Begin]) == len(told[v3.RealTimeEvents.Termination]) == 1
    formatted = [
        turn.transcript for turn in told[v3.RealTimeEvents.Turn] if turn.end_of_turn and turn.turn_is_formatted
    ]
    assert formatted == [FIRST, SECOND]
    assert sum(map(len, told.values())) == len(server.told)
    assert server.heard["UpdateConfiguration"] == server.heard["KeepAlive"] == server.heard["Terminate"] == 1
