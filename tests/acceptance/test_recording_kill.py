"""A gateway killed outright while it records: what was stored is served, and deleted in time; nothing else is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from sqlalchemy import text
from websockets.asyncio.client import connect

from dispatchers.audio.decode import load
from dispatchers.engine.models import MICRO_SAMPLES
from dispatchers.recorder import PART_SAMPLES
from gateway.commands.local import LocalGateway, local_gateway
from policy import policies
from policy.admission import reap
from policy.policies import PolicyBody
from runtime.embedded import with_database
from runtime.resources import Resources, open_resources
from runtime.settings import Settings
from workers.retention import expire

T = TypeVar("T")
SETTINGS = {"backend": "scripted"}
SPOKEN = load(MICRO_SAMPLES / "long.wav")


def beside(data_dir: Path, work: Callable[[Resources], Awaitable[T]]) -> T:
    """Does something to the database, whether a gateway runs or not."""

    async def run(completed: Settings) -> T:
        async with open_resources(completed) as resources:
            return await work(resources)

    with with_database(Settings(data_dir=data_dir)) as completed:
        return asyncio.run(run(completed))


def blobs_of(data_dir: Path) -> set[str]:
    return {str(path.relative_to(data_dir / "blobs")) for path in (data_dir / "blobs").rglob("*") if path.is_file()}


async def killed_while_speaking(gateway: LocalGateway, data_dir: Path) -> str:
    """Speaks for more than a part, kills the gateway once that part is stored; the session's id."""
    address = gateway.client.url.replace("http", "ws", 1) + "/v1/stream"
    headers = {"Authorization": f"Bearer {gateway.client.token}"}
    audio = np.resize(SPOKEN, PART_SAMPLES * 3 // 2).tobytes()
    async with connect(address, additional_headers=headers, compression=None, proxy=None) as socket:
        await socket.send(json.dumps({"type": "start", "partials": False}))
        ready = json.loads(await socket.recv())
        for at in range(0, len(audio), 64_000):
            await socket.send(audio[at : at + 64_000])
        async with asyncio.timeout(60):
            while not blobs_of(data_dir):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)  # some of the next part is taken down
        os.kill(gateway.pid, signal.SIGKILL)
    return str(ready["session_id"])


def test_a_crash_leaves_nothing_unaccounted(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"

    async def keep_audio(resources: Resources) -> None:
        async with resources.database.across_tenants("test set-up") as tx:
            tenant_id = (await tx.execute(text("select id from tenants where slug = 'demo'"))).scalar_one()
            await policies.put(tx, tenant_id, PolicyBody(keep_audio=True), actor="test")

    async def found_abandoned(resources: Resources) -> list[str]:
        assert await reap(resources.database, 0) == 1
        async with resources.database.across_tenants("test") as tx:
            await tx.execute(text("update sessions set ended_at = ended_at - interval '2 min'"))
            return list((await tx.execute(text("select blob_key from recording_parts"))).scalars())

    async def time_over(resources: Resources) -> list[Any]:
        async with resources.database.across_tenants("test") as tx:
            await tx.execute(text("update recordings set expires_at = now() - interval '1 s'"))
        assert await expire(resources.database, resources.blobs) == 1
        async with resources.database.across_tenants("test") as tx:
            query = text("select object, after from audit_log where action = 'recording.delete'")
            return list(await tx.execute(query))

    with local_gateway(data_dir, **SETTINGS) as gateway:
        beside(data_dir, keep_audio)
        session_id = asyncio.run(killed_while_speaking(gateway, data_dir))
    assert list((data_dir / "recordings").iterdir()) == []

    assert set(beside(data_dir, found_abandoned)) >= blobs_of(data_dir)
    with local_gateway(data_dir, **SETTINGS) as gateway:
        session = asyncio.run(gateway.client.get(f"/v1/sessions/{session_id}")).json()
        response = asyncio.run(gateway.client.get(f"/v1/sessions/{session_id}/audio"))
        ((object_, after),) = beside(data_dir, time_over)
    audio = session["audio"]
    assert (session["status"], audio["status"], audio["duration_ms"]) == ("interrupted", "kept", PART_SAMPLES // 16)
    assert audio["missing_ms"] == max(0, session["accepted_ms"] - audio["duration_ms"])
    assert response.content[44:] == np.resize(SPOKEN, PART_SAMPLES).tobytes()

    assert blobs_of(data_dir) == set()
    assert object_ == f"recording/{session_id}"
    assert (after["stored"], after["found"], after["left"]) == (1, 1, 0)
    assert after["seen_gone"] >= 1
