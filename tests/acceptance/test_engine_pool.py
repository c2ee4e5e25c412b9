"""A gateway without models, and engines in processes of their own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
from websockets.exceptions import InvalidStatus

from tests.acceptance.test_drain import serving, talking
from tests.acceptance.test_engine_kill import figure, readiness, transcribed
from tests.engines import TOKEN, engine_process, free_port
from tests.streaming import Talk, assert_well_formed, clip

RUNTIMES = ("ctranslate2", "onnxruntime", "pocketsphinx")
SAMPLES, SAID = clip("clip05.wav")


def loaded_by(process: subprocess.Popen[bytes]) -> str:
    """The libraries that a process has loaded."""
    return " ".join(region.path for region in psutil.Process(process.pid).memory_maps())


async def refusal(found: dict[str, str]) -> httpx.Headers | None:
    """The head of the answer that refuses a live stream; None where it is let in."""
    try:
        async with talking(found) as talk:
            await talk.say("start")
            await talk.until("ready")
    except InvalidStatus as refused:
        return httpx.Headers({"status": str(refused.response.status_code), **refused.response.headers})
    return None


def test_an_engine_killed_under_live_streams(tmp_path: Path) -> None:
    """No utterance is lost, none is billed twice, and the gateway holds no model."""

    async def conversation(found: dict[str, str], kill: Callable[[], None]) -> list[Talk]:
        async with talking(found) as one, talking(found) as other:
            talks = [one, other]
            for talk in talks:
                await talk.say("start")
                await talk.until("ready")
                await talk.speak(SAMPLES.tobytes() + bytes(32_000))
            for talk in talks:
                await talk.until("speech_started")
            kill()
            for talk in talks:
                await talk.until("final")
                await talk.speak(SAMPLES.tobytes())
                await talk.say("stop")
            assert [await talk.end() for talk in talks] == [(1000, "")] * 2
            answer = await transcribed(found)
        assert (answer.status_code, answer.json()["text"]) == (200, SAID)
        return talks

    with engine_process() as first, engine_process() as second:
        engines = f"{first.url},{second.url}"
        with serving(tmp_path / "data", engines=engines, engine_token=TOKEN) as (process, found):
            assert asyncio.run(readiness(found)) == (200, "ok")
            talks = asyncio.run(conversation(found, first.process.kill))
            assert asyncio.run(figure(found, "stenogate_engine_up")) == 1
            assert "numpy" in loaded_by(process)
            assert not [runtime for runtime in RUNTIMES if runtime in loaded_by(process)]
            assert not [
                child for child in psutil.Process(process.pid).children() if "dispatchers.engine" in child.cmdline()
            ]
        assert TOKEN not in (tmp_path / "data" / "log").read_text()
    for talk in talks:
        assert_well_formed(talk.events)
        assert talk.text == f"{SAID} {SAID}"
        assert not talk.all("gap")
        closed = talk.events[-1]
        assert closed["billed_ms"] == closed["accepted_ms"] == 2 * len(SAMPLES) // 16 + 1000
        assert closed["coverage"] == 1.0


def test_a_gateway_starts_before_its_engines(tmp_path: Path) -> None:
    """It is ready, refuses with a reason and a time, and serves as soon as an engine is there."""
    port = free_port()

    async def early(found: dict[str, str]) -> None:
        assert await readiness(found) == (200, "away")
        answer = await transcribed(found)
        assert (answer.status_code, answer.json()["code"]) == (503, "BACKEND_UNAVAILABLE")
        assert int(answer.headers["retry-after"]) > 0
        refused = await refusal(found)
        assert refused is not None
        assert refused["status"] == "503"
        assert int(refused["retry-after"]) > 0

    async def late(found: dict[str, str]) -> None:
        async with asyncio.timeout(30):
            while await readiness(found) != (200, "ok"):  # noqa: ASYNC110 — another process' doing
                await asyncio.sleep(0.05)
        assert (await transcribed(found)).json()["text"] == SAID
        assert await refusal(found) is None

    with serving(tmp_path / "data", engines=f"http://127.0.0.1:{port}", engine_token=TOKEN) as (_, found):
        asyncio.run(early(found))
        with engine_process(port=port):
            asyncio.run(late(found))


def test_the_doctor_looks_at_each_engine() -> None:
    with engine_process() as engine:
        away = f"127.0.0.1:{free_port()}"
        environment = {
            "STENOGATE_ENGINES": f"{engine.url},http://{away}",
            "STENOGATE_ENGINE_TOKEN": TOKEN,
            "COLUMNS": "200",
        }
        command = [sys.executable, "-m", "gateway", "doctor"]
        report = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=60)
        wrong = subprocess.run(
            command,
            env=environment | {"STENOGATE_ENGINE_TOKEN": "another"},
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert report.returncode == wrong.returncode == 0, report.stdout + report.stderr
    assert "ready: micro ready" in report.stdout
    assert f"engine {away}" in report.stdout
    assert "cannot be reached" in report.stdout
    assert "STENOGATE_ENGINE_TOKEN" in wrong.stdout
