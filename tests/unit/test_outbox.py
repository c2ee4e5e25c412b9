"""Whatever ends the work that fills it, who reads the box learns of it."""

from __future__ import annotations

import asyncio

import pytest

from dispatchers.adapters.outbox import Outbox
from dispatchers.errors import BackendFailed
from dispatchers.interface import Flushed


@pytest.mark.parametrize("grouped", [False, True])
async def test_a_failure_is_raised_where_the_events_are_read(grouped: bool) -> None:
    out = Outbox()

    async def work() -> None:
        await out.put(Flushed(1))
        raise ExceptionGroup("tasks", [BackendFailed()]) if grouped else BackendFailed()

    heard = []
    async with asyncio.timeout(5), out.filled_by(work) as events:
        with pytest.raises(BackendFailed):
            async for event in events:
                heard.append(event)  # noqa: PERF401  what came before the failure counts
    assert heard == [Flushed(1)]
