"""Jobs on a real Postgres: one transcript and one charge, whoever dies, is slow, or comes twice."""

from __future__ import annotations

import asyncio
import hashlib
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest
from sqlalchemy import text

from dispatchers.backends.scripted import Scripted
from dispatchers.dispatch import Door
from dispatchers.errors import BackendFailed, NotAudio
from dispatchers.interface import Heard, Options, Origin, Samples, Transcript, ignore
from dispatchers.registry import Registry
from policy import policies
from policy.admission import Admission
from policy.errors import BudgetExhausted, Invalid, ModelNotFound
from policy.identity import Authenticator, Caller
from policy.jwks import KeySets
from policy.policies import PolicyBody
from policy.resolve import Demand
from policy.tenants import Tenant
from runtime.blobs import Blobs
from runtime.coordination import InProcess
from runtime.database import Database
from runtime.settings import Settings
from runtime.telemetry import REGISTRY
from workers.claim import Claim
from workers.errors import JobFailed, JobNotFound, JobNotReady
from workers.jobs import Job, Jobs, Upload
from workers.main import embedded_workers
from workers.queue import InProcessDoorbell
from workers.recordings import collect
from workers.schedule import count, sweep
from workers.transcribe import CONTEXT, Workshop, transcribe_job

WORDS = tuple(f"w{number}" for number in range(1000))
CHUNK_MS = 10_000
WORD_MS = 500
SPEECH_MS = 25_000


class Recogniser(Scripted):
    """Reads from the script, notes the length of each piece, and can be held up at one of them."""

    def __init__(self, **said: Any):
        super().__init__(WORDS, word_ms=WORD_MS, **said)
        self.pieces: list[int] = []
        self.hold_at: int | None = None
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        self.pieces.append(len(audio) // 16)
        if len(self.pieces) == self.hold_at:
            self.reached.set()
            await self.go_on.wait()
        return await super().transcribe(audio, options, heard)


@dataclass
class Plant:
    """A gateway's jobs and what their workers work with."""

    jobs: Jobs
    bell: InProcessDoorbell
    shop: Workshop
    blob_dir: Path
    caller: Caller
    upload: Callable[..., Upload]

    async def submit(self, milliseconds: int = SPEECH_MS, *, demand: Demand | None = None, **upload: Any) -> Job:
        given = demand or Demand("job", customer="acme", metadata={"case": "7"})
        return await self.jobs.submit(self.caller, given, Options(words=True), self.upload(milliseconds, **upload))

    async def work(self, job: Job) -> Job:
        await transcribe_job(self.context, str(job.tenant_id), str(job.id))
        return await self.jobs.get(job.tenant_id, job.id)

    @property
    def context(self) -> dict[Any, Any]:
        return {CONTEXT: self.shop}

    def blobs_left(self) -> list[Path]:
        return [path for path in self.blob_dir.rglob("*") if path.is_file()]


@pytest.fixture
def build(settings: Settings, database: Database, caller: Caller, tmp_path: Path) -> Callable[[Scripted], Plant]:
    """A plant around a recogniser."""

    def build_one(recogniser: Scripted) -> Plant:
        authenticator = Authenticator(
            database, signing_key=bytes(32), issuer="stenogate", audience="stenogate", jwks=KeySets()
        )
        door = Door(database, Admission(database, InProcess()), authenticator, Registry.only(recogniser))
        blobs = Blobs.open(None, tmp_path / "blobs")
        bell = InProcessDoorbell()
        shop = Workshop(database, blobs, door, settings.model_copy(update={"chunk_ms": CHUNK_MS}))
        return Plant(Jobs(database, blobs, door, bell), bell, shop, tmp_path / "blobs", caller, uploader(tmp_path))

    return build_one


@pytest.fixture
def recogniser() -> Recogniser:
    return Recogniser()


@pytest.fixture
def plant(build: Callable[[Scripted], Plant], recogniser: Recogniser) -> Plant:
    return build(recogniser)


def uploader(folder: Path) -> Callable[..., Upload]:
    """Makes recordings: noise as wav, or, as flac whose header tells no length, silence."""

    def upload(milliseconds: int, *, kind: str = "wav", filename: str = "talk.wav") -> Upload:
        path = folder / f"upload.{kind}"
        (write_wav if kind == "wav" else write_endless_flac)(path, milliseconds)
        content = path.read_bytes()
        return Upload(path, len(content), filename, "audio/wav", hashlib.sha256(content).hexdigest())

    return upload


def write_wav(path: Path, milliseconds: int) -> None:
    noise = np.random.default_rng(7).integers(-8000, 8000, milliseconds * 16).astype(np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(noise.tobytes())


def write_endless_flac(path: Path, milliseconds: int) -> None:
    """Silence, by an encoder that could not go back to write the length into STREAMINFO (RFC 9639, section 8.2)."""
    import av

    with av.open(str(path), "w", format="flac") as container:
        stream = container.add_stream("flac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, milliseconds * 16), np.int16), format="s16", layout="mono")
        frame.rate = 16_000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the 36 bits of "total samples" begin in the low half of this byte
    content[22:26] = bytes(4)
    path.write_bytes(content)


def spoken(milliseconds: list[int]) -> str:
    return " ".join(" ".join(WORDS[: length // WORD_MS]) for length in milliseconds)


async def ledger(database: Database, job: Job) -> list[Any]:
    async with database.tenant(job.tenant_id) as tx:
        query = text("select * from usage_ledger where source_id = :id order by seq")
        return list(await tx.execute(query, {"id": job.id}))


async def held_nano(database: Database, tenant_id: UUID) -> int:
    async with database.tenant(tenant_id) as tx:
        held: int = (await tx.execute(text("select coalesce(sum(held_nano), 0) from budget_windows"))).scalar_one()
        return held


async def session_of(database: Database, job: Job) -> Any:
    async with database.tenant(job.tenant_id) as tx:
        return (await tx.execute(text("select * from sessions where id = :id"), {"id": job.id})).one()


async def expire_lease(database: Database, job: Job) -> None:
    async with database.tenant(job.tenant_id) as tx:
        query = text("update jobs set lease_until = now() - interval '1 second', run_after = now() where id = :id")
        await tx.execute(query, {"id": job.id})


async def test_a_job_becomes_one_transcript_and_one_charge(
    plant: Plant, recogniser: Recogniser, database: Database
) -> None:
    queued = await plant.submit(filename="a\0b\ud800.wav")
    assert (queued.status, queued.progress, queued.audio_ms, queued.customer) == ("queued", 0.0, None, "acme")
    assert queued.filename == "ab?.wav"
    assert len(plant.blobs_left()) == 1
    with pytest.raises(JobNotReady):
        await plant.jobs.transcript(queued.tenant_id, queued.id)

    done = await plant.work(queued)

    assert (done.status, done.audio_ms, done.billed_ms, done.progress) == ("completed", SPEECH_MS, SPEECH_MS, 1.0)
    assert (done.backend, done.model, done.error, done.eta_s) == ("self_hosted", "scripted", None, None)
    assert sum(recogniser.pieces) == SPEECH_MS
    assert len(recogniser.pieces) == 3
    assert max(recogniser.pieces) <= CHUNK_MS
    transcript = await plant.jobs.transcript(done.tenant_id, done.id)
    assert transcript.text == spoken(recogniser.pieces)
    assert transcript.duration_ms == SPEECH_MS
    starts = [word.start_ms for segment in transcript.segments for word in segment.words]
    assert starts == sorted(starts)
    assert starts[-1] > SPEECH_MS - CHUNK_MS
    (row,) = await ledger(database, done)
    assert (row.start_ms, row.end_ms, row.billed_ms, row.customer) == (0, SPEECH_MS, SPEECH_MS, "acme")
    session = await session_of(database, done)
    assert (session.status, session.accepted_ms, session.text) == ("completed", SPEECH_MS, transcript.text)
    assert await held_nano(database, done.tenant_id) == 0
    assert plant.blobs_left() == []


async def test_what_is_no_audio_leaves_nothing_behind(plant: Plant, database: Database) -> None:
    upload = plant.upload(1000)
    assert isinstance(upload.recording, Path)
    upload.recording.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(2000))
    with pytest.raises(NotAudio):
        await plant.jobs.submit(plant.caller, Demand("job"), Options(), upload)
    assert plant.blobs_left() == []
    assert await plant.jobs.listing(plant.caller.tenant_id) == ([], None)


async def test_a_refusal_leaves_nothing_behind(plant: Plant, database: Database) -> None:
    with pytest.raises(ModelNotFound):
        await plant.submit(demand=Demand("job", model="none"))
    async with database.across_tenants("test set-up") as tx:
        await tx.execute(
            text("update budgets set limit_nano = 1 where tenant_id = :id"), {"id": plant.caller.tenant_id}
        )
    with pytest.raises(BudgetExhausted):
        await plant.submit()
    assert plant.blobs_left() == []
    assert await plant.jobs.listing(plant.caller.tenant_id) == ([], None)
    assert await held_nano(database, plant.caller.tenant_id) == 0


async def test_another_tenant_finds_nothing(plant: Plant, other_tenant: Tenant) -> None:
    job = await plant.submit()
    with pytest.raises(JobNotFound):
        await plant.jobs.get(other_tenant.id, job.id)
    with pytest.raises(JobNotFound):
        await plant.jobs.transcript(other_tenant.id, job.id)
    assert await plant.jobs.joinable(other_tenant.id, plant.upload(SPEECH_MS).fingerprint) is None
    await transcribe_job(plant.context, str(other_tenant.id), str(job.id))
    assert (await plant.jobs.get(job.tenant_id, job.id)).status == "queued"


async def test_of_many_workers_one_has_it(plant: Plant, recogniser: Recogniser, database: Database) -> None:
    job = await plant.submit()
    await asyncio.gather(*(plant.work(job) for _ in range(5)))
    assert (await plant.jobs.get(job.tenant_id, job.id)).attempts == 1
    assert len(recogniser.pieces) == 3
    assert len(await ledger(database, job)) == 1


async def test_a_worker_told_to_stop_gives_the_job_back_and_nothing_is_done_twice(
    plant: Plant, recogniser: Recogniser, database: Database
) -> None:
    recogniser.hold_at = 2
    job = await plant.submit()
    working = asyncio.create_task(plant.work(job))
    await recogniser.reached.wait()
    running = await plant.jobs.get(job.tenant_id, job.id)
    assert (running.status, running.done_ms, running.billed_ms) == ("running", recogniser.pieces[0], 0)
    assert running.eta_s is not None
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    given_back = await plant.jobs.get(job.tenant_id, job.id)
    assert (given_back.status, given_back.attempts) == ("queued", 0)

    recogniser.hold_at = None
    done = await plant.work(job)

    assert done.status == "completed"
    first, interrupted, *rest = recogniser.pieces
    assert rest[0] == interrupted  # planned alike
    transcript = await plant.jobs.transcript(job.tenant_id, job.id)
    assert transcript.text == spoken([first, *rest])
    assert [row.billed_ms for row in await ledger(database, job)] == [SPEECH_MS]


async def test_a_worker_that_was_thought_dead_can_change_nothing(
    plant: Plant, recogniser: Recogniser, database: Database
) -> None:
    recogniser.hold_at = 3
    job = await plant.submit()
    slow = asyncio.create_task(plant.work(job))
    await recogniser.reached.wait()
    await expire_lease(database, job)
    done = await plant.work(job)
    assert done.status == "completed"
    recogniser.go_on.set()
    assert await slow == done
    assert [row.billed_ms for row in await ledger(database, job)] == [SPEECH_MS]
    async with database.tenant(job.tenant_id) as tx:
        chunks = (await tx.execute(text("select chunk_no from job_chunks order by chunk_no"))).scalars().all()
    assert chunks == [0, 1, 2]


async def test_a_lost_lease_stops_the_work(plant: Plant, recogniser: Recogniser, database: Database) -> None:
    recogniser.hold_at = 1
    plant.shop = Workshop(
        database, plant.shop.blobs, plant.shop.door, plant.shop.settings.model_copy(update={"job_lease_s": 0.3})
    )
    job = await plant.submit()
    working = asyncio.create_task(plant.work(job))
    await recogniser.reached.wait()
    async with database.tenant(job.tenant_id) as tx:
        await tx.execute(text("update jobs set lease_token = gen_random_uuid() where id = :id"), {"id": job.id})
    stopped = await working  # nobody lets the recogniser go on
    assert stopped.status == "running"


async def test_a_job_that_its_own_worker_ended_is_not_lost_to_it(plant: Plant, database: Database) -> None:
    job = await plant.submit()
    claim = await Claim.take(database, job.tenant_id, job.id, lease_s=0.06)
    assert claim is not None
    keeping = asyncio.create_task(claim.keep())
    async with database.tenant(job.tenant_id) as tx:
        await claim.complete(tx, Transcript("", "en", SPEECH_MS, (), Origin("self_hosted", "scripted", "scripted")))
        await asyncio.sleep(0.1)  # a renewal waits for this transaction
    await asyncio.sleep(0.1)
    assert not keeping.done()
    keeping.cancel()
    async with database.tenant(job.tenant_id) as tx:
        left = text("select status, lease_until, done_ms from jobs where id = :id")
        assert (await tx.execute(left, {"id": job.id})).one() == ("completed", None, SPEECH_MS)


async def test_a_failing_recogniser_is_tried_again_and_then_given_up(
    build: Callable[[Scripted], Plant], database: Database
) -> None:
    plant = build(Scripted(fail=BackendFailed))
    job = await plant.submit()
    for attempt in (1, 2):
        waiting = await plant.work(job)
        assert (waiting.status, waiting.attempts) == ("queued", attempt)
        assert (await plant.work(job)).attempts == attempt  # not due yet
        async with database.tenant(job.tenant_id) as tx:
            later = (await tx.execute(text("select run_after > now() from jobs where id = :id"), {"id": job.id})).one()
        assert later == (True,)
        await expire_lease(database, job)
    failed = await plant.work(job)
    assert (failed.status, failed.billed_ms) == ("failed", 0)
    assert failed.error == {"code": "BACKEND_FAILED", "message": BackendFailed().message}
    with pytest.raises(JobFailed):
        await plant.jobs.transcript(job.tenant_id, job.id)
    assert await ledger(database, job) == []
    session = await session_of(database, job)
    assert (session.status, session.code) == ("failed", "BACKEND_FAILED")
    assert await held_nano(database, job.tenant_id) == 0
    assert plant.blobs_left() == []


async def test_a_recording_that_kills_its_workers_is_given_up(plant: Plant, database: Database) -> None:
    job = await plant.submit()
    async with database.tenant(job.tenant_id) as tx:
        await tx.execute(
            text("""
                update jobs set status = 'running', attempts = 3, lease_token = gen_random_uuid(),
                                lease_until = now() - interval '1 second'
                where id = :id
            """),
            {"id": job.id},
        )
    failed = await plant.work(job)
    assert (failed.status, failed.billed_ms) == ("failed", 0)
    assert failed.error is not None
    assert failed.error["code"] == "JOB_FAILED"


@pytest.mark.parametrize("fails", [False, True])
async def test_a_jobs_end_is_in_the_outbox_once(
    build: Callable[[Scripted], Plant], database: Database, fails: bool
) -> None:
    plant = build(Scripted(fail=NotAudio) if fails else Recogniser())
    job = await plant.submit()
    endpoint = uuid4()
    async with database.tenant(job.tenant_id) as tx:
        named = {"id": job.id, "endpoint": endpoint}
        await tx.execute(text("update jobs set webhook_id = :endpoint where id = :id"), named)
    for _ in range(2):
        ended = await plant.work(job)
    query = "select topic, endpoint_id, payload from outbox where object_id = :id"
    async with database.tenant(job.tenant_id) as tx:
        (event,) = (await tx.execute(text(query), {"id": job.id})).all()
    assert (event.topic, event.endpoint_id) == (f"job.{ended.status}", endpoint)
    assert WORDS[0] not in event.payload


async def test_an_unknown_length_is_held_for_once_it_is_known(plant: Plant, database: Database) -> None:
    job = await plant.submit(20_000, kind="flac")
    assert (await session_of(database, job)).held_ms < 20_000  # silence packs well: the bytes promised less
    done = await plant.work(job)
    assert (done.status, done.billed_ms) == ("completed", 20_000)
    assert await held_nano(database, job.tenant_id) == 0


async def test_a_recording_beyond_the_policy_fails_whatever_its_header_says(plant: Plant, database: Database) -> None:
    async with database.across_tenants("test set-up") as tx:
        await policies.put(tx, plant.caller.tenant_id, PolicyBody(max_file_ms=5000), actor="test")
    with pytest.raises(Invalid):
        await plant.submit(6000)
    failed = await plant.work(await plant.submit(20_000, kind="flac"))
    assert failed.error is not None
    assert (failed.status, failed.error["code"], failed.billed_ms) == ("failed", "AUDIO_TOO_LONG", 0)
    assert plant.blobs_left() == []


async def test_a_job_that_waited_is_not_done_where_a_later_policy_forbids_it(plant: Plant, database: Database) -> None:
    job = await plant.submit()
    async with database.across_tenants("test") as tx:
        await policies.put(tx, plant.caller.tenant_id, PolicyBody(regions=("eu",)), actor="test")
    plant.shop.door.terms.forget()
    failed = await plant.work(job)
    assert failed.error is not None
    assert (failed.status, failed.error["code"], failed.billed_ms) == ("failed", "FORBIDDEN", 0)
    assert await held_nano(database, job.tenant_id) == 0
    assert plant.blobs_left() == []


async def test_a_job_may_be_longer_than_a_file(plant: Plant, database: Database) -> None:
    async with database.across_tenants("test set-up") as tx:
        body = PolicyBody(max_file_ms=1000, max_job_ms=SPEECH_MS)
        await policies.put(tx, plant.caller.tenant_id, body, actor="test")
    assert (await plant.work(await plant.submit())).status == "completed"
    with pytest.raises(Invalid, match=f"allows {SPEECH_MS} ms"):
        await plant.submit(SPEECH_MS + 1000)


async def test_a_recording_that_a_dead_worker_left_is_collected(plant: Plant, database: Database) -> None:
    job = await plant.submit()
    running = await plant.submit(1000)
    (left,) = [path for path in plant.blobs_left() if path.stat().st_size > 100_000]
    recording = left.read_bytes()
    await plant.work(job)
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(recording)
    async with database.tenant(job.tenant_id) as tx:
        query = text("update jobs set blob_key = :key, finished_at = now() - interval '1 hour' where id = :id")
        await tx.execute(query, {"id": job.id, "key": str(left.relative_to(plant.blob_dir))})
    assert await collect(database, plant.shop.blobs) == 1
    assert await collect(database, plant.shop.blobs) == 0
    assert len(plant.blobs_left()) == 1
    assert (await plant.work(running)).status == "completed"


async def test_jobs_are_listed_newest_first_and_stand_in_line(plant: Plant) -> None:
    tenant_id = plant.caller.tenant_id
    first, second, third = [await plant.submit(1000 + number) for number in range(3)]
    positions = [(await plant.jobs.get(tenant_id, job.id)).queue_position or 0 for job in (first, second, third)]
    assert positions == [positions[0], positions[0] + 1, positions[0] + 2]
    page, cursor = await plant.jobs.listing(tenant_id, limit=2)
    assert [job.id for job in page] == [third.id, second.id]
    page, cursor = await plant.jobs.listing(tenant_id, limit=2, cursor=cursor)
    assert ([job.id for job in page], cursor) == ([first.id], None)
    await plant.work(first)
    page, _ = await plant.jobs.listing(tenant_id, status="completed")
    assert [job.id for job in page] == [first.id]
    with pytest.raises(Invalid):
        await plant.jobs.listing(tenant_id, cursor="job_nonsense")


async def test_a_retry_joins_the_job_of_the_same_upload(plant: Plant, database: Database) -> None:
    job = await plant.submit()
    fingerprint = plant.upload(SPEECH_MS).fingerprint
    for _ in ("while it waits", "once it is completed"):
        joined = await plant.jobs.joinable(job.tenant_id, fingerprint)
        assert joined is not None
        assert joined.id == job.id
        await plant.work(job)
    async with database.tenant(job.tenant_id) as tx:
        await tx.execute(text("update jobs set finished_at = now() - interval '1 hour'"))
    assert await plant.jobs.joinable(job.tenant_id, fingerprint) is None


async def test_waiting_ends_with_the_job_or_with_patience(plant: Plant) -> None:
    job = await plant.submit()
    assert (await plant.jobs.wait(job.tenant_id, job.id, 0)).status == "queued"
    waiting = asyncio.create_task(plant.jobs.wait(job.tenant_id, job.id, 60))
    await plant.work(job)
    assert (await waiting).status == "completed"


async def test_embedded_workers_find_what_nobody_rang_for(plant: Plant, database: Database) -> None:
    unheard = InProcessDoorbell()
    jobs = Jobs(database, plant.shop.blobs, plant.shop.door, unheard)
    job = await jobs.submit(plant.caller, Demand("job"), Options(), plant.upload(SPEECH_MS))
    await asyncio.wait_for(unheard.answer(), 1)
    assert await sweep(database, plant.bell) >= 1
    async with embedded_workers(plant.context, plant.bell, 2):
        assert (await jobs.wait(job.tenant_id, job.id, 30)).status == "completed"


async def test_the_metrics_count_jobs_by_state(plant: Plant, database: Database) -> None:
    job = await plant.submit()
    await count(database)
    waiting = REGISTRY.get_sample_value("stenogate_jobs", {"state": "queued"})
    await plant.work(job)
    await count(database)
    assert waiting is not None
    assert REGISTRY.get_sample_value("stenogate_jobs", {"state": "queued"}) == waiting - 1


async def test_a_full_doorbell_does_not_lose_the_job(plant: Plant, database: Database) -> None:
    full = InProcessDoorbell(waiting=1)
    jobs = Jobs(database, plant.shop.blobs, plant.shop.door, full)
    queued = [
        await jobs.submit(plant.caller, Demand("job"), Options(), plant.upload(1000 + number)) for number in range(2)
    ]
    assert [job.status for job in queued] == ["queued", "queued"]
    await full.answer()
    await full.ring(queued[1].tenant_id, queued[1].id)
    assert await full.answer() == (queued[1].tenant_id, queued[1].id)
