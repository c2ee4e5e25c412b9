"""What a session may set and what its policy sets for it, over real sockets."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from dispatchers.adapters.segmenting import Segmenting
from dispatchers.audio.decode import load
from dispatchers.audio.vad import SileroVad
from dispatchers.backends.scripted import Scripted
from dispatchers.engine.models import MICRO
from dispatchers.interface import Samples, to_ms
from gateway.live.intake import AHEAD_MS
from runtime.settings import Settings
from runtime.telemetry import REGISTRY
from tests.server import SAMPLES, Served, serving
from tests.streaming import Talk, assert_well_formed, clip, talking

SILENCE = np.zeros(16_000, np.int16)


@pytest.fixture(scope="module")
async def server(settings: Settings) -> AsyncIterator[Served]:
    async with serving(settings, backend="scripted", stream_resume_s=0.0) as running:
        yield running


async def paced(talk: Talk, samples: Samples, times_real: float = 5) -> None:
    """In frames of 100 ms."""
    for at in range(0, len(samples), 1_600):
        await talk.socket.send(samples[at : at + 1_600].tobytes())
        await asyncio.sleep(0.1 / times_real)


# --- cadence and delay --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_address", [False, True])
async def test_the_cadence_is_the_clients(server: Served, in_address: bool) -> None:
    samples, _ = clip("clip05.wav")
    token, partials = server.token(await server.tenant()), []
    for interval_ms in (100, 5_000):
        query = f"?partial_interval_ms={interval_ms}" if in_address else ""
        async with talking(server, token, query) as talk:
            if not in_address:
                await talk.say("start", partial_interval_ms=interval_ms)
            await paced(talk, samples)
            await talk.say("stop")
            assert await talk.end() == (1000, "")
        assert_well_formed(talk.events)
        partials.append(len(talk.all("partial")))
    often, seldom = partials
    assert often > 2 * seldom
    assert 1 <= seldom <= 2, "the first, and the early final"


@pytest.mark.parametrize("kinds", [{}, {"partials": False, "deltas": True}])
async def test_text_is_firm_in_time(server: Served, kinds: dict[str, bool]) -> None:
    """The scripted recogniser says a word for each 400 ms, and is never sure earlier than a second hypothesis."""
    samples = np.concatenate([load(SAMPLES / "long.wav")[3_000 * 16 : 6_900 * 16], SILENCE])
    token = server.token(await server.tenant())
    firm = []
    for delay in ({}, {"max_delay_ms": 700}):
        async with talking(server, token) as talk:
            await talk.say("start", partial_interval_ms=1_500, **delay, **kinds)
            await paced(talk, samples)
            await talk.say("stop")
            assert await talk.end() == (1000, "")
        assert_well_formed(talk.events)
        assert not any(final["revised"] for final in talk.all("final"))
        assert ("partial" in {event["type"] for event in talk.events}) is not bool(kinds)
        firm.append(next(event["end_ms"] for event in talk.all("delta")))
    assert firm[1] < firm[0]


async def test_a_delay_of_nothing_is_refused(server: Served) -> None:
    async with talking(server, server.token(await server.tenant())) as talk:
        await talk.say("start", partials=False, max_delay_ms=1_000)
        assert await talk.end() == (4400, "BAD_PARAMETERS")
    assert "max_delay_ms" in talk.events[-1]["message"]


# --- endpointing --------------------------------------------------------------------------------------------------


async def test_endpointing_is_the_policys_unless_the_session_sets_it_within_range(server: Served) -> None:
    """The first two phrases are 1.4 s apart."""
    samples = np.concatenate([load(SAMPLES / "long.wav")[: 6_400 * 16], SILENCE])
    token = server.token(await server.tenant(vad={"silence_ms": {"least": 300, "most": 2_000, "default": 1_900}}))
    utterances = []
    for asked in ({}, {"silence_ms": 300}):
        async with talking(server, token) as talk:
            await talk.say("start", vad=asked, partials=False)
            await talk.speak(samples.tobytes())
            await talk.say("stop")
            assert await talk.end() == (1000, "")
        utterances.append(len(talk.all("final")))
    assert utterances[0] == 1
    assert utterances[1] >= 2


@pytest.mark.parametrize("in_address", [False, True])
async def test_endpointing_beyond_the_policys_range_is_forbidden(server: Served, in_address: bool) -> None:
    token = server.token(await server.tenant(vad={"silence_ms": {"least": 300}}))
    if in_address:
        async with server.http(token) as http:  # refused before the upgrade
            asked = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
            key = {"sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA=="}
            answer = await http.get("/v1/stream", params={"vad": '{"silence_ms":200}'}, headers=asked | key)
        assert (answer.status_code, answer.json()["code"]) == (403, "FORBIDDEN")
        assert (answer.json()["param"], "from 300 to 5000" in answer.json()["detail"]) == ("vad.silence_ms", True)
        return
    async with talking(server, token) as talk:
        await talk.say("start", vad={"silence_ms": 200})
        assert await talk.end() == (4403, "FORBIDDEN")
    assert "from 300 to 5000" in talk.events[-1]["message"]


# --- a model for partials -----------------------------------------------------------------------------------------


async def test_partials_of_one_real_model_and_finals_of_another(settings: Settings, tmp_path: Path) -> None:
    samples, said = clip("clip05.wav")
    other = tmp_path / "other"
    shutil.copytree(MICRO.source, other)

    async def worked(model: str) -> float:
        await served.gateway.tell_figures()
        return REGISTRY.get_sample_value("stenogate_recognition_seconds_count", {"model": model}) or 0.0

    async with serving(settings, model=str(other), shortest_window=1_000, engine_workers=1) as served:
        tenant = await served.tenant(partial_model="micro", default_model="other")
        before = await worked("micro"), await worked("other")
        async with talking(served, served.token(tenant)) as talk:
            await talk.say("start", language="en")
            ready = await talk.until("ready")
            await paced(talk, samples, times_real=1)
            await talk.say("stop")
            assert await talk.end() == (1000, "")
        assert (ready["model"], ready["partial_model"]) == ("other", "micro")
        assert talk.text == said
        assert await worked("micro") > before[0]
        assert await worked("other") == before[1] + 1, "the early final, and nothing else"
        assert talk.events[-1]["billed_ms"] == to_ms(len(samples))


async def test_without_the_model_for_partials_there_is_no_stream(server: Served) -> None:
    async with talking(server, server.token(await server.tenant(partial_model="tiny"))) as talk:
        await talk.say("start")
        assert await talk.end() == (4403, "FORBIDDEN")
    assert "`tiny`" in talk.events[-1]["message"]


# --- speakers at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["policy", "setting"])
async def test_who_speaks_beyond_the_limit_gets_finals_and_is_told(settings: Settings, by: str) -> None:
    samples, _ = clip("clip05.wav")
    speech = np.concatenate([samples, SILENCE])
    limits = {"max_speaking": 1} if by == "setting" else {}
    async with serving(settings, backend="scripted", **limits) as served:
        tenant = await served.tenant(**({"max_speaking": 1} if by == "policy" else {}))
        token, other = served.token(tenant), served.token(await served.tenant())
        async with (
            talking(served, token) as first,
            talking(served, token) as second,
            talking(served, other) as elsewhere,
        ):
            for talk in (first, second, elsewhere):
                await talk.say("start")
                await talk.until("ready")
            await first.speak(samples[:16_000].tobytes())
            await first.until("partial")
            for talk in (second, elsewhere):
                await talk.speak(np.tile(speech, 2).tobytes())
                await talk.say("stop")
                assert await talk.end() == (1000, "")
                assert_well_formed(talk.events)
            await first.say("stop")
            assert await first.end() == (1000, "")
    limited = [second, elsewhere] if by == "setting" else [second]
    for talk in limited:
        assert [event["code"] for event in talk.all("warning")] == ["SPEAKERS_LIMITED"]
        assert not talk.all("partial")
        assert len(talk.all("final")) >= 2
        assert talk.events[-1]["coverage"] == 1.0
    for talk in {id(talk): talk for talk in (first, elsewhere) if talk not in limited}.values():
        assert not talk.all("warning")
        assert talk.all("partial")


# --- an hour in a second ------------------------------------------------------------------------------------------


async def test_an_hour_in_a_second_is_held_back_and_harms_nobody(settings: Settings) -> None:
    """All of it is offered at once; what waits here stays bounded, and a neighbour is answered meanwhile."""
    passage = load(SAMPLES / "long.wav").tobytes()
    said, _ = clip("clip05.wav")
    hour_bytes = 3_600 * 32_000
    slow = Segmenting(Scripted(delay_s=0.2), SileroVad.load())
    async with serving(settings, recogniser=slow, stream_resume_s=0.0, stream_frames_per_s=100_000) as served:
        hurried, token = served.token(await served.tenant()), served.token(await served.tenant())
        sent = 0

        async def flood(talk: Talk) -> None:
            nonlocal sent
            while sent < hour_bytes:
                for at in range(0, len(passage), 32_000):
                    await talk.socket.send(passage[at : at + 32_000])
                    sent += 32_000

        async with talking(served, hurried) as fast, talking(served, token) as quiet:
            await fast.say("start")
            await fast.until("ready")
            await fast.say("metrics")
            flooding = asyncio.create_task(flood(fast))
            await quiet.say("start")
            for _ in range(3):
                await quiet.speak(np.concatenate([said, SILENCE]).tobytes())
            await quiet.say("stop")
            assert await quiet.end() == (1000, "")
            assert len(quiet.all("final")) >= 3
            assert quiet.events[-1]["coverage"] == 1.0
            assert not fast.over
            assert not flooding.done()
            told = fast.all("final") + fast.all("gap")
            answered_ms = max((event["end_ms"] for event in told), default=0)
            in_the_sockets_ms = 8 * 1_024 * 1_024 // 32
            assert sent // 32 <= answered_ms + 4 * 30_000 + AHEAD_MS + in_the_sockets_ms < 3_600_000
            flooding.cancel()
            await asyncio.gather(flooding, return_exceptions=True)
