"""A recording made by two processes one after the other, with a hole, is one file on one clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID, uuid4

import numpy as np
import pytest
from sqlalchemy import text

from dispatchers import recorder
from dispatchers.audio.encode import Form
from dispatchers.interface import Clear, Pcm, Samples, StreamInput
from dispatchers.recorder import Recorder
from gateway.playback import played
from policy import recordings
from policy.policies import PolicyBody
from policy.recordings import Recording
from policy.tenants import Tenant
from runtime.blobs import Blobs
from runtime.database import Database
from tests.integration.conftest import OpenSession

KEEP = PolicyBody(keep_audio=True)


def noise(size: int) -> Samples:
    return np.random.default_rng(size).integers(-32_768, 32_768, size, np.int16)


async def said(samples: Samples) -> AsyncIterator[StreamInput]:
    for at in range(0, len(samples), 1_600):
        yield Pcm(samples[at : at + 1_600])
        yield Clear()


async def taped(one: Recorder, tenant: Tenant, session_id: UUID, samples: Samples, start: int) -> None:
    with one.taping(tenant.id, session_id, KEEP, start=start) as through:
        passed = [item async for item in through(said(samples))]
    assert np.array_equal(np.concatenate([item.samples for item in passed if isinstance(item, Pcm)]), samples)
    await one.aclose()


async def of(database: Database, tenant: Tenant, session_id: UUID) -> Recording:
    async with database.tenant(tenant.id) as tx:
        return await recordings.get(tx, tenant.id, session_id)


async def file(blobs: Blobs, recording: Recording, form: Form) -> bytes:
    return b"".join([piece async for piece in played(blobs, uuid4(), recording, form)])


async def test_a_second_process_goes_on_where_the_first_one_was(
    database: Database, tenant: Tenant, open_session: OpenSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "PART_SAMPLES", 16_000)
    monkeypatch.setattr(recorder, "BITE_SAMPLES", 1_600)
    blobs = Blobs.open(None, tmp_path / "blobs")
    session_id = await open_session(tenant)
    first, second, third = noise(40_000), noise(30_000), noise(20_000)

    await taped(Recorder(database, blobs, tmp_path / "a"), tenant, session_id, first, 0)
    assert (await of(database, tenant, session_id)).state == "recording"  # the session is still open
    await taped(Recorder(database, blobs, tmp_path / "b"), tenant, session_id, second, 32_000)  # 8,000 came again
    await taped(Recorder(database, blobs, tmp_path / "c"), tenant, session_id, third, 80_000)  # 18,000 never came

    async with database.tenant(tenant.id) as tx:
        closed = text("update sessions set status = 'completed', ended_at = now(), accepted_ms = 6_260")
        await tx.execute(closed)
    recording = await of(database, tenant, session_id)
    assert recording.state == "kept"
    assert [(part.start, part.end) for part in recording.parts] == [
        (0, 16_000), (16_000, 32_000), (32_000, 40_000), (32_000, 48_000), (48_000, 62_000), (80_000, 96_000),
        (96_000, 100_000),
    ]  # fmt: skip
    assert [(span.start_ms, span.end_ms) for span in recording.missing] == [(3_875, 5_000), (6_250, 6_260)]

    whole = np.concatenate([first, second[8_000:], np.zeros(18_000, np.int16), third])
    assert np.array_equal(np.frombuffer((await file(blobs, recording, "wav"))[44:], "<i2"), whole)


async def test_nothing_stays_in_the_folder_for_what_is_under_way(
    database: Database, tenant: Tenant, open_session: OpenSession, tmp_path: Path
) -> None:
    one = Recorder(database, Blobs.open(None, tmp_path / "blobs"), tmp_path / "spool")
    session_id = await open_session(tenant)
    with one.taping(tenant.id, session_id, KEEP) as through:
        async for _ in through(said(noise(200_000))):
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            while not (tmp_path / "spool").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert list((tmp_path / "spool").iterdir()) == []
        assert not (tmp_path / "blobs" / "tenant").exists()
    await one.aclose()
    assert len([path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]) == 1
