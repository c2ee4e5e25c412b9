"""A time limit on many waits."""

import asyncio

import pytest

from gateway.live.patience import Patience


async def test_a_wait_that_takes_too_long_fails_and_the_next_one_does_not():
    patience = Patience()
    with pytest.raises(TimeoutError):
        await patience.wait(asyncio.Event().wait(), 0.01)
    assert await patience.wait(asyncio.sleep(0, "answer"), 0.01) == "answer"
    assert asyncio.current_task().cancelling() == 0


async def test_a_shorter_limit_after_a_longer_one_counts():
    patience = Patience()
    await patience.wait(asyncio.sleep(0), 3_600)
    with pytest.raises(TimeoutError):
        await patience.wait(asyncio.Event().wait(), 0.01)


async def test_a_limit_counts_from_its_own_wait_and_none_is_none():
    patience = Patience()
    await patience.wait(asyncio.sleep(0), 0.02)
    assert await patience.wait(asyncio.sleep(0.06, "later"), 3_600) == "later"
    await patience.wait(asyncio.sleep(0), 0.02)
    assert await patience.wait(asyncio.sleep(0.06, "no limit"), None) == "no limit"


async def test_a_cancellation_from_outside_stays_one():
    patience = Patience()
    task = asyncio.create_task(patience.wait(asyncio.Event().wait(), 3_600))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_fails_is_told_as_it_is():
    async def broken() -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        await Patience().wait(broken(), 1)
