"""The doorbell: tells a worker that a job is due. Nothing more: the job's row is the truth.

A ring may be lost or come twice. A lost one is repeated by the sweeper (`workers.schedule`), and of two the second
finds nothing to claim.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any, Protocol
from urllib.parse import unquote
from uuid import UUID

from arq.connections import ArqRedis, RedisSettings, create_pool
from redis.exceptions import RedisError

from workers.errors import Unheard

QUEUE = "stenogate:jobs"
TASK = "transcribe_job"
RING_TIMEOUT_S = 3.0
WAITING = 10_000


class Doorbell(Protocol):
    """Rings for a job. `after` is the token of its last claim, None before the first: for each try it rings once."""

    async def ring(self, tenant_id: UUID, job_id: UUID, *, after: UUID | None = None) -> None:
        """Raises `Unheard`."""
        ...

    async def aclose(self) -> None: ...


class InProcessDoorbell:
    """For workers in the same process. A job that waits already is not queued again."""

    def __init__(self, waiting: int = WAITING):
        self._queue: asyncio.Queue[tuple[UUID, UUID]] = asyncio.Queue(waiting)
        self._waiting: set[UUID] = set()

    async def ring(self, tenant_id: UUID, job_id: UUID, *, after: UUID | None = None) -> None:
        if job_id in self._waiting:
            return
        try:
            self._queue.put_nowait((tenant_id, job_id))
        except asyncio.QueueFull:
            raise Unheard("Too many jobs wait.") from None
        self._waiting.add(job_id)

    async def answer(self) -> tuple[UUID, UUID]:
        """The next tenant and job; waits for one."""
        tenant_id, job_id = await self._queue.get()
        self._waiting.discard(job_id)
        return tenant_id, job_id

    async def aclose(self) -> None:
        """Nothing to close."""


class ArqDoorbell:
    """For workers on arq. Connects at the first ring, so that a gateway starts without its Redis.

    arq takes an id at most once while the job with it waits, runs, or is thought to run: a killed worker's for as long
    as the longest job may take. Hence one id for each try, not for each job.
    """

    def __init__(self, redis_url: str):
        self._settings = redis_settings(redis_url)
        self._connecting = asyncio.Lock()
        self._redis: ArqRedis | None = None

    async def ring(self, tenant_id: UUID, job_id: UUID, *, after: UUID | None = None) -> None:
        bell = f"{job_id.hex}:{after.hex if after else 'new'}"
        try:
            async with asyncio.timeout(RING_TIMEOUT_S):
                redis = await self._connected()
                await redis.enqueue_job(TASK, str(tenant_id), str(job_id), _job_id=bell)
        except (RedisError, OSError) as error:  # a TimeoutError is an OSError
            raise Unheard(type(error).__name__) from error

    async def aclose(self) -> None:
        if self._redis is not None:
            await self._redis.aclose(close_connection_pool=True)

    async def _connected(self) -> ArqRedis:
        async with self._connecting:
            if self._redis is None:
                self._redis = await create_pool(self._settings, default_queue_name=QUEUE, job_serializer=dump)
            return self._redis


def redis_settings(url: str) -> RedisSettings:
    """arq's view of a `redis://`, `rediss://` or `unix://` URL."""
    settings = RedisSettings.from_dsn(url)
    username, password = unquote(settings.username or ""), unquote(settings.password or "")
    return replace(settings, username=username or None, password=password or None, conn_retries=0)


def dump(task: dict[str, Any]) -> bytes:
    """What goes into Redis: JSON, not arq's pickle, which would run whatever somebody else put there."""
    return json.dumps(task, default=str).encode()


def load(raw: bytes) -> dict[str, Any]:
    """The inverse of `dump`."""
    task: dict[str, Any] = json.loads(raw)
    return task
