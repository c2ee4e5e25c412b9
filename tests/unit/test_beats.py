"""Beats: while inside, and no longer."""

from __future__ import annotations

import asyncio

from runtime.beats import beating


async def test_it_beats_until_left() -> None:
    beats, third = [], asyncio.Event()

    async def beat() -> None:
        beats.append(len(asyncio.all_tasks()))
        if len(beats) == 3:
            third.set()

    with beating(0.01, beat):
        await asyncio.wait_for(third.wait(), 5)
    await asyncio.sleep(0.05)
    assert len(beats) == 3


async def test_whoever_is_gone_before_the_first_beat_has_made_no_task() -> None:
    before = asyncio.all_tasks()

    async def beat() -> None:
        raise AssertionError("it was left")

    for _ in range(3):
        with beating(0.01, beat):
            assert asyncio.all_tasks() == before
    await asyncio.sleep(0.05)


async def test_a_beat_under_way_ends_with_the_rest() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def beat() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with beating(0.01, beat):
        await asyncio.wait_for(begun.wait(), 5)
    await asyncio.wait_for(ended.wait(), 5)
