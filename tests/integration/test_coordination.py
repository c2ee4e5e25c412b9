"""One suite for both ways to coordinate, the second on a real Redis."""

from __future__ import annotations

import asyncio
import math
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis

from runtime.coordination import Coordination, CoordinationUnavailable, InProcess, RedisCoordination, seat

HOUR = 3600.0


@pytest.fixture(params=["in process", "redis"])
async def coordination(request: pytest.FixtureRequest) -> AsyncIterator[Coordination]:
    made: Coordination = (
        InProcess() if request.param == "in process" else RedisCoordination(request.getfixturevalue("redis_url"))
    )
    yield made
    await made.aclose()


@pytest.fixture
def key() -> str:
    return uuid.uuid4().hex


async def until_seated(coordination: Coordination, key: str, member: str) -> None:
    async with asyncio.timeout(30):
        while not await coordination.seat(key, member, 1, HOUR):  # noqa: ASYNC110  # as a client would
            await asyncio.sleep(0.01)


async def test_seats_are_limited_and_given_back(coordination: Coordination, key: str) -> None:
    await coordination.ping()
    assert await coordination.seat(key, "a", 2, HOUR)
    assert await coordination.seat(key, "b", 2, HOUR)
    assert not await coordination.seat(key, "c", 2, HOUR)
    assert await coordination.seat(f"{key}-other", "c", 2, HOUR)
    await coordination.leave(key, "a")
    assert await coordination.seat(key, "c", 2, HOUR)
    await coordination.leave(key, "nobody")
    assert not await coordination.seat(key, "a", 2, HOUR)


async def test_renewing_takes_no_second_seat_and_outlives_a_lowered_limit(coordination: Coordination, key: str) -> None:
    assert await coordination.seat(key, "a", 2, HOUR)
    assert await coordination.seat(key, "a", 2, HOUR)
    assert await coordination.seat(key, "b", 2, HOUR)
    assert await coordination.seat(key, "a", 1, HOUR)
    assert not await coordination.seat(key, "c", 1, HOUR)


async def test_a_seat_runs_out(coordination: Coordination, key: str) -> None:
    assert await coordination.seat(key, "crashed", 1, 0.05)
    await until_seated(coordination, key, "next")
    assert not await coordination.seat(key, "crashed", 1, HOUR)


async def test_a_short_lease_does_not_shorten_a_long_one(coordination: Coordination, key: str) -> None:
    assert await coordination.seat(key, "long", 2, HOUR)
    assert await coordination.seat(key, "short", 2, 0.05)
    await asyncio.sleep(0.1)
    assert await coordination.seat(key, "next", 2, HOUR)
    assert not await coordination.seat(key, "one too many", 2, HOUR)


async def test_many_at_once_get_exactly_the_seats_there_are(coordination: Coordination, key: str) -> None:
    taken = await asyncio.gather(*(coordination.seat(key, str(n), 7, HOUR) for n in range(100)))
    assert sum(taken) == 7


async def test_a_burst_is_allowed_and_no_more(coordination: Coordination, key: str) -> None:
    # One a minute: nothing that matters here fills up again while the test runs.
    waits = [await coordination.spend(key, 1, per_minute=1, burst=3) for _ in range(5)]
    assert waits[:3] == [0.0, 0.0, 0.0]
    assert all(0 < wait <= 60 for wait in waits[3:])
    assert await coordination.spend(f"{key}-other", 3, per_minute=1, burst=3) == 0.0


async def test_a_refusal_spends_nothing(coordination: Coordination, key: str) -> None:
    assert await coordination.spend(key, 2, per_minute=1, burst=3) == 0.0
    assert 0 < await coordination.spend(key, 2, per_minute=1, burst=3) <= 60
    assert await coordination.spend(key, 1, per_minute=1, burst=3) == 0.0


async def test_after_the_wait_it_is_allowed(coordination: Coordination, key: str) -> None:
    assert await coordination.spend(key, 1, per_minute=1200, burst=1) == 0.0
    async with asyncio.timeout(30):
        while (wait_s := await coordination.spend(key, 1, per_minute=1200, burst=1)) > 0:
            assert wait_s <= 0.05
            await asyncio.sleep(wait_s)


async def test_what_exceeds_the_burst_never_fits(coordination: Coordination, key: str) -> None:
    assert await coordination.spend(key, 4, per_minute=1, burst=3) == math.inf
    assert await coordination.spend(key, 3, per_minute=1, burst=3) == 0.0


@pytest.mark.parametrize("per_minute", [7, 600, 60_000, 6_000_000])
async def test_what_just_fits_is_allowed(coordination: Coordination, key: str, per_minute: int) -> None:
    assert await coordination.spend(key, per_minute, per_minute, burst=per_minute) == 0.0
    assert await coordination.spend(key, per_minute, per_minute, burst=per_minute) > 0


class Full(Exception):
    pass


async def test_a_held_seat_is_renewed_and_given_back(coordination: Coordination, key: str) -> None:
    async with seat(coordination, key, limit=1, ttl_s=1.0, full=Full()):
        for _ in range(20):  # twice its time to live
            await asyncio.sleep(0.1)
            assert not await coordination.seat(key, "other", 1, HOUR)
    assert await coordination.seat(key, "other", 1, HOUR)
    with pytest.raises(Full):
        async with seat(coordination, key, limit=1, ttl_s=HOUR, full=Full()):
            pytest.fail("there was no seat")


@pytest.mark.parametrize("how", ["error", "cancelled"])
async def test_a_seat_is_given_back_however_the_body_ends(coordination: Coordination, key: str, how: str) -> None:
    seated = asyncio.Event()

    async def hold() -> None:
        async with seat(coordination, key, limit=1, ttl_s=HOUR, full=Full()):
            seated.set()
            if how == "error":
                raise ValueError
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    await seated.wait()
    task.cancel() if how == "cancelled" else None
    with pytest.raises((ValueError, asyncio.CancelledError)):
        await task
    assert await coordination.seat(key, "next", 1, HOUR)


async def test_two_processes_share_one_redis(redis_url: str, key: str) -> None:
    here, there = RedisCoordination(redis_url), RedisCoordination(redis_url)
    assert await here.seat(key, "a", 1, HOUR)
    assert not await there.seat(key, "b", 1, HOUR)
    assert await here.spend(key, 1, per_minute=1, burst=1) == 0.0
    assert await there.spend(key, 1, per_minute=1, burst=1) > 0
    await here.aclose()
    await there.aclose()


async def test_redis_forgets_what_ran_out(redis_url: str, key: str) -> None:
    coordination = RedisCoordination(redis_url)
    await coordination.seat(key, "a", 1, 0.05)
    await coordination.spend(key, 1, per_minute=6000, burst=1)
    await coordination.aclose()
    with redis.Redis.from_url(redis_url) as client:
        for _ in range(500):
            if not client.keys(f"*{key}*"):
                return
            await asyncio.sleep(0.02)
    pytest.fail("keys stay for ever")


async def test_an_absent_redis_is_said(tmp_path: Path, key: str) -> None:
    coordination = RedisCoordination(f"unix://{tmp_path}/nothing.sock")
    for call in (coordination.ping(), coordination.seat(key, "a", 1, 1), coordination.spend(key, 1, 1, 1)):
        with pytest.raises(CoordinationUnavailable):
            await call
    await coordination.aclose()


async def test_a_silent_redis_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.coordination.REDIS_TIMEOUT_S", 0.1)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{tmp_path}/silent.sock")
        listening.listen()
        coordination = RedisCoordination(f"unix://{tmp_path}/silent.sock")
        async with asyncio.timeout(30):
            with pytest.raises(CoordinationUnavailable):
                await coordination.ping()
        await coordination.aclose()


async def test_in_process_forgets_what_is_full_again() -> None:
    now = 0.0
    coordination = InProcess(clock=lambda: now)
    for n in range(5000):
        now += 1.0
        assert await coordination.spend(str(n), 1, per_minute=60, burst=1) == 0.0
    assert len(coordination._arrivals) <= 1025


async def test_what_is_kept_is_found_added_to_and_forgotten(coordination: Coordination, key: str) -> None:
    log = f"{key}-log"
    assert not await coordination.keep(key, "one", log, ["a"], HOUR, anew=False)  # there is none
    assert await coordination.kept(key) is None
    await coordination.forget(key, log)
    assert await coordination.keep(key, "one", log, ["a"], HOUR, anew=True)
    assert await coordination.keep(key, "twö", log, ["b", "ç"], HOUR, anew=False)
    assert await coordination.keep(key, "twö", log, [], HOUR, anew=False)
    assert (await coordination.kept(key), await coordination.entries(log)) == ("twö", ["a", "b", "ç"])
    assert await coordination.renew(key, log, HOUR)
    await coordination.forget(key, log)
    assert (await coordination.kept(key), await coordination.entries(log)) == (None, [])
    assert not await coordination.renew(key, log, HOUR)
    await coordination.forget(key)


async def test_what_is_kept_runs_out(coordination: Coordination, key: str) -> None:
    log = f"{key}-log"
    assert await coordination.keep(key, "one", log, ["a"], 0.05, anew=True)
    async with asyncio.timeout(30):
        while await coordination.kept(key) or await coordination.entries(log):  # noqa: ASYNC110  as a client would
            await asyncio.sleep(0.01)
    assert not await coordination.keep(key, "two", log, [], HOUR, anew=False)
