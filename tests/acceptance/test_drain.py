"""A gateway asked to end while people speak: nobody is cut off without a word, and the bill is right."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect

from gateway.commands.local import local_gateway
from tests.streaming import Talk, assert_well_formed, clip

STREAMS = 5
SETTINGS = {"model": "micro", "engine_workers": "1"}


@contextmanager
def serving(data_dir: Path, **settings: str) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, str]]]:
    """A `serve` in a process of its own, and where it listens."""
    data_dir.mkdir()
    chosen = {"data_dir": str(data_dir), "port": "0", **SETTINGS, **settings}
    with (data_dir / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "serve"],
            env=os.environ | {f"STENOGATE_{name.upper()}": value for name, value in chosen.items()},
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 60
        while not (data_dir / "serve.json").exists():
            assert process.poll() is None, (data_dir / "log").read_text()
            assert time.monotonic() < deadline, (data_dir / "log").read_text()
            time.sleep(0.05)
        yield process, json.loads((data_dir / "serve.json").read_text())
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def talking(found: dict[str, str]) -> AsyncIterator[Talk]:
    headers = {"Authorization": f"Bearer {found['token']}"}
    address = found["url"].replace("http", "ws", 1) + "/v1/stream"
    async with connect(address, additional_headers=headers, compression=None, proxy=None) as socket:
        talk = Talk(socket)
        listening = asyncio.create_task(talk.listen())
        try:
            yield talk
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)


async def speaking(talk: Talk) -> tuple[int | None, str | None]:
    """Speaks a sample, is told that the gateway leaves, and speaks another."""
    samples, _ = clip("clip05.wav")
    await talk.until("draining")
    await talk.speak(samples.tobytes())
    return await talk.end()


def test_live_streams_are_sent_off_and_settled(tmp_path: Path) -> None:
    samples, said = clip("clip05.wav")

    async def conversation(process: subprocess.Popen[bytes], found: dict[str, str]) -> list[Talk]:
        async with AsyncExitStack() as stack:
            talks = [await stack.enter_async_context(talking(found)) for _ in range(STREAMS)]
            for talk in talks:
                await talk.say("start")
                await talk.until("ready")
                await talk.speak(samples.tobytes())
            await asyncio.gather(*(talk.until("speech_started") for talk in talks))
            process.send_signal(signal.SIGTERM)
            ends = await asyncio.gather(*(speaking(talk) for talk in talks))
        assert ends == [(1012, "RESTARTING")] * STREAMS
        return talks

    with serving(tmp_path / "data", stream_drain_s="2") as (process, found):
        talks = asyncio.run(conversation(process, found))
        assert process.wait(30) == 0
    told: dict[str, list[dict[str, Any]]] = {}
    for talk in talks:
        assert_well_formed(talk.events)
        assert talk.text == f"{said} {said}"
        assert talk.all("draining")[0]["resume_token"] == talk.events[0]["resume_token"]
        assert talk.events[-1]["code"] == "RESTARTING"
        told[talk.events[0]["session_id"]] = talk.events

    with local_gateway(tmp_path / "data", **SETTINGS) as gateway:
        listed = asyncio.run(gateway.client.get("/v1/sessions")).json()["data"]
        usage = asyncio.run(gateway.client.get("/v1/usage", group_by="model")).json()["data"]
    assert {row["id"] for row in listed} == set(told)
    length = 2 * len(samples) // 16
    assert [(row["status"], row["billed_ms"]) for row in listed] == [("interrupted", length)] * STREAMS
    assert [(row["requests"], row["billed_ms"]) for row in usage] == [(STREAMS, STREAMS * length)]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_asked_twice_it_ends_at_once(tmp_path: Path, sign: signal.Signals) -> None:
    async def conversation(process: subprocess.Popen[bytes], found: dict[str, str]) -> None:
        async with talking(found) as talk:
            await talk.say("start")
            await talk.until("ready")
            process.send_signal(sign)
            await talk.until("draining")
            process.send_signal(sign)
            await talk.end()

    with serving(tmp_path / "data", stream_drain_s="600") as (process, found):
        asyncio.run(conversation(process, found))
        assert process.wait(30) == 0
