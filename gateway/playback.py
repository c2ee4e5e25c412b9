"""A kept recording, put together from its parts and encoded as it is sent: in memory is never more than one of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar
from uuid import UUID

import numpy as np
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from dispatchers.audio.encode import MEDIA_TYPES, Encoder, Form, encoder, unpacked
from dispatchers.errors import Overloaded
from dispatchers.interface import SAMPLE_RATE, Samples
from policy.errors import ConcurrencyLimited
from policy.recordings import Recording
from runtime.blobs import Blobs

T = TypeVar("T")

STEP_SAMPLES = 10 * SAMPLE_RATE
AT_ONCE = 64
AT_ONCE_OF_A_TENANT = 8
RETRY_S = 5

_THREADS = ThreadPoolExecutor(2, "playback")  # live streams come first: no more than two are encoded at once
_playing: Counter[UUID] = Counter()


class Playing(StreamingResponse):
    """A recording as a file."""

    def __init__(self, pieces: AsyncGenerator[bytes, None], form: Form, headers: dict[str, str]):
        super().__init__(pieces, headers=headers, media_type=MEDIA_TYPES[form])
        self._pieces = pieces
        self._first = b""

    async def begun(self) -> Playing:
        """Waits for the first piece, so that a failure before it can still be answered with a status: it is raised
        here."""
        self._first = await anext(self._pieces)
        self.body_iterator = self._all()
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._pieces.aclose()

    async def _all(self) -> AsyncGenerator[bytes, None]:
        yield self._first
        async for piece in self._pieces:
            yield piece


async def played(blobs: Blobs, tenant_id: UUID, recording: Recording, form: Form) -> AsyncGenerator[bytes, None]:
    """The file, in pieces. What lies between its parts is silence, so that times are the transcript's; where two
    overlap, the first counts.

    Raises `BlobMissing`, `BlobsUnavailable`; `Overloaded` and `ConcurrencyLimited` where too many are played already.
    """
    with _place(tenant_id):
        made = await _in_thread(lambda: encoder(form, recording.samples))
        reached = 0
        for part in recording.parts:
            while reached < part.start:
                silence = np.zeros(min(STEP_SAMPLES, part.start - reached), np.int16)
                reached += len(silence)
                if data := await _fed(made, silence):
                    yield data
            at = part.start
            content = await blobs.get(part.blob_key) if part.end > reached else b""
            async for samples in _samples(content):
                fresh = samples[max(0, reached - at) :]
                at += len(samples)
                reached = max(reached, at)
                if data := await _fed(made, fresh):
                    yield data
        if data := await _in_thread(made.end):
            yield data


async def _samples(content: bytes) -> AsyncGenerator[Samples, None]:
    if not content:
        return
    pieces = unpacked(content, STEP_SAMPLES)
    while (samples := await _in_thread(lambda: next(pieces, None))) is not None:
        yield samples


async def _fed(made: Encoder, samples: Samples) -> bytes:
    return await _in_thread(lambda: made.feed(samples))


async def _in_thread(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work)


@contextmanager
def _place(tenant_id: UUID) -> Iterator[None]:
    if _playing.total() >= AT_ONCE:
        raise Overloaded(retry_after_s=RETRY_S)
    if _playing[tenant_id] >= AT_ONCE_OF_A_TENANT:
        raise ConcurrencyLimited("Too many recordings at once. Try again when one has been fetched.")
    _playing[tenant_id] += 1
    try:
        yield
    finally:
        _playing[tenant_id] -= 1
        if not _playing[tenant_id]:
            del _playing[tenant_id]
