"""What several processes must agree on from moment to moment: who has a seat, who has spent what, what one leaves to
another. On Redis, or in process where there is only one.

Nothing here is the truth about money, and all of it may be lost: leases expire, and rates forget.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Protocol, TypeVar

import redis.asyncio
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from runtime.errors import StenogateError

log = structlog.get_logger(__name__)

T = TypeVar("T")

REDIS_TIMEOUT_S = 2.0
REDIS_CONNECTIONS = 16
SWEEP_EVERY = 1024
US_PER_MINUTE = 60_000_000


class CoordinationUnavailable(StenogateError):
    """The service that keeps limits does not answer. Try again shortly."""

    code = "UNAVAILABLE"
    retryable = True


class Coordination(Protocol):
    """Leases and rates under a key. Raises `CoordinationUnavailable`."""

    async def seat(self, key: str, member: str, limit: int, ttl_s: float) -> bool:
        """Takes one of `limit` seats for `ttl_s`, or renews the seat that `member` has, whatever the limit is now.
        False when all are taken."""
        ...

    async def leave(self, key: str, member: str) -> None:
        """Gives the seat back. No error if there is none."""
        ...

    async def spend(self, key: str, cost: int, per_minute: int, burst: int) -> float:
        """Spends `cost` from an allowance that fills at `per_minute` up to `burst` (GCRA, ITU-T I.371). 0.0 when
        allowed; otherwise nothing is spent, and the answer is the seconds to wait: infinite if cost exceeds burst."""
        ...

    @property
    def shared(self) -> bool:
        """Whether other processes see it, and see it when this one has ended."""
        ...

    async def keep(self, key: str, value: str, log: str, entries: Sequence[str], ttl_s: float, *, anew: bool) -> bool:
        """In one step keeps `value` under `key`, appends to the list `log`, and lets both live for `ttl_s`. False, if
        not `anew`: somebody has forgotten the key, and it stays so."""
        ...

    async def kept(self, key: str) -> str | None:
        """What is kept under the key."""
        ...

    async def entries(self, log: str) -> list[str]:
        """All of a list."""
        ...

    async def renew(self, key: str, log: str, ttl_s: float) -> bool:
        """Lets both live for `ttl_s` from now. False: there is nothing under `key`."""
        ...

    async def forget(self, *keys: str) -> None:
        """No error for what is not there."""
        ...

    async def ping(self) -> None:
        """Raises if it cannot be reached."""
        ...

    async def aclose(self) -> None: ...


class InProcess:
    """For a single process. `clock` gives seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seats: dict[str, dict[str, float]] = {}
        self._arrivals: dict[str, int] = {}
        self._spends = 0
        self._keeps = 0
        self._kept: dict[str, tuple[str | list[str], float]] = {}

    @property
    def shared(self) -> bool:
        return False

    async def seat(self, key: str, member: str, limit: int, ttl_s: float) -> bool:
        now = self._clock()
        taken = {other: until for other, until in self._seats.get(key, {}).items() if until > now}
        allowed = member in taken or len(taken) < limit
        if allowed:
            taken[member] = now + ttl_s
        self._seats[key] = taken
        return allowed

    async def leave(self, key: str, member: str) -> None:
        taken = self._seats.get(key, {})
        taken.pop(member, None)
        if not taken:
            self._seats.pop(key, None)

    async def spend(self, key: str, cost: int, per_minute: int, burst: int) -> float:
        if cost > burst:
            return math.inf
        now = round(self._clock() * 1_000_000)
        self._sweep(now)
        arrival = max(now, self._arrivals.get(key, now)) + _us(cost, per_minute)
        wait_us = arrival - _us(burst, per_minute) - now
        if wait_us > 0:
            return wait_us / 1_000_000
        self._arrivals[key] = arrival
        return 0.0

    async def keep(self, key: str, value: str, log: str, entries: Sequence[str], ttl_s: float, *, anew: bool) -> bool:
        if not anew and self._alive(key) is None:
            return False
        self._keeps += 1
        if self._keeps % SWEEP_EVERY == 0:
            self._kept = {name: found for name, found in self._kept.items() if found[1] > self._clock()}
        until = self._clock() + ttl_s
        self._kept[key] = value, until
        kept = self._alive(log)
        kept = kept if isinstance(kept, list) else []
        kept.extend(entries)
        self._kept[log] = kept, until
        return True

    async def kept(self, key: str) -> str | None:
        found = self._alive(key)
        return found if isinstance(found, str) else None

    async def entries(self, log: str) -> list[str]:
        found = self._alive(log)
        return list(found) if isinstance(found, list) else []

    async def renew(self, key: str, log: str, ttl_s: float) -> bool:
        until = self._clock() + ttl_s
        for name in (key, log):
            if (found := self._alive(name)) is not None:
                self._kept[name] = found, until
        return self._alive(key) is not None

    async def forget(self, *keys: str) -> None:
        for key in keys:
            self._kept.pop(key, None)

    async def ping(self) -> None:
        return None

    async def aclose(self) -> None:
        return None

    def _alive(self, key: str) -> str | list[str] | None:
        value, until = self._kept.get(key, (None, 0.0))
        return value if until > self._clock() else None

    def _sweep(self, now: int) -> None:
        """Forgets, now and then, the allowances that are full again."""
        self._spends += 1
        if self._spends % SWEEP_EVERY == 0:
            self._arrivals = {key: arrival for key, arrival in self._arrivals.items() if arrival > now}


# Redis's own clock decides, so processes whose clocks differ agree.
SEAT = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then
    return 0
end
redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[1])
redis.call('PEXPIREAT', KEYS[1], redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2])
return 1
"""
SPEND = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local arrival = math.max(now, tonumber(redis.call('GET', KEYS[1]) or 0)) + tonumber(ARGV[1])
local wait = arrival - tonumber(ARGV[2]) - now
if wait > 0 then
    return wait
end
redis.call('SET', KEYS[1], string.format('%.0f', arrival), 'PX', math.ceil((arrival - now) / 1000) + 1)
return 0
"""


class RedisCoordination:
    """For processes that share a Redis."""

    def __init__(self, url: str) -> None:
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=REDIS_CONNECTIONS,
            timeout=REDIS_TIMEOUT_S,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            # A connection that Redis closed while idle is replaced once.
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )
        self._redis: redis.asyncio.Redis = redis.asyncio.Redis.from_pool(pool)
        self._seat = self._redis.register_script(SEAT)
        self._spend = self._redis.register_script(SPEND)

    async def seat(self, key: str, member: str, limit: int, ttl_s: float) -> bool:
        taken = await _answer(self._seat(keys=[_seats(key)], args=[member, limit, math.ceil(ttl_s * 1000)]))
        return bool(taken)

    async def leave(self, key: str, member: str) -> None:
        await _answer(self._redis.zrem(_seats(key), member))

    async def spend(self, key: str, cost: int, per_minute: int, burst: int) -> float:
        if cost > burst:
            return math.inf
        costs = [_us(cost, per_minute), _us(burst, per_minute)]
        wait_us: int = await _answer(self._spend(keys=[f"stenogate:rate:{key}"], args=costs))
        return wait_us / 1_000_000

    @property
    def shared(self) -> bool:
        return True

    async def keep(self, key: str, value: str, log: str, entries: Sequence[str], ttl_s: float, *, anew: bool) -> bool:
        ttl_ms = math.ceil(ttl_s * 1000)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(_state(key), value, px=ttl_ms, xx=not anew)
            if entries:
                pipe.rpush(_state(log), *entries)
            pipe.pexpire(_state(log), ttl_ms)
            found, *_ = await _answer(pipe.execute())
        return bool(found)

    async def kept(self, key: str) -> str | None:
        found: bytes | None = await _answer(self._redis.get(_state(key)))
        return None if found is None else found.decode()

    async def entries(self, log: str) -> list[str]:
        async with self._redis.pipeline() as pipe:
            pipe.lrange(_state(log), 0, -1)
            (found,) = await _answer(pipe.execute())
        return [entry.decode() for entry in found]

    async def renew(self, key: str, log: str, ttl_s: float) -> bool:
        ttl_ms = math.ceil(ttl_s * 1000)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.pexpire(_state(key), ttl_ms)
            pipe.pexpire(_state(log), ttl_ms)
            found, _ = await _answer(pipe.execute())
        return bool(found)

    async def forget(self, *keys: str) -> None:
        await _answer(self._redis.delete(*(_state(key) for key in keys)))

    async def ping(self) -> None:
        await _answer(self._redis.ping())

    async def aclose(self) -> None:
        await self._redis.aclose()


def _us(amount: int, per_minute: int) -> int:
    """How long it takes to fill up by `amount`: whole microseconds, since floats would refuse what just fits."""
    return amount * US_PER_MINUTE // per_minute


def _seats(key: str) -> str:
    return f"stenogate:seats:{key}"


def _state(key: str) -> str:
    return f"stenogate:state:{key}"


async def _answer(call: Awaitable[T]) -> T:
    try:
        return await call
    except (redis.RedisError, OSError) as error:
        raise CoordinationUnavailable from error


@asynccontextmanager
async def seat(
    coordination: Coordination, key: str, *, limit: int, ttl_s: float, full: Exception
) -> AsyncIterator[None]:
    """Holds a seat for as long as the body runs, renewing it before `ttl_s` is over. Raises `full` when there is none.

    Once seated, the body is never cut off: where renewing fails, the others may sit down after `ttl_s`.
    """
    member = uuid.uuid4().hex
    if not await coordination.seat(key, member, limit, ttl_s):
        raise full
    renewal = asyncio.create_task(_renew(coordination, key, member, limit, ttl_s))
    try:
        yield
    finally:
        renewal.cancel()
        await asyncio.wait({renewal})
        with suppress(CoordinationUnavailable):  # the lease runs out by itself
            await coordination.leave(key, member)


async def _renew(coordination: Coordination, key: str, member: str, limit: int, ttl_s: float) -> None:
    while True:
        await asyncio.sleep(ttl_s / 3)
        try:
            renewed = await coordination.seat(key, member, limit, ttl_s)
        except CoordinationUnavailable:
            renewed = False
        if not renewed:
            log.warning("seat not renewed", key=key)
