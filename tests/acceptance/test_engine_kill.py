"""The models' process killed outright under a gateway that people are using, and the gateway under its models."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from gateway.commands.local import local_gateway
from tests.acceptance.test_drain import SETTINGS, serving, talking
from tests.streaming import Talk, assert_well_formed, clip

SAMPLES, SAID = clip("clip05.wav")
LENGTH_MS = len(SAMPLES) // 16
TWICE_MS = 2 * len(SAMPLES) // 16


def engine_of(pid: int) -> psutil.Process:
    """The process with the models, of a gateway that has one."""
    (engine,) = (child for child in psutil.Process(pid).children() if "dispatchers.engine" in child.cmdline())
    return engine


async def until(met: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not met():  # noqa: ASYNC110 — another process' doing
            await asyncio.sleep(0.02)


async def transcribed(found: dict[str, str]) -> httpx.Response:
    headers = {"Authorization": f"Bearer {found['token']}"}
    recording = (Path(__file__).parents[2] / "dispatchers/engine/micro/samples/clip05.wav").read_bytes()
    async with httpx.AsyncClient(base_url=found["url"], headers=headers, timeout=60, trust_env=False) as http:
        return await http.post(
            "/v1/audio/transcriptions", data={"model": "micro"}, files={"file": ("a.wav", recording)}
        )


async def readiness(found: dict[str, str]) -> tuple[int, Any]:
    async with httpx.AsyncClient(base_url=found["url"], timeout=10, trust_env=False) as http:
        answer = await http.get("/readyz")
    return answer.status_code, answer.json()["checks"]["engine"]


async def figure(found: dict[str, str], name: str) -> float:
    async with httpx.AsyncClient(base_url=found["url"], timeout=10, trust_env=False) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def test_an_engine_killed_in_mid_utterance_is_replaced(tmp_path: Path) -> None:
    """The stream hears of it and loses nothing; a file that comes meanwhile waits; the bill is exact."""
    half = len(SAMPLES) // 2

    async def conversation(process: subprocess.Popen[bytes], found: dict[str, str]) -> Talk:
        assert await readiness(found) == (200, "ok")
        async with talking(found) as talk:
            await talk.say("start")
            await talk.until("ready")
            await talk.speak(SAMPLES[:half].tobytes())
            await talk.until("partial")
            killed = engine_of(process.pid)
            killed.kill()
            await until(lambda: not killed.is_running() or killed.status() == psutil.STATUS_ZOMBIE)
            waiting = asyncio.create_task(transcribed(found))
            await asyncio.sleep(0.2)
            assert await readiness(found) == (503, "away")
            await talk.speak(SAMPLES[half:].tobytes() + bytes(32_000))
            await talk.until("error")
            await talk.until("final")
            assert await readiness(found) == (200, "ok")
            await talk.speak(SAMPLES.tobytes())
            await talk.say("stop")
            assert await talk.end() == (1000, "")
            answer = await waiting
        assert (answer.status_code, answer.json()["text"]) == (200, SAID)
        assert engine_of(process.pid).pid != killed.pid
        assert await figure(found, "stenogate_engine_restarts_total") == 1
        return talk

    with serving(tmp_path / "data") as (process, found):
        talk = asyncio.run(conversation(process, found))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert_well_formed(talk.events)
    assert talk.text == f"{SAID} {SAID}"
    (error,) = talk.all("error")
    assert (error["code"], error["retryable"], error["fatal"]) == ("BACKEND_UNAVAILABLE", True, False)
    accepted = TWICE_MS + 1000
    closed = talk.events[-1]
    assert (closed["accepted_ms"], closed["billed_ms"], closed["coverage"]) == (accepted, accepted, 1.0)

    with local_gateway(tmp_path / "data", **SETTINGS) as gateway:
        usage = asyncio.run(gateway.client.get("/v1/usage", group_by="model")).json()["data"]
    assert [(row["requests"], row["billed_ms"]) for row in usage] == [(2, accepted + LENGTH_MS)]


def test_a_final_lost_with_the_engine_is_a_gap(tmp_path: Path) -> None:
    """Killed while it makes a final that nothing was heard of before: told, a gap, billed as accepted."""

    async def conversation(process: subprocess.Popen[bytes], found: dict[str, str]) -> Talk:
        async with talking(found) as talk:
            await talk.say("start", partials=False)
            await talk.until("ready")
            engine = engine_of(process.pid)
            engine.suspend()
            await talk.speak(SAMPLES.tobytes())
            await talk.until("speech_started")
            await talk.say("flush")
            await talk.say("ping", id=1)
            await talk.until("pong")
            await asyncio.sleep(0.5)
            engine.kill()
            await talk.until("gap")
            await talk.speak(SAMPLES.tobytes())
            await talk.say("stop")
            assert await talk.end() == (1000, "")
        return talk

    with serving(tmp_path / "data") as (process, found):
        talk = asyncio.run(conversation(process, found))
    assert [event["seq"] for event in talk.events] == list(range(1, len(talk.events) + 1))
    error, gap = (talk.all(kind)[0] for kind in ("error", "gap"))
    assert (error["code"], error["retryable"], error["fatal"]) == ("BACKEND_UNAVAILABLE", True, False)
    assert gap["seq"] == error["seq"] + 1
    assert talk.text == SAID
    assert talk.events[-1]["billed_ms"] == TWICE_MS
    assert talk.events[-1]["coverage"] < 0.7


def test_a_killed_gateway_leaves_no_engine(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as (process, _):
        engine = engine_of(process.pid)
        process.kill()
        process.wait()
        engine.wait(30)  # raises when it is still there


def test_the_engine_stays_until_the_last_final(tmp_path: Path) -> None:
    """A service manager signals every process it started at once."""

    async def conversation(process: subprocess.Popen[bytes], found: dict[str, str]) -> Talk:
        async with talking(found) as talk:
            await talk.say("start")
            await talk.until("ready")
            await talk.speak(SAMPLES.tobytes())
            await talk.until("speech_started")
            for pid in (engine_of(process.pid).pid, process.pid):
                os.kill(pid, signal.SIGTERM)
            await talk.until("draining")
            await talk.speak(SAMPLES.tobytes())
            assert await talk.end() == (1012, "RESTARTING")
        return talk

    with serving(tmp_path / "data", stream_drain_s="1") as (process, found):
        engine = engine_of(process.pid)
        talk = asyncio.run(conversation(process, found))
        began = time.monotonic()
        assert process.wait(30) == 0
        engine.wait(1)
    assert time.monotonic() - began < 20
    assert talk.text == f"{SAID} {SAID}"
    assert talk.events[-1]["code"] == "RESTARTING"
