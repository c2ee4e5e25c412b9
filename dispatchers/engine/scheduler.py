"""Who is next: a bounded executor that takes urgent work first and is fair between shares.

Order: final before partial before batch; within a class the share that has been served the least audio; within a share,
first come first served. A stream has one place for a partial: a newer one takes it while the older waits, and is
refused while that runs (and somebody waits for it); a waiting final empties it. Pieces of one kind may run together
(`Meeting`). Batch work may be long, so it gives way between its steps: it keeps its thread, not its worker, while
anything more urgent waits.

The queue lives on the event loop, so it needs no lock; only the work itself runs in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from dispatchers.engine.line import Line, Piece
from dispatchers.engine.meeting import Meeting
from dispatchers.engine.rhythm import Rhythm
from dispatchers.errors import BackendUnavailable, DispatchError, Overloaded, Superseded
from dispatchers.interface import Urgency
from runtime.telemetry import BATCH_SIZE, COALESCED_PARTIALS, DROPPED_PARTIALS, QUEUE_SECONDS

P = ParamSpec("P")
R = TypeVar("R")

_CLASSES: tuple[Urgency, ...] = ("final", "partial", "batch")
_SMOOTHING = 0.2


class Seat:
    """A piece's place among the running, for its thread: with whom it runs, and the way to let others before it."""

    def __init__(self, scheduler: Scheduler, urgency: Urgency, meeting: Meeting) -> None:
        self.meeting = meeting
        self._gives_way = urgency == "batch" and meeting.members == 1
        self._scheduler = scheduler

    def give_way(self) -> None:
        """Blocks, without a worker, while more urgent work waits. To be called between the steps of long work."""
        if self._gives_way:
            self._scheduler.give_way()


class _Worker:
    """A worker at work on pieces that run together: taken until the last of them has ended."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces


class Scheduler:
    """Runs blocking functions on `workers` workers, each of which takes up to `batch_limit` pieces of one kind at once.
    `queue_limit` holds for each class by itself, so that waiting batches never refuse a final. `measured`: it tells the
    engine's metrics. `spread`: no worker takes more than its part of what waits, nor waits for company. Use from one
    event loop."""

    def __init__(
        self, workers: int, queue_limit: int, *, batch_limit: int = 1, spread: bool = False, measured: bool = False
    ) -> None:
        self.workers = workers
        self._spread = spread
        self._queue_limit = queue_limit
        self._batch_limit = batch_limit
        self._measured = measured
        self._lines = {urgency: Line() for urgency in _CLASSES}
        self._slots: dict[str, Piece] = {}  # the waiting partial of each stream
        self._awaited: dict[str, Piece] = {}  # the running partial of each stream
        self._aside: deque[threading.Event] = deque()
        self._busy = 0
        self._running = 0
        self._mean_s = 1.0
        self._live_mean_s = 1.0
        self._rhythm = Rhythm()
        self._gathering = False
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._urgent_waiting = False  # read by threads
        self._closed = False
        # one more for each worker: a piece that has given way keeps its thread
        self._threads = ThreadPoolExecutor(workers * (batch_limit + 1), thread_name_prefix="engine")

    @property
    def waiting(self) -> int:
        """Pieces of work in the queue, those that have given way included."""
        return sum(map(len, self._lines.values())) + len(self._aside)

    @property
    def wait_s(self) -> float:
        """About how long live work (finals and partials) that came now would stand in the queue, going by what such
        work took of late. Batches stand behind it and do not count."""
        ahead = len(self._lines["final"]) + len(self._lines["partial"])
        return self.pace_s * ahead

    @property
    def pace_s(self) -> float:
        """By about how much a piece of live work makes the queue longer."""
        return self._live_mean_s / self.workers

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
        """The result of `work(*args)`, which knows nothing of its seat. See `seat`."""
        return await self.seat(lambda _: work(*args), urgency=urgency, share=share, timeout_s=timeout_s)

    async def seat(
        self,
        work: Callable[[Seat], R],
        *,
        urgency: Urgency = "batch",
        share: str = "",
        seconds: float = 1.0,
        stream: str = "",
        kind: Hashable | None = None,
        timeout_s: float | None = None,
    ) -> R:
        """The result of `work`. `seconds` of audio are charged to the share. Cancelling takes waiting work out of the
        queue; work that has begun ends in its thread, whose worker stays taken until then, and its result is dropped.
        `timeout_s` counts from its beginning.

        Raises `Overloaded` when the class's queue is full, `Superseded` when a newer partial or the final of its
        stream came before its turn, or a partial of its stream is running, `BackendUnavailable` when closed,
        `TimeoutError`."""
        if self._closed:
            raise BackendUnavailable
        self._loop = loop = asyncio.get_running_loop()
        piece = Piece(work, loop.create_future(), loop.time(), urgency, share, seconds, stream, kind)
        self._join(piece)
        self._dispatch()
        try:
            thread = await piece.turn
            async with asyncio.timeout(timeout_s):
                result: R = await asyncio.wrap_future(thread)
                return result
        except asyncio.CancelledError:
            if self._leave(piece) and urgency == "partial" and self._measured:
                DROPPED_PARTIALS.inc()
            raise
        finally:
            if self._awaited.get(stream) is piece:
                del self._awaited[stream]

    def give_way(self) -> None:
        """For the thread of a running piece: see `Seat.give_way`."""
        if not self._urgent_waiting or self._loop is None:
            return
        resumed = threading.Event()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is waiting any more
            self._loop.call_soon_threadsafe(self._step_aside, resumed)
            while not resumed.wait(1) and not self._loop.is_closed():
                pass

    async def aclose(self) -> None:
        """Refuses what waits and ends the threads, once the work in them has ended."""
        self._closed = True
        for line in self._lines.values():
            while (piece := line.choose()) is not None:
                self._refuse(piece, BackendUnavailable())
        while self._aside:
            self._resume()
        await asyncio.to_thread(self._threads.shutdown)

    # --- in and out of the queue ---

    def _join(self, piece: Piece) -> None:
        if piece.urgency == "partial" and piece.stream in self._awaited:
            raise Superseded
        line, slot = self._lines[piece.urgency], self._slots.get(piece.stream) if piece.stream else None
        if piece.urgency == "partial" and slot is not None and slot.share == piece.share:
            line.replace(slot, piece)
            self._answer(slot, Superseded())
            self._count(COALESCED_PARTIALS)
        else:
            free = self._busy < self.workers and not self.waiting
            if len(line) >= self._queue_limit and not free:
                raise Overloaded(retry_after_s=1 + self._mean_s * self.waiting / self.workers)
            line.join(piece)
        if piece.urgency == "final" and slot is not None:
            self._refuse(slot, Superseded())
            self._count(DROPPED_PARTIALS)
        if piece.urgency == "partial" and piece.stream:
            self._slots[piece.stream] = piece
        self._rhythm.beat(piece.joined)

    def _leave(self, piece: Piece) -> bool:
        """Whether it was still waiting."""
        if self._slots.get(piece.stream) is piece:
            del self._slots[piece.stream]
        left = self._lines[piece.urgency].leave(piece)
        self._look()
        return left

    def _refuse(self, piece: Piece, error: DispatchError) -> None:
        self._leave(piece)
        self._answer(piece, error)

    def _answer(self, piece: Piece, error: DispatchError) -> None:
        if not piece.turn.done():
            piece.turn.set_exception(error)

    def _count(self, counter: Any) -> None:
        if self._measured:
            counter.inc()

    # --- to work ---

    def _dispatch(self) -> None:
        """Gives the free workers what is next."""
        while self._busy < self.workers and (piece := self._next()) is not None:
            if (wait_s := self._window(piece)) > 0:
                self._gathering = True
                self._timer = self._timer or self._loop_of(piece).call_later(wait_s, self._window_over)
                break
            company = self._company(piece)
            if self._gathering:
                self._gathering = False
                self._rhythm.gathered(self._loop_of(piece).time(), company=len(company) > 1)
            self._begin(company)
        self._look()

    def _next(self) -> Piece | None:
        """The next piece that still wants to run; what has given way goes on before another batch begins."""
        for urgency, line in self._lines.items():
            if urgency == "batch":
                while self._aside and self._busy < self.workers:
                    self._resume()
                if self._busy >= self.workers:
                    return None
            while (piece := line.choose()) is not None:
                if not piece.turn.done():
                    return piece
                self._leave(piece)
        return None

    def _company(self, first: Piece) -> list[Piece]:
        """`first` and what may run with it, by the same order."""
        pieces, most = [first], self._most_together(first)
        self._take(first)
        if first.kind is None:
            return pieces
        for line in self._lines.values():
            while len(pieces) < most and (piece := line.choose(first.kind)) is not None:
                if piece.turn.done():
                    self._leave(piece)
                else:
                    self._take(piece)
                    pieces.append(piece)
        return pieces

    def _most_together(self, piece: Piece) -> int:
        if not self._spread or piece.kind is None or self._batch_limit == 1:
            return self._batch_limit
        alike = sum(line.count(piece.kind) for line in self._lines.values())
        return min(self._batch_limit, -(-alike // self.workers))

    def _take(self, piece: Piece) -> None:
        self._lines[piece.urgency].take(piece)
        self._leave(piece)

    def _begin(self, pieces: list[Piece]) -> None:
        worker, meeting = _Worker(len(pieces)), Meeting(len(pieces))
        seats = [Seat(self, piece.urgency, meeting) for piece in pieces]
        self._busy += 1
        self._running += len(pieces)
        if self._measured:
            BATCH_SIZE.observe(len(pieces))
        for piece, seat in zip(pieces, seats, strict=True):
            loop, began = self._loop_of(piece), time.monotonic()
            if self._measured:
                QUEUE_SECONDS.labels(piece.urgency).observe(loop.time() - piece.joined)

            def ended(_: ThreadFuture[Any], piece: Piece = piece, began: float = began) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is waiting for a worker any more
                    took_s = time.monotonic() - began
                    self._loop_of(piece).call_soon_threadsafe(self._ended, worker, piece.urgency, took_s)

            thread = self._threads.submit(_work, piece.work, seat)
            thread.add_done_callback(ended)
            piece.turn.set_result(thread)
            if piece.urgency == "partial" and piece.stream:
                self._awaited[piece.stream] = piece

    def _ended(self, worker: _Worker, urgency: Urgency, took_s: float) -> None:
        self._mean_s += _SMOOTHING * (took_s - self._mean_s)
        if urgency != "batch":
            self._live_mean_s += _SMOOTHING * (took_s - self._live_mean_s)
        self._running -= 1
        worker.pieces -= 1
        if worker.pieces == 0:
            self._busy -= 1
            self._dispatch()

    # --- giving way ---

    def _look(self) -> None:
        self._urgent_waiting = any(len(self._lines[urgency]) for urgency in ("final", "partial"))

    def _step_aside(self, resumed: threading.Event) -> None:
        self._busy -= 1
        self._running -= 1
        self._aside.append(resumed)
        if self._closed:
            self._resume()
        else:
            self._dispatch()

    def _resume(self) -> None:
        self._busy += 1
        self._running += 1
        self._aside.popleft().set()

    # --- the window in which a batch gathers ---

    def _window(self, piece: Piece) -> float:
        """How long yet `piece` waits for company: not at all where the next is not expected within the window."""
        missing = self._batch_limit - self.waiting
        if piece.kind is None or missing <= 0 or self._spread:
            return 0.0
        now = self._loop_of(piece).time()
        return piece.joined + self._rhythm.window(missing, now) - now

    def _window_over(self) -> None:
        self._timer = None
        self._dispatch()

    @staticmethod
    def _loop_of(piece: Piece) -> asyncio.AbstractEventLoop:
        return piece.turn.get_loop()


def _work(work: Callable[[Seat], R], seat: Seat) -> R:
    try:
        return work(seat)
    finally:
        seat.meeting.leave()
