"""A lost socket costs nothing: the session goes on where it was, every message once, every millisecond billed once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text
from websockets.asyncio.client import connect

from dispatchers.audio.decode import load
from dispatchers.interface import Samples, to_ms
from gateway.live.seats import SEATS
from policy.tenants import Tenant
from runtime.ids import read
from runtime.settings import Settings
from tests.server import SAMPLES, Served, serving
from tests.streaming import Event, Talk, assert_well_formed, clip, refused, talking

STEP = 1_600


@pytest.fixture(scope="module")
async def server(settings: Settings) -> AsyncIterator[Served]:
    async with serving(settings, model="micro", engine_workers=1, stream_resume_s=30) as running:
        yield running
    assert SEATS.taken == 0


@pytest.fixture(scope="module")
async def hasty(settings: Settings) -> AsyncIterator[Served]:
    async with serving(settings, backend="scripted", stream_resume_s=0.1) as running:
        yield running


async def row_of(server: Served, tenant: Tenant, session_id: str) -> Any:
    """The ended session's row, with what the ledger says of it."""
    query = text("""
        select s.*, (select coalesce(sum(l.billed_ms), 0) from usage_ledger l where l.source_id = s.id) ledger_ms,
            (select count(*) from sessions) sessions
        from sessions s where s.id = :id
    """)
    async with asyncio.timeout(30):
        while True:
            async with server.gateway.resources.database.tenant(tenant.id) as tx:
                row = (await tx.execute(query, {"id": read("sess", session_id)})).one()
            if row.status != "open":
                return row
            await asyncio.sleep(0.05)


def last_seq(events: list[Event]) -> int:
    return max(int(event["seq"]) for event in events)


async def resumed(talk: Talk, events: list[Event], token: str) -> Event:
    """Asks for the session of these events; the `ready` of it."""
    await talk.say("start", resume_token=token, last_seq=last_seq(events))
    ready = await talk.until("ready")
    assert (ready["seq"], ready["resumed"]) == (0, True)
    assert ready["session_id"] == events[0]["session_id"]
    assert ready["resume_token"] != token
    return ready


async def spoken(talk: Talk, samples: Samples, from_ms: int, until: int) -> None:
    for at in range(from_ms * 16, until, STEP):
        await talk.socket.send(samples[at : min(at + STEP, until)].tobytes())


def once(*talks: Talk) -> list[Event]:
    """What was heard over all connections, without the `ready`s of resumes."""
    return [event for talk in talks for event in talk.events if event["seq"]]


@pytest.mark.parametrize("drops", [1, 3])
async def test_nothing_is_lost_and_nothing_is_billed_twice(server: Served, drops: int) -> None:
    samples = load(SAMPLES / "long.wav")[: 40 * 16_000]
    whole = await server.tenant()
    async with talking(server, server.token(whole)) as talk:
        await talk.say("start")
        await talk.speak(samples.tobytes())
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    expected = [event["text"] for event in talk.all("final")]

    tenant = await server.tenant()
    token = server.token(tenant)
    events: list[Event] = []
    ready: Event = {}
    for drop in range(drops + 1):
        last = drop == drops
        until = len(samples) if last else len(samples) * (drop + 1) // (drops + 1) + 777
        async with talking(server, token) as talk:
            if drop == 0:
                await talk.say("start")
                ready = await talk.until("ready")
            else:
                ready = await resumed(talk, events, ready["resume_token"])
                ends = [event["end_ms"] for event in events if event["type"] == "final"]
                assert ready["resend_from_ms"] >= max(ends, default=0)
                assert ready["accepted_ms"] <= until // 16
            await spoken(talk, samples, ready["resend_from_ms"], until)
            if last:
                await talk.say("stop")
                assert await talk.end() == (1000, "")
            else:
                await talk.until("speech_started")
                talk.socket.transport.abort()
                await talk.end()
        events += [event for event in talk.events if event["seq"]]
    assert_well_formed(events)
    assert [event["text"] for event in events if event["type"] == "final"] == expected
    closed = events[-1]
    assert closed["accepted_ms"] == closed["billed_ms"] == to_ms(len(samples))
    assert closed["coverage"] == 1.0
    row = await row_of(server, tenant, events[0]["session_id"])
    assert (row.status, row.sessions, row.ledger_ms) == ("completed", 1, to_ms(len(samples)))
    assert row.text == " ".join(text for text in expected if text)


async def test_what_was_missed_is_told_again(server: Served) -> None:
    samples, said = clip("clip05.wav")
    tenant = await server.tenant()
    token = server.token(tenant)
    async with talking(server, token) as first:
        await first.say("start")
        ready = await first.until("ready")
        await first.speak(samples.tobytes())
        await first.say("flush")
        await first.until("flushed")
        first.socket.transport.abort()
        await first.end()
    heard = first.events[:3]
    async with talking(server, token, f"?resume_token={ready['resume_token']}&last_seq={last_seq(heard)}") as second:
        await second.until("flushed")
        await second.say("stop")
        assert await second.end() == (1000, "")
    assert second.events[0]["resumed"]
    assert second.events[1 : len(first.events) - 2] == first.events[3:]
    assert second.text == said
    assert_well_formed(heard + once(second))


async def test_a_second_connection_takes_over(server: Served) -> None:
    samples, said = clip("clip02.wav")
    token = server.token(await server.tenant())
    async with talking(server, token) as first, talking(server, token) as second:
        await first.say("start")
        ready = await first.until("ready")
        await spoken(first, samples, 0, len(samples) // 2)
        await first.until("speech_started")
        heard = list(first.events)
        await resumed(second, heard, ready["resume_token"])
        assert await first.end() == (4409, "SESSION_TAKEN_OVER")
        assert (first.events[-1]["type"], first.events[-1]["code"]) == ("error", "SESSION_TAKEN_OVER")
        await spoken(second, samples, 0, len(samples))
        await second.say("stop")
        assert await second.end() == (1000, "")
    assert_well_formed(heard + once(second))
    assert second.text == said
    assert second.events[-1]["billed_ms"] == to_ms(len(samples))


async def test_a_connection_that_takes_nothing_any_more_does_not_hinder(server: Served) -> None:
    token = server.token(await server.tenant())
    headers = {"Authorization": f"Bearer {token}"}
    address = server.url.replace("http", "ws", 1) + "/v1/stream"
    question = json.dumps({"type": "ping", "id": "x" * 200})
    async with connect(address, additional_headers=headers, compression=None, proxy=None, max_queue=1) as stuck:
        await stuck.send(json.dumps({"type": "start"}))
        ready = json.loads(await stuck.recv())
        with pytest.raises(TimeoutError):  # the answers fill every buffer between us, then the server reads no more
            async with asyncio.timeout(20):
                while True:
                    await asyncio.wait_for(asyncio.gather(*(stuck.send(question) for _ in range(500))), 0.3)
        async with talking(server, token) as talk:  # more was said than is kept, and little was heard of it
            await talk.say("start", resume_token=ready["resume_token"], last_seq=1)
            assert await talk.end() == (4410, "RESUME_FAILED")
        (session,) = server.gateway.roster._sessions.values()
        async with talking(server, token) as talk:
            await resumed(talk, [{**ready, "seq": session._record.seq}], ready["resume_token"])
            await talk.say("stop")
            assert await talk.end() == (1000, "")
        stuck.transport.abort()


async def failed(server: Served, token: str, resume_token: str, seq: int = 1) -> None:
    async with talking(server, token) as talk:
        await talk.say("start", resume_token=resume_token, last_seq=seq)
        assert await talk.end() == (4410, "RESUME_FAILED")
    assert [(event["type"], event["code"], event["fatal"]) for event in talk.events] == [
        ("error", "RESUME_FAILED", True)
    ]


async def test_a_bad_used_or_foreign_token_resumes_nothing(server: Served) -> None:
    tenant = await server.tenant()
    token = server.token(tenant)
    async with talking(server, token) as first, talking(server, token) as second:
        await first.say("start")
        ready = await first.until("ready")
        await failed(server, token, "rubbish")
        await failed(server, server.token(await server.tenant()), ready["resume_token"])
        await failed(server, token, ready["resume_token"], seq=99)  # more than was ever said
        assert await refused(server, token, "?resume_token=rubbish&last_seq=0") == (410, "RESUME_FAILED")
        fresh = await resumed(second, first.events, ready["resume_token"])
        await failed(server, token, ready["resume_token"])  # used
        await second.say("stop")
        assert await second.end() == (1000, "")
    await failed(server, token, fresh["resume_token"])  # over


async def test_who_comes_too_late_finds_the_session_settled(hasty: Served) -> None:
    samples, _ = clip("clip05.wav")
    tenant = await hasty.tenant()
    async with talking(hasty, hasty.token(tenant)) as talk:
        await talk.say("start")
        ready = await talk.until("ready")
        await talk.speak(samples.tobytes())
        await talk.until("speech_started")
        talk.socket.transport.abort()
    row = await row_of(hasty, tenant, ready["session_id"])
    assert (row.status, row.ledger_ms) == ("completed", row.accepted_ms)
    assert row.text
    await failed(hasty, hasty.token(tenant), ready["resume_token"])


async def test_who_leaves_on_purpose_is_not_waited_for(server: Served) -> None:
    tenant = await server.tenant()
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start")
        ready = await talk.until("ready")
        await talk.socket.close(1000)
    assert (await row_of(server, tenant, ready["session_id"])).status == "completed"
    assert SEATS.taken == 0


async def test_a_gateway_may_offer_no_resume(settings: Settings) -> None:
    async with serving(settings, backend="scripted", stream_resume_s=0) as server:
        async with talking(server, server.token(await server.tenant())) as talk:
            await talk.say("start")
            assert (await talk.until("ready"))["resume_token"] is None


async def test_a_draining_gateway_lets_nobody_in_and_sees_everybody_out(settings: Settings) -> None:
    samples, said = clip("clip05.wav")
    async with serving(settings, model="micro", engine_workers=1) as server:
        tenant = await server.tenant()
        token = server.token(tenant)
        async with talking(server, token) as talk, talking(server, token) as quick, talking(server, token) as lost:
            for each in (talk, quick, lost):
                await each.say("start")
                await each.until("ready")
                await each.speak(samples.tobytes())
                await each.until("speech_started")
            lost.socket.transport.abort()
            draining = asyncio.create_task(server.gateway.roster.drain(1.0))
            told = await talk.until("draining")
            assert (told["deadline_ms"], told["resume_token"]) == (1000, talk.events[0]["resume_token"])
            assert told["reconnect_after_ms"] >= 0
            assert await refused(server, token) == (503, "RESTARTING")
            async with server.http() as http:
                ready = await http.get("/readyz")
            assert (ready.status_code, json.loads(ready.text)["status"]) == (503, "draining")
            await quick.say("stop")  # in time
            assert await quick.end() == (1000, "")
            assert await talk.end() == (1012, "RESTARTING")
            await draining
        assert talk.text == quick.text == said
        assert_well_formed(talk.events)
        assert (talk.events[-1]["code"], talk.events[-1]["retryable"]) == ("RESTARTING", True)
        for each in (talk, quick, lost):
            row = await row_of(server, tenant, each.events[0]["session_id"])
            assert row.status == ("completed" if each is quick else "interrupted")
            assert row.text
            assert row.ledger_ms == row.accepted_ms
        assert SEATS.taken == 0
