"""A kept recording, put together from its parts and encoded as it is sent: in memory is never more than one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from dispatchers.audio.encode import Encoder, Form, encoder, unpacked
from dispatchers.interface import SAMPLE_RATE, Samples
from policy.recordings import Part
from runtime.blobs import Blobs

T = TypeVar("T")

STEP_SAMPLES = 10 * SAMPLE_RATE

_THREADS = ThreadPoolExecutor(2, "playback")  # live streams come first: no more than two are encoded at once


async def played(blobs: Blobs, parts: Sequence[Part], form: Form) -> AsyncGenerator[bytes, None]:
    """The file, in pieces. Parts are in order; what lies between them is silence, so that times are the transcript's;
    where two overlap, the first counts.

    Raises `BlobMissing`, `BlobsUnavailable`.
    """
    total = max((part.end for part in parts), default=0)
    made = await _in_thread(lambda: encoder(form, total))
    reached = 0
    for part in parts:
        while reached < part.start:
            silence = np.zeros(min(STEP_SAMPLES, part.start - reached), np.int16)
            reached += len(silence)
            if data := await _fed(made, silence):
                yield data
        if part.end <= reached:
            continue
        samples = (await _samples(blobs, part))[reached - part.start :]
        for at in range(0, len(samples), STEP_SAMPLES):
            if data := await _fed(made, samples[at : at + STEP_SAMPLES]):
                yield data
        reached = part.end
    if data := await _in_thread(made.end):
        yield data


async def _samples(blobs: Blobs, part: Part) -> Samples:
    content = await blobs.get(part.blob_key)
    return await _in_thread(lambda: unpacked(content))


async def _fed(made: Encoder, samples: Samples) -> bytes:
    return await _in_thread(lambda: made.feed(samples))


async def _in_thread(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work)
