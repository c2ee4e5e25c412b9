"""Nothing hangs, leaks or tells secrets, whatever a provider with OpenAI's API does."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dispatchers.backends import relay as relays
from dispatchers.backends.openai import OpenAIRelay, Patience, Quirks
from dispatchers.backends.relay import Account
from dispatchers.errors import (
    BackendError,
    BackendFailed,
    BackendRefused,
    BackendTimeout,
    BackendUnavailable,
    BadAnswer,
    CredentialRefused,
    Throttled,
)
from dispatchers.interface import Options, Samples, Transcript
from tests.openai_relays import CLIP, IMPATIENT, SAID, SECONDS_5, relay_to, tells_nothing
from tests.providers.http import FAULTS, Answer, Fault, closed, deaf
from tests.providers.openai import KEY, OpenAIServer, openai_server

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


@pytest.mark.parametrize("name", UNEXPECTED)
async def test_whatever_the_provider_answers(
    provider: OpenAIServer, relay: OpenAIRelay, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    provider.http.fault = UNEXPECTED[name]
    with pytest.raises(BackendError) as failed:
        await relay.transcribe(SECONDS_5, Options())
    error = failed.value
    assert type(error) is UNLIKE_BAD_ANSWER.get(name, BadAnswer)
    assert error.retryable == (type(error) not in (CredentialRefused, BackendRefused))
    assert error.elsewhere == (type(error) is not BackendRefused)
    tells_nothing(error)
    assert "the-secret" not in caplog.text
    provider.http.fault = None
    assert (await relay.transcribe(SECONDS_5, Options())).text == SAID


async def test_how_long_to_wait_is_told(provider: OpenAIServer, relay: OpenAIRelay) -> None:
    for name, wait_s in (
        ("too many", 7),
        ("too many until", 300),
        ("too many, and nonsense", None),
        ("unavailable", 2),
    ):
        provider.http.fault = FAULTS[name]
        with pytest.raises(BackendError) as failed:
            await relay.transcribe(SECONDS_5, Options())
        assert failed.value.retry_after_s == wait_s


async def test_the_credential_is_named_by_its_beginning(provider: OpenAIServer) -> None:
    async with relay_to(provider, key="sk-wrong-one") as relay:
        with pytest.raises(CredentialRefused, match="credential sk-wron "):
            await relay.transcribe(CLIP, Options())
    assert "sk-wrong-one" not in repr(provider.account(key="sk-wrong-one"))


async def test_a_model_that_the_provider_has_not(provider: OpenAIServer) -> None:
    async with relay_to(provider, models=("whisper-9",)) as relay:
        with pytest.raises(BackendUnavailable, match="The operator must look"):
            await relay.transcribe(CLIP, Options())


@pytest.mark.parametrize(("start", "end"), [(-5, 1e300), (4, 2), (9e9, -9e9)])
async def test_times_stay_within_the_recording(
    provider: OpenAIServer, relay: OpenAIRelay, start: float, end: float
) -> None:
    word = {"word": "a", "start": start, "end": end}
    segment = {"text": "a", "start": start, "end": end}
    body = {"text": "a a", "segments": [segment, segment], "words": [word, word]}
    provider.http.fault = Fault(answer=Answer(json.dumps(body).encode()))
    answer = await relay.transcribe(SECONDS_5, Options(words=True))
    edges = [edge for each in answer.segments for edge in (each.start_ms, each.end_ms)]
    assert edges == sorted(edges)
    words = [word for each in answer.segments for word in each.words]
    assert [word.text for word in words] == ["a", "a"]
    for edge in edges + [edge for word in words for edge in (word.start_ms, word.end_ms)]:
        assert 0 <= edge <= 5_000


async def test_control_characters_are_left_out(provider: OpenAIServer, relay: OpenAIRelay) -> None:
    body = {"text": "a\x00b\x1b[31m c\u0085", "segments": [{"text": "a\x00b\x1b[31m c\u0085", "start": 0, "end": 1}]}
    provider.http.fault = Fault(answer=Answer(json.dumps(body).encode()))
    assert (await relay.transcribe(SECONDS_5, Options())).text == "ab[31m c"


async def test_a_redirect_is_not_followed(provider: OpenAIServer, relay: OpenAIRelay) -> None:
    async with openai_server() as other:
        for status in (301, 302, 303, 307, 308):
            elsewhere = {"location": f"{other.base_url}/audio/transcriptions"}
            provider.http.fault = Fault(answer=Answer(status=status, headers=elsewhere))
            with pytest.raises(BadAnswer):
                await relay.transcribe(CLIP, Options())
        assert other.http.opened == 0


async def test_a_cookie_is_not_kept(provider: OpenAIServer, relay: OpenAIRelay) -> None:
    provider.http.fault = Fault(headers={"set-cookie": "session=1; Path=/"})
    await relay.transcribe(CLIP, Options())
    await relay.transcribe(CLIP, Options())
    assert ["cookie" in request.headers for request in provider.http.requests] == [False, False]


# --- time and connections -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["silent", "never reads"])
@pytest.mark.parametrize(
    "audio", [CLIP, np.random.default_rng(1).integers(-32768, 32767, 16 * 400_000).astype(np.int16)]
)
async def test_a_provider_that_says_nothing(
    provider: OpenAIServer, relay: OpenAIRelay, name: str, audio: Samples
) -> None:
    provider.http.fault = FAULTS[name]
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

    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(BackendUnavailable) as failed:
        await connecting_to("http://provider.invalid")
    tells_nothing(failed.value)


async def test_what_is_not_http() -> None:
    async def babble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.6 the-secret\r\n" * 10)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as listening:
        address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        with pytest.raises(BackendFailed) as failed:
            await connecting_to(f"http://{address}")
        tells_nothing(failed.value)
        with pytest.raises(BackendUnavailable):
            await connecting_to(f"https://{address}")


async def test_connections_are_kept(provider: OpenAIServer, relay: OpenAIRelay) -> None:
    before = provider.http.opened
    for _ in range(20):
        await relay.transcribe(CLIP, Options())
    assert provider.http.opened == before + 1


async def test_no_slot_is_lost_to_those_who_leave(provider: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand leave at random moments of a request; then as many as there are slots find one each."""
    monkeypatch.setattr(relays, "MOST_CONNECTIONS", 8)
    provider.http.fault = Fault(wait_s=0.002, piece_bytes=100, pause_s=0.001)
    chance = random.Random(4)
    async with relay_to(provider, patience=Patience(connect_s=1.0, silent_s=5.0, whole_s=5.0)) as relay:

        async def leave_early() -> bool:
            asked = asyncio.create_task(relay.transcribe(CLIP, Options()))
            await asyncio.sleep(chance.uniform(0, 0.05))
            asked.cancel()
            await asyncio.wait([asked])
            return asked.cancelled()

        left = [await asyncio.gather(*(leave_early() for _ in range(20))) for _ in range(50)]
        assert sum(map(sum, left)) > 500
        assert sum(map(sum, left)) < 1_000
        provider.http.fault = Fault(wait_s=2.0)  # longer than anybody waits for a slot
        answers = await asyncio.gather(*(relay.transcribe(SECONDS_5, Options()) for _ in range(8)))
        assert [answer.text for answer in answers] == [SAID] * 8
        with pytest.raises(BackendTimeout):
            await asyncio.gather(*(relay.transcribe(SECONDS_5, Options()) for _ in range(9)))
    provider.http.fault = None
