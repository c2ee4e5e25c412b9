"""Does one job: claim, decode, cut, recognise chunk by chunk, settle. The same function on arq and embedded.

A worker may die anywhere: the chunks done stay done, and text and charge are stored in one transaction, once.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any
from uuid import UUID

import structlog

from dispatchers.audio.decode import spool
from dispatchers.dispatch import Door, outcome_of
from dispatchers.errors import BackendFailed
from dispatchers.interface import Samples, Segment, Transcript, to_ms
from policy.admission import Lease
from policy.errors import Conflict
from policy.resolve import Candidate
from runtime.blobs import Blobs
from runtime.database import Database
from runtime.errors import StenogateError
from runtime.settings import Settings
from workers.chunks import Chunk, Heard, joined, plan, shifted
from workers.claim import Claim
from workers.errors import LeaseLost, WorkersLost
from workers.recordings import discard

log = structlog.get_logger()

RETRY_S = 5.0
RETRY_MOST_S = 300.0
CONTEXT = "workshop"


@dataclass(frozen=True)
class Workshop:
    """What a worker works with."""

    database: Database
    blobs: Blobs
    door: Door
    settings: Settings


async def transcribe_job(context: dict[Any, Any], tenant_id: str, job_id: str) -> None:
    """Transcribes the job if it is due. Returns quietly when somebody else has it or it has ended.

    `context` holds the `Workshop` under `CONTEXT`. When cancelled, gives the job back to the queue at once.
    """
    shop: Workshop = context[CONTEXT]
    claim = await Claim.take(shop.database, UUID(tenant_id), UUID(job_id), shop.settings.job_lease_s)
    if claim is None:
        return
    with structlog.contextvars.bound_contextvars(tenant_id=tenant_id, job_id=job_id):
        try:
            ended = await _while_held(claim, _attempt(shop, claim))
        except LeaseLost:
            log.warning("job.lease_lost")
        except asyncio.CancelledError:
            await _give_back(claim)
            raise
        else:
            if ended:
                await discard(shop.database, shop.blobs, claim.tenant_id, claim.job_id, claim.blob_key)


async def _while_held(claim: Claim, work: Coroutine[Any, Any, bool]) -> bool:
    """The work's result, while the claim is kept. A lost claim stops the work."""
    working, keeping = asyncio.create_task(work), asyncio.create_task(claim.keep())
    try:
        await asyncio.wait((working, keeping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (working, keeping):
            task.cancel()
        await asyncio.gather(working, keeping, return_exceptions=True)
    if not working.cancelled():
        return working.result()
    if not keeping.cancelled():
        keeping.result()
    raise BackendFailed  # cancelled from inside: nobody told us to stop


async def _attempt(shop: Workshop, claim: Claim) -> bool:
    """Whether the job has ended, well or badly; if not, it waits to be tried again."""
    try:
        async with shop.door.attached(claim.tenant_id, claim.job_id) as lease:
            await _transcribe(shop, claim, lease)
    except LeaseLost:
        raise
    except Exception as error:  # noqa: BLE001 — not swallowed: stored with the job
        return await _failed(shop, claim, error)
    log.info("job.completed", attempts=claim.attempts)
    return True


async def _transcribe(shop: Workshop, claim: Claim, lease: Lease) -> None:
    if claim.attempts > shop.settings.job_attempts:
        raise WorkersLost
    samples = await _samples(shop, claim, lease.policy.body.longest_ms("job"))
    audio_ms = to_ms(len(samples))
    await claim.measure(audio_ms)
    await lease.extend(audio_ms)
    pieces, served = await claim.heard()
    covered_ms = pieces[-1].chunk.end_ms if pieces else 0
    rest = plan(samples, shop.settings.chunk_ms, number=len(pieces), start_ms=covered_ms)
    for chunk in await asyncio.to_thread(list, rest):
        if served:
            _prefer(lease, served[-1])
        piece, candidate = await _recognise(shop.door, claim, lease, samples, chunk)
        await lease.flush()
        await claim.add(piece, candidate)
        pieces.append(piece)
        served.append(candidate)
    ends = [piece.chunk.end_ms for piece in pieces]
    await _settle(claim, lease, joined(pieces, claim.options), list(zip(ends, served, strict=True)))


async def _samples(shop: Workshop, claim: Claim, limit_ms: int) -> Samples:
    """The recording, decoded and mapped. Its file is already unlinked: it goes with the mapping, even by kill -9."""
    with tempfile.TemporaryDirectory(prefix="stenogate-job-", ignore_cleanup_errors=True) as folder:
        recording = Path(folder) / "recording"
        await shop.blobs.fetch(claim.blob_key, recording)
        return await asyncio.to_thread(spool, recording, Path(folder) / "samples", limit_ms=limit_ms)


async def _recognise(door: Door, claim: Claim, lease: Lease, samples: Samples, chunk: Chunk) -> tuple[Heard, Candidate]:
    def note(segment: Segment) -> None:
        claim.reached_ms = min(chunk.start_ms + segment.end_ms, chunk.end_ms)

    options = replace(claim.options, urgency="batch")
    transcript, candidate = await door.recognise(lease, options, chunk.of(samples), note, from_ms=chunk.start_ms)
    segments = tuple(shifted(segment, chunk.start_ms) for segment in transcript.segments)
    return Heard(chunk, transcript.language, segments, transcript.origin), candidate


def _prefer(lease: Lease, candidate: Candidate) -> None:
    """Whoever did the last chunk is asked first for the next one: a job is best heard by one."""
    others = (other for other in lease.decision.candidates if other != candidate)
    lease.decision = replace(lease.decision, candidates=(candidate, *others))


async def _settle(claim: Claim, lease: Lease, transcript: Transcript, served: list[tuple[int, Candidate]]) -> None:
    """Bills each stretch to who did it; with the last one the job is done."""
    *before, (_, candidate) = [(list(stretch)[-1][0], who) for who, stretch in groupby(served, key=itemgetter(1))]
    for until_ms, who in before:
        await lease.settle(until_ms, who)
    await lease.settle(
        transcript.duration_ms,
        candidate,
        outcome=outcome_of(transcript, keep_text=lease.policy.body.keep_transcripts),
        extra=lambda tx: claim.complete(tx, transcript),
    )


async def _failed(shop: Workshop, claim: Claim, error: Exception) -> bool:
    """Whether that was the end of it."""
    known = error if isinstance(error, StenogateError) else StenogateError()
    final = isinstance(error, StenogateError) and not error.retryable
    log.warning("job.failed", code=known.code, error=type(error).__name__, attempts=claim.attempts, final=final)
    if not final and claim.attempts < shop.settings.job_attempts:
        backoff_s = min(RETRY_S * 2 ** (claim.attempts - 1), RETRY_MOST_S)
        await claim.retry(known.retry_after_s or backoff_s)
        return False
    await claim.renew()  # whoever lost the job must not end its session
    with suppress(Conflict):  # it has ended already
        async with shop.door.attached(claim.tenant_id, claim.job_id) as lease:
            await lease.fail(known.code)
    await claim.fail(known)
    return True


async def _give_back(claim: Claim) -> None:
    try:
        await asyncio.shield(claim.give_back())
    except LeaseLost:
        return
    except Exception as error:  # noqa: BLE001 — then the lease runs out by itself
        log.warning("job.not_given_back", error=type(error).__name__)
    else:
        log.info("job.given_back")
