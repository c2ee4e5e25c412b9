"""Keeps the audio of live sessions, where their policy says so: on the sample clock of the transcript, in parts of two
minutes, stored as soon as they are full.

A recording never holds its session up. What does not get through (a disk, a blob store or a database that is away for
long) is counted, logged and lost; the parts around it keep their place on the clock, so that the hole can be told. The
part under way lies on the disk in a file without a name: a crash leaves nothing of it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias
from uuid import UUID

import numpy as np
import structlog

from dispatchers.audio.resample import mixed
from dispatchers.audio.spooled import SpooledPart
from dispatchers.interface import SAMPLE_RATE, Pcm, Samples, StreamInput
from policy import recordings
from policy.errors import LedgerUnavailable, NotFound
from policy.outage import ledger_reachable
from policy.policies import PolicyBody
from runtime.blobs import Blobs, BlobsUnavailable
from runtime.database import Database
from runtime.telemetry import RECORDED_SECONDS, UNRECORDED_SECONDS

log = structlog.get_logger()

PART_SAMPLES = 120 * SAMPLE_RATE  # 3.8 MB at most: one request to any blob store
BITE_SAMPLES = 5 * SAMPLE_RATE
BEHIND_SAMPLES = 120 * SAMPLE_RATE
"""Audio that may wait for the encoder, in memory."""

WAITING_PARTS = 5
"""Parts that may wait for the blob store, on the disk: ten minutes of it being away cost nothing."""

RETRY_S = 2.0
FINISH_S = 30.0
"""How long after its session's end a recording is still tried to be stored; well below `recordings.SETTLING_S`."""

CLOSE_S = 10.0
THREADS = 2
UPLOADS = 4

Wrap: TypeAlias = Callable[[AsyncIterator[StreamInput]], AsyncIterator[StreamInput]]


class Recorder:
    """One a process. `folder` is for what is not stored yet."""

    def __init__(self, database: Database, blobs: Blobs, folder: Path):
        self.database = database
        self.blobs = blobs
        self.folder = folder
        self.threads = ThreadPoolExecutor(THREADS, "recorder")
        self.uploads = asyncio.Semaphore(UPLOADS)
        self._tasks: set[asyncio.Task[None]] = set()

    @contextmanager
    def taping(self, tenant_id: UUID, session_id: UUID, policy: PolicyBody, *, start: int = 0) -> Iterator[Wrap]:
        """Gives what audio is to pass through: kept where the policy says so, as the session's from its sample `start`
        on. On leaving, the rest is stored behind the caller's back."""
        if not policy.keep_audio:
            yield lambda audio: audio
            return
        tape = _Tape(self, tenant_id, session_id, policy.audio_ttl_s, start)
        task = asyncio.create_task(tape.run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            yield tape.heard
        finally:
            tape.end()

    async def aclose(self) -> None:
        """Waits until every recording is stored or given up."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.threads.shutdown(wait=False)


@dataclass(slots=True)
class _Bite:
    """Samples that wait for the encoder."""

    start: int
    samples: Samples


class _Tape:
    """One session's. `heard` and `end` are called by the session and wait for nothing."""

    def __init__(self, recorder: Recorder, tenant_id: UUID, session_id: UUID, ttl_s: int, start: int):
        self._recorder = recorder
        self._tenant_id = tenant_id
        self._session_id = session_id
        self._ttl_s = ttl_s
        self._clock = start
        self._fresh: list[Samples] = []  # not yet a bite
        self._fresh_size = 0
        self._bites: deque[_Bite] = deque()
        self._bites_size = 0
        self._parts: deque[SpooledPart] = deque()
        self._under_way: SpooledPart | None = None  # being written
        self._in_hand: SpooledPart | None = None  # being stored
        self._news = asyncio.Event()
        self._full = asyncio.Event()
        self._ended = self._encoded = self._over = False
        self._deadline: asyncio.Timeout | None = None

    async def heard(self, audio: AsyncIterator[StreamInput]) -> AsyncIterator[StreamInput]:
        """The same, taken down as it passes."""
        async for item in audio:
            if isinstance(item, Pcm):
                self._hear(mixed(item.samples))
            yield item

    def end(self) -> None:
        """Nothing more will be heard."""
        self._bite()
        self._ended = True
        self._news.set()
        if self._deadline is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time() + FINISH_S)

    async def run(self) -> None:
        """Encodes and stores until all is stored, or given up."""
        try:
            async with asyncio.timeout(FINISH_S if self._ended else None) as self._deadline:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._encode())
                    tasks.create_task(self._store())
        except TimeoutError:
            self._give_up("store")
        except Exception as error:  # noqa: BLE001  the session goes on without it
            causes = error.exceptions if isinstance(error, BaseExceptionGroup) else (error,)
            kinds = [type(cause).__name__ for cause in causes]  # a traceback might quote what was said
            log.error("recording.failed", session_id=str(self._session_id), errors=kinds)  # noqa: TRY400  see above
            self._give_up("failed")
        finally:
            self._give_up("stopped")

    # --- heard ---

    def _hear(self, samples: Samples) -> None:
        self._fresh.append(samples)
        self._fresh_size += len(samples)
        if self._fresh_size >= BITE_SAMPLES:
            self._bite()

    def _bite(self) -> None:
        if not self._fresh:
            return
        if self._over or self._bites_size + self._fresh_size > BEHIND_SAMPLES:
            self._lost(self._fresh_size, "failed" if self._over else "behind")
        else:
            self._bites.append(_Bite(self._clock, np.concatenate(self._fresh)))
            self._bites_size += self._fresh_size
            self._news.set()
        self._clock += self._fresh_size
        self._fresh, self._fresh_size = [], 0

    # --- encoded ---

    async def _encode(self) -> None:
        while (bite := await self._next()) is not None:
            start, samples = bite.start, bite.samples
            while len(samples):
                part = self._under_way
                if part is not None and (part.samples >= PART_SAMPLES or part.end != start):
                    await self._filed(part)
                    part = None
                self._under_way = part = part or SpooledPart(start)
                piece = samples[: PART_SAMPLES - part.samples]
                await self._written(part, piece)
                start, samples = start + len(piece), samples[len(piece) :]
        if self._under_way is not None:
            await self._filed(self._under_way)
        self._encoded = True
        self._full.set()

    async def _next(self) -> _Bite | None:
        while not self._bites:
            if self._ended:
                return None
            self._news.clear()
            await self._news.wait()
        bite = self._bites.popleft()
        self._bites_size -= len(bite.samples)
        return bite

    async def _written(self, part: SpooledPart, samples: Samples) -> None:
        try:
            await self._in_thread(lambda: part.add(samples, self._recorder.folder))
        except OSError as error:
            self._no_room(part, len(samples), error)

    async def _filed(self, part: SpooledPart) -> None:
        try:
            await self._in_thread(part.finish)
        except OSError as error:
            self._no_room(part, 0, error)
            return
        self._under_way = None
        self._parts.append(part)
        self._full.set()
        if len(self._parts) > WAITING_PARTS:
            oldest = self._parts.popleft()
            self._lost(oldest.samples, "store")
            oldest.drop()

    def _no_room(self, part: SpooledPart, more: int, error: OSError) -> None:
        log.warning("recording.disk", session_id=str(self._session_id), error=type(error).__name__)
        self._lost(part.samples + more, "disk")
        self._under_way = None
        part.drop()

    # --- stored ---

    async def _store(self) -> None:
        await self._insisting(self._begin)
        while (part := await self._oldest()) is not None:
            await self._insisting(partial(self._put, part))
            part.drop()
            self._in_hand = None
        await self._insisting(self._finish)

    async def _oldest(self) -> SpooledPart | None:
        while not self._parts:
            if self._encoded:
                return None
            self._full.clear()
            await self._full.wait()
        self._in_hand = self._parts.popleft()
        return self._in_hand

    async def _insisting(self, act: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                with ledger_reachable():
                    return await act()
            except (BlobsUnavailable, LedgerUnavailable) as error:
                log.warning("recording.waits", session_id=str(self._session_id), code=error.code)
                await asyncio.sleep(RETRY_S)

    async def _begin(self) -> None:
        async with self._recorder.database.tenant(self._tenant_id) as tx:
            await recordings.begin(tx, self._tenant_id, self._session_id, self._ttl_s)

    async def _put(self, part: SpooledPart) -> None:
        """Row, blob, row: whatever happens in between, a row accounts for the blob."""
        tenant_id, session_id, database = self._tenant_id, self._session_id, self._recorder.database
        if part.stored_as is None:
            async with database.tenant(tenant_id) as tx:
                part.stored_as = await recordings.add_part(
                    tx, tenant_id, session_id, start=part.start, samples=part.samples, ttl_s=self._ttl_s
                )
        number, key = part.stored_as
        async with self._recorder.uploads:
            await self._recorder.blobs.put(key, await self._in_thread(part.content))
        async with database.tenant(tenant_id) as tx:
            accounted = await recordings.stored(tx, tenant_id, session_id, number)
        if not accounted:
            await self._recorder.blobs.delete(key)
            raise NotFound("The recording was deleted meanwhile.")
        RECORDED_SECONDS.inc(part.samples / SAMPLE_RATE)

    async def _finish(self) -> None:
        async with self._recorder.database.tenant(self._tenant_id) as tx:
            await recordings.finish(tx, self._tenant_id, self._session_id, self._ttl_s)

    # --- lost ---

    def _give_up(self, reason: str) -> None:
        """What waits will not be stored."""
        self._over = True
        parts = [part for part in (self._in_hand, *self._parts, self._under_way) if part is not None]
        self._lost(sum(part.samples for part in parts) + self._bites_size, reason)
        for part in parts:
            part.drop()
        self._parts.clear()
        self._bites.clear()
        self._in_hand, self._under_way, self._bites_size = None, None, 0

    async def _in_thread(self, work: Callable[[], bytes | None]) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._recorder.threads, work) or b""

    def _lost(self, samples: int, reason: str) -> None:
        if samples:
            log.warning("recording.lost", session_id=str(self._session_id), ms=samples // 16, reason=reason)
            UNRECORDED_SECONDS.labels(reason).inc(samples / SAMPLE_RATE)
