"""Two channels transcribed each for itself, as a caller has it: a real server, a real socket, the micro model."""

from __future__ import annotations

import asyncio
import io
import json
import wave
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from dispatchers.adapters.per_channel import PerChannel
from dispatchers.adapters.segmenting import Segmenting
from dispatchers.audio.vad import SileroVad
from dispatchers.backends.scripted import Scripted
from dispatchers.errors import BackendFailed
from dispatchers.interface import Heard, Options, Samples, Transcript, ignore, to_ms
from gateway.live.seats import SEATS
from policy.statements import build
from policy.tenants import Tenant
from runtime.ids import read
from runtime.settings import Settings
from tests.server import PRICE_NANO_PER_HOUR, Served, serving
from tests.streaming import Event, Talk, assert_well_formed, clip, denial, talking

PRICE_NANO_PER_MS = PRICE_NANO_PER_HOUR // 3_600_000
STEP_BYTES = 6_403  # cuts samples and frames
PER_CHANNEL: Event = {"channels": 2, "per_channel": True}


@pytest.fixture(scope="module")
async def server(settings: Settings) -> AsyncIterator[Served]:
    async with serving(settings, model="micro", engine_workers=1, stream_resume_s=30) as running:
        yield running
    assert SEATS.taken == 0


@pytest.fixture(scope="module")
async def scripted(settings: Settings) -> AsyncIterator[Served]:
    async with serving(settings, backend="scripted", max_streams=3) as running:
        yield running
    assert SEATS.taken == 0


def conversation(*clips: tuple[int, str, int]) -> tuple[Samples, tuple[list[str], list[str]]]:
    """Clips by channel, with the ms at which they start: samples, shape (length, 2), and what each channel says."""
    said: tuple[list[str], list[str]] = ([], [])
    parts = [(channel, start_ms * 16, *clip(name)) for channel, name, start_ms in clips]
    sides = np.zeros((max(at + len(samples) for _, at, samples, _ in parts) + 16_000, 2), np.int16)
    for channel, at, samples, words in parts:
        sides[at : at + len(samples), channel] = samples
        said[channel].append(words)
    return sides, said


def overlapping() -> tuple[Samples, tuple[list[str], list[str]]]:
    """Left is interrupted by right, and then by another clip of right's."""
    return conversation(
        (0, "clip02.wav", 300), (0, "clip05.wav", 5_200), (1, "clip12.wav", 1_500), (1, "clip05.wav", 6_000)
    )


def heard(events: list[Event], channel: int) -> list[str]:
    return [event["text"] for event in events if event["type"] == "final" and event["channel"] == channel]


async def rows_of(server: Served, tenant: Tenant, session_id: str) -> Any:
    """The ended session's row, with what the ledger says of it."""
    query = text("""
        select s.*, l.ledger_ms, l.amount, l.ledger_channels from sessions s,
            lateral (select sum(billed_ms) ledger_ms, sum(amount_nano) amount, max(channels) ledger_channels
                     from usage_ledger where source_id = s.id) l
        where s.id = :id
    """)
    async with asyncio.timeout(30):
        while True:
            async with server.gateway.resources.database.tenant(tenant.id) as tx:
                row = (await tx.execute(query, {"id": read("sess", session_id)})).one()
            if row.status != "open":
                return row
            await asyncio.sleep(0.05)


async def said_by(talk: Talk, data: bytes) -> None:
    await talk.speak(data, step=STEP_BYTES)
    await talk.say("stop")
    assert await talk.end() == (1000, "")


# --- the main way -------------------------------------------------------------------------------------------------


async def test_each_channel_has_its_own_transcript(server: Served) -> None:
    sides, said = overlapping()
    tenant = await server.tenant(budget_nano=10**9)
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start", **PER_CHANNEL, words=True, language="en", model="micro")
        await said_by(talk, sides.tobytes())
    assert (heard(talk.events, 0), heard(talk.events, 1)) == said
    assert_well_formed(talk.events)
    about_audio = [event for event in talk.events if "start_ms" in event]
    assert {event["channel"] for event in about_audio} == {0, 1}
    finals = talk.all("final")
    left, right = ([event for event in finals if event["channel"] == channel] for channel in (0, 1))
    assert left[0]["start_ms"] < right[0]["start_ms"] < left[0]["end_ms"]  # while the other speaks
    for event in finals:
        assert [word["word"] for word in event["words"]] == event["text"].split()
        times = [event["start_ms"], *(word["start_ms"] for word in event["words"]), event["end_ms"]]
        assert times == sorted(times)

    length, closed = to_ms(len(sides)), talk.events[-1]
    assert (closed["accepted_ms"], closed["billed_ms"], closed["coverage"]) == (length, 2 * length, 1.0)
    assert (closed["utterances"], closed["words"]) == (4, sum(len(words.split()) for words in said[0] + said[1]))
    row = await rows_of(server, tenant, talk.events[0]["session_id"])
    assert (row.status, row.channels, row.ledger_channels) == ("completed", 2, 2)
    assert (row.accepted_ms, row.billed_ms, row.ledger_ms) == (length, 2 * length, 2 * length)
    assert row.amount == 2 * length * PRICE_NANO_PER_MS
    assert row.text == " ".join(event["text"] for event in finals)
    async with server.gateway.resources.database.tenant(tenant.id) as tx:
        window = (await tx.execute(text("select settled_nano, held_nano from budget_windows"))).one()
        started = row.started_at.date()
        statement = await build(tx, tenant, started, started.replace(year=started.year + 1))
    assert (window.settled_nano, window.held_nano) == (row.amount, 0)
    assert statement.reconciliation.balanced
    assert (statement.lines[0].audio_ms, statement.lines[0].billed_ms) == (length, 2 * length)
    async with server.http(server.token(tenant)) as http:
        shown = (await http.get(f"/v1/sessions/{talk.events[0]['session_id']}")).json()
    assert (shown["channels"], shown["accepted_ms"], shown["billed_ms"]) == (2, length, 2 * length)


async def test_the_address_may_say_it_and_the_rate_may_be_any(server: Served) -> None:
    sides, said = overlapping()
    wide = np.stack([upsampled(sides[:, channel]) for channel in (0, 1)], axis=1)
    query = "?channels=2&per_channel=true&sample_rate=48000"
    async with talking(server, server.token(await server.tenant()), query) as talk:
        await said_by(talk, wide.tobytes())
    assert (heard(talk.events, 0), heard(talk.events, 1)) == said
    assert abs(talk.events[-1]["accepted_ms"] - to_ms(len(sides))) <= 1


def upsampled(samples: Samples) -> Samples:
    """To 48 kHz, by what brings a third of the rate to 16 kHz."""
    at = np.arange(3 * len(samples)) / 3
    return np.interp(at, np.arange(len(samples)), samples).astype(np.int16)


async def test_a_container_may_have_the_two(server: Served) -> None:
    sides, said = overlapping()
    async with talking(server, server.token(await server.tenant())) as talk:
        await talk.say("start", encoding="wav", per_channel=True)
        await said_by(talk, wav(sides))
    assert (heard(talk.events, 0), heard(talk.events, 1)) == said
    length = to_ms(len(sides))
    assert (talk.events[-1]["accepted_ms"], talk.events[-1]["billed_ms"]) == (length, 2 * length)


def wav(samples: Samples) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())
    return out.getvalue()


# --- commands, lost sockets ---------------------------------------------------------------------------------------


async def test_a_flush_is_answered_once_when_both_have_answered(server: Served) -> None:
    sides, said = conversation((0, "clip02.wav", 0), (1, "clip05.wav", 0))
    spoken = sides[: len(sides) - 16_000]
    async with talking(server, server.token(await server.tenant())) as talk:
        await talk.say("start", **PER_CHANNEL, vad={"silence_ms": 5_000})
        await talk.speak(spoken.tobytes(), step=STEP_BYTES)
        await talk.say("flush")
        flushed = await talk.until("flushed")
        assert (heard(talk.events, 0), heard(talk.events, 1)) == said
        assert flushed["accepted_ms"] == to_ms(len(spoken))
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert len(talk.all("flushed")) == 1
    assert_well_formed(talk.events)


async def test_clear_drops_what_both_are_saying(server: Served) -> None:
    sides, said = conversation((0, "clip02.wav", 0), (1, "clip02.wav", 0))
    async with talking(server, server.token(await server.tenant())) as talk:
        await talk.say("start", **PER_CHANNEL, vad={"silence_ms": 5_000})
        await talk.speak(sides[: 2 * 16_000].tobytes(), step=STEP_BYTES)
        await talk.until("speech_started", 2)
        await talk.say("clear")
        await talk.until("cleared")
        await said_by(talk, sides.tobytes())
    gaps, closed = talk.all("gap"), talk.events[-1]
    assert {(gap["channel"], gap["reason"]) for gap in gaps} == {(0, "cleared"), (1, "cleared")}
    assert len(talk.all("cleared")) == 1
    assert (heard(talk.events, 0), heard(talk.events, 1)) == said
    lost = sum(gap["end_ms"] - gap["start_ms"] for gap in gaps)
    assert closed["coverage"] == pytest.approx(1 - lost / (2 * closed["accepted_ms"]), abs=1e-6)


async def test_a_lost_socket_costs_nothing(server: Served) -> None:
    sides, said = overlapping()
    tenant = await server.tenant()
    token, events, ready = server.token(tenant), list[Event](), Event()
    cuts = [len(sides) // 3 + 777, 2 * len(sides) // 3, len(sides)]
    for cut in cuts:
        async with talking(server, token) as talk:
            last = max((event["seq"] for event in events), default=0)
            await talk.say(
                "start", **({"resume_token": ready["resume_token"], "last_seq": last} if ready else PER_CHANNEL)
            )
            ready = await talk.until("ready")
            await talk.speak(sides[ready["resend_from_ms"] * 16 : cut].tobytes(), step=STEP_BYTES)
            if cut == cuts[-1]:
                await talk.say("stop")
                assert await talk.end() == (1000, "")
            else:
                await talk.until("final" if events else "speech_started")
                talk.socket.transport.abort()
                await talk.end()
        events += [event for event in talk.events if event["seq"]]
    assert_well_formed(events)
    assert (heard(events, 0), heard(events, 1)) == said
    assert (events[-1]["accepted_ms"], events[-1]["billed_ms"]) == (to_ms(len(sides)), 2 * to_ms(len(sides)))


async def test_who_vanishes_still_gets_both_texts(server: Served) -> None:
    sides, said = conversation((0, "clip02.wav", 0), (1, "clip05.wav", 500))
    tenant = await server.tenant()
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start", **PER_CHANNEL)
        ready = await talk.until("ready")
        await talk.speak(sides.tobytes(), step=STEP_BYTES)
        await talk.until("final", 2)
        await talk.socket.close(1000)
    row = await rows_of(server, tenant, ready["session_id"])
    assert (row.status, row.billed_ms, row.ledger_ms) == ("completed", 2 * row.accepted_ms, 2 * row.accepted_ms)
    assert sorted(row.text.split()) == sorted(" ".join(said[0] + said[1]).split())


class HalfDeaf(Scripted):
    """Fails for the stream that it heard of first."""

    def __init__(self) -> None:
        super().__init__()
        self._first = ""

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        self._first = self._first or options.stream
        if options.stream == self._first:
            raise BackendFailed
        return await super().transcribe(audio, options, heard)


async def test_what_fails_in_one_channel_leaves_the_other_alone(settings: Settings) -> None:
    sides, _ = overlapping()
    recogniser = PerChannel(Segmenting(HalfDeaf(), SileroVad.load()))
    async with serving(settings, recogniser=recogniser) as half_deaf:
        async with talking(half_deaf, half_deaf.token(await half_deaf.tenant())) as talk:
            await talk.say("start", **PER_CHANNEL)
            await said_by(talk, sides.tobytes())
    errors, gaps = talk.all("error"), talk.all("gap")
    (deaf,) = {error["channel"] for error in errors}
    assert {(error["code"], error["fatal"]) for error in errors} == {("BACKEND_FAILED", False)}
    assert [(gap["channel"], gap["reason"]) for gap in gaps] == [(deaf, "BACKEND_FAILED")] * len(errors)
    assert heard(talk.events, deaf) == []
    assert all(heard(talk.events, 1 - deaf))
    lost = sum(gap["end_ms"] - gap["start_ms"] for gap in gaps)
    closed = talk.events[-1]
    assert closed["coverage"] == pytest.approx(1 - lost / (2 * closed["accepted_ms"]), abs=1e-6)


# --- limits and money ---------------------------------------------------------------------------------------------


async def test_a_budget_pays_for_both_channels(scripted: Served) -> None:
    tenant = await scripted.tenant(budget_nano=70_000 * PRICE_NANO_PER_MS)
    async with talking(scripted, scripted.token(tenant)) as talk:
        await talk.say("start", **PER_CHANNEL)
        await talk.speak(bytes(90 * 64_000), step=100_000)
        assert await talk.end() == (4402, "BUDGET_EXHAUSTED")
        ready = talk.events[0]
    row = await rows_of(scripted, tenant, ready["session_id"])
    assert 30_000 <= row.accepted_ms <= 35_000
    assert row.ledger_ms == row.billed_ms == 2 * row.accepted_ms
    for usage in talk.all("usage"):
        assert usage["billed_ms"] == 2 * usage["accepted_ms"]
        assert usage["budget_remaining_ms"] <= 35_000 - usage["accepted_ms"]


async def test_it_takes_a_seat_for_each_channel(scripted: Served) -> None:
    tenant = await scripted.tenant(max_streams=3)
    token = scripted.token(tenant)
    query = "?channels=2&per_channel=1"
    async with talking(scripted, token, query) as first:
        await first.until("ready")
        assert SEATS.taken == 2
        response = await denial(scripted, token, query)
        assert (response.status_code, json.loads(response.body or b"")["code"]) == (503, "NO_SEAT")
        assert SEATS.taken == 2
        async with talking(scripted, token, "?channels=2") as mixed:
            await mixed.until("ready")
    narrow = scripted.token(await scripted.tenant(max_streams=1))
    async with asyncio.timeout(10):
        while SEATS.taken > 1:  # noqa: ASYNC110  those who left are still leaving
            await asyncio.sleep(0.01)
    response = await denial(scripted, narrow, query)
    assert (response.status_code, json.loads(response.body or b"")["code"]) == (429, "CONCURRENCY_LIMITED")
    async with talking(scripted, narrow, "?channels=2") as alone:  # the seat it took first is free again
        await alone.until("ready")


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"per_channel": True}, "`channels` must be 2"),
        ({"per_channel": True, "channels": 1}, "`channels` must be 2"),
        ({"per_channel": True, "channels": 3}, "channels"),
        ({"per_channel": "both", "channels": 2}, "per_channel"),
        ({"per_channel": True, "channels": 2, "encoding": "mulaw"}, "mulaw is always of one channel"),
    ],
)
async def test_what_has_not_two_channels_is_refused_with_a_hint(scripted: Served, fields: Event, hint: str) -> None:
    async with talking(scripted, scripted.token(await scripted.tenant())) as talk:
        await talk.say("start", **fields)
        assert (await talk.end())[0] == 4400
    assert talk.events[-1]["code"] == "BAD_PARAMETERS"
    assert hint in talk.events[-1]["message"]


async def test_the_address_is_refused_before_the_upgrade(scripted: Served) -> None:
    response = await denial(scripted, scripted.token(await scripted.tenant()), "?per_channel=true")
    assert response.status_code == 400
    assert "`channels` must be 2" in json.loads(response.body or b"")["detail"]


async def test_a_container_of_one_channel_ends_the_session(scripted: Served) -> None:
    samples, _ = clip("clip02.wav")
    tenant = await scripted.tenant()
    async with talking(scripted, scripted.token(tenant)) as talk:
        await talk.say("start", encoding="wav", per_channel=True)
        ready = await talk.until("ready")
        await talk.speak(wav(samples))
        assert (await talk.end())[0] == 1007
    assert talk.events[-1]["code"] == "UNSUPPORTED_AUDIO"
    assert "this audio has 1" in talk.events[-1]["message"]
    row = await rows_of(scripted, tenant, ready["session_id"])
    assert (row.accepted_ms, row.billed_ms) == (0, 0)
