"""Two gateways that share Postgres and Redis: a session goes over from one to the other once, and is billed once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio
from pydantic import SecretStr
from sqlalchemy import text

from dispatchers.adapters.segmenting import Segmenting
from dispatchers.audio.decode import load
from dispatchers.audio.vad import SileroVad
from dispatchers.backends.scripted import Scripted
from dispatchers.interface import Heard, Options, Samples, Transcript, ignore, to_ms
from gateway.live.seats import SEATS
from policy.admission import reap
from policy.tenants import Tenant
from runtime.ids import read
from runtime.settings import Settings
from tests.server import SAMPLES, Served, serving
from tests.streaming import Event, Talk, assert_well_formed, clip, encoded, refused, talking

STEP = 1_600


@pytest.fixture(scope="module")
async def pair(settings: Settings, redis_url: str) -> AsyncIterator[tuple[Served, Served]]:
    shared = {"redis_url": SecretStr(redis_url), "model": "micro", "engine_workers": 1, "stream_resume_s": 3}
    async with serving(settings, **shared) as first, serving(settings, **shared) as second:
        yield first, second
    assert SEATS.taken == 0


async def row_of(server: Served, tenant: Tenant, session_id: str, *, ended: bool = True) -> Any:
    query = text("""
        select s.*, (select coalesce(sum(l.billed_ms), 0) from usage_ledger l where l.source_id = s.id) ledger_ms,
            (select count(*) from budget_holds h where h.session_id = s.id and h.state = 'open') open_holds
        from sessions s where s.id = :id
    """)
    async with asyncio.timeout(30):
        while True:
            async with server.gateway.resources.database.tenant(tenant.id) as tx:
                row = (await tx.execute(query, {"id": read("sess", session_id)})).one()
            if not ended or row.status != "open":
                return row
            await asyncio.sleep(0.05)


async def spoken(talk: Talk, samples: Samples, from_ms: int, until: int) -> None:
    for at in range(from_ms * 16, until, STEP):
        await talk.socket.send(samples[at : min(at + STEP, until)].tobytes())


def heard(*talks: Talk) -> list[Event]:
    return [event for talk in talks for event in talk.events if event["seq"]]


async def asked(talk: Talk, events: list[Event], **fields: Any) -> None:
    token = next(event["resume_token"] for event in reversed(events) if event["type"] == "ready")
    await talk.say("start", resume_token=token, last_seq=max(event["seq"] for event in events), **fields)


async def failed(server: Served, token: str, events: list[Event]) -> None:
    async with talking(server, token) as talk:
        await asked(talk, events)
        assert await talk.end() == (4410, "RESUME_FAILED")


async def gone(server: Served) -> None:
    """No session is left in this gateway."""
    async with asyncio.timeout(30):
        while server.gateway.roster._sessions:  # noqa: ASYNC110  nothing says so
            await asyncio.sleep(0.05)


async def test_the_former_holder_gives_up_and_bills_nothing_more(pair: tuple[Served, Served]) -> None:
    first, second = pair
    samples = load(SAMPLES / "long.wav")[: 40 * 16_000]
    tenant = await first.tenant(budget_nano=1_000_000_000, max_streams=1)
    token = first.token(tenant)
    async with talking(first, token) as one, talking(second, token) as two:
        await one.say("start")
        await one.until("ready")
        await spoken(one, samples, 0, 20 * 16_000 + 555)
        await one.until("final", 3)
        known = list(one.events)
        await asked(two, known)  # while the first connection still hangs on
        ready = await two.until("ready")
        assert ready["resumed"]
        assert await one.end() == (4409, "SESSION_TAKEN_OVER")
        await gone(first)
        await failed(second, token, known)  # its token is used
        await failed(first, token, known)
        await spoken(two, samples, ready["resend_from_ms"], len(samples))
        await two.say("stop")
        assert await two.end() == (1000, "")
    events = [event for event in known if event["seq"]] + heard(two)
    assert_well_formed(events)
    row = await row_of(first, tenant, known[0]["session_id"])
    assert (row.status, row.code, row.ledger_ms, row.open_holds) == ("completed", None, to_ms(len(samples)), 0)
    assert row.text == " ".join(event["text"] for event in events if event["type"] == "final" and event["text"])
    async with first.gateway.resources.database.tenant(tenant.id) as tx:
        (held,) = (await tx.execute(text("select sum(held_nano) from budget_windows"))).one()
    assert held == 0


async def test_of_two_who_take_it_up_one_succeeds(pair: tuple[Served, Served]) -> None:
    first, second = pair
    tenant = await first.tenant()
    token = first.token(tenant)
    samples, said = clip("clip02.wav")
    async with serving(first.gateway.settings) as third:
        async with talking(first, token) as talk:
            await talk.say("start")
            await talk.until("ready")
            await spoken(talk, samples, 0, len(samples) // 2)
            await talk.until("speech_started")
        async with talking(second, token) as one, talking(third, token) as two:
            await asyncio.gather(asked(one, talk.events), asked(two, talk.events))
            async with asyncio.timeout(30):
                while not (one.events and two.events):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            (winner,) = [each for each in (one, two) if each.events[0]["type"] == "ready"]
            (loser,) = [each for each in (one, two) if each is not winner]
            assert await loser.end() == (4410, "RESUME_FAILED")
            await spoken(winner, samples, winner.events[0]["resend_from_ms"], len(samples))
            await winner.say("stop")
            assert await winner.end() == (1000, "")
            assert winner.text == said
        row = await row_of(first, tenant, talk.events[0]["session_id"])
        assert (row.status, row.ledger_ms) == ("completed", to_ms(len(samples)))


async def test_what_was_missed_is_told_and_what_cannot_be_sent_again_is_a_gap(pair: tuple[Served, Served]) -> None:
    first, second = pair
    samples, said = clip("clip05.wav")
    tenant = await first.tenant()
    token = first.token(tenant)
    async with talking(first, token) as one, talking(second, token) as two:
        await one.say("start")
        await one.until("ready")
        await spoken(one, samples, 0, len(samples))
        await one.say("flush")
        await one.until("flushed")
        await spoken(one, samples, 0, len(samples))  # and once more, of which only the beginning is known to be lost
        await one.until("speech_started", 2)
        one.socket.transport.abort()
        await one.end()
        length = to_ms(len(samples))
        known = one.events[:2]
        await asked(two, known, resend_from_ms=10**9)
        ready = await two.until("ready")
        gap = await two.until("gap")
        final = two.all("final")[0]
        assert (final["text"], final["end_ms"] <= gap["start_ms"]) == (said, True)
        assert (gap["end_ms"], gap["reason"]) == (ready["resend_from_ms"], "lost")
        assert final["end_ms"] < ready["resend_from_ms"] <= 2 * length
        await spoken(two, samples, 0, len(samples))
        await two.say("stop")
        assert await two.end() == (1000, "")
    assert_well_formed([event for event in known if event["seq"]] + heard(two))
    assert two.all("final")[-1]["text"] == said
    assert two.all("final")[-1]["start_ms"] >= ready["resend_from_ms"]
    closed = two.events[-1]
    assert closed["billed_ms"] == closed["accepted_ms"] == ready["resend_from_ms"] + length
    lost = gap["end_ms"] - gap["start_ms"]
    assert closed["coverage"] == pytest.approx(1 - lost / closed["accepted_ms"], abs=1e-5)


async def test_where_no_transcript_is_kept_nothing_is_left_to_anybody(pair: tuple[Served, Served]) -> None:
    first, second = pair
    token = first.token(await first.tenant(keep_transcripts=False))
    async with talking(first, token) as talk:
        await talk.say("start")
        await talk.until("ready")
        talk.socket.transport.abort()
        await talk.end()
        await failed(second, token, talk.events)
        query = f"?resume_token={talk.events[0]['resume_token']}&last_seq=1"
        assert await refused(second, token, query) == (410, "RESUME_FAILED")
        async with talking(first, token, query) as again:
            await again.until("ready")
            await again.say("stop")
            assert await again.end() == (1000, "")


async def test_nobody_comes_and_the_account_is_closed(pair: tuple[Served, Served]) -> None:
    first, _ = pair
    samples, said = clip("clip05.wav")
    async with serving(first.gateway.settings) as leaving:
        tenant = await leaving.tenant(budget_nano=1_000_000_000)
        token = leaving.token(tenant)
        async with talking(leaving, token) as talk:
            await talk.say("start")
            await talk.until("ready")
            await spoken(talk, samples, 0, len(samples))
            await talk.until("speech_started")
            await leaving.gateway.roster.drain(0.2)
            assert await talk.end() == (1012, "RESTARTING")
    session_id = talk.events[0]["session_id"]
    row = await row_of(first, tenant, session_id, ended=False)
    assert (row.status, row.code, row.text) == ("open", "RESTARTING", said)
    assert row.ledger_ms == row.accepted_ms == to_ms(len(samples))
    assert row.open_holds == 1
    await reap(first.gateway.resources.database, 0)
    row = await row_of(first, tenant, session_id)
    assert (row.status, row.code, row.text, row.utterances) == ("interrupted", "RESTARTING", said, 1)
    assert (row.ledger_ms, row.open_holds) == (to_ms(len(samples)), 0)
    await failed(first, token, talk.events)


async def test_a_store_that_forgot_everything_is_told_again(pair: tuple[Served, Served], redis_url: str) -> None:
    first, second = pair
    samples, said = clip("clip05.wav")
    token = first.token(await first.tenant())
    async with talking(first, token) as one, talking(second, token) as two:
        await one.say("start")
        await one.until("ready")
        await spoken(one, samples, 0, len(samples))
        await one.say("flush")
        await one.until("flushed")
        async with redis.asyncio.from_url(redis_url) as store:
            await store.flushall()
            async with asyncio.timeout(30):
                while not await store.keys("stenogate:state:*"):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        one.socket.transport.abort()
        await one.end()
        known = one.events[:1]
        await asked(two, known)
        await two.until("ready")
        await two.say("stop")
        assert await two.end() == (1000, "")
    assert two.text == said
    assert_well_formed(known + heard(two))


class Breaking(Scripted):
    """Fails once, by no fault that anybody foresaw."""

    broken = False

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        if options.urgency == "final" and not self.broken:
            self.broken = True
            raise ZeroDivisionError
        return await super().transcribe(audio, options, heard)


async def test_our_own_fault_ends_no_session(settings: Settings) -> None:
    samples, _ = clip("clip05.wav")
    vad = SileroVad.load()
    async with serving(settings, recogniser=Segmenting(Breaking(), vad)) as server:
        tenant = await server.tenant()
        token = server.token(tenant)
        async with talking(server, token) as one, talking(server, token) as two:
            await one.say("start")
            await one.until("ready")
            await spoken(one, samples, 0, len(samples))
            await one.say("flush")
            assert await one.end() == (1011, "INTERNAL")
            await asked(two, one.events)
            ready = await two.until("ready")
            assert ready["resend_from_ms"] == 0
            await spoken(two, samples, 0, len(samples))
            await two.say("stop")
            assert await two.end() == (1000, "")
        row = await row_of(server, tenant, one.events[0]["session_id"])
    vad.close()
    assert two.text
    assert (row.status, row.code, row.text) == ("completed", None, two.text)
    assert row.ledger_ms == to_ms(len(samples))


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_container_is_resumed_with_a_new_header(pair: tuple[Served, Served], elsewhere: bool) -> None:
    first, second = pair
    samples = load(SAMPLES / "long.wav")[: 24 * 16_000]
    tenant = await first.tenant()
    token = first.token(tenant)

    def flac(part: Samples) -> bytes:
        return encoded(part, "flac", "flac", 16_000)

    async with talking(first, token) as whole:
        await whole.say("start")
        await whole.speak(samples.tobytes())
        await whole.say("stop")
        await whole.end()
    async with talking(first, token) as one, talking(second if elsewhere else first, token) as two:
        await one.say("start", encoding="flac")
        assert (await one.until("ready"))["resume_token"]
        data = flac(samples)
        await one.speak(data[: len(data) // 2])
        await one.until("final", 2)
        one.socket.transport.abort()
        await one.end()
        await asked(two, one.events)
        ready = await two.until("ready")
        assert ready["resend_from_ms"] > 0
        await two.speak(flac(samples[ready["resend_from_ms"] * 16 :]))
        await two.say("stop")
        assert await two.end() == (1000, "")
    events = heard(one, two)
    assert_well_formed(events)
    said = [event["text"] for event in events if event["type"] == "final" and event["text"]]
    assert said == [event["text"] for event in whole.all("final") if event["text"]]
    assert two.events[-1]["billed_ms"] == two.events[-1]["accepted_ms"] == to_ms(len(samples))


async def test_it_goes_back_and_forth(pair: tuple[Served, Served]) -> None:
    samples = load(SAMPLES / "long.wav")[: 32 * 16_000]
    tenant = await pair[0].tenant()
    token = pair[0].token(tenant)
    events: list[Event] = []
    every: list[Event] = []
    for hop in range(4):
        until = len(samples) * (hop + 1) // 4 + (777 if hop < 3 else 0)
        async with talking(pair[hop % 2], token) as talk:
            await (asked(talk, every) if hop else talk.say("start"))
            ready = await talk.until("ready")
            await spoken(talk, samples, ready["resend_from_ms"], min(until, len(samples)))
            if hop == 3:
                await talk.say("stop")
                assert await talk.end() == (1000, "")
            else:
                await talk.until("speech_started")
                talk.socket.transport.abort()
                await talk.end()
        every += talk.events
        events += heard(talk)
    async with talking(pair[0], token) as whole:
        await whole.say("start")
        await whole.speak(samples.tobytes())
        await whole.say("stop")
        await whole.end()
    assert_well_formed(events)
    said = [event["text"] for event in events if event["type"] == "final" and event["text"]]
    assert said == [event["text"] for event in whole.all("final") if event["text"]]
    row = await row_of(pair[0], tenant, events[0]["session_id"])
    assert (row.status, row.turn, row.ledger_ms, row.open_holds) == ("completed", 3, to_ms(len(samples)), 0)
    assert row.text == " ".join(said)
