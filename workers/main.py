"""Puts workers together: on arq (`stenogate work`), or inside the gateway where there is no Redis."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import structlog
from arq.worker import Worker, func
from redis.exceptions import RedisError

from dispatchers.assembly import open_door
from dispatchers.dispatch import Door
from runtime.errors import Misconfigured
from runtime.resources import Resources, open_resources
from runtime.settings import Settings
from runtime.telemetry import configure_logging
from workers.jobs import Jobs
from workers.queue import QUEUE, TASK, ArqDoorbell, InProcessDoorbell, dump, load, redis_settings
from workers.schedule import swept, tidied
from workers.transcribe import CONTEXT, Workshop, transcribe_job
from workers.webhooks import delivered

if TYPE_CHECKING:
    from arq.typing import WorkerCoroutine

log = structlog.get_logger()

JOB_TIMEOUT_S = 24 * 3600  # our own leases find a dead worker long before arq would
POLL_S = 0.2
HEALTH_S = 10
REDIS_AWAY_S = 2.0


@asynccontextmanager
async def open_jobs(resources: Resources, door: Door) -> AsyncIterator[Jobs]:
    """The jobs of a gateway: done by workers on arq where there is a Redis, else by workers in this process."""
    settings, database, blobs = resources.settings, resources.database, resources.blobs
    async with tidied(database, blobs):
        if settings.redis_url is None:
            doorbell = InProcessDoorbell()
            async with (
                embedded_workers(context_of(resources, door), doorbell, settings.job_workers),
                delivered(database, resources.sealer, resources.egress),
            ):
                yield Jobs(database, blobs, door, doorbell)
        else:
            async with aclosing(ArqDoorbell(settings.redis_url.get_secret_value())) as bell:
                yield Jobs(database, blobs, door, bell)


def context_of(resources: Resources, door: Door) -> dict[Any, Any]:
    """What `transcribe_job` works with."""
    return {CONTEXT: Workshop(resources.database, resources.blobs, door, resources.settings)}


@asynccontextmanager
async def embedded_workers(context: dict[Any, Any], doorbell: InProcessDoorbell, count: int) -> AsyncIterator[None]:
    """So many workers in this process. On leaving, what they are at goes back to the queue."""
    shop: Workshop = context[CONTEXT]
    async with swept(shop.database, doorbell):
        workers = [asyncio.create_task(_answer(context, doorbell)) for _ in range(count)]
        try:
            yield
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


async def _answer(context: dict[Any, Any], doorbell: InProcessDoorbell) -> None:
    while True:
        tenant_id, job_id = await doorbell.answer()
        try:
            await transcribe_job(context, str(tenant_id), str(job_id))
        except Exception as error:  # noqa: BLE001 — the job's lease runs out, and it is found again
            log.warning("job.abandoned", job_id=str(job_id), error=type(error).__name__)


def run(settings: Settings) -> None:
    """Works until SIGINT or SIGTERM; then gives what it is at back to the queue. Blocking; for the main thread."""
    if settings.redis_url is None:
        raise Misconfigured("set STENOGATE_REDIS_URL: without it, the gateway does its jobs itself")
    configure_logging(settings.log_level, settings.log_format)
    asyncio.run(_work(settings, settings.redis_url.get_secret_value()))


def worker_settings(settings: Settings, redis_url: str, context: dict[Any, Any]) -> dict[str, Any]:
    """The arguments of arq's `Worker`."""
    return {
        "functions": [func(cast("WorkerCoroutine", transcribe_job), name=TASK)],
        "queue_name": QUEUE,
        "redis_settings": redis_settings(redis_url),
        "ctx": context,
        "max_jobs": settings.job_workers,
        "job_timeout": JOB_TIMEOUT_S,
        "keep_result": 0,
        "poll_delay": POLL_S,
        "health_check_interval": HEALTH_S,
        "handle_signals": False,
        "job_serializer": dump,
        "job_deserializer": load,
        "log_results": False,
    }


async def _work(settings: Settings, redis_url: str) -> None:
    stop = asyncio.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(sign, stop.set)
    async with (
        open_resources(settings) as resources,
        open_door(resources) as opened,
        aclosing(ArqDoorbell(redis_url)) as doorbell,
        tidied(resources.database, resources.blobs),
        swept(resources.database, doorbell),
        delivered(resources.database, resources.sealer, resources.egress),
    ):
        arguments = worker_settings(settings, redis_url, context_of(resources, opened.door))
        log.info("worker.ready", engine=opened.model_note, jobs=settings.job_workers)
        while not stop.is_set():
            await work_until(stop, Worker(**arguments))
    log.info("worker.stopped")


async def work_until(stop: asyncio.Event, worker: Worker) -> None:
    """Runs an arq worker until told to stop, or until Redis fails it. What it is at goes back to the queue."""
    working, stopping = asyncio.create_task(worker.async_run()), asyncio.create_task(stop.wait())
    await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    endings = await asyncio.gather(worker.close(), working, return_exceptions=True)
    failures = [ending for ending in endings if isinstance(ending, Exception)]
    for failure in failures:
        if not isinstance(failure, RedisError | OSError):
            raise failure
    if not stop.is_set():
        log.warning("worker.redis_away", errors=[type(failure).__name__ for failure in failures])
        await asyncio.sleep(REDIS_AWAY_S)
