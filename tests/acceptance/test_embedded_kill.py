"""The one-process gateway killed outright in the middle of a job: nothing is lost, nothing is charged twice."""

from __future__ import annotations

import asyncio
import os
import signal
import wave
from contextlib import aclosing
from pathlib import Path
from typing import Any

from dispatchers.engine.models import MICRO_SAMPLES
from dispatchers.wer import word_errors
from gateway.commands.client import Client
from gateway.commands.local import local_gateway

REPEATS = 8
SETTINGS = {"model": "micro", "chunk_ms": "30000", "job_lease_s": "3"}


def repeated(path: Path) -> Path:
    with wave.open(str(MICRO_SAMPLES / "long.wav")) as clip, wave.open(str(path), "wb") as made:
        made.setparams(clip.getparams())
        frames = clip.readframes(clip.getnframes())
        for _ in range(REPEATS):
            made.writeframes(frames)
    return path


async def until_begun(client: Client, link: str) -> None:
    async with aclosing(client.job_events(f"{link}/events")) as jobs:
        async for job in jobs:
            if job["progress"] > 0.2:
                return
    raise AssertionError("the job ended before it could be killed")


async def outcome(client: Client, link: str) -> tuple[dict[str, Any], str, list[dict[str, Any]]]:
    *_, job = [job async for job in client.job_events(f"{link}/events")]
    text = (await client.get(f"{link}/transcript", format="text")).text
    usage = (await client.get("/v1/usage", group_by="model")).json()["data"]
    return job, text, usage


def test_a_job_survives_its_process(tmp_path: Path) -> None:
    spoken = " ".join(row.split("\t")[-1] for row in (MICRO_SAMPLES / "long.tsv").read_text().splitlines()[1:])
    with local_gateway(tmp_path / "data", **SETTINGS) as gateway:
        accepted = asyncio.run(gateway.client.transcribe(repeated(tmp_path / "long.wav"), model="micro"))
        assert accepted.status_code == 202
        link = accepted.json()["links"]["self"]
        asyncio.run(until_begun(gateway.client, link))
        os.kill(gateway.pid, signal.SIGKILL)
    with local_gateway(tmp_path / "data", **SETTINGS) as gateway:
        job, text, usage = asyncio.run(outcome(gateway.client, link))
    assert job["status"] == "completed"
    errors, words = word_errors(" ".join([spoken] * REPEATS), text)
    assert errors / words < 0.05
    assert [(row["requests"], row["billed_ms"]) for row in usage] == [(1, job["audio_ms"])]
