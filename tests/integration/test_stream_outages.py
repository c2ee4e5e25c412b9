"""What a live stream stands on goes away for ten seconds and comes back: the stream goes on, and is billed exactly."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from dispatchers.audio.decode import load
from dispatchers.interface import to_ms
from gateway.live.seats import SEATS
from policy.tenants import Tenant
from runtime.ids import read
from runtime.settings import Settings
from tests.outages import own_redis, wire_to, wired_postgres
from tests.server import SAMPLES, Served, serving
from tests.streaming import Talk, assert_well_formed, clip, denial, talking

AWAY_S = 10.0
STEP = 1_600
BEFORE_MS, DURING_MS, AFTER_MS = 14_000, 10_000, 16_000
AUDIO = load(SAMPLES / "long.wav")[: (BEFORE_MS + DURING_MS + AFTER_MS) * 16]

Do = Callable[[], Awaitable[None]]

pytestmark = pytest.mark.filterwarnings("ignore:unclosed connection:ResourceWarning")
"""A connection whose Postgres is killed while it is being made is dropped by the pool as it is."""


@pytest.fixture(autouse=True)
def dropped_here() -> Iterator[None]:
    """Such connections are collected before the next test, where they would be its fault."""
    yield
    gc.collect()


async def spoken(talk: Talk, start_ms: int, length_ms: int, *, pace: bool = False) -> None:
    """So much of the audio, as fast as it goes or as it is spoken."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for at in range(start_ms * 16, (start_ms + length_ms) * 16, STEP):
        if pace:
            await asyncio.sleep(begun + (at + STEP - start_ms * 16) / 16_000 - loop.time())
        await talk.socket.send(AUDIO[at : at + STEP].tobytes())


async def uninterrupted(served: Served) -> list[str]:
    async with talking(served, served.token(await served.tenant())) as talk:
        await talk.say("start")
        await spoken(talk, 0, BEFORE_MS + DURING_MS + AFTER_MS)
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    return [event["text"] for event in talk.all("final")]


async def streamed_through(served: Served, go: Do, come_back: Do, during: Do) -> tuple[Tenant, Talk]:
    """A stream that sees its support go and come back."""
    tenant = await served.tenant(budget_nano=10_000_000_000)
    async with talking(served, served.token(tenant)) as talk:
        await talk.say("start")
        await spoken(talk, 0, BEFORE_MS)
        await talk.until("final", 3)
        await go()
        heard = len(talk.all("final"))
        meanwhile = asyncio.create_task(during())
        await spoken(talk, BEFORE_MS, DURING_MS, pace=True)
        assert len(talk.all("final")) > heard, "no final came while it was away"
        await come_back()
        await meanwhile
        await spoken(talk, BEFORE_MS + DURING_MS, AFTER_MS)
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert_well_formed(talk.events)
    assert SEATS.taken == 0
    return tenant, talk


async def assert_billed_once(served: Served, tenant: Tenant, talk: Talk) -> None:
    """Client, session, ledger and budget tell the same milliseconds, each of them once."""
    closed = talk.events[-1]
    assert closed["accepted_ms"] == closed["billed_ms"] == to_ms(len(AUDIO))
    assert closed["coverage"] == 1.0
    async with served.gateway.resources.database.tenant(tenant.id) as tx:
        session = (await tx.execute(text("select * from sessions"))).one()
        rows = (await tx.execute(text("select * from usage_ledger order by start_ms"))).all()
        held = (await tx.execute(text("select count(*) from budget_holds where state = 'open'"))).scalar_one()
    assert session.id == read("sess", talk.events[0]["session_id"])
    assert (session.status, session.accepted_ms, session.billed_ms) == (
        "completed",
        to_ms(len(AUDIO)),
        to_ms(len(AUDIO)),
    )
    assert [row.start_ms for row in rows] == [0, *(row.end_ms for row in rows[:-1])]
    assert rows[-1].end_ms == sum(row.billed_ms for row in rows) == to_ms(len(AUDIO))
    assert held == 0


async def refused_to_come_again(served: Served, token: str) -> None:
    """A new stream is refused in good time, and told that it may try again."""
    async with asyncio.timeout(AWAY_S):
        response = await denial(served, token, "?sample_rate=16000")
    problem: dict[str, Any] = json.loads(response.body or b"")
    assert (response.status_code, problem["retryable"]) == (503, True)


@pytest.mark.parametrize("how", ["killed", "silent"])
async def test_without_postgres_for_ten_seconds(settings: Settings, tmp_path: Path, how: str) -> None:
    async with wired_postgres(settings, tmp_path) as (wired, postgres, wire):
        async with serving(wired, model="micro", engine_workers=1) as served:
            token = served.token(await served.tenant())
            expected = await uninterrupted(served)

            async def go() -> None:
                if how == "silent":
                    wire.freeze()
                else:
                    wire.cut()
                    await asyncio.to_thread(postgres.kill)

            async def come_back() -> None:
                if how == "silent":
                    wire.thaw()
                else:
                    await asyncio.to_thread(postgres.start)
                    wire.mend()

            async def during() -> None:
                if how == "killed":
                    await refused_to_come_again(served, token)
                else:
                    with pytest.raises(TimeoutError):
                        async with asyncio.timeout(AWAY_S / 2):
                            await served.gateway.resources.database.ping()

            tenant, talk = await streamed_through(served, go, come_back, during)
            assert [event["text"] for event in talk.all("final")] == expected
            await assert_billed_once(served, tenant, talk)
            await served.still_serves(token)


async def test_without_redis_for_ten_seconds(settings: Settings) -> None:
    with own_redis() as redis:
        async with serving(settings, model="micro", engine_workers=1, redis_url=SecretStr(redis.url)) as served:
            token = served.token(await served.tenant())
            expected = await uninterrupted(served)

            async def go() -> None:
                await asyncio.to_thread(redis.kill)

            async def come_back() -> None:
                await asyncio.to_thread(redis.start)

            async def during() -> None:
                await refused_to_come_again(served, token)

            tenant, talk = await streamed_through(served, go, come_back, during)
            assert [event["text"] for event in talk.all("final")] == expected
            await assert_billed_once(served, tenant, talk)
            await served.still_serves(token)


@asynccontextmanager
async def through_a_wire(served: Served, token: str) -> AsyncIterator[tuple[Talk, Any]]:
    async with wire_to(urlsplit(served.url).port or 0) as (wire, port):
        far = Served(served.gateway, f"http://127.0.0.1:{port}")
        async with talking(far, token, close_timeout=0.1, ping_interval=None) as talk:
            yield talk, wire


async def test_a_client_that_vanishes_without_a_word_is_let_go(settings: Settings) -> None:
    """No FIN, no RST: only the silence tells."""
    samples, said = clip("clip05.wav")
    async with serving(settings, model="micro", engine_workers=1, stream_idle_s=1.0) as served:
        tenant = await served.tenant()
        async with through_a_wire(served, served.token(tenant)) as (talk, wire):
            await talk.say("start")
            await talk.until("ready")
            await talk.speak(samples.tobytes())
            await talk.until("speech_started")
            wire.freeze()
            async with asyncio.timeout(30):
                while SEATS.taken:  # noqa: ASYNC110 — it is told to nobody
                    await asyncio.sleep(0.02)
        async with served.gateway.resources.database.tenant(tenant.id) as tx:
            row = (await tx.execute(text("select status, code, accepted_ms, billed_ms, text from sessions"))).one()
        assert tuple(row) == ("interrupted", "IDLE", to_ms(len(samples)), to_ms(len(samples)), said)


async def test_who_came_back_past_a_dead_connection_goes_on(settings: Settings) -> None:
    """The old connection hangs; the client gives it up, opens another and takes its session with it."""
    samples, said = clip("clip05.wav")
    half = len(samples) // 2
    async with serving(settings, model="micro", engine_workers=1) as served:
        tenant = await served.tenant()
        token = served.token(tenant)
        async with through_a_wire(served, token) as (lost, wire):
            await lost.say("start")
            ready = await lost.until("ready")
            await lost.speak(samples[:half].tobytes())
            await lost.until("speech_started")
            wire.freeze()
            async with talking(served, token) as talk:
                await talk.say("start", resume_token=ready["resume_token"], last_seq=lost.events[-1]["seq"])
                again = await talk.until("ready")
                await talk.speak(samples[again["resend_from_ms"] * 16 :].tobytes())
                await talk.say("stop")
                assert await talk.end() == (1000, "")
        assert talk.text == said
        assert talk.events[-1]["billed_ms"] == to_ms(len(samples))
        assert SEATS.taken == 0
