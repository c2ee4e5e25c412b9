"""Live streams as a caller has them: a real server, a real socket, real recognition by the micro model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from av import AudioFrame, AudioResampler
from sqlalchemy import text

from dispatchers.adapters.segmenting import Segmenting
from dispatchers.audio.decode import load
from dispatchers.audio.live import ALAW, MULAW
from dispatchers.audio.vad import SileroVad
from dispatchers.backends.scripted import Scripted
from dispatchers.errors import BackendFailed
from dispatchers.interface import Heard, Options, Samples, Transcript, ignore, to_ms
from gateway.live.intake import AHEAD_MS
from gateway.live.seats import SEATS
from policy import tenants
from policy.admission import reap
from policy.tenants import Tenant
from runtime.ids import read
from runtime.settings import Settings
from tests.server import PRICE_NANO_PER_HOUR, SAMPLES, Served, serving
from tests.streaming import Event, Talk, assert_well_formed, clip, encoded, refused, talking

PRICE_NANO_PER_MS = PRICE_NANO_PER_HOUR // 3_600_000
EXACT = ("clip02.wav", "clip05.wav", "clip12.wav")
SILENCE = np.zeros(16_000, np.int16).tobytes()


@pytest.fixture(scope="module")
async def server(settings: Settings) -> AsyncIterator[Served]:
    async with serving(settings, model="micro", engine_workers=1, stream_resume_s=0.2) as running:
        yield running
    assert SEATS.taken == 0


@pytest.fixture(scope="module")
def vad() -> SileroVad:
    return SileroVad.load()


@pytest.fixture(scope="module")
async def scripted(settings: Settings) -> AsyncIterator[Served]:
    async with serving(settings, backend="scripted") as running:
        yield running


async def row_of(server: Served, tenant: Tenant, session_id: str) -> Any:
    """The ended session's row, with what the ledger says of it."""
    async with asyncio.timeout(30):
        while True:
            async with server.gateway.resources.database.tenant(tenant.id) as tx:
                query = text("""
                    select s.*,
                        (select coalesce(sum(l.billed_ms), 0) from usage_ledger l where l.source_id = s.id) ledger_ms
                    from sessions s where s.id = :id
                """)
                row = (await tx.execute(query, {"id": read("sess", session_id)})).one()
            if row.status != "open":
                return row
            await asyncio.sleep(0.05)


async def paced(talk: Talk, samples: Samples, times_real: float) -> None:
    """Speaks in frames of 100 ms."""
    for at in range(0, len(samples), 1_600):
        await talk.socket.send(samples[at : at + 1_600].tobytes())
        await asyncio.sleep(0.1 / times_real)


# --- the main way -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
async def test_speech_becomes_text_while_it_is_spoken(server: Served, name: str) -> None:
    samples, said = clip(name)
    tenant = await server.tenant()
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start", words=True, language="en", model="micro")
        await paced(talk, samples, times_real=3)
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert talk.text == said
    assert_well_formed(talk.events)
    assert talk.all("partial")
    assert "".join(delta["text"] for delta in talk.all("delta")) == said

    ready, final, closed = talk.events[0], talk.all("final")[0], talk.events[-1]
    assert ready | {"session_id": "", "limits": {}, "resume_token": None} == {
        "type": "ready", "seq": 1, "session_id": "", "resumed": False, "resend_from_ms": 0, "resume_token": None,
        "backend": "self_hosted", "engine": "faster-whisper", "model": "micro", "language": "en",
        "encoding": "pcm_s16le", "sample_rate": 16_000, "recorded": False, "limits": {}, "accepted_ms": 0,
    }  # fmt: skip
    assert [word["word"] for word in final["words"]] == said.split()
    assert set(final["words"][0]) == {"word", "start_ms", "end_ms", "confidence"}
    assert final.keys() == {
        "type", "seq", "utterance", "text", "start_ms", "end_ms", "language", "confidence", "words", "revised",
    }  # fmt: skip
    length = to_ms(len(samples))
    assert closed == {
        "type": "closed", "seq": len(talk.events), "session_id": ready["session_id"], "reason": "stop",
        "accepted_ms": length, "billed_ms": length, "utterances": 1, "words": len(said.split()), "coverage": 1.0,
    }  # fmt: skip

    row = await row_of(server, tenant, ready["session_id"])
    assert (row.status, row.accepted_ms, row.billed_ms, row.ledger_ms) == ("completed", length, length, length)


async def test_a_long_recording_at_full_speed_loses_nothing(server: Served) -> None:
    samples = load(SAMPLES / "long.wav")
    said = [line.split("\t")[2] for line in (SAMPLES / "long.tsv").read_text().splitlines()[1:]]
    tenant = await server.tenant()
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start")
        await talk.speak(samples.tobytes(), step=200_000)
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert_well_formed(talk.events)
    closed = talk.events[-1]
    assert closed["accepted_ms"] == closed["billed_ms"] == to_ms(len(samples))
    assert closed["coverage"] == 1.0
    used = [event["billed_ms"] for event in talk.all("usage")]
    assert used
    assert used == sorted(used)
    ends = [event["end_ms"] for event in talk.all("final")]
    assert ends == sorted(ends)
    heard = talk.text.split()
    assert abs(len(heard) - len(" ".join(said).split())) <= 0.1 * len(heard)


async def test_fields_may_stand_in_the_address(server: Served) -> None:
    samples, said = clip("clip05.wav")
    tenant = await server.tenant()
    query = '?encoding=pcm_s16le&sample_rate=16000&words=true&hotwords=dog&hotwords=black&metadata={"call":"7"}&vad={}'
    async with talking(server, server.token(tenant), query) as talk:
        await talk.speak(samples.tobytes())
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert talk.text == said
    assert talk.all("final")[0]["words"]
    row = await row_of(server, tenant, talk.events[0]["session_id"])
    assert row.metadata == {"call": "7"}


async def test_a_browser_authenticates_by_subprotocol(server: Served) -> None:
    tenant = await server.tenant()
    offered = ["stenogate.v1", f"bearer.{server.token(tenant)}"]
    async with talking(server, None, subprotocols=offered) as talk:
        assert talk.socket.subprotocol == "stenogate.v1"
        await talk.say("start")
        await talk.until("ready")
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert [event["type"] for event in talk.events] == ["ready", "closed"]


# --- encodings ----------------------------------------------------------------------------------------------------


def resampled(samples: Samples, rate: int) -> Samples:
    converter = AudioResampler(format="s16", layout="mono", rate=rate)
    frame = AudioFrame.from_ndarray(samples[np.newaxis], format="s16", layout="mono")
    frame.sample_rate = 16_000
    frames = [*converter.resample(frame), *converter.resample(None)]
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])


@pytest.mark.parametrize("rate", [22_050, 44_100, 48_000])
async def test_any_rate_is_understood(server: Served, rate: int) -> None:
    samples, said = clip("clip12.wav")
    tenant = await server.tenant()
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start", sample_rate=rate)
        await talk.speak(resampled(samples, rate).tobytes(), step=1_001)  # every frame ends in the middle of a sample
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert talk.text == said
    assert talk.events[0]["sample_rate"] == rate
    assert abs(talk.events[-1]["accepted_ms"] - to_ms(len(samples))) <= 2


@pytest.mark.parametrize(
    ("encoding", "form", "codec", "rate"),
    [
        ("opus", "webm", "libopus", 48_000),
        ("opus", "ogg", "libopus", 48_000),
        ("flac", "flac", "flac", 16_000),
        ("wav", "wav", "pcm_s16le", 44_100),
        ("mp3", "mp3", "libmp3lame", 32_000),
    ],
)
async def test_containers_are_understood(server: Served, encoding: str, form: str, codec: str, rate: int) -> None:
    samples, said = clip("clip05.wav")
    tenant = await server.tenant()
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start", encoding=encoding)
        await talk.speak(encoded(samples, form, codec, rate), step=700)
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert talk.text == said
    assert_well_formed(talk.events)
    ready, closed = talk.events[0], talk.events[-1]
    assert (ready["encoding"], ready["sample_rate"]) == (encoding, None)
    assert abs(closed["accepted_ms"] - to_ms(len(samples))) <= 150
    row = await row_of(server, tenant, ready["session_id"])
    assert row.ledger_ms == closed["billed_ms"] == closed["accepted_ms"]


async def test_two_channels_are_heard_as_one(server: Served) -> None:
    samples, said = clip("clip05.wav")
    sides = np.stack([samples, np.zeros_like(samples)], axis=1)
    async with talking(server, server.token(await server.tenant())) as talk:
        await talk.say("start", channels=2)
        await talk.speak(sides.tobytes(), step=6_401)
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert talk.text == said
    assert talk.events[-1]["billed_ms"] == to_ms(len(samples))


@pytest.mark.parametrize("encoding", ["pcm_s16le", "mulaw", "alaw"])
async def test_telephone_audio_is_understood(server: Served, encoding: str) -> None:
    samples, said = clip("clip12.wav")
    narrow = resampled(samples, 8_000)
    table = {"mulaw": MULAW, "alaw": ALAW}.get(encoding)
    data = narrow.tobytes() if table is None else nearest(table, narrow).tobytes()
    tenant = await server.tenant()
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start", encoding=encoding, **({"sample_rate": 8_000} if table is None else {}))
        await talk.speak(data)
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert talk.events[0]["sample_rate"] == 8_000
    assert abs(talk.events[-1]["accepted_ms"] - to_ms(len(samples))) <= 2
    assert len(set(talk.text.split()) & set(said.split())) >= 4  # the band above 4 kHz is gone


def nearest(table: Samples, samples: Samples) -> np.ndarray[Any, np.dtype[np.uint8]]:
    order = np.argsort(table)
    values = table[order].astype(int)
    at = np.searchsorted((values[1:] + values[:-1]) // 2, samples)
    return order[at].astype(np.uint8)


# --- commands -----------------------------------------------------------------------------------------------------


def spoken_only(name: str) -> tuple[bytes, str]:
    """A clip cut off right after its last word: no silence would ever end it."""
    rows = [line.split("\t") for line in (SAMPLES / "transcripts.tsv").read_text().splitlines()[1:]]
    end = next(float(row[3]) for row in rows if row[0] == name)
    samples, said = clip(name)
    return samples[: int((end + 0.05) * 16_000)].tobytes(), said


@pytest.mark.parametrize("rate", [16_000, 48_000])
async def test_stop_loses_no_tail(server: Served, rate: int) -> None:
    data, said = spoken_only("clip05.wav")
    tenant = await server.tenant()
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start", sample_rate=rate)
        await talk.speak(resampled(np.frombuffer(data, np.int16), rate).tobytes())
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert talk.text == said


async def test_flush_ends_the_utterance_now(server: Served) -> None:
    data, said = spoken_only("clip05.wav")
    tenant = await server.tenant()
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start")
        await talk.speak(data)
        await talk.say("flush")
        flushed = await talk.until("flushed")
        assert talk.text == said
        assert flushed["accepted_ms"] == len(data) // 32
        await talk.speak(SILENCE)
        await talk.say("flush")
        await talk.until("flushed", 2)
        assert len(talk.all("final")) == 1  # there was nothing to say
        await talk.speak(data)
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert talk.text == f"{said} {said}"
    assert_well_formed(talk.events)


async def test_clear_drops_the_utterance_being_heard(server: Served) -> None:
    data, _ = spoken_only("clip05.wav")
    tenant = await server.tenant()
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start")
        await talk.speak(data)
        await talk.until("speech_started")
        await talk.say("clear")
        cleared = await talk.until("cleared")
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert not talk.all("final")
    assert [gap["reason"] for gap in talk.all("gap")] == ["cleared"]
    assert cleared["accepted_ms"] == talk.events[-1]["billed_ms"] == len(data) // 32  # what was accepted stays billed


async def test_ping_and_metrics_are_answered_at_once(server: Served) -> None:
    samples, _ = clip("clip05.wav")
    tenant = await server.tenant()
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start")
        await talk.say("ping", id={"any": ["thing", 1]})
        assert (await talk.until("pong"))["id"] == {"any": ["thing", 1]}
        await talk.speak(samples.tobytes() + SILENCE)
        await talk.until("final")
        await talk.say("metrics")
        metrics = await talk.until("metrics")
        await talk.say("ping")
        pong = await talk.until("pong", 2)
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert (metrics["finals"], metrics["lag_ms"], metrics["final_ms"]["count"]) == (1, 0, 1)
    assert pong["id"] is None
    assert pong["accepted_ms"] == talk.events[-1]["accepted_ms"] == to_ms(len(samples)) + 1_000


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({"partials": True}, {"partial", "delta"}),
        ({"partials": False}, set()),
        ({"partials": False, "deltas": True}, {"delta"}),
    ],
)
async def test_partials_and_deltas_come_as_asked(scripted: Served, fields: Event, kinds: set[str]) -> None:
    samples, _ = clip("clip08.wav")
    tenant = await scripted.tenant()
    async with talking(scripted, scripted.token(tenant)) as talk:
        await talk.say("start", **fields)
        await paced(talk, samples, times_real=4)
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert_well_formed(talk.events)
    assert {event["type"] for event in talk.events} & {"partial", "delta"} == kinds
    assert talk.all("final")[0]["text"]
    assert "words" not in talk.all("final")[0]


# --- how else it ends ---------------------------------------------------------------------------------------------


async def test_a_client_that_vanishes_still_gets_its_text_kept_and_billed(server: Served) -> None:
    samples, said = clip("clip02.wav")
    tenant = await server.tenant()
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start")
        ready = await talk.until("ready")
        await talk.speak(samples.tobytes())
        await talk.until("speech_started")
        talk.socket.transport.abort()
    row = await row_of(server, tenant, ready["session_id"])
    assert (row.status, row.ledger_ms) == ("completed", row.accepted_ms)
    assert row.accepted_ms > 0
    assert said.startswith(row.text.split()[0])


async def test_the_end_of_the_budget_is_told_after_the_last_final(server: Served) -> None:
    samples = np.tile(load(SAMPLES / "long.wav"), 2)
    tenant = await server.tenant(budget_nano=35_000 * PRICE_NANO_PER_MS)
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start")
        ready = await talk.until("ready")
        await talk.speak(samples.tobytes(), step=100_000)
        assert await talk.end() == (4402, "BUDGET_EXHAUSTED")
    error = talk.events[-1]
    assert (error["type"], error["code"], error["fatal"]) == ("error", "BUDGET_EXHAUSTED", True)
    assert talk.all("final")
    assert_well_formed(talk.events)
    row = await row_of(server, tenant, ready["session_id"])
    assert (row.status, row.accepted_ms, row.ledger_ms) == ("interrupted", 30_000, 30_000)


async def test_no_budget_at_all_is_refused_before_the_upgrade_or_after(server: Served) -> None:
    tenant = await server.tenant(budget_nano=1)
    token = server.token(tenant)
    assert await refused(server, token, "?language=en") == (402, "BUDGET_EXHAUSTED")
    async with talking(server, token) as talk:
        await talk.say("start")
        assert await talk.end() == (4402, "BUDGET_EXHAUSTED")


async def test_a_suspended_tenant_is_cut_off_at_the_next_block(scripted: Served) -> None:
    tenant = await scripted.tenant()
    async with talking(scripted, scripted.token(tenant)) as talk:
        await talk.say("start")
        await talk.until("ready")
        async with scripted.gateway.resources.database.across_tenants("test") as tx:
            await tenants.set_status(tx, tenant.id, "suspended", actor="test")
        while not talk.over:  # as a microphone does
            await talk.speak(SILENCE)
            await asyncio.sleep(0.05)
        assert await talk.end() == (4403, "TENANT_SUSPENDED")
    assert talk.events[-1]["code"] == "TENANT_SUSPENDED"
    assert await refused(scripted, scripted.token(tenant)) == (403, "TENANT_SUSPENDED")


async def test_a_session_may_not_be_longer_than_the_policy_says(server: Served) -> None:
    samples, said = clip("clip05.wav")
    tenant = await server.tenant(max_stream_ms=to_ms(len(samples)))
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start")
        ready = await talk.until("ready")
        await talk.speak(samples.tobytes() + SILENCE)
        assert await talk.end() == (4408, "SESSION_TOO_LONG")
    assert talk.text == said
    row = await row_of(server, tenant, ready["session_id"])
    assert (row.status, row.billed_ms) == ("interrupted", to_ms(len(samples)))


async def test_an_utterance_that_cannot_be_recognised_is_a_gap(settings: Settings, vad: SileroVad) -> None:
    samples, _ = clip("clip05.wav")
    async with serving(settings, recogniser=Segmenting(Scripted(fail=BackendFailed), vad)) as failing:
        async with talking(failing, failing.token(await failing.tenant())) as talk:
            await talk.say("start")
            await talk.speak(samples.tobytes())
            await talk.say("stop")
            assert await talk.end() == (1000, "")
    error, gap, closed = talk.events[-3:]
    assert (error["code"], error["retryable"], error["fatal"]) == ("BACKEND_FAILED", True, False)
    assert (gap["type"], gap["reason"]) == ("gap", "BACKEND_FAILED")
    assert closed["coverage"] == round(1 - (gap["end_ms"] - gap["start_ms"]) / closed["accepted_ms"], 6)


class Broken(Scripted):
    """Fails in a way that nobody foresaw, and chatters."""

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        raise ZeroDivisionError("he has a black dog")


async def test_our_own_fault_is_told_without_a_word_of_it(
    settings: Settings, vad: SileroVad, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, _ = clip("clip05.wav")
    async with serving(settings, recogniser=Segmenting(Broken(), vad)) as broken:
        tenant = await broken.tenant()
        async with talking(broken, broken.token(tenant)) as talk:
            await talk.say("start")
            ready = await talk.until("ready")
            await talk.speak(samples.tobytes())
            assert await talk.end() == (1011, "INTERNAL")
        async with asyncio.timeout(30):  # it could be resumed
            while not await reap(broken.gateway.resources.database, 0):  # noqa: ASYNC110  as the chores do
                await asyncio.sleep(0.05)
        row = await row_of(broken, tenant, ready["session_id"])
    assert (talk.events[-1]["code"], talk.events[-1]["fatal"]) == ("INTERNAL", True)
    assert (row.status, row.code) == ("interrupted", "INTERNAL")
    logged = capsys.readouterr().out
    assert "ZeroDivisionError" in logged
    assert "black dog" not in logged + str(talk.events)


async def test_a_recogniser_that_never_answers_holds_nobody(
    settings: Settings, vad: SileroVad, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.live.hearing.DRAIN_S", 0.5)
    samples, _ = clip("clip05.wav")
    async with serving(settings, recogniser=Segmenting(Scripted(delay_s=600), vad)) as stuck:
        async with talking(stuck, stuck.token(await stuck.tenant())) as talk:
            await talk.say("start")
            await talk.speak(samples.tobytes())
            await talk.say("stop")
            assert await talk.end() == (1011, "BACKEND_TIMEOUT")
    assert SEATS.taken == 0


async def test_who_speaks_faster_than_we_hear_is_held_back_and_loses_nothing(
    settings: Settings, vad: SileroVad
) -> None:
    samples = np.tile(load(SAMPLES / "long.wav"), 3)
    async with serving(settings, recogniser=Segmenting(Scripted(delay_s=0.05), vad)) as slow:
        async with talking(slow, slow.token(await slow.tenant())) as talk:
            await talk.say("start", partials=False)
            await talk.speak(samples.tobytes(), step=32_000)
            await talk.say("metrics")
            metrics = await talk.until("metrics")
            await talk.say("stop")
            assert await talk.end() == (1000, "")
    assert metrics["accepted_ms"] + AHEAD_MS + 1_000 >= to_ms(len(samples))
    assert metrics["lag_ms"] <= AHEAD_MS + 1_000
    assert talk.events[-1]["accepted_ms"] == to_ms(len(samples))
    assert_well_formed(talk.events)


# --- many at once -------------------------------------------------------------------------------------------------


async def test_a_tenant_has_so_many_streams(scripted: Served) -> None:
    tenant, other = await scripted.tenant(max_streams=1), await scripted.tenant()
    token = scripted.token(tenant)
    async with talking(scripted, token) as first:
        await first.say("start")
        await first.until("ready")
        assert await refused(scripted, token, "?language=en") == (429, "CONCURRENCY_LIMITED")
        async with talking(scripted, token) as second:
            await second.say("start")
            assert (await second.end())[0] == 4429
        async with talking(scripted, scripted.token(other)) as theirs:
            await theirs.say("start")
            await theirs.until("ready")
        await first.say("stop")
        assert await first.end() == (1000, "")
    async with talking(scripted, token, "?language=en") as third:
        await third.until("ready")


async def test_two_tenants_hear_only_themselves(server: Served) -> None:
    async def one(name: str) -> tuple[Tenant, Talk, str]:
        samples, said = clip(name)
        tenant = await server.tenant()
        async with talking(server, server.token(tenant)) as talk:
            await talk.say("start")
            await paced(talk, samples, times_real=4)
            await talk.say("stop")
            assert await talk.end() == (1000, "")
        return tenant, talk, said

    both = await asyncio.gather(one("clip02.wav"), one("clip12.wav"))
    for tenant, talk, said in both:
        assert talk.text == said
        assert_well_formed(talk.events)
        async with server.gateway.resources.database.tenant(tenant.id) as tx:
            kept = (await tx.execute(text("select id, accepted_ms from sessions"))).all()
        assert [(row.id, row.accepted_ms) for row in kept] == [
            (read("sess", talk.events[0]["session_id"]), talk.events[-1]["accepted_ms"])
        ]


async def test_twenty_at_once(scripted: Served) -> None:
    samples, _ = clip("clip08.wav")
    tenant = await scripted.tenant(max_streams=20)

    async def one() -> Talk:
        async with talking(scripted, scripted.token(tenant)) as talk:
            await talk.say("start")
            await talk.speak(samples.tobytes())
            await talk.say("stop")
            assert await talk.end() == (1000, "")
        return talk

    talks = await asyncio.gather(*(one() for _ in range(20)))
    assert len({talk.events[0]["session_id"] for talk in talks}) == 20
    for talk in talks:
        assert_well_formed(talk.events)
        assert talk.events[-1]["billed_ms"] == to_ms(len(samples))
    async with scripted.gateway.resources.database.tenant(tenant.id) as tx:
        billed = (await tx.execute(text("select sum(billed_ms) from usage_ledger"))).scalar_one()
    assert billed == 20 * to_ms(len(samples))
    assert SEATS.taken == 0
