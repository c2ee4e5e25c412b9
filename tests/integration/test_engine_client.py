"""A dispatcher over an engine elsewhere: the same answers, the same errors, as from one in this process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from dispatchers.audio.decode import load
from dispatchers.backends.engine import MOST_SAID, EngineClient
from dispatchers.backends.local import LocalBackend
from dispatchers.engine import wire
from dispatchers.engine.interface import Recognised
from dispatchers.engine.meeting import Meeting
from dispatchers.engine.models import KNOWN, MICRO, MICRO_SAMPLES, ModelSpec
from dispatchers.engine.server import EngineServer
from dispatchers.errors import (
    BackendError,
    BackendFailed,
    BackendRefused,
    BackendTimeout,
    BackendUnavailable,
    BadAnswer,
    CredentialRefused,
    EngineLost,
    Overloaded,
    Superseded,
    UnknownModel,
    UnsupportedOption,
)
from dispatchers.interface import Heard, Options, Samples, Segment
from tests.integration.test_engine_server import serving, until

MIB = 1024 * 1024
CLIP = load(MICRO_SAMPLES / "clip09.wav")
LONG = load(MICRO_SAMPLES / "long.wav")
EN = Options(model="micro", language="en", urgency="final", words=True)


@asynccontextmanager
async def client_of(
    backend: LocalBackend,
    *,
    token: str | None = None,
    sent: str | None = None,
    timeout_s: float = 60,
    most: int = 64 * MIB,
) -> AsyncIterator[EngineClient]:
    server = EngineServer(lambda: backend, token=token, max_upload_bytes=most)
    headers = {"authorization": f"Bearer {sent}"} if sent else {}
    async with serving(server) as address:
        await server.load()
        client = EngineClient(httpx.AsyncClient(base_url=address, headers=headers, timeout=timeout_s, trust_env=False))
        yield client
        await client.aclose()


@pytest.fixture(scope="module")
async def local() -> LocalBackend:
    return LocalBackend(MICRO, workers=2, device="cpu")


@pytest.fixture(scope="module")
async def client(local: LocalBackend) -> AsyncIterator[EngineClient]:
    async with client_of(local) as opened:
        await opened.refresh()
        yield opened


async def test_it_answers_as_the_engine_itself(client: EngineClient, local: LocalBackend) -> None:
    for audio, options in [
        (CLIP, EN),
        (LONG, replace(EN, urgency="batch")),
        (CLIP, replace(EN, prompt="é\n☃", hotwords=("a",))),
    ]:
        told: list[Segment] = []
        far, near = await client.transcribe(audio, options, told.append), await local.transcribe(audio, options)
        assert far == near
        assert far.text
        assert tuple(told) == far.segments


async def test_what_it_says_of_itself(client: EngineClient, local: LocalBackend) -> None:
    await client.refresh()
    assert client.capabilities == local.capabilities
    assert client.status.models == local.catalogue()
    assert client.origin("") == client.origin("micro") == local.origin("micro")
    with pytest.raises(UnknownModel):
        client.origin("nonsense")
    with pytest.raises(UnsupportedOption):
        client.stream(aiter_of(), EN)
    figures = await client.figures()
    assert 'stenogate_recognition_seconds_count{model="micro"}' in figures
    assert "stenogate_requests" not in figures


async def aiter_of() -> AsyncIterator[None]:
    return
    yield


async def test_hours_of_audio_go_through_in_pieces(client: EngineClient) -> None:
    """More than either side keeps in memory: silence, which the engine answers quickly, and a clip at its end."""
    silence = np.zeros(16_000 * 150, np.int16)
    answer = await client.transcribe(np.concatenate([silence, CLIP]), replace(EN, urgency="batch"))
    assert answer.duration_ms == (len(silence) + len(CLIP)) // 16
    assert answer.segments[-1].end_ms > 150_000


async def test_errors_come_back_as_themselves(client: EngineClient) -> None:
    with pytest.raises(UnknownModel) as unknown:
        await client.transcribe(CLIP, replace(EN, model="nonsense"))
    assert unknown.value.param == "model"
    with pytest.raises(UnsupportedOption, match="knows no language but"):
        await client.transcribe(CLIP, replace(EN, model="pocketsphinx", language="de"))


def test_every_error_survives_the_wire() -> None:
    for kind in every(BackendError):
        told = wire.Failure.of(kind("why", param="p", retry_after_s=3)).error()
        assert (told.code, told.retryable, told.message, told.param, told.retry_after_s) == (
            kind.code,
            kind.retryable,
            "why",
            "p",
            3,
        )
    for retryable, kind in ((True, BackendFailed), (False, BackendRefused)):
        assert type(wire.Failure("OF_ANOTHER_RELEASE", "why", retryable).error()) is kind


def every(kind: type[BackendError]) -> list[type[BackendError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in every(child))]


async def test_fields_of_another_release_do_no_harm() -> None:
    assert wire.load_options(b'{"model": "micro", "of_another_release": 1}').model == "micro"
    assert wire.load_line(b'{"of_another_release": {}}') == wire.Line()


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b"{}", b"x" * (MOST_SAID + 1)], ids=["html", "list", "empty", "long"]
)
async def test_a_status_that_is_none(body: bytes) -> None:
    http = httpx.AsyncClient(
        transport=httpx.MockTransport(lambda _: httpx.Response(200, content=body)), base_url="http://e"
    )
    client = EngineClient(http)
    with pytest.raises(BadAnswer):
        await client.refresh()
    assert not client.status.ready
    await client.aclose()


@pytest.mark.parametrize("sent", [None, "another"])
async def test_only_its_token_opens_it(local: LocalBackend, sent: str | None) -> None:
    async with client_of(LocalBackend(MICRO, workers=1), token="the token", sent=sent) as shut:
        for asked in (shut.transcribe(CLIP, EN), shut.refresh(), shut.figures()):
            with pytest.raises(CredentialRefused, match="STENOGATE_ENGINE_TOKEN"):
                await asked


async def test_with_its_token_it_opens() -> None:
    async with client_of(LocalBackend(MICRO, workers=1), token="the token", sent="the token") as opened:
        assert (await opened.transcribe(CLIP, EN)).text


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "bad_parameters"),
        (b"no line", "bad_parameters"),
        (b"not json\n", "bad_parameters"),
        (b'{"urgency": "soon"}\n', "bad_parameters"),
        (b"{}\n" + bytes(3), "bad_parameters"),
        (bytes(300_000), "bad_parameters"),
        (b"{}\n" + bytes(MIB + 2), None),
    ],
)
async def test_bodies_that_are_none(body: bytes, code: str | None) -> None:
    async with client_of(LocalBackend(MICRO, workers=1), most=MIB) as opened:
        answer = await opened._http.post(wire.RECOGNISE, content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == ((400, code) if code else (413, "too_large"))


# --- work that is held --------------------------------------------------------------------------------------------


class Held:
    """An engine that says one word, and holds what follows until it is let go or told to stop."""

    workers = 1
    batch_limit = 1
    spec: ModelSpec = KNOWN["base"]

    def __init__(self) -> None:
        self.entered, self.open, self.stopped = (threading.Event() for _ in range(3))

    def kind(self, samples: Samples, options: Options) -> None:
        pass

    def transcribe(
        self,
        samples: Samples,
        options: Options,
        heard: Heard,
        cancelled: Callable[[], bool],
        meeting: Meeting | None = None,
    ) -> Recognised:
        heard(Segment(0, 1, "one"))
        self.entered.set()
        while not self.open.wait(0.01):
            if cancelled():
                self.stopped.set()
                break
        return Recognised("one", "en")

    def close(self) -> None:
        pass


@pytest.fixture
def engine() -> Held:
    return Held()


@pytest.fixture
def backend(engine: Held, tmp_path: Path) -> LocalBackend:
    return LocalBackend(KNOWN["base"], workers=1, cache_dir=tmp_path, queue_limit=1, load=lambda _: engine)


async def test_the_queue_is_the_engines(engine: Held, backend: LocalBackend) -> None:
    """Who leaves stops it, who is superseded or one too many is told, and how long it takes is known."""
    partial = Options(urgency="partial", stream="s", share="t")
    async with client_of(backend) as client:
        watching = asyncio.create_task(client.watch())
        first = asyncio.create_task(client.transcribe(CLIP, replace(partial, stream="another")))
        await until(engine.entered.is_set)
        older = asyncio.create_task(client.transcribe(CLIP, partial))
        await until(lambda: backend.waiting == 1)
        newer = asyncio.create_task(client.transcribe(CLIP, partial))
        with pytest.raises(Superseded):
            await older
        with pytest.raises(Overloaded) as full:
            await client.transcribe(CLIP, replace(partial, stream="third"))
        assert full.value.retry_after_s is not None
        await until(lambda: client.status.wait_s > 0)
        newer.cancel()
        await until(lambda: backend.waiting == 0)
        assert not engine.stopped.is_set()
        first.cancel()
        await until(engine.stopped.is_set)
        await until(lambda: client.status.wait_s == 0)
        watching.cancel()
        assert len(backend.catalogue()) == len(client.status.models)


async def test_segments_come_before_the_end(engine: Held, backend: LocalBackend) -> None:
    async with client_of(backend) as client:
        told: list[Segment] = []
        asked = asyncio.create_task(client.transcribe(CLIP, Options(), told.append))
        await until(lambda: bool(told))
        assert not asked.done()
        engine.open.set()
        assert (await asked).segments == tuple(told) == (Segment(0, 1, "one"),)


async def test_while_it_works_it_is_not_taken_for_dead(
    engine: Held, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "HEARTBEAT_S", 0.05)
    async with client_of(backend, timeout_s=0.5) as client:
        asked = asyncio.create_task(client.transcribe(CLIP, Options()))
        await asyncio.sleep(1.0)
        engine.open.set()
        assert (await asked).text == "one"


async def test_an_engine_that_says_nothing_is_given_up(engine: Held, backend: LocalBackend) -> None:
    async with client_of(backend, timeout_s=0.5) as client:
        with pytest.raises(BackendTimeout):
            await client.transcribe(CLIP, Options())
        engine.open.set()


async def test_an_engine_that_is_not_there(tmp_path: Path) -> None:
    client = EngineClient(
        httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(tmp_path / "none")), base_url="http://e")
    )
    with pytest.raises(EngineLost):
        await client.transcribe(CLIP, EN)
    await client.aclose()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (httpx.Response(200, content=b'{"segment": {"start_ms": 0, "end_ms": 1, "text": "one"}}\n'), EngineLost),
        (httpx.Response(200, content=b"<html>\n"), BadAnswer),
        (httpx.Response(200, content=b"x" * (MOST_SAID + 1)), BadAnswer),
        (httpx.Response(403), CredentialRefused),
        (httpx.Response(503), BackendUnavailable),
        (httpx.Response(500), BackendFailed),
        (httpx.Response(404), BackendRefused),
    ],
)
async def test_answers_that_are_none(answer: httpx.Response, error: type[BackendError]) -> None:
    http = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: answer), base_url="http://engine")
    client = EngineClient(http)
    with pytest.raises(error) as caught:
        await client.transcribe(CLIP, EN)
    assert type(caught.value) is error
    await client.aclose()


def test_the_options_that_were_made_use_of_stay_here() -> None:
    assert json.loads(wire.dump_options(replace(EN, partials=False))) == {
        "model": "micro", "language": "en", "words": True, "urgency": "final",
    }  # fmt: skip
