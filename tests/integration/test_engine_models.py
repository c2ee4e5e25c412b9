"""Models of an engine: loaded, unloaded and downloaded while it serves; what is told of it meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dispatchers.backends.local import LocalBackend
from dispatchers.engine import wire
from dispatchers.engine.models import KNOWN, MICRO, MICRO_SAMPLES, POCKETSPHINX
from dispatchers.engine.server import EngineServer
from dispatchers.errors import UnknownModel
from dispatchers.interface import Options
from tests.engines import TOKEN, engine_process, until
from tests.integration.test_engine_client import CLIP as SAMPLES
from tests.integration.test_engine_server import SAID, post, serving
from tests.integration.test_local import Shelf

MIB = 1024 * 1024
HERE, LOST = "tiny.en", "base.en"


@asynccontextmanager
async def served(backend: LocalBackend) -> AsyncIterator[httpx.AsyncClient]:
    server = EngineServer(lambda: backend, token=TOKEN, max_upload_bytes=MIB)
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with serving(server) as address, httpx.AsyncClient(base_url=address, headers=headers) as http:
        await server.load()
        yield http


async def state(http: httpx.AsyncClient, model: str) -> dict[str, Any]:
    """What `GET /v1/models` says of it; empty where it is not listed."""
    listed: list[dict[str, Any]] = (await http.get("/v1/models")).json().get("data", [])
    return next((entry for entry in listed if entry["id"] == model), {})


async def reached(http: httpx.AsyncClient, model: str, status: str) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while (found := await state(http, model)).get("status") != status:  # noqa: ASYNC110 — another process' doing
            await asyncio.sleep(0.02)
    return found


# --- loading and unloading ----------------------------------------------------------------------------------------


async def test_a_model_is_loaded_and_unloaded_while_it_serves() -> None:
    backend = LocalBackend(MICRO, workers=1)
    async with served(backend) as http:
        assert (await state(http, "pocketsphinx"))["status"] == "available"
        answer = await http.put(f"{wire.MODELS}/pocketsphinx")
        assert answer.status_code == 202
        assert wire.load_status(answer.content).models[1].status in ("loading", "ready")
        assert (await post(http, {"model": "micro"})).json()["text"] == SAID
        await reached(http, "pocketsphinx", "ready")
        assert (await http.put(f"{wire.MODELS}/pocketsphinx")).status_code == 202  # it is
        for _ in range(2):
            answer = await http.delete(f"{wire.MODELS}/pocketsphinx")
            assert answer.status_code == 200
        assert (await state(http, "pocketsphinx"))["status"] == "available"
        assert (await post(http, {"model": "pocketsphinx"})).status_code == 200  # loaded again


@pytest.mark.parametrize(
    ("method", "model", "status", "code"),
    [
        ("PUT", "nowhere", 404, "model_not_found"),
        ("PUT", "owner/name", 404, "model_not_found"),  # no names that reach the network
        ("DELETE", "nowhere", 404, "model_not_found"),
        ("DELETE", "micro", 400, "unsupported_option"),
    ],
)
async def test_what_cannot_be_loaded_or_unloaded(method: str, model: str, status: int, code: str) -> None:
    async with served(LocalBackend(MICRO, workers=1)) as http:
        answer = await http.request(method, f"{wire.MODELS}/{model}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        for headers in ({"authorization": ""}, {"authorization": "Bearer another"}):
            assert (await http.request(method, f"{wire.MODELS}/{model}", headers=headers)).status_code == 401


async def test_a_model_at_work_stays() -> None:
    shelf = Shelf()
    async with served(LocalBackend(KNOWN["base"], workers=1, load=shelf)) as http:
        running = asyncio.create_task(post(http, {"model": "micro"}))
        assert await asyncio.to_thread(shelf["micro"].entered.wait, 30)
        answer = await http.delete(f"{wire.MODELS}/micro")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_seat")
        shelf["micro"].open.set()
        assert (await running).status_code == 200
        assert (await http.delete(f"{wire.MODELS}/micro")).status_code == 200
        assert shelf["micro"].closed.is_set()
        shelf["base"].open.set()


async def test_idle_models_are_unloaded_and_the_default_stays() -> None:
    backend = LocalBackend(MICRO, workers=1, idle_s=0.3)
    await backend.warm()

    def states() -> dict[str, str]:
        return {card.name: card.status for card in backend.catalogue()}

    for _ in range(3):
        assert (await backend.transcribe(SAMPLES, Options(model="pocketsphinx"))).text
        assert states()["pocketsphinx"] == "ready"
        await asyncio.sleep(0.1)  # used again before its time
    await until(lambda: states()["pocketsphinx"] == "available")
    assert states()["micro"] == "ready"
    backend.load("pocketsphinx")
    await until(lambda: states()["pocketsphinx"] == "ready")
    await until(lambda: states()["pocketsphinx"] == "available")  # nobody ever asked for it
    await backend.aclose()


async def test_it_says_that_its_default_is_loading() -> None:
    let = threading.Event()
    shelf = Shelf()

    def load(spec: Any) -> Any:
        let.wait(30)
        return shelf(spec)

    backend = LocalBackend(POCKETSPHINX, workers=1, load=load)
    server = EngineServer(lambda: backend, token=None, max_upload_bytes=MIB)
    async with serving(server) as address, httpx.AsyncClient(base_url=address) as http:
        loading = asyncio.create_task(server.load())
        await reached(http, "pocketsphinx", "loading")
        assert (await http.get("/readyz")).status_code == 503
        assert not wire.load_status((await http.get(wire.STATUS)).content).ready
        let.set()
        await loading
        assert wire.load_status((await http.get(wire.STATUS)).content).ready
        shelf["pocketsphinx"].open.set()


# --- downloading --------------------------------------------------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """A hub (its API's `revision`, `tree` and `resolve` routes) that has the micro model under another name. Nothing is
    given out before `half`, and of a large file only half before `whole`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files = {
            path.name: path.read_bytes() for path in sorted(Path(MICRO.source).iterdir()) if path.name != "README.md"
        }
        self.repository = KNOWN[HERE].source
        self.half, self.whole = threading.Event(), threading.Event()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    commit = "c0ffee" * 6 + "beef"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        api = f"/api/models/{self.server.repository}"
        if path.startswith(f"{api}/tree/"):
            self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                    for name, data in self.server.files.items()
                ]
            )
        elif path.startswith(api):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._json({"id": self.server.repository, "sha": self.commit, "siblings": siblings})
        elif (data := self.server.files.get(path.rpartition("/")[2])) is not None and self.server.repository in path:
            self._file(data)
        else:
            self.send_response(404)
            self.send_header("x-error-code", "RepoNotFound")
            self.send_header("content-length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def _json(self, body: object) -> None:
        self._send(json.dumps(body).encode(), {"content-type": "application/json"})

    def _file(self, data: bytes) -> None:
        self._send(data, {"etag": f'"{_etag(data)}"', "x-repo-commit": self.commit, "accept-ranges": "bytes"})

    def _send(self, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "content-length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        middle = len(data) // 2 if len(data) > MIB else len(data)
        self.server.half.wait(30)
        self.wfile.write(data[:middle])
        if middle < len(data):
            self.server.whole.wait(30)
            self.wfile.write(data[middle:])

    def log_message(self, *_: object) -> None:
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def hub() -> Iterator[Hub]:
    running = Hub()
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
        yield running
    finally:
        running.half.set()
        running.whole.set()
        running.shutdown()
        thread.join()
        running.server_close()


async def test_a_download_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real engine process, the hub's own library, and a hub on loopback; the model is used in the end."""
    with hub() as running:
        for name, value in {
            "HF_ENDPOINT": running.endpoint,
            "HF_HUB_DOWNLOAD_TIMEOUT": "30",
            "HF_HUB_OFFLINE": "0",
        }.items():
            monkeypatch.setenv(name, value)
        running.half.clear()
        with engine_process(model_cache_dir=str(tmp_path)) as engine:
            headers = {"authorization": f"Bearer {TOKEN}"}
            async with httpx.AsyncClient(base_url=engine.url, headers=headers, timeout=30, trust_env=False) as client:
                assert await state(client, HERE) == {}
                assert (await post(client, {"model": HERE})).status_code == 404  # a request starts no download
                assert (await client.put(f"{wire.MODELS}/{HERE}")).status_code == 202
                running.half.set()
                async with asyncio.timeout(30):
                    while (await state(client, HERE)).get("progress", 0) < 5:  # noqa: ASYNC110 — what is not held back
                        await asyncio.sleep(0.02)
                found = await state(client, HERE)
                assert (found["status"], found["progress"] < 100) == ("downloading", True)
                assert (await post(client, {"model": "micro"})).json()["text"] == SAID  # and it serves
                status = wire.load_status((await client.get(wire.STATUS)).content)
                assert [(card.status, card.progress) for card in status.models if card.name == HERE] == [
                    ("downloading", found["progress"])
                ]
                running.whole.set()
                assert "progress" not in await reached(client, HERE, "ready")
                assert (await post(client, {"model": HERE})).json()["text"]
                assert (await client.delete(f"{wire.MODELS}/{HERE}")).status_code == 200
                assert (await state(client, HERE))["status"] == "cached"

                assert (await client.put(f"{wire.MODELS}/{LOST}")).status_code == 202
                await reached(client, LOST, "failed")
                assert (await post(client, {"model": LOST})).status_code == 404


def test_a_name_is_never_taken_from_a_request() -> None:
    with pytest.raises(UnknownModel):
        LocalBackend(MICRO, workers=1).load(str(MICRO_SAMPLES))
