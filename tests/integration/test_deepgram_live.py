"""Live streams to Deepgram over real sockets: what is said on them, what comes of it, and that whatever breaks them is
told as an error after which another backend can take over."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from dispatchers.backends.deepgram import MODELS, DeepgramRelay
from dispatchers.backends.deepgram_live import Patience
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
from tests.providers.deepgram import KEY, DeepgramServer, Quirks, deepgram_server
from tests.providers.http import FAULTS, Answer, Fault, closed, deaf
from tests.providers.script import said, sound

IMPATIENT = Patience(connect_s=1.0, silent_s=1.0, finalize_s=0.3, drain_s=2.0, keep_alive_s=0.2)
FIRST, SECOND = "Tell me more.", "And then, where did it go?"
ENDLESS = said("on and on and on and on and on and on and on and on and on")
EN = Options(language="en", words=True)


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
async def server() -> AsyncIterator[DeepgramServer]:
    async with deepgram_server() as opened:
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
async def relay_to(account: Account, patience: Patience = IMPATIENT) -> AsyncIterator[DeepgramRelay]:
    relay = DeepgramRelay(account, patience)
    try:
        yield relay
    finally:
        await relay.aclose()


async def streamed(
    server: DeepgramServer, *parts: Part, options: Options = EN, patience: Patience = IMPATIENT, **account: Any
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

FIXED = {
    "encoding": ("linear16",),
    "sample_rate": ("16000",),
    "channels": ("1",),
    "punctuate": ("true",),
    "interim_results": ("true",),
    "vad_events": ("true",),
}
DEFAULTS = {"endpointing": ("550",), "utterance_end_ms": ("1000",)}


@pytest.mark.parametrize(
    ("options", "query"),
    [
        (Options(), DEFAULTS | {"model": ("nova-3",), "language": ("multi",)}),
        (
            Options(model="nova-2", language="yue", hotwords=("a b", "c:d"), vad=VadOptions(silence_ms=1_100)),
            {
                "model": ("nova-2",),
                "language": ("zh-HK",),
                "keywords": ("a b", "c d"),
                "endpointing": ("1100",),
                "utterance_end_ms": ("1100",),
            },
        ),
        (
            Options(language="en", hotwords=("a b", "c"), partials=False),
            DEFAULTS | {"model": ("nova-3",), "language": ("en",), "keyterm": ("a b", "c")},
        ),
    ],
)
async def test_options_become_parameters(
    server: DeepgramServer, options: Options, query: dict[str, tuple[str, ...]]
) -> None:
    stream = await streamed(server, sound(6), options=options)
    assert stream.texts == [FIRST, SECOND]
    assert server.queries == [FIXED | query]
    (request,) = server.http.requests
    assert request.headers["authorization"] == f"Token {KEY}"


async def test_a_stream_is_told_as_it_firms_up(server: DeepgramServer) -> None:
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
    assert stream.all(Delta) == [Delta(1, FIRST, 400, 1_600), Delta(2, SECOND, 2_800, 5_200)]
    assert "Tell m" in [partial.text for partial in stream.all(Partial)]
    assert server.heard["CloseStream"] == 1
    assert server.closed_with == [1000]


async def test_long_speech_comes_in_deltas() -> None:
    async with deepgram_server(ENDLESS) as server:
        stream = await streamed(server, sound(8))
        (final,) = stream.all(Final)
        deltas = stream.all(Delta)
        assert len(deltas) == 3
        assert "".join(delta.text for delta in deltas) == final.text == " ".join(word for word, *_ in ENDLESS)
        for partial in stream.all(Partial):
            assert final.text.startswith(partial.text[: partial.stable])
        assert [word.text for word in final.words] == final.text.split()
        assert max(partial.stable for partial in stream.all(Partial)) > 0
        cut = await streamed(server, sound(8), options=replace(EN, vad=VadOptions(max_utterance_ms=4_000)))
        assert len(cut.all(Final)) == 2
        assert " ".join(cut.texts) == final.text


async def test_an_utterance_ends_without_a_pause(server: DeepgramServer) -> None:
    """Noise hides pauses from `speech_final`."""
    server.quirks = Quirks(mangle=lambda message: [json.dumps(message | {"speech_final": False})])
    stream = await streamed(server, sound(8))
    assert stream.texts == [FIRST, SECOND]
    assert any(message["type"] == "UtteranceEnd" for message in server.told)


async def test_sound_without_words(server: DeepgramServer) -> None:
    assert (await streamed(server, np.zeros(32_000, np.int16))).events == []
    assert (await streamed(server, sound(0.25))).events == []


async def test_bursts_and_crumbs(server: DeepgramServer) -> None:
    """How the audio is cut does not matter."""
    for step in (7, 160, 96_000):
        async with relay_to(server.account()) as relay:
            audio = spoken(sound(6)[:96_000], step=step, pace_s=0)
            async with relay.stream(audio, EN) as events:
                assert [event.text async for event in events if isinstance(event, Final)] == [FIRST, SECOND]


# --- commands -----------------------------------------------------------------------------------------------------


async def test_a_flush_ends_the_utterance(server: DeepgramServer) -> None:
    stream = await streamed(server, sound(1.0), Flush(), sound(1.5), Flush(), Flush(), sound(4), Flush())
    assert [event for event in stream.events if isinstance(event, Final | Flushed)] == [
        *(stream.all(Final)[0], Flushed(1_000)),
        *(stream.all(Final)[1], Flushed(2_500), Flushed(2_500)),
        *(stream.all(Final)[2], Flushed(6_500)),
    ]
    assert stream.texts == ["Tell me", "more.", SECOND]
    assert server.heard["Finalize"] == 3


async def test_a_finalize_that_is_not_answered(server: DeepgramServer) -> None:
    """What was told of the utterance is its text, and is not told again."""
    server.quirks = Quirks(ignored=frozenset({"Finalize"}))
    stream = await streamed(server, sound(1.3), Flush(), sound(4.7))
    assert stream.failure is None
    flushed = stream.events.index(Flushed(1_300))
    assert isinstance(stream.events[flushed - 1], Final)
    assert stream.texts[0] == "Tell me m"  # the last guess
    assert stream.texts[-1] == SECOND
    assert " ".join(stream.texts).count("Tell") == 1


async def test_what_is_cleared_is_not_told(server: DeepgramServer) -> None:
    stream = await streamed(server, sound(1.0), Clear(), sound(5))
    assert [event for event in stream.events if isinstance(event, Gap | Cleared)] == [
        Gap(400, 1_000, "cleared"),
        Cleared(1_000),
    ]
    assert stream.texts == ["more.", SECOND]
    assert not any(
        "Tell" in event.text
        for event in stream.events[stream.events.index(Cleared(1_000)) :][1:]
        if isinstance(event, Partial)
    )
    stream = await streamed(server, sound(0.2), Clear(), Clear(), sound(5.8))
    assert stream.all(Gap) == []
    assert stream.all(Cleared) == [Cleared(200), Cleared(200)]
    assert stream.texts == [FIRST, SECOND]


async def test_before_the_first_audio_there_is_no_connection(server: DeepgramServer) -> None:
    stream = await streamed(server, Flush(), Clear(), Pause(0.3), np.zeros(0, np.int16))
    assert stream.events == [Flushed(0), Cleared(0)]
    assert server.http.opened == 0


async def test_pauses_are_survived(server: DeepgramServer) -> None:
    server.quirks = Quirks(idle_s=0.8)
    stream = await streamed(server, sound(2.7), Pause(1.5), sound(3.3))
    assert stream.failure is None
    assert stream.texts == [FIRST, SECOND]
    assert 2 <= server.heard["KeepAlive"] <= 8
    server.quirks = Quirks(idle_s=0.3)
    assert type((await streamed(server, sound(1), Pause(1), patience=Patience())).failure) is BackendFailed


async def test_words_before_a_pause_become_firm(server: DeepgramServer) -> None:
    """The stream's clock stands still without audio, so nothing would end the utterance; nor does it."""
    stream = await streamed(server, sound(1.3), Pause(0.7), sound(4.7))
    assert [delta.text for delta in stream.all(Delta)][:1] == ["Tell me more."]
    assert server.heard["Finalize"] == 1
    assert stream.texts == [FIRST, SECOND]


# --- what breaks --------------------------------------------------------------------------------------------------

ENDINGS: dict[str, type[BackendError]] = {
    "1011": BackendFailed,
    "1008": BackendFailed,
    "1012": BackendUnavailable,
    "1000": BackendFailed,
    "reset": BackendFailed,
    "half-closed": BackendFailed,
    "silence": BackendTimeout,
    "not a frame": BadAnswer,
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_socket_that_ends_in_an_utterance(server: DeepgramServer, ending: Any) -> None:
    """What was final is told, what was not is for another backend to say."""
    server.quirks = Quirks(most_s=3.5, ending=ending)
    stream = await streamed(server, sound(6), Pause(0.3), sound(3))
    assert type(stream.failure) is ENDINGS[ending]
    assert stream.failure.retryable
    assert stream.failure.elsewhere
    assert stream.texts == [FIRST]
    assert stream.events[-1] == Partial(2, "And t", 0, 2_800, 3_500)
    server.quirks = Quirks()
    assert (await streamed(server, sound(6))).texts == [FIRST, SECOND]


async def test_an_end_that_is_not_told_is_none(server: DeepgramServer) -> None:
    """A close before `Metadata` has cut something off."""
    server.quirks = Quirks(ignored=frozenset({"CloseStream"}))
    stream = await streamed(server, sound(6))
    assert type(stream.failure) is BackendTimeout
    server.quirks = Quirks(mangle=lambda message: [] if message["type"] == "Metadata" else [json.dumps(message)])
    stream = await streamed(server, sound(6))
    assert type(stream.failure) is BackendFailed
    server.quirks = Quirks(mangle=lambda message: [json.dumps(message)] * (message["type"] != "Results"))
    assert (await streamed(server, sound(0.2))).failure is None


async def test_metadata_before_the_end_is_not_the_end(server: DeepgramServer) -> None:
    metadata = json.dumps({"type": "Metadata", "request_id": "…", "duration": 0})
    server.quirks = Quirks(mangle=lambda message: [metadata, json.dumps(message)])
    assert (await streamed(server, sound(6))).texts[0] == FIRST


def but(**changes: Any) -> Callable[[dict[str, Any]], list[str | bytes]]:
    """Every `Results` with these members changed."""

    def mangle(message: dict[str, Any]) -> list[str | bytes]:
        return [json.dumps(message | changes if message["type"] == "Results" else message)]

    return mangle


def instead(*frames: str | bytes) -> Callable[[dict[str, Any]], list[str | bytes]]:
    return lambda _: list(frames)


def channel(**alternative: Any) -> dict[str, Any]:
    return {"alternatives": [{"transcript": "the-secret", "confidence": 0.9, "words": []} | alternative]}


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
    "five million signs": instead('{"type": "Results", "text": "' + "a" * 5_000_000 + '"}'),
    "start is a string": but(start="0"),
    "start is NaN": but(start=float("nan")),
    "duration is infinite": but(duration=float("inf")),
    "is_final is a number": but(is_final=1),
    "speech_final is null": but(speech_final=None),
    "no channel": but(channel=None),
    "a channel that is a list": but(channel=[]),
    "no alternatives": but(channel={"alternatives": []}),
    "text is a number": but(channel=channel(transcript=5)),
    "words is an object": but(channel=channel(words={"the-secret": 1})),
    "a word is a string": but(channel=channel(words=["the-secret"])),
    "a word's time is null": but(channel=channel(words=[{"word": "the-secret", "start": None, "end": 1}])),
    "more than can be said": but(channel=channel(transcript="the-secret " * 1_000)),
    "a timestamp that is none": instead('{"type": "SpeechStarted", "channel": [0, 1], "timestamp": "the-secret"}'),
    "an end that is none": instead('{"type": "UtteranceEnd", "channel": [0, 1]}'),
}


@pytest.mark.parametrize("name", UNREADABLE)
async def test_messages_that_cannot_be_read(
    server: DeepgramServer, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.quirks = Quirks(mangle=UNREADABLE[name])
    stream = await streamed(server, sound(3))
    assert type(stream.failure) is BadAnswer
    assert not stream.all(Final)
    assert "the-secret" not in caplog.text


async def test_an_error_message_ends_the_stream(server: DeepgramServer) -> None:
    error = {"type": "Error", "variant": "the-secret", "description": "the-secret", "message": "the-secret"}
    server.quirks = Quirks(mangle=instead(json.dumps(error)))
    stream = await streamed(server, sound(3))
    assert type(stream.failure) is BackendFailed


async def test_what_is_new_to_us_is_passed_over(server: DeepgramServer) -> None:
    new = [json.dumps({"type": "Sentiment", "value": [1]}), json.dumps({"type": "ConfigureSuccess"})]
    server.quirks = Quirks(mangle=lambda message: [*new, json.dumps(message | {"new": {"a": 1}})])
    assert (await streamed(server, sound(6))).texts == [FIRST, SECOND]


async def test_text_without_words_has_the_times_of_its_range(server: DeepgramServer) -> None:
    def wordless(message: dict[str, Any]) -> list[str | bytes]:
        if message["type"] == "Results":
            message["channel"]["alternatives"][0]["words"] = []
        return [json.dumps(message)] if message["type"] != "SpeechStarted" else []

    server.quirks = Quirks(mangle=wordless)
    stream = await streamed(server, sound(6))
    assert stream.texts == [FIRST, SECOND]
    assert [(final.start_ms, final.end_ms, final.words) for final in stream.all(Final)] == [
        (0, 2_250, ()),
        (2_250, 5_250, ()),
    ]
    assert stream.all(Final)[0].confidence == 0.99


@pytest.mark.parametrize("start", [-5.0, 1e300, 100.0, 0.0])
async def test_times_that_cannot_be(server: DeepgramServer, start: float) -> None:
    def shifted(message: dict[str, Any]) -> list[str | bytes]:
        if message["type"] == "Results":
            message["start"] = start
            for word in message["channel"]["alternatives"][0]["words"]:
                word["start"], word["end"] = word["end"] + start, word["start"] - start
        return [json.dumps(message)]

    server.quirks = Quirks(mangle=shifted)
    stream = await streamed(server, sound(6))
    assert stream.failure is None
    edges = [edge for final in stream.all(Final) for edge in (final.start_ms, final.end_ms)]
    assert edges == sorted(edges)
    for final in stream.all(Final):
        assert 0 <= final.start_ms < final.end_ms <= 6_000
        assert all(final.start_ms <= word.start_ms <= word.end_ms <= final.end_ms for word in final.words)


async def test_control_characters_are_left_out(server: DeepgramServer) -> None:
    server.quirks = Quirks(mangle=but(channel=channel(transcript="a\x00b\x1b[31m\n c")))
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
async def test_a_handshake_that_fails(server: DeepgramServer, name: str, caplog: pytest.LogCaptureFixture) -> None:
    server.http.fault = FAULTS[name]
    stream = await streamed(server, sound(1))
    assert type(stream.failure) is REFUSED[name]
    assert stream.events == []
    assert stream.failure.retry_after_s == {"too many": 7, "unavailable": 2}.get(name)
    assert "the-secret" not in caplog.text


async def test_a_redirect_is_not_followed(server: DeepgramServer) -> None:
    async with deepgram_server() as other:
        elsewhere = {"location": other.http.url.replace("http", "ws") + "/v1/listen"}
        for status in (301, 302, 303, 307, 308):
            server.http.fault = Fault(answer=Answer(status=status, headers=elsewhere))
            assert type((await streamed(server, sound(1))).failure) is BadAnswer
        assert other.http.opened == 0


async def test_the_credential_is_named_by_its_beginning(server: DeepgramServer) -> None:
    stream = await streamed(server, sound(1), key="wrong-and-secret")
    assert type(stream.failure) is CredentialRefused
    assert "credential wrong-a " in stream.failure.message
    assert "wrong-and-secret" not in "".join(traceback.format_exception(stream.failure))


async def failing_at(address: str) -> BackendError:
    async with relay_to(Account("deepgram", address, KEY, KEY[:7], MODELS)) as relay:
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


async def test_what_is_not_a_websocket() -> None:
    async def babble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.6 the-secret\r\n" * 10)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        assert type(await failing_at(f"http://127.0.0.1:{port}")) is BadAnswer
        assert type(await failing_at(f"https://127.0.0.1:{port}")) is BackendUnavailable


async def test_nothing_is_logged(server: DeepgramServer, caplog: pytest.LogCaptureFixture) -> None:
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
        from tests.providers.websocket import Socket

        await Socket.accepted(head, {}, reader, writer)
        await asyncio.sleep(3600)

    from tests.providers.http import http_server

    async with http_server(lambda _: Answer(), deaf_to_audio) as http:
        async with relay_to(Account("deepgram", http.url, KEY, KEY[:7], MODELS)) as relay:
            with pytest.raises(BackendTimeout):
                async with relay.stream(endless(), EN) as events:
                    async for _ in events:
                        pass
    assert 0 < taken < 32_000_000


async def test_events_wait_for_their_reader(server: DeepgramServer) -> None:
    async with relay_to(server.account()) as relay:
        async with relay.stream(spoken(*[sound(6)] * 10, pace_s=0), EN) as events:
            await asyncio.sleep(1.5)  # longer than the provider may be silent
            texts = [event.text async for event in events if isinstance(event, Final)]
    assert texts == [FIRST, SECOND]


@pytest.mark.parametrize("quirks", [Quirks(), Quirks(most_s=1.0, ending="silence")])
async def test_leaving_early_leaves_nothing(server: DeepgramServer, quirks: Quirks) -> None:
    server.quirks = quirks
    before = asyncio.all_tasks()
    async with relay_to(server.account()) as relay:
        async with relay.stream(spoken(sound(60)), EN) as events:
            assert isinstance(await anext(events), SpeechStarted)
        await until(lambda: server.open == 0)
        assert asyncio.all_tasks() <= before


async def test_what_breaks_in_the_audio_is_told_as_it_is(server: DeepgramServer) -> None:
    async def breaking() -> AsyncIterator[StreamInput]:
        async for item in spoken(sound(1)):
            yield item
        raise NotAudio("The stream's FLAC is damaged.")

    async with relay_to(server.account()) as relay:
        with pytest.raises(NotAudio):
            async with relay.stream(breaking(), EN) as events:
                async for _ in events:
                    pass


# --- the test server speaks true ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:websockets:DeprecationWarning")  # the client imports deprecated parts of it
async def test_the_official_client_understands_the_test_server(server: DeepgramServer) -> None:
    from deepgram import AsyncDeepgramClient
    from deepgram.core.events import EventType
    from deepgram.environment import DeepgramClientEnvironment
    from deepgram.listen.v1.types.listen_v1error import ListenV1Error
    from deepgram.listen.v1.types.listen_v1metadata import ListenV1Metadata
    from deepgram.listen.v1.types.listen_v1results import ListenV1Results
    from deepgram.listen.v1.types.listen_v1speech_started import ListenV1SpeechStarted
    from deepgram.listen.v1.types.listen_v1utterance_end import ListenV1UtteranceEnd

    kinds = [ListenV1Results, ListenV1SpeechStarted, ListenV1UtteranceEnd, ListenV1Metadata, ListenV1Error]
    url = server.http.url.replace("http", "ws")
    environment = DeepgramClientEnvironment(base=server.http.url, production=url, agent=url, agent_rest=url)
    messages: list[Any] = []
    parameters = {"interim_results": True, "punctuate": True, "vad_events": True, "utterance_end_ms": 1000}
    async with AsyncDeepgramClient(api_key=KEY, environment=environment).listen.v1.connect(
        model="nova-3", encoding="linear16", sample_rate=16_000, language="multi", **parameters
    ) as socket:
        socket.on(EventType.MESSAGE, messages.append)
        listening = asyncio.create_task(socket.start_listening())
        await socket.send_keep_alive()
        await socket.send_media(sound(2).tobytes())
        await socket.send_finalize()
        await socket.send_media(sound(4.5).tobytes())
        await socket._send("no command")
        await socket.send_close_stream()
        await listening
    assert {type(message) for message in messages} == set(kinds)
    assert len(messages) == len(server.told)
    for message, told in zip(messages, server.told, strict=True):
        type(message).model_validate(told)  # the client itself does not check
    finals = [each for each in messages if isinstance(each, ListenV1Results) and each.is_final]
    assert " ".join(each.channel.alternatives[0].transcript for each in finals).split() == f"{FIRST} {SECOND}".split()
    assert any(each.from_finalize for each in finals)
