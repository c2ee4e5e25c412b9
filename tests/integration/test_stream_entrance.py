"""Who is let in to `/v1/stream`, over real sockets; and that those inside do not feel who is not."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from ipaddress import ip_network
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from websockets.exceptions import InvalidStatus

from dispatchers.interface import to_ms
from gateway.live.entrance import ADDRESSES
from gateway.live.seats import SEATS
from gateway.serve import uvicorn_config
from runtime.settings import Settings
from tests.server import Served, serving
from tests.streaming import assert_well_formed, clip, talking

LOOPBACK = (ip_network("127.0.0.0/8"),)


@pytest.fixture(autouse=True)
def everybody_leaves() -> Any:
    yield
    assert SEATS.taken == 0
    assert not ADDRESSES._taken


@pytest.fixture
async def server(settings: Settings) -> AsyncIterator[Served]:
    async with serving(settings, backend="scripted") as running:
        yield running


async def answer(served: Served, token: str | None, query: str = "?language=en", **headers: str) -> tuple[int, str]:
    """Status and code of an attempt to connect; 101 where it succeeds and is left at once."""
    try:
        async with knocking(served, token, query, **headers) as talk:
            await talk.say("stop")
            assert await talk.end() == (1000, "")
    except InvalidStatus as refusal:
        return code_of(refusal)
    return 101, ""


def code_of(refusal: InvalidStatus) -> tuple[int, str]:
    return refusal.response.status_code, json.loads(refusal.response.body or b"")["code"]


def knocking(served: Served, token: str | None, query: str = "?language=en", **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return talking(served, None, query, extra={"Authorization": f"Bearer {token}", **named})


# --- origins ------------------------------------------------------------------------------------------------------


async def test_pages_of_our_own_host_only(server: Served) -> None:
    token = server.token(await server.tenant())
    host = urlsplit(server.url).netloc
    assert await answer(server, token) == (101, "")
    assert await answer(server, token, Origin=f"http://{host}") == (101, "")
    assert await answer(server, token, Origin="https://evil.example") == (403, "FORBIDDEN")
    assert await answer(server, token, "", Origin="null") == (403, "FORBIDDEN")


async def test_pages_that_the_operator_names(settings: Settings) -> None:
    origins = frozenset({"https://app.example"})
    async with serving(settings, backend="scripted", origins=origins) as server:
        token = server.token(await server.tenant())
        assert await answer(server, token, Origin="https://app.example") == (101, "")
        assert await answer(server, token, Origin="https://app.example:444") == (403, "FORBIDDEN")
        assert await answer(server, token, Origin=server.url) == (403, "FORBIDDEN")


async def test_a_page_that_may_not_connect_uses_up_no_ticket(server: Served) -> None:
    async with server.http(server.token(await server.tenant())) as http:
        ticket = (await http.post("/v1/tickets")).json()["ticket"]
    query = f"?ticket={ticket}&language=en"
    with pytest.raises(InvalidStatus) as refusal:
        async with talking(server, None, query, extra={"Origin": "https://evil.example"}):
            pass
    assert code_of(refusal.value) == (403, "FORBIDDEN")
    async with talking(server, None, query) as talk:
        await talk.until("ready")


# --- addresses ----------------------------------------------------------------------------------------------------


async def test_an_address_has_so_many_streams(settings: Settings) -> None:
    async with serving(settings, backend="scripted", max_streams_per_address=2) as server:
        token = server.token(await server.tenant())
        async with knocking(server, token) as one, knocking(server, token) as two:
            await one.until("ready")
            await two.until("ready")
            with pytest.raises(InvalidStatus) as refusal:
                async with knocking(server, token):
                    pass
            assert code_of(refusal.value) == (429, "CONCURRENCY_LIMITED")
            assert refusal.value.response.headers["retry-after"] == "5"
            # nobody is believed: another address in the header is no other address
            assert (await answer(server, token, X_Forwarded_For="203.0.113.9"))[0] == 429
        while ADDRESSES._taken:  # noqa: ASYNC110 — it is told to nobody
            await asyncio.sleep(0.01)
        assert await answer(server, token) == (101, "")


async def test_a_trusted_proxy_is_believed_and_what_a_client_wrote_before_it_is_not(settings: Settings) -> None:
    changes: dict[str, Any] = {"max_streams_per_address": 1, "trusted_proxies": LOOPBACK}
    async with serving(settings, backend="scripted", **changes) as server:
        token = server.token(await server.tenant())
        async with knocking(server, token, X_Forwarded_For="203.0.113.9") as talk:
            await talk.until("ready")
            assert set(ADDRESSES._taken) == {"203.0.113.9"}
            assert (await answer(server, token, X_Forwarded_For="203.0.113.9"))[0] == 429
            for forged in ("198.51.100.1, 203.0.113.9", "127.0.0.1, 203.0.113.9", "x, 203.0.113.9, 127.0.0.5"):
                assert (await answer(server, token, X_Forwarded_For=forged))[0] == 429
            assert await answer(server, token, X_Forwarded_For="203.0.113.10") == (101, "")
            assert await answer(server, token) == (101, "")  # the proxy itself


async def test_only_configured_proxies_are_trusted_whatever_the_environment_says(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    config = uvicorn_config(server.gateway)
    assert (config.proxy_headers, config.forwarded_allow_ips) == (False, [])
    assert "FORWARDED_ALLOW_IPS" in os.environ


# --- room ---------------------------------------------------------------------------------------------------------


async def test_a_full_house_harms_nobody_inside(settings: Settings) -> None:
    samples, said = clip("clip02.wav")
    async with serving(settings, model="micro", engine_workers=1, max_streams=2) as server:
        token = server.token(await server.tenant())
        async with server.http(token) as http:
            tickets = [(await http.post("/v1/tickets")).json()["ticket"] for _ in range(20)]
        refusals: list[tuple[int, str]] = []

        async def knock(ticket: str) -> None:
            with pytest.raises(InvalidStatus) as refusal:
                async with talking(server, None, f"?ticket={ticket}&language=en"):
                    pass
            assert refusal.value.response.headers["retry-after"] == "5"
            refusals.append(code_of(refusal.value))

        async with knocking(server, token) as one, knocking(server, token) as two:
            for talk in (one, two):
                await talk.until("ready")
            for at in range(0, len(samples), 16_000):
                for talk in (one, two):
                    await talk.socket.send(samples[at : at + 16_000].tobytes())
                await asyncio.gather(*(knock(ticket) for ticket in tickets[:10]))
            await asyncio.gather(*(knock(ticket) for ticket in tickets))
            for talk in (one, two):
                await talk.say("stop")
                assert await talk.end() == (1000, "")
        assert set(refusals) == {(503, "NO_SEAT")}
        for talk in (one, two):
            assert_well_formed(talk.events)
            assert talk.text == said
            closed = talk.events[-1]
            assert closed["accepted_ms"] == closed["billed_ms"] == to_ms(len(samples))
        async with talking(server, None, f"?ticket={tickets[0]}&language=en") as late:  # whom it refused, it owes still
            await late.until("ready")


async def test_while_the_engine_is_behind_nobody_new_is_let_in(settings: Settings) -> None:
    samples, said = clip("clip05.wav")
    spoken = np.concatenate([samples, np.zeros(16_000, np.int16)]).tobytes()
    async with serving(settings, model="micro", engine_workers=1, max_queue_wait_s=0.0) as server:
        token = server.token(await server.tenant(max_streams=20))
        async with AsyncExitStack() as stack:
            talks = [await stack.enter_async_context(knocking(server, token)) for _ in range(6)]
            for talk in talks:
                await talk.until("ready")
            speaking = [asyncio.create_task(talk.speak(spoken * 3, step=len(spoken))) for talk in talks]
            async with asyncio.timeout(30):
                while not server.gateway.queue_wait_s():  # noqa: ASYNC110 — it is told to nobody
                    await asyncio.sleep(0)
                while (found := await answer(server, token))[0] == 101:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            assert found == (503, "NO_SEAT")
            await asyncio.gather(*speaking)
            for talk in talks:
                await talk.say("stop")
            for talk in talks:
                assert await talk.end() == (1000, "")
                assert talk.text.split().count(said.split()[0]) >= 3
                assert talk.events[-1]["coverage"] == 1.0
        assert await answer(server, token) == (101, "")


# --- frames -------------------------------------------------------------------------------------------------------


async def test_a_flood_of_tiny_frames_is_held_back_and_loses_nothing(settings: Settings) -> None:
    async with serving(settings, backend="scripted", stream_frames_per_s=200) as server:
        token = server.token(await server.tenant())
        async with knocking(server, token) as flood, knocking(server, token) as quiet:
            await quiet.until("ready")
            began = asyncio.get_running_loop().time()
            flooding = asyncio.create_task(flood.speak(bytes(32 * 600), step=32))  # 600 frames: 400 at once, 1 s more
            await quiet.say("ping", id=1)
            await quiet.until("pong")
            assert not flood.all("pong")
            await flooding
            await flood.say("ping", id=2)
            pong = await flood.until("pong")
            took_s = asyncio.get_running_loop().time() - began
            for talk in (flood, quiet):
                await talk.say("stop")
                assert await talk.end() == (1000, "")
        assert took_s > 0.9  # no faster, by however much the machine is slower
        assert pong["accepted_ms"] <= flood.events[-1]["accepted_ms"] == 600


# --- what everybody may know --------------------------------------------------------------------------------------


async def test_the_config_is_public_and_names_no_tenant(served: Served) -> None:
    async with served.http() as http:
        response = await http.get("/v1/config")
    assert response.status_code == 200
    config = response.json()
    assert config["protocol"] == "stenogate.v1"
    assert "micro" in config["models"]
    assert all(isinstance(name, str) for name in config["models"])
    assert config["encodings"] == ["pcm_s16le", "mulaw", "alaw", "opus", "flac", "wav", "mp3"]
    assert config["sample_rates"] == {"least": 8_000, "most": 48_000}
    assert config["languages"] is None or "en" in config["languages"]
    settings = served.gateway.settings
    assert config["limits"] == {
        "frame_bytes": 262_144, "frames_per_s": settings.stream_frames_per_s, "ahead_ms": 30_000, "start_ms": 10_000,
        "idle_ms": 60_000, "streams_per_address": settings.max_streams_per_address, "ticket_s": 60,
        "upload_bytes": settings.max_upload_bytes,
    }  # fmt: skip


async def test_a_scripted_backend_lists_no_model(server: Served) -> None:
    async with httpx.AsyncClient(trust_env=False) as http:
        assert (await http.get(f"{server.url}/v1/config")).json()["models"] == []
