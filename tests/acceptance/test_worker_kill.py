"""Real worker processes on a real Redis, killed and stopped in the middle of real recognition."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import wave
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from dispatchers.assembly import Opened, open_door
from dispatchers.interface import Options
from dispatchers.wer import word_errors
from policy import pricing, tenants
from policy.identity import Caller
from policy.resolve import Demand
from runtime.database import Database
from runtime.ids import uuid7
from runtime.resources import open_resources
from runtime.settings import Settings
from workers.jobs import Job, Jobs, Upload
from workers.main import open_jobs

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "dispatchers" / "engine" / "micro" / "samples"
REPEATS = 3
CHUNK_MS = 15_000
LEASE_S = 2.0


@dataclass(frozen=True)
class Plant:
    """A gateway's side of the jobs, and the way to start workers beside it."""

    settings: Settings
    opened: Opened
    jobs: Jobs
    caller: Caller
    recording: Path
    log: Path

    def blobs_left(self) -> list[Path]:
        folder = Path(str(self.settings.blob_url).removeprefix("file://"))
        return [path for path in folder.rglob("*") if path.is_file()]

    async def submit(self) -> Job:
        upload = Upload(self.recording, self.recording.stat().st_size, "long.wav", "audio/wav", "0" * 64)
        return await self.jobs.submit(self.caller, Demand("job", model="micro"), Options(), upload)

    @contextmanager
    def worker(self) -> Iterator[subprocess.Popen[bytes]]:
        names = ("database_url", "system_database_url", "redis_url")
        secrets = {name: getattr(self.settings, name).get_secret_value() for name in names}
        plain = ("data_dir", "blob_url", "model", "engine_workers", "chunk_ms", "job_lease_s")
        given = secrets | {name: str(getattr(self.settings, name)) for name in plain}
        environment = os.environ | {f"STENOGATE_{name.upper()}": value for name, value in given.items()}
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "work"], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait(timeout=10)


@pytest.fixture
async def plant(settings: Settings, database: Database, redis_url: str, tmp_path: Path) -> AsyncIterator[Plant]:
    own = settings.model_copy(
        update={
            "redis_url": SecretStr(redis_url),
            "blob_url": f"file://{tmp_path / 'blobs'}",
            "model": "micro",
            "engine_workers": 1,
            "chunk_ms": CHUNK_MS,
            "job_lease_s": LEASE_S,
        }
    )
    async with database.across_tenants("test set-up") as tx:
        tenant = await tenants.create(tx, slug=f"t-{uuid7().hex[:12]}", actor="test")
        await pricing.set_price(
            tx,
            backend="self_hosted",
            price_nano_per_hour=258_000_000,
            currency="USD",
            tenant_id=tenant.id,
            actor="test",
        )
    caller = Caller(tenant.id, tenant.slug, "tester", frozenset({"transcribe"}), "token", 4_102_444_800)
    recording = tmp_path / "long.wav"
    with wave.open(str(SAMPLES / "long.wav")) as once, wave.open(str(recording), "wb") as file:
        file.setparams(once.getparams())
        file.writeframes(once.readframes(once.getnframes()) * REPEATS)
    async with open_resources(own) as resources, open_door(resources) as opened, open_jobs(resources, opened.door) as j:
        yield Plant(own, opened, j, caller, recording, tmp_path / "worker.log")


async def chunks_of(database: Database, job: Job) -> list[tuple[int, datetime]]:
    async with database.tenant(job.tenant_id) as tx:
        query = text("select chunk_no, done_at from job_chunks where job_id = :id order by chunk_no")
        return [(row.chunk_no, row.done_at) for row in await tx.execute(query, {"id": job.id})]


async def chunks_done(database: Database, job: Job, count: int) -> None:
    async with asyncio.timeout(60):
        while len(await chunks_of(database, job)) < count:  # noqa: ASYNC110  another process does them
            await asyncio.sleep(0.02)


async def test_a_killed_worker_costs_one_chunk_and_never_a_second_charge(plant: Plant, database: Database) -> None:
    job = await plant.submit()

    with plant.worker() as victim:
        await chunks_done(database, job, 2)
        victim.send_signal(signal.SIGKILL)
        victim.wait(timeout=10)
    left = await plant.jobs.get(job.tenant_id, job.id)
    assert (left.status, left.billed_ms) == ("running", 0), plant.log.read_text()
    survived = await chunks_of(database, job)

    with plant.worker() as second:
        await chunks_done(database, job, len(survived) + 1)
        second.send_signal(signal.SIGTERM)
        assert second.wait(timeout=20) == 0, plant.log.read_text()
    given_back = await plant.jobs.get(job.tenant_id, job.id)
    assert (given_back.status, given_back.billed_ms) == ("queued", 0), plant.log.read_text()
    kept = await chunks_of(database, job)

    with plant.worker():
        done = await plant.jobs.wait(job.tenant_id, job.id, 90)
        undisturbed = await plant.submit()
        await plant.jobs.wait(job.tenant_id, undisturbed.id, 90)
        async with asyncio.timeout(30):
            while plant.blobs_left():  # noqa: ASYNC110  another process removes them
                await asyncio.sleep(0.05)
    assert done.status == "completed", plant.log.read_text()

    redone = await chunks_of(database, job)
    assert redone[: len(survived)] == survived
    assert redone[: len(kept)] == kept
    assert [number for number, _ in redone] == list(range(len(redone)))
    async with database.tenant(job.tenant_id) as tx:
        query = text("select billed_ms from usage_ledger where source_id = :id")
        charged = list((await tx.execute(query, {"id": job.id})).scalars())
    assert charged == [done.audio_ms]
    transcript = await plant.jobs.transcript(job.tenant_id, job.id)
    assert transcript == await plant.jobs.transcript(job.tenant_id, undisturbed.id)
    lines = (SAMPLES / "long.tsv").read_text().splitlines()[1:]
    errors, words = word_errors(" ".join([line.split("\t")[2] for line in lines] * REPEATS), transcript.text)
    assert errors / words < 0.05
