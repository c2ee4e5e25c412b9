"""A time limit on each of many short waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Answer = TypeVar("Answer")


class Patience:
    """Like `asyncio.timeout` around each wait, of one task at a time, but with a timer that is set anew only when it
    rings: a stream waits ten times a second and is hardly ever silent."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Task[object] | None = None
        self._until: float | None = None
        self._lost = False

    async def wait(self, answer: Awaitable[Answer], timeout_s: float | None) -> Answer:
        """Raises `TimeoutError`. `timeout_s` None: as long as it takes."""
        self._until = None if timeout_s is None else self._loop.time() + timeout_s
        self._set()
        self._waiting = task = asyncio.current_task()
        before = 0 if task is None else task.cancelling()
        self._lost = False
        try:
            return await answer
        except BaseException as failure:
            ours = self._lost and task is not None and task.uncancel() <= before
            if ours and isinstance(failure, asyncio.CancelledError):
                raise TimeoutError from None
            raise
        finally:
            self._waiting = None

    def lose(self) -> bool:
        """Makes the wait under way have taken too long. False: there is none."""
        if self._waiting is None:
            return False
        if not self._lost:
            self._lost = True
            self._waiting.cancel()
        return True

    def end(self) -> None:
        """There will be no other wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self) -> None:
        """The timer may ring too early, never too late."""
        if self._until is None or (self._timer is not None and self._timer.when() <= self._until):
            return
        self.end()
        self._timer = self._loop.call_at(self._until, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._waiting is None or self._until is None or self._lost:
            return
        if self._loop.time() < self._until:
            self._set()
        else:
            self.lose()
