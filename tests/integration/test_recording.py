"""What a live session keeps of its audio: all of it, no longer than it may, and nothing where nothing is to be kept."""

from __future__ import annotations

import asyncio
import errno
import io
import time
import wave
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from sqlalchemy import text

from dispatchers import recorder
from dispatchers.audio import spooled
from dispatchers.audio.live import MULAW
from dispatchers.audio.resample import Resampler
from dispatchers.interface import Samples
from gateway import playback
from policy.policies import DAY_S
from policy.tenants import Tenant
from runtime.blobs import Blobs
from runtime.ids import read
from runtime.settings import Settings
from runtime.telemetry import RECORDINGS_OVERDUE
from tests.server import Served, assert_problem, post, serving
from tests.streaming import clip, talking
from workers import retention
from workers.retention import expire


@pytest.fixture(scope="module")
async def server(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("recording")
    async with serving(settings, model="micro", engine_workers=1, data_dir=folder) as running:
        yield running


def on_disk(server: Served) -> list[Path]:
    folders = [server.gateway.settings.data_dir / name for name in ("blobs", "recordings")]
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def blobs_of(server: Served, tenant: Tenant) -> list[Path]:
    return [path for path in on_disk(server) if str(tenant.id) in path.parts]


@contextmanager
def away(server: Served) -> Iterator[None]:
    """The blob store does not work: where its folder was is a file."""
    folder = server.gateway.settings.data_dir / "blobs"
    aside = folder.rename(folder.with_name("aside"))
    folder.touch()
    yield
    folder.unlink()
    aside.rename(folder)


async def over(server: Served, tenant: Tenant, session_id: str) -> None:
    """Its time is over."""
    change = text("update recordings set expires_at = now() - interval '1 s' where session_id = :session")
    async with server.gateway.resources.database.across_tenants("test") as tx:
        assert (await tx.execute(change, {"session": read("sess", session_id)})).rowcount == 1


async def parts_of(server: Served, tenant: Tenant) -> list[str]:
    async with server.gateway.resources.database.tenant(tenant.id) as tx:
        return list((await tx.execute(text("select blob_key from recording_parts"))).scalars())


async def audited(server: Served, tenant: Tenant, action: str) -> list[Any]:
    query = text("select actor, object, before, after from audit_log where action = :action order by seq")
    async with server.gateway.resources.database.tenant(tenant.id) as tx:
        return list(await tx.execute(query, {"action": action}))


async def fetched(http: httpx.AsyncClient, session_id: str) -> Samples:
    response = await http.get(f"/v1/sessions/{session_id}/audio?format=wav")
    assert response.status_code == 200, response.text
    return np.frombuffer(response.content[44:], "<i2")


async def recorded(server: Served, tenant: Tenant, data: bytes, *, kept: bool = True, **start: Any) -> str:
    """A session that hears these bytes and ends; its id."""
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start", **start)
        ready = await talk.until("ready")
        assert ready["recorded"] is kept
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
        forms = {
            form: await http.get(f"/v1/sessions/{session_id}/audio?format={form}") for form in ("wav", "flac", "mp3")
        }
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


async def test_a_telephones_audio_is_kept_as_it_was_recognised(server: Served) -> None:
    samples, _ = clip("clip05.wav")
    mulaw = np.abs(MULAW.astype(np.int32)[np.newaxis] - samples[::2, np.newaxis]).argmin(1).astype(np.uint8).tobytes()
    resampler = Resampler(8_000)
    expected = np.concatenate([resampler.feed(MULAW[np.frombuffer(mulaw, np.uint8)].tobytes()), resampler.flush()])
    tenant = await server.tenant(keep_audio=True)
    session_id = await recorded(server, tenant, mulaw, encoding="mulaw")
    async with server.http(server.token(tenant)) as http:
        session = await session_of(http, session_id)
        assert (session["audio"]["missing_ms"], session["accepted_ms"]) == (0, len(expected) // 16)
        assert np.array_equal(await fetched(http, session_id), expected)


async def test_of_two_channels_the_mean_is_kept(server: Served) -> None:
    one, other = clip("clip02.wav")[0], clip("clip03.wav")[0]
    both = np.stack([one[:16_000], other[:16_000]], axis=1)
    tenant = await server.tenant(keep_audio=True)
    session_id = await recorded(server, tenant, both.tobytes(), channels=2, per_channel=True)
    async with server.http(server.token(tenant)) as http:
        await session_of(http, session_id)
        kept = await fetched(http, session_id)
    assert np.array_equal(kept, both.mean(axis=1).astype(np.int16))


async def test_parts_make_one_whole_over_a_resume_a_flush_and_a_clear(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "PART_SAMPLES", 20_011)
    monkeypatch.setattr(recorder, "BITE_SAMPLES", 3_000)
    samples, _ = clip("clip02.wav")
    half = len(samples) // 2
    tenant = await server.tenant(keep_audio=True)
    token = server.token(tenant)
    async with talking(server, token) as talk:
        await talk.say("start")
        ready = await talk.until("ready")
        await talk.speak(samples[:half].tobytes())
        await talk.say("clear")
        await talk.until("cleared")
        await talk.say("flush")
        await talk.until("flushed")
        talk.socket.transport.abort()
        await talk.end()
    async with talking(server, token) as again:
        await again.say("start", resume_token=ready["resume_token"], last_seq=talk.events[-1]["seq"])
        resend = (await again.until("ready"))["resend_from_ms"] * 16
        await again.speak(samples[resend:].tobytes())
        async with server.http(token) as http:
            path = f"/v1/sessions/{ready['session_id']}/audio"
            for method in ("GET", "DELETE"):
                problem = assert_problem(await http.request(method, path), 409, "AUDIO_NOT_READY")
                assert problem["retryable"]
        await again.say("stop")
        assert await again.end() == (1000, "")
    async with server.http(token) as http:
        assert (await session_of(http, ready["session_id"]))["audio"]["missing"] == []
        assert np.array_equal(await fetched(http, ready["session_id"]), samples)
    assert len(blobs_of(server, tenant)) == -(-len(samples) // 20_011)


async def test_nothing_is_kept_where_nothing_is_to_be(server: Served) -> None:
    samples, _ = clip("clip02.wav")
    before = on_disk(server)
    tenant = await server.tenant()
    session_id = await recorded(server, tenant, samples.tobytes(), kept=False)
    async with server.http(server.token(tenant)) as http:
        assert (await session_of(http, session_id))["audio"] is None
        for method in ("GET", "DELETE"):
            assert_problem(await http.request(method, f"/v1/sessions/{session_id}/audio"), 404, "AUDIO_NOT_KEPT")
        await post(http)
        (file, *_) = (await http.get("/v1/sessions?kind=file")).json()["data"]
        assert_problem(await http.get(f"/v1/sessions/{file['id']}/audio"), 404, "AUDIO_NOT_KEPT")
    assert on_disk(server) == before


async def test_audio_wants_the_scope_of_sessions_and_a_format_that_is_one(server: Served) -> None:
    samples, _ = clip("clip02.wav")
    tenant = await server.tenant(keep_audio=True)
    session_id = await recorded(server, tenant, samples.tobytes())
    path = f"/v1/sessions/{session_id}/audio"
    async with server.http(server.token(tenant, ["transcribe", "jobs"])) as http:
        for method in ("GET", "DELETE"):
            assert_problem(await http.request(method, path), 403, "FORBIDDEN")
    async with server.http(server.token(tenant)) as http:
        await session_of(http, session_id)
        assert_problem(await http.get(f"{path}?format=ogg"), 400, "BAD_PARAMETERS")
        head = await http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(44 + 2 * len(samples))


async def test_when_its_time_is_over_it_is_gone_and_the_log_says_so(server: Served) -> None:
    samples, _ = clip("clip02.wav")
    tenant = await server.tenant(keep_audio=True)
    database, blobs = server.gateway.resources.database, server.gateway.resources.blobs
    gone, kept = [await recorded(server, tenant, samples.tobytes()) for _ in range(2)]
    async with server.http(server.token(tenant)) as http:
        ends = (await session_of(http, gone))["audio"]["expires_at"] - time.time()
        assert 29 * DAY_S < ends <= 30 * DAY_S
        await session_of(http, kept)
        files = blobs_of(server, tenant)
        assert len(files) == 2
        await over(server, tenant, gone)
        assert_problem(await http.get(f"/v1/sessions/{gone}/audio"), 410, "AUDIO_GONE")  # even before it is deleted

        assert sorted(await asyncio.gather(expire(database, blobs), expire(database, blobs))) == [0, 1]
        assert await expire(database, blobs) == 0

        (left,) = blobs_of(server, tenant)
        (lost,) = set(files) - {left}
        assert await parts_of(server, tenant) == [str(left.relative_to(server.gateway.settings.data_dir / "blobs"))]
        for method in ("GET", "DELETE"):
            assert_problem(await http.request(method, f"/v1/sessions/{gone}/audio"), 410, "AUDIO_GONE")
        assert (await http.get(f"/v1/sessions/{gone}")).json()["audio"]["status"] == "deleted"
        assert np.array_equal(await fetched(http, kept), samples)
    (entry,) = await audited(server, tenant, "recording.delete")
    assert (entry.actor, entry.object) == ("retention", f"recording/{gone}")
    assert entry.before["blobs"] == [str(lost.relative_to(server.gateway.settings.data_dir / "blobs"))]
    assert entry.after == {"reason": "expired", "stored": 1, "found": 1, "seen_gone": 1, "left": 0}


async def test_it_can_be_deleted_at_once_part_after_part(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "PART_SAMPLES", 16_000)
    monkeypatch.setattr(retention, "PARTS", 2)
    samples, _ = clip("clip02.wav")
    tenant = await server.tenant(keep_audio=True)
    session_id = await recorded(server, tenant, samples.tobytes())
    async with server.http(server.token(tenant)) as http:
        await session_of(http, session_id)
        assert len(blobs_of(server, tenant)) == 4
        assert (await http.delete(f"/v1/sessions/{session_id}/audio")).status_code == 204
        assert_problem(await http.delete(f"/v1/sessions/{session_id}/audio"), 410, "AUDIO_GONE")
        assert (await http.get(f"/v1/sessions/{session_id}")).json()["text"]
    assert (blobs_of(server, tenant), await parts_of(server, tenant)) == ([], [])
    assert [entry.actor for entry in await audited(server, tenant, "recording.expire")] == ["tester"]
    entries = await audited(server, tenant, "recording.delete")
    assert [(entry.actor, entry.after["reason"], entry.after["left"]) for entry in entries] == [
        ("tester", "asked", 2),
        ("tester", "asked", 0),
    ]


async def test_a_store_that_is_away_keeps_what_is_due_and_gives_it_up_later(server: Served) -> None:
    samples, _ = clip("clip02.wav")
    tenant = await server.tenant(keep_audio=True)
    database, blobs = server.gateway.resources.database, server.gateway.resources.blobs
    asked, late = [await recorded(server, tenant, samples.tobytes()) for _ in range(2)]
    async with server.http(server.token(tenant)) as http:
        for session_id in (asked, late):
            await session_of(http, session_id)
        await over(server, tenant, late)
        with away(server):
            assert_problem(await http.get(f"/v1/sessions/{asked}/audio"), 503, "UNAVAILABLE")
            assert_problem(await http.delete(f"/v1/sessions/{asked}/audio"), 503, "UNAVAILABLE")
            assert_problem(await http.get(f"/v1/sessions/{asked}/audio"), 410, "AUDIO_GONE")
            assert await expire(database, blobs) == 0
            assert len(await parts_of(server, tenant)) == 2
        assert len(blobs_of(server, tenant)) == 2
        assert await audited(server, tenant, "recording.delete") == []
        assert await expire(database, blobs) == 2
    assert (blobs_of(server, tenant), await parts_of(server, tenant)) == ([], [])


async def test_a_store_that_is_away_for_a_while_costs_nothing(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "RETRY_S", 0.02)
    samples, said = clip("clip02.wav")
    tenant = await server.tenant(keep_audio=True)
    async with server.http(server.token(tenant)) as http:
        with away(server):
            session_id = await recorded(server, tenant, samples.tobytes())
            session = (await http.get(f"/v1/sessions/{session_id}")).json()
            assert (session["status"], session["text"], session["audio"]["status"]) == ("completed", said, "recording")
        assert (await session_of(http, session_id))["audio"]["missing"] == []
        assert np.array_equal(await fetched(http, session_id), samples)


async def test_what_is_lost_is_told_and_the_rest_keeps_its_place(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "RETRY_S", 0.02)
    monkeypatch.setattr(recorder, "PART_SAMPLES", 16_000)
    monkeypatch.setattr(recorder, "BITE_SAMPLES", 1_600)
    monkeypatch.setattr(recorder, "WAITING_PARTS", 1)
    samples, _ = clip("clip02.wav")
    tenant = await server.tenant(keep_audio=True)
    async with server.http(server.token(tenant)) as http:
        with away(server):
            session_id = await recorded(server, tenant, samples.tobytes())
        audio = (await session_of(http, session_id))["audio"]
        got = await fetched(http, session_id)
        response = await http.get(f"/v1/sessions/{session_id}/audio?format=flac")
    assert audio["missing_ms"] == sum(span["end_ms"] - span["start_ms"] for span in audio["missing"]) > 0
    assert response.headers["x-stenogate-missing-ms"] == str(audio["missing_ms"])
    expected = samples.copy()
    for span in audio["missing"]:
        expected[span["start_ms"] * 16 : span["end_ms"] * 16] = 0
    assert np.array_equal(got, expected)


async def test_a_full_disk_or_a_slow_encoder_costs_audio_and_no_session(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, said = clip("clip02.wav")
    tenant = await server.tenant(keep_audio=True)

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    for place, name, value in (
        (spooled.tempfile, "TemporaryFile", full),
        (recorder, "BEHIND_SAMPLES", 0),
    ):
        with monkeypatch.context() as fault:
            fault.setattr(place, name, value)
            session_id = await recorded(server, tenant, samples.tobytes())
            async with server.http(server.token(tenant)) as http:
                session = await session_of(http, session_id)
                assert (session["text"], session["audio"]["status"]) == (said, "kept")
                assert session["audio"]["missing_ms"] == len(samples) // 16
                assert_problem(await http.get(f"/v1/sessions/{session_id}/audio"), 404, "AUDIO_NOT_KEPT")
                assert (await http.delete(f"/v1/sessions/{session_id}/audio")).status_code == 204
    assert blobs_of(server, tenant) == []


async def test_who_fetches_too_many_at_once_waits_and_who_leaves_makes_room(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(playback, "AT_ONCE_OF_A_TENANT", 1)
    tenant = await server.tenant(keep_audio=True, max_stream_ms=3_600_000)
    session_id = await recorded(server, tenant, bytes(2 * 16_000 * 300))  # more than the sockets' buffers take
    path = f"/v1/sessions/{session_id}/audio"
    async with server.http(server.token(tenant)) as http:
        await session_of(http, session_id)
        async with http.stream("GET", path) as fetching:
            assert fetching.status_code == 200
            assert_problem(await http.get(path), 429, "CONCURRENCY_LIMITED")
        async with asyncio.timeout(10):
            while playback._playing:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        monkeypatch.setattr(playback, "AT_ONCE", 0)
        assert_problem(await http.get(path), 503, "NO_SEAT")


class Stubborn(Blobs):
    """A store that says it deleted and did not."""

    async def delete(self, key: str) -> None:
        pass


async def test_what_is_not_seen_to_be_gone_is_not_called_deleted(server: Served) -> None:
    samples, _ = clip("clip02.wav")
    tenant = await server.tenant(keep_audio=True)
    database, blobs = server.gateway.resources.database, server.gateway.resources.blobs
    session_id = await recorded(server, tenant, samples.tobytes())
    async with server.http(server.token(tenant)) as http:
        await session_of(http, session_id)
    await over(server, tenant, session_id)
    failures = RECORDINGS_OVERDUE._value.get()
    assert await expire(database, Stubborn(blobs._store)) == 0
    assert RECORDINGS_OVERDUE._value.get() == failures + 1
    assert len(await parts_of(server, tenant)) == 1
    assert await audited(server, tenant, "recording.delete") == []
    assert await expire(database, blobs) == 1
    assert await parts_of(server, tenant) == []


async def test_what_was_not_accepted_is_not_kept(server: Served) -> None:
    samples, _ = clip("clip02.wav")
    tenant = await server.tenant(keep_audio=True, max_stream_ms=2_000)
    async with talking(server, server.token(tenant)) as talk:
        await talk.say("start")
        session_id = (await talk.until("ready"))["session_id"]
        await talk.speak(samples.tobytes())
        assert await talk.end() == (4408, "SESSION_TOO_LONG")
    async with server.http(server.token(tenant)) as http:
        session = await session_of(http, session_id)
        assert (session["accepted_ms"], session["audio"]["duration_ms"]) == (2_000, 2_000)
        assert np.array_equal(await fetched(http, session_id), samples[:32_000])
