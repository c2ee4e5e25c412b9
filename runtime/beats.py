"""Something done again and again beside whatever goes on meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beating(every_s: float, beat: Callable[[], Awaitable[None]]) -> Iterator[None]:
    """Awaits `beat` every so many seconds while inside, in a task of its own. Most are left before the first beat, and
    have then cost no more than a timer."""
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []
    timer = loop.call_later(every_s, lambda: tasks.append(loop.create_task(_go_on(every_s, beat))))
    try:
        yield
    finally:
        timer.cancel()
        for task in tasks:
            task.cancel()


def spread() -> float:
    """A half to one, at random: so much of its time is something kept, for what was kept at once is not to be looked at
    again at once."""
    return random.uniform(0.5, 1.0)  # noqa: S311  no secret


async def _go_on(every_s: float, beat: Callable[[], Awaitable[None]]) -> None:
    while True:
        await beat()
        await asyncio.sleep(every_s)
