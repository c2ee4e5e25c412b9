"""Who is next: a bounded executor that takes urgent work first and is fair between shares.

Order: final before partial before batch; within a class the shares take turns; within a share, first come first served.
The queue lives on the event loop, so it needs no lock; only the work itself runs in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from dispatchers.errors import BackendUnavailable, Overloaded
from dispatchers.interface import Urgency

P = ParamSpec("P")
R = TypeVar("R")

_CLASSES: tuple[Urgency, ...] = ("final", "partial", "batch")
_SMOOTHING = 0.2


class _Line:
    """The queue of one class: shares in turn, each first come first served."""

    def __init__(self) -> None:
        self._shares: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._shares.values()))

    def join(self, share: str, turn: asyncio.Future[None]) -> None:
        self._shares.setdefault(share, deque()).append(turn)

    def leave(self, share: str, turn: asyncio.Future[None]) -> None:
        queue = self._shares.get(share, deque())
        if turn in queue:
            queue.remove(turn)
            if not queue:
                del self._shares[share]

    def next(self) -> asyncio.Future[None]:
        share, queue = self._shares.popitem(last=False)
        turn = queue.popleft()
        if queue:
            self._shares[share] = queue
        return turn


class Scheduler:
    """Runs blocking functions in `workers` threads. `queue_limit` holds for each class by itself, so that waiting
    batches never refuse a final. Use from one event loop."""

    def __init__(self, workers: int, queue_limit: int) -> None:
        self.workers = workers
        self._queue_limit = queue_limit
        self._lines = {urgency: _Line() for urgency in _CLASSES}
        self._running = 0
        self._mean_s = 1.0
        self._live_mean_s = 1.0
        self._closed = False
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="engine")

    @property
    def waiting(self) -> int:
        """Pieces of work in the queue."""
        return sum(map(len, self._lines.values()))

    @property
    def wait_s(self) -> float:
        """About how long live work (finals and partials) that came now would stand in the queue, going by what such
        work took of late. Batches stand behind it and do not count."""
        ahead = len(self._lines["final"]) + len(self._lines["partial"])
        return self._live_mean_s * ahead / self.workers

    @property
    def running(self) -> int:
        """Pieces of work in the threads, abandoned ones included."""
        return self._running

    async def run(
        self,
        work: Callable[..., R],
        *args: Any,
        urgency: Urgency = "batch",
        share: str = "",
        timeout_s: float | None = None,
    ) -> R:
        """The result of `work(*args)`. Cancelling takes waiting work out of the queue; work that has begun ends in its
        thread, which stays taken until then, and its result is dropped. `timeout_s` counts from its beginning.

        Raises `Overloaded` when the class's queue is full, `BackendUnavailable` when closed, `TimeoutError`."""
        await self._seat(urgency, share)
        try:
            future = self._threads.submit(work, *args)
        except BaseException:
            self._release()
            raise
        loop, began = asyncio.get_running_loop(), time.monotonic()

        def ended(_: ThreadFuture[R]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is waiting for a seat any more
                loop.call_soon_threadsafe(self._ended, urgency, time.monotonic() - began)

        future.add_done_callback(ended)
        async with asyncio.timeout(timeout_s):
            return await asyncio.wrap_future(future)

    async def aclose(self) -> None:
        """Refuses what waits and ends the threads, once the work in them has ended."""
        self._closed = True
        while self.waiting:
            turn = self._next()
            if not turn.done():
                turn.set_exception(BackendUnavailable())
        await asyncio.to_thread(self._threads.shutdown)

    async def _seat(self, urgency: Urgency, share: str) -> None:
        if self._closed:
            raise BackendUnavailable
        if self._running < self.workers:
            self._running += 1
            return
        line = self._lines[urgency]
        if len(line) >= self._queue_limit:
            raise Overloaded(retry_after_s=1 + self._mean_s * self.waiting / self.workers)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.join(share, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                line.leave(share, turn)
            elif turn.exception() is None:
                self._release()
            raise

    def _ended(self, urgency: Urgency, took_s: float) -> None:
        self._mean_s += _SMOOTHING * (took_s - self._mean_s)
        if urgency != "batch":
            self._live_mean_s += _SMOOTHING * (took_s - self._live_mean_s)
        self._release()

    def _release(self) -> None:
        """Hands the seat to whoever is next. A turn that is cancelled but has not left its line yet is passed over."""
        self._running -= 1
        while self.waiting:
            turn = self._next()
            if not turn.done():
                self._running += 1
                turn.set_result(None)
                return

    def _next(self) -> asyncio.Future[None]:
        return next(line for line in self._lines.values() if len(line)).next()
