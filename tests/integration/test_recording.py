"""What a live session keeps of its audio: all of it, no longer than it may, and nothing where nothing is to be kept."""

from __future__ import annotations

import asyncio
import io
import wave
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from sqlalchemy import text

from dispatchers.interface import Samples
from policy.tenants import Tenant
from runtime.ids import read
from runtime.settings import Settings
from tests.server import Served, assert_problem, post, serving
from tests.streaming import clip, talking


@pytest.fixture(scope="module")
async def server(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("recording")
    async with serving(settings, model="micro", engine_workers=1, data_dir=folder) as running:
        yield running


def on_disk(server: Served) -> list[Path]:
    folders = [server.gateway.settings.data_dir / name for name in ("blobs", "recordings")]
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


async def recorded(server: Served, tenant: Tenant, data: bytes, **start: Any) -> str:
    """A session that hears these bytes and ends; its id."""
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start", **start)
        ready = await talk.until("ready")
        await talk.speak(data)
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    return str(ready["session_id"])


async def session_of(http: httpx.AsyncClient, session_id: str) -> Any:
    """The session, once its audio is stored."""
    async with asyncio.timeout(20):
        while True:
            session = (await http.get(f"/v1/sessions/{session_id}")).json()
            if session["audio"] is None or session["audio"]["status"] != "recording":
                return session
            await asyncio.sleep(0.02)


def samples_of(data: bytes) -> Samples:
    with av.open(io.BytesIO(data)) as container:
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])


async def test_what_was_sent_comes_back_in_every_form(server: Served) -> None:
    samples, said = clip("clip02.wav")
    tenant = await server.tenant(keep_audio=True)
    session_id = await recorded(server, tenant, samples.tobytes())
    async with server.http(server.token(tenant)) as http:
        audio = (await session_of(http, session_id))["audio"]
        assert (audio["status"], audio["missing_ms"], audio["missing"]) == ("kept", 0, [])
        assert audio["duration_ms"] == len(samples) // 16
        forms = {form: await http.get(f"/v1/sessions/{session_id}/audio?format={form}") for form in ("wav", "flac", "mp3")}
        for form, response in forms.items():
            assert response.status_code == 200, response.text
            assert response.headers["content-disposition"] == f'attachment; filename="{session_id}.{form}"'
        heard = await post(http, forms["mp3"].content)
    with wave.open(io.BytesIO(forms["wav"].content)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
        assert file.readframes(file.getnframes()) == samples.tobytes()
    assert forms["wav"].headers["content-length"] == str(44 + 2 * len(samples))
    assert np.array_equal(samples_of(forms["flac"].content), samples)
    with av.open(io.BytesIO(forms["flac"].content)) as container:
        assert container.duration == pytest.approx(len(samples) / 0.016, abs=1)  # told in the header
    assert heard.json()["text"] == said
