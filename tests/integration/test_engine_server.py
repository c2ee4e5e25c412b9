"""The engine role over HTTP: the real micro model for OpenAI's client, and an engine of the test's own where work must
be held."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from openai import AsyncOpenAI

from dispatchers.backends.local import LocalBackend
from dispatchers.engine.interface import Recognised
from dispatchers.engine.meeting import Meeting
from dispatchers.engine.models import KNOWN, MICRO, MICRO_SAMPLES, ModelSpec
from dispatchers.engine.serve import Unprotected, run, serve, uvicorn_config
from dispatchers.engine.server import EngineServer
from dispatchers.errors import BackendUnavailable
from dispatchers.interface import Heard, Options, Samples, Segment

CLIP = MICRO_SAMPLES / "clip09.wav"
SAID = "she will print the ticket in the morning"
MIB = 1024 * 1024


@asynccontextmanager
async def serving(server: EngineServer) -> AsyncIterator[str]:
    """Its address, while it listens."""
    http = uvicorn.Server(uvicorn_config(server))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(http.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            http.should_exit = True
            await task
            await server.aclose()


def micro() -> LocalBackend:
    return LocalBackend(MICRO, workers=2, device="cpu")


@pytest.fixture(scope="module")
async def url() -> AsyncIterator[str]:
    server = EngineServer(micro, token=None, max_upload_bytes=8 * MIB)
    async with serving(server) as address:
        await server.load()
        yield address


@pytest.fixture
async def client(url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as opened:
        yield opened


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=60) as opened:
        yield opened


async def post(http: httpx.AsyncClient, fields: dict[str, object], audio: bytes | None = None) -> httpx.Response:
    files = {"file": ("clip.wav", CLIP.read_bytes() if audio is None else audio)}
    return await http.post("/v1/audio/transcriptions", data=fields, files=files)


# --- the real model -----------------------------------------------------------------------------------------------


async def test_a_transcript_says_who_made_it_and_leaves_no_file(
    client: AsyncOpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    answer = await client.audio.transcriptions.with_raw_response.create(file=CLIP, model="micro", language="en")
    assert answer.parse().text == SAID
    assert answer.headers["x-stenogate-engine"] == "faster-whisper"
    assert answer.headers["x-stenogate-model"] == "micro"
    assert os.listdir(tmp_path) == []  # noqa: PTH208 — quick


async def test_verbose_json_has_words_and_segments(client: AsyncOpenAI) -> None:
    found = await client.audio.transcriptions.create(
        file=CLIP, model="micro", response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert found.words is not None
    assert found.segments is not None
    assert " ".join(word.word for word in found.words) == SAID
    assert "".join(segment.text for segment in found.segments).strip() == SAID
    assert 0 <= found.words[0].start < found.words[-1].end <= found.duration
    only_words = await client.audio.transcriptions.create(
        file=CLIP, model="micro", response_format="verbose_json", timestamp_granularities=["word"]
    )
    assert only_words.segments is None


@pytest.mark.parametrize(("fmt", "start"), [("text", SAID), ("srt", "1\n00:00:0"), ("vtt", "WEBVTT\n\n00:00:0")])
async def test_the_other_formats(client: AsyncOpenAI, fmt: str, start: str) -> None:
    body = await client.audio.transcriptions.create(file=CLIP, model="micro", response_format=fmt)  # type: ignore[call-overload]
    assert body.startswith(start)
    assert SAID in body


async def test_a_stream_of_deltas_is_the_text(client: AsyncOpenAI) -> None:
    audio = MICRO_SAMPLES / "long.wav"
    stream = await client.audio.transcriptions.create(file=audio, model="micro", stream=True)
    events = [event async for event in stream]
    deltas, done = events[:-1], events[-1]
    assert {event.type for event in deltas} == {"transcript.text.delta"}
    assert len(deltas) > 5
    assert done.type == "transcript.text.done"
    assert done.text.startswith("where is the hospital")
    assert "".join(event.delta for event in deltas if event.type == "transcript.text.delta") == done.text


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the client's own
async def test_a_translation(client: AsyncOpenAI, http: httpx.AsyncClient) -> None:
    assert (await client.audio.translations.create(file=CLIP, model="micro")).text == SAID
    found = await client.audio.translations.create(file=CLIP, model="micro", response_format="verbose_json")
    assert (found.text, found.language) == (SAID, "english")
    files = {"file": ("clip.wav", CLIP.read_bytes())}
    refused = await http.post("/v1/audio/translations", data={"model": "pocketsphinx"}, files=files)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_option")


async def test_models_default_first(client: AsyncOpenAI) -> None:
    models = (await client.models.list()).data
    assert (models[0].id, models[0].object) == ("micro", "model")
    assert models[0].model_dump()["status"] == "ready"


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "nonsense"}, 404, "model_not_found", "model"),
        ({"response_format": "pdf"}, 400, "bad_parameters", "response_format"),
        ({"response_format": "srt", "stream": "true"}, 400, "unsupported_option", "response_format"),
        ({"timestamp_granularities[]": "word"}, 400, "unsupported_option", "timestamp_granularities"),
        ({"language": "klingon"}, 400, "bad_parameters", "language"),
        ({"temperature": "nan"}, 400, "bad_parameters", "temperature"),
        ({"temperature": "2"}, 400, "bad_parameters", "temperature"),
        ({"model": ["micro", "micro"]}, 400, "bad_parameters", "model"),
        ({"model": "pocketsphinx", "language": "de"}, 400, "unsupported_option", "language"),
        ({"model": "nonsense", "stream": "true"}, 404, "model_not_found", "model"),
    ],
)
async def test_what_cannot_be_had(
    http: httpx.AsyncClient, fields: dict[str, object], status: int, code: str, param: str
) -> None:
    answer = await post(http, fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("audio", "code"),
    [
        (b"", "empty_audio"),
        (b"\x89PNG\r\n\x1a\n" + bytes(999), "undecodable"),
        (CLIP.read_bytes()[:200], "audio_too_short"),
    ],
)
async def test_what_is_no_recording(http: httpx.AsyncClient, audio: bytes, code: str) -> None:
    answer = await post(http, {"model": "micro"}, audio)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


async def test_bodies_that_are_no_form(http: httpx.AsyncClient) -> None:
    multipart = {"content-type": "multipart/form-data; boundary=x"}
    for body, headers in [
        (b"{}", {"content-type": "application/json"}),
        (b"garbage", multipart),
        (b"", multipart),
        (b"x", {"content-type": "multipart/form-data"}),
        (b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nbroken off', multipart),
        (b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\ntext\r\n--x--\r\n', multipart),
    ]:
        answer = await http.post("/v1/audio/transcriptions", content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), body
    assert (await http.get("/v1/nothing")).json()["error"]["code"] == "not_found"


async def test_an_upload_over_the_limit(http: httpx.AsyncClient) -> None:
    answer = await post(http, {"model": "micro"}, bytes(9 * MIB))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


async def test_figures(http: httpx.AsyncClient) -> None:
    body = (await http.get("/metrics")).text
    assert "stenogate_queue_depth 0.0" in body


# --- who may call -------------------------------------------------------------------------------------------------


async def test_only_the_token_opens_it() -> None:
    server = EngineServer(micro, token="the token", max_upload_bytes=MIB)
    async with serving(server) as address, httpx.AsyncClient(base_url=address) as http:
        await server.load()
        for authorization in ("", "Bearer", "Bearer the toke", "Basic the token", "the token"):
            for answer in (
                await http.get("/v1/models", headers={"authorization": authorization}),
                await http.post("/v1/audio/transcriptions", headers={"authorization": authorization}),
            ):
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="the token") as client:
            assert (await client.audio.transcriptions.create(file=CLIP, model="micro")).text == SAID
        for path in ("/livez", "/readyz", "/metrics"):
            assert (await http.get(path)).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "engine.example"])
def test_without_a_token_it_stays_at_home(host: str) -> None:
    with pytest.raises(Unprotected, match="STENOGATE_ENGINE_TOKEN"):
        run(micro, host=host, port=0, token=None, max_upload_bytes=MIB)


# --- work that is held --------------------------------------------------------------------------------------------


class Held:
    """An engine that says one word, and holds what follows until it is let go, or until it is told to stop."""

    workers = 1
    batch_limit = 1

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.entered, self.open, self.stopped = (threading.Event() for _ in range(3))
        self.failure: Exception | None = None

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
        if self.failure:
            raise self.failure
        heard(Segment(1, 2, "two"))
        return Recognised("one two", "en")

    def close(self) -> None:
        pass


@pytest.fixture
def engine() -> Held:
    return Held(KNOWN["base"])


@pytest.fixture
def backend(engine: Held, tmp_path: Path) -> LocalBackend:
    return LocalBackend(KNOWN["base"], workers=1, cache_dir=tmp_path, queue_limit=1, load=lambda _: engine)


@pytest.fixture
async def busy(engine: Held, backend: LocalBackend) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server whose engine is held."""
    server = EngineServer(lambda: backend, token=None, max_upload_bytes=MIB)
    async with serving(server) as address, httpx.AsyncClient(base_url=address, timeout=60) as http:
        await server.load()
        yield http
        engine.open.set()


async def until(met: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not met():  # noqa: ASYNC110 — a thread's doing
            await asyncio.sleep(0.01)


async def test_who_leaves_the_queue_is_not_waited_for(
    busy: httpx.AsyncClient, engine: Held, backend: LocalBackend
) -> None:
    first = asyncio.create_task(post(busy, {}))
    await until(engine.entered.is_set)
    second = asyncio.create_task(post(busy, {"stream": "true"}))
    await until(lambda: backend.waiting == 1)
    refused = await post(busy, {})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_seat")
    assert int(refused.headers["retry-after"]) >= 1
    second.cancel()
    await until(lambda: backend.waiting == 0)
    assert not engine.stopped.is_set()
    engine.open.set()
    assert (await first).json()["text"] == "one two"


@pytest.mark.parametrize("stream", ["false", "true"])
async def test_who_leaves_stops_the_engine(busy: httpx.AsyncClient, engine: Held, stream: str) -> None:
    request = asyncio.create_task(post(busy, {"stream": stream}))
    await until(engine.entered.is_set)
    request.cancel()
    await until(engine.stopped.is_set)


async def test_who_leaves_a_stream_that_has_begun_stops_the_engine(busy: httpx.AsyncClient, engine: Held) -> None:
    files = {"file": CLIP.read_bytes()}
    async with busy.stream("POST", "/v1/audio/transcriptions", data={"stream": "true"}, files=files) as answer:
        assert '"delta":"one"' in await anext(answer.aiter_lines())
    await until(engine.stopped.is_set)


async def test_an_engine_that_fails(busy: httpx.AsyncClient, engine: Held) -> None:
    engine.failure = RuntimeError("what nobody should read")
    engine.open.set()
    answer = await post(busy, {})
    assert (answer.status_code, answer.json()["error"]["type"]) == (502, "server_error")
    assert "nobody" not in answer.text
    async with AsyncOpenAI(base_url=f"{busy.base_url}/v1", api_key="any", max_retries=0) as client:
        stream = await client.audio.transcriptions.create(file=CLIP, model="base", stream=True)
        with pytest.raises(openai.APIError, match="recogniser failed"):
            async for _ in stream:
                pass


async def test_it_listens_before_it_is_ready(engine: Held, backend: LocalBackend) -> None:
    let = threading.Event()

    def build() -> LocalBackend:
        let.wait(30)
        return backend

    server = EngineServer(build, token=None, max_upload_bytes=MIB)
    async with serving(server) as address, httpx.AsyncClient(base_url=address) as http:
        loading = asyncio.create_task(server.load())
        assert (await http.get("/livez")).status_code == 200
        assert (await http.get("/readyz")).status_code == 503
        assert (await http.get("/v1/models")).status_code == 503
        early = await post(http, {})
        assert (early.status_code, early.json()["error"]["code"]) == (503, "backend_unavailable")
        assert early.headers["retry-after"] == "5"
        let.set()
        await loading
        assert (await http.get("/readyz")).status_code == 200


# --- the process --------------------------------------------------------------------------------------------------


async def test_without_its_model_it_ends() -> None:
    def build() -> LocalBackend:
        raise BackendUnavailable("There is no such model here.")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(BackendUnavailable, match="no such model here"):
            await serve(EngineServer(build, token=None, max_upload_bytes=MIB), listener)


async def test_the_command_serves_and_ends_on_a_signal(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gateway", "engine", "--port", str(port)]
    settings = {"STENOGATE_MODEL": "micro", "STENOGATE_ENGINE_TOKEN": "the token", "STENOGATE_LOG_LEVEL": "warning"}
    process = subprocess.Popen(  # noqa: ASYNC220 — quick
        command, env=os.environ | settings, stderr=subprocess.PIPE
    )
    try:
        async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="the token", max_retries=0) as client:
            async with asyncio.timeout(60):
                while True:
                    try:
                        transcript = await client.audio.transcriptions.create(file=CLIP, model="micro")
                        break
                    except (openai.APIConnectionError, openai.InternalServerError):
                        assert process.poll() is None
                        await asyncio.sleep(0.1)
        assert transcript.text == SAID
        process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.to_thread(process.communicate, timeout=30)
        assert (process.returncode, errors) == (0, b"")
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
