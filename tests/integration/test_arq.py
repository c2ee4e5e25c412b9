"""arq as the doorbell, on a real Redis: bells may be lost or doubled, jobs may not."""

from __future__ import annotations

import asyncio
import wave
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arq.worker import Worker
from redis.asyncio import Redis
from sqlalchemy import text

from dispatchers.backends.scripted import Scripted
from dispatchers.dispatch import Door
from dispatchers.interface import Heard, Options, Samples, Transcript, ignore
from dispatchers.registry import Registry
from policy.admission import Admission
from policy.identity import Authenticator, Caller
from policy.jwks import KeySets
from policy.resolve import Demand
from runtime.blobs import Blobs
from runtime.coordination import InProcess
from runtime.database import Database
from runtime.ids import uuid7
from runtime.settings import Settings
from workers.errors import Unheard
from workers.jobs import Job, Jobs, Upload
from workers.main import work_until, worker_settings
from workers.queue import QUEUE, ArqDoorbell, redis_settings
from workers.schedule import sweep
from workers.transcribe import CONTEXT, Workshop

# arq 0.28 closes its connections by redis-py's old name.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated close:DeprecationWarning")


class Holding(Scripted):
    """Holds every recognition up until told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        self.reached.set()
        await self.go_on.wait()
        return await super().transcribe(audio, options, heard)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(redis_url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
async def bell(redis: Redis, redis_url: str) -> AsyncIterator[ArqDoorbell]:
    doorbell = ArqDoorbell(redis_url)
    yield doorbell
    await doorbell.aclose()


@pytest.fixture
def recogniser() -> Holding:
    return Holding()


@pytest.fixture
def shop(database: Database, settings: Settings, recogniser: Holding, tmp_path: Path) -> Workshop:
    authenticator = Authenticator(
        database, signing_key=bytes(32), issuer="stenogate", audience="stenogate", jwks=KeySets()
    )
    door = Door(database, Admission(database, InProcess()), authenticator, Registry.only(recogniser))
    return Workshop(database, Blobs.open(None, tmp_path / "blobs"), door, settings)


@pytest.fixture
def submit(shop: Workshop, caller: Caller, tmp_path: Path) -> Callable[[ArqDoorbell], Any]:
    """Submits three seconds of silence."""
    path = tmp_path / "upload.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(np.zeros(48_000, np.int16).tobytes())

    async def submit_one(doorbell: ArqDoorbell) -> tuple[Jobs, Job]:
        jobs = Jobs(shop.database, shop.blobs, shop.door, doorbell)
        upload = Upload(path, path.stat().st_size, "upload.wav", "audio/wav", "0" * 64)
        return jobs, await jobs.submit(caller, Demand("job"), Options(), upload)

    return submit_one


@pytest.fixture
def working(shop: Workshop, redis_url: str) -> Callable[[], Any]:
    """A worker on arq for as long as the context is open."""

    @asynccontextmanager
    async def one() -> AsyncIterator[None]:
        stop = asyncio.Event()
        arguments = worker_settings(shop.settings, redis_url, {CONTEXT: shop})
        task = asyncio.create_task(work_until(stop, Worker(**arguments)))
        try:
            yield
        finally:
            stop.set()
            await task

    return one


async def billed(database: Database, job: Job) -> list[int]:
    async with database.tenant(job.tenant_id) as tx:
        query = text("select billed_ms from usage_ledger where source_id = :id")
        return list((await tx.execute(query, {"id": job.id})).scalars())


async def test_a_ring_reaches_a_worker(
    bell: ArqDoorbell, submit: Any, working: Any, redis: Redis, shop: Workshop
) -> None:
    jobs, job = await submit(bell)
    async with working():
        done = await jobs.wait(job.tenant_id, job.id, 30)
    assert (done.status, done.billed_ms) == ("completed", 3000)
    assert await billed(shop.database, job) == [3000]
    assert await redis.zcard(QUEUE) == 0
    assert await redis.keys("arq:*") == []  # nothing keeps a later bell from ringing


async def test_a_lost_redis_loses_nothing(
    bell: ArqDoorbell, submit: Any, working: Any, redis: Redis, shop: Workshop
) -> None:
    jobs, job = await submit(bell)
    await redis.flushall()
    async with working():
        await sweep(shop.database, bell)
        done = await jobs.wait(job.tenant_id, job.id, 30)
    assert done.status == "completed"
    assert await billed(shop.database, job) == [3000]


async def test_a_job_is_taken_without_redis_and_done_when_it_is_back(
    bell: ArqDoorbell, submit: Any, working: Any, shop: Workshop
) -> None:
    dead = ArqDoorbell("redis://127.0.0.1:1/0")
    with pytest.raises(Unheard):
        await dead.ring(uuid7(), uuid7())
    jobs, job = await submit(dead)
    assert job.status == "queued"
    await dead.aclose()
    async with working():
        await sweep(shop.database, bell)
        assert (await jobs.wait(job.tenant_id, job.id, 30)).status == "completed"


async def test_a_try_rings_once_and_the_next_one_again(bell: ArqDoorbell, redis: Redis) -> None:
    tenant_id, job_id, claim = uuid7(), uuid7(), uuid7()
    for _ in range(3):
        await bell.ring(tenant_id, job_id)
    assert await redis.zcard(QUEUE) == 1
    for _ in range(3):
        await bell.ring(tenant_id, job_id, after=claim)
    assert await redis.zcard(QUEUE) == 2
    (task, _) = [await redis.get(key) for key in await redis.keys("arq:job:*")]
    assert b"pickle" not in task
    assert task.startswith(b"{")


async def test_a_worker_told_to_stop_hands_its_job_to_the_next(
    bell: ArqDoorbell, submit: Any, working: Any, recogniser: Holding, shop: Workshop
) -> None:
    recogniser.go_on.clear()
    jobs, job = await submit(bell)
    async with working():
        await recogniser.reached.wait()
    waiting = await jobs.get(job.tenant_id, job.id)
    assert (waiting.status, waiting.attempts) == ("queued", 0)
    recogniser.go_on.set()
    async with working():  # no sweep: the bell itself still rings
        assert (await jobs.wait(job.tenant_id, job.id, 30)).status == "completed"
    assert await billed(shop.database, job) == [3000]


async def test_a_redis_that_is_away_does_not_end_the_worker(shop: Workshop) -> None:
    stop = asyncio.Event()
    arguments = worker_settings(shop.settings, "redis://127.0.0.1:1/0", {CONTEXT: shop})
    stop.set()
    await work_until(stop, Worker(**arguments))  # returns, so that it can be tried again


def test_a_redis_url_is_read_whole() -> None:
    settings = redis_settings("rediss://us%40er:p%2Fw@cache.internal:6380/3")
    assert (settings.host, settings.port, settings.database, settings.ssl) == ("cache.internal", 6380, 3, True)
    assert (settings.username, settings.password) == ("us@er", "p/w")
    unix = redis_settings("unix:///run/redis.sock?db=2")
    assert (unix.unix_socket_path, unix.database) == ("/run/redis.sock", 2)
