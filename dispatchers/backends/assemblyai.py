"""AssemblyAI's recognisers: recordings by `/v2/transcript`, live audio by the WebSocket `/v3/ws`.

A recording is uploaded, its transcription asked for, and asked after until it is there. Then it is deleted, as is what
somebody no longer waits for: AssemblyAI keeps nothing that it need not.

https://www.assemblyai.com/docs/api-reference
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from itertools import pairwise
from typing import TypeVar

import structlog
from pydantic import BaseModel

from dispatchers.adapters.outbox import Outbox
from dispatchers.backends.assemblyai_live import PATIENT, LiveStream, Patience
from dispatchers.backends.assemblyai_wire import (
    TRANSCRIPT,
    UPLOAD,
    Job,
    Uploaded,
    languages_of,
    live_query,
    prompted,
    recorded_request,
    words_of,
)
from dispatchers.backends.recording import file_of
from dispatchers.backends.relay import Account, client, parsed, understood, whole
from dispatchers.backends.said import clean, language_of, model_of, sayable
from dispatchers.deltas import Deltas
from dispatchers.errors import AudioTooLong, BackendError, BackendFailed
from dispatchers.interface import (
    Capabilities,
    Event,
    Heard,
    Options,
    Origin,
    Samples,
    Segment,
    StreamInput,
    Transcript,
    Word,
    ignore,
    to_ms,
)

ENGINE = "assemblyai"
BASE_URL = "https://api.assemblyai.com"
MODELS = ("universal-3-pro", "universal-2")
LONGEST_MS = 60 * 60 * 1000
"""Far below AssemblyAI's own limit (10 h): the words of an hour fit in the longest answer we read."""

LOOK_MOST_S, LESS_OFTEN = 3.0, 1.5
"""How long until a transcription is asked after at most, and by how much that grows."""
LOOKS_FAILED_MOST = 3
"""In a row: what was uploaded and asked for is not given up for a hiccup."""
DELETING_MOST = 1_000
CLOSE_S = 2.0

SENTENCE_PAUSE_MS, PAUSE_MS = 200, 800
"""A segment ends before a pause of so much, after the end of a sentence and within one."""
_SENTENCE_ENDS = tuple(".?!…。？！।؟")
_LARGE_BYTES = 256 * 1024
"""An answer above this is read in a thread."""

M = TypeVar("M", bound=BaseModel)
log = structlog.get_logger()


class AssemblyAIRelay:
    """One account at AssemblyAI. Use from one event loop."""

    def __init__(self, account: Account, patience: Patience = PATIENT):
        self._account = account
        self._patience = patience
        headers = {"authorization": account.key}
        self._http = client(account, headers, read_s=patience.silent_s, connect_s=patience.connect_s)
        self._deleting: set[asyncio.Task[None]] = set()

    @property
    def capabilities(self) -> Capabilities:
        """What the default model can do; another's limits are told when it is asked for."""
        default = self._account.models[0]
        return Capabilities(
            stream=True,
            partials=True,
            words=True,
            prompt=prompted(default),
            longest_ms=LONGEST_MS,
            languages=languages_of(default),
            models=self._account.models,
        )

    def origin(self, model: str) -> Origin:
        """See `Dispatcher.origin`. Raises `UnknownModel`."""
        return Origin(self._account.backend, ENGINE, model_of(self._account, model))

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        """See `Dispatcher.transcribe`. Raises `UnknownModel`, `UnsupportedOption`, `AudioTooLong`, or a
        `BackendError`."""
        duration_ms = to_ms(len(audio))
        if duration_ms > LONGEST_MS:
            raise AudioTooLong(f"{self._account.backend} takes {LONGEST_MS // 60_000} minutes at once.", param="file")
        origin, request = self.origin(options.model), recorded_request(self._account, options)
        async with understood(self._account, self._patience.recorded_s):
            _, content = file_of(audio)
            uploaded = await self._asked("POST", UPLOAD, Uploaded, content)
            body = json.dumps(request | {"audio_url": uploaded.upload_url}).encode()
            asked = await self._asked("POST", TRANSCRIPT, Job, body, "application/json")
            try:
                job = await self._done(asked)
            finally:
                self._delete(asked.id)
        transcript = self._transcript(job, duration_ms, options, origin)
        for segment in transcript.segments:
            heard(segment)
        return transcript

    def stream(
        self, audio: AsyncIterator[StreamInput], options: Options
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """See `Dispatcher.stream`. Raises `UnknownModel` and `UnsupportedOption` at once; a `BackendError` comes from
        the iterator, and ends the stream in the middle of its utterance."""
        out = Outbox()
        stream = LiveStream(self._account, live_query(self._account, options), options, out, self._patience)
        return out.filled_by(lambda: stream.run(audio))

    async def aclose(self) -> None:
        """Closes the connections, except those of live streams. What is to be deleted has a moment for it."""
        if self._deleting:
            await asyncio.wait(self._deleting, timeout=CLOSE_S)
        for task in self._deleting:
            task.cancel()
        await asyncio.gather(*self._deleting, return_exceptions=True)
        await self._http.aclose()

    # --- a transcription, step by step ---

    async def _asked(
        self,
        method: str,
        path: str,
        form: type[M],
        content: bytes | AsyncIterator[bytes] | None = None,
        media_type: str | None = None,
    ) -> M:
        headers = {} if media_type is None else {"content-type": media_type}
        async with (
            understood(self._account),
            self._http.stream(method, path, content=content, headers=headers) as answer,
        ):
            body = await whole(self._account, answer)
        if len(body) > _LARGE_BYTES:
            return await asyncio.to_thread(parsed, self._account, form, body)
        return parsed(self._account, form, body)

    async def _done(self, job: Job) -> Job:
        """The same when it has ended."""
        path, wait_s, failed = f"{TRANSCRIPT}/{job.id}", self._patience.look_s, 0
        while job.status in ("queued", "processing"):
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * LESS_OFTEN, LOOK_MOST_S)
            try:
                job, failed = await self._asked("GET", path, Job), 0
            except BackendError as error:
                failed += 1
                if failed == LOOKS_FAILED_MOST or not error.retryable:
                    raise
                wait_s = max(wait_s, error.retry_after_s or 0.0)
        return job

    def _delete(self, job_id: str) -> None:
        if len(self._deleting) >= DELETING_MOST:
            log.warning("relay.kept", backend=self._account.backend, transcript=job_id, error="TooMany")
            return
        task = asyncio.create_task(self._deleted(job_id))
        self._deleting.add(task)
        task.add_done_callback(self._deleting.discard)

    async def _deleted(self, job_id: str) -> None:
        """One that is still under way may not be deleted yet."""
        why = ""
        for wait_s in self._patience.delete_s:
            await asyncio.sleep(wait_s)
            try:
                await self._asked("DELETE", f"{TRANSCRIPT}/{job_id}", Job)
            except BackendError as error:
                why = type(error).__name__
            else:
                return
        log.warning("relay.kept", backend=self._account.backend, transcript=job_id, error=why)

    # --- in our words ---

    def _transcript(self, job: Job, duration_ms: int, options: Options, origin: Origin) -> Transcript:
        if job.status == "error" and not job.is_silent:
            raise BackendFailed(f"{self._account.backend} could not transcribe the recording.")
        text = clean(job.text or "")
        sayable(len(text), duration_ms)
        words = words_of(job.words or (), 0, duration_ms)
        sayable(sum(len(word.text) for word in words), duration_ms)
        segments = _segments(text, words, duration_ms, words=options.words)
        language = language_of(job.language_code, options.language)
        whole_text = Deltas()
        for segment in segments:
            whole_text.add(segment.text)
        return Transcript(whole_text.said, language, duration_ms, segments, origin)


def _segments(text: str, said: tuple[Word, ...], duration_ms: int, *, words: bool) -> tuple[Segment, ...]:
    """The text cut at pauses, where its words can be found in it; else all of it in one."""
    if not text:
        return ()
    if (places := _places(text, said)) is None:
        return (Segment(0, duration_ms, text, words=said if words else ()),)
    firsts = [0, *(at + 1 for at, (one, after) in enumerate(pairwise(said)) if _parted(one, after)), len(said)]
    segments: list[Segment] = []
    for first, after in pairwise(firsts):
        start = places[first] if first else 0
        end = places[after] if after < len(said) else len(text)
        group = said[first:after]
        end_ms = max(word.end_ms for word in group)
        if after < len(said):
            end_ms = min(end_ms, said[after].start_ms)
        segments.append(Segment(group[0].start_ms, end_ms, text[start:end].strip(), words=group if words else ()))
    return tuple(segments)


def _parted(one: Word, after: Word) -> bool:
    pause_ms = SENTENCE_PAUSE_MS if one.text.endswith(_SENTENCE_ENDS) else PAUSE_MS
    return after.start_ms - one.end_ms >= pause_ms


def _places(text: str, words: tuple[Word, ...]) -> list[int] | None:
    """Where each word begins in the text."""
    places: list[int] = []
    at = 0
    for word in words:
        if (at := text.find(word.text, at)) < 0:
            return None
        places.append(at)
        at += len(word.text)
    return places or None
