"""Deepgram's recognisers: recordings by `POST /v1/listen`, live audio by a WebSocket of that name.

https://developers.deepgram.com/reference/speech-to-text-api/listen
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from urllib.parse import urlencode

from dispatchers.adapters.outbox import Outbox
from dispatchers.audio.encode import MEDIA_TYPES
from dispatchers.backends.deepgram_live import PATIENT, LiveStream, Patience
from dispatchers.backends.deepgram_wire import (
    LANGUAGES,
    LISTEN,
    Alternative,
    Recorded,
    SaidUtterance,
    live_query,
    recorded_query,
    words_of,
)
from dispatchers.backends.recording import file_of
from dispatchers.backends.relay import Account, at_ms, client, parsed, understood, whole
from dispatchers.backends.said import clean, language_of, model_of, sayable
from dispatchers.deltas import Deltas
from dispatchers.errors import AudioTooLong
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
    ignore,
    to_ms,
)

ENGINE = "deepgram"
BASE_URL = "https://api.deepgram.com"
EU_BASE_URL = "https://api.eu.deepgram.com"
MODELS = ("nova-3", "nova-2")
LONGEST_MS = 60 * 60 * 1000
"""Far below Deepgram's own limits (2 GB, 10 min of work): the words of an hour fit in the longest answer we read."""
_LARGE_BYTES = 256 * 1024
"""An answer above this is read in a thread."""
_ENDLESS_S = 1e9


class DeepgramRelay:
    """One account at Deepgram. Use from one event loop."""

    def __init__(self, account: Account, patience: Patience = PATIENT):
        self._account = account
        self._patience = patience
        headers = {"authorization": f"Token {account.key}"}
        self._http = client(account, headers, read_s=patience.recorded_s, connect_s=patience.connect_s)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            stream=True,
            partials=True,
            words=True,
            longest_ms=LONGEST_MS,
            languages=LANGUAGES,
            models=self._account.models,
        )

    def origin(self, model: str) -> Origin:
        """See `Dispatcher.origin`. Raises `UnknownModel`."""
        return Origin(self._account.backend, ENGINE, model_of(self._account, model))

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        """See `Dispatcher.transcribe`. Raises `UnknownModel`, `UnsupportedOption`, `AudioTooLong`, or a
        `BackendError`."""
        if to_ms(len(audio)) > LONGEST_MS:
            raise AudioTooLong(f"{self._account.backend} takes {LONGEST_MS // 60_000} minutes at once.", param="file")
        origin, query = self.origin(options.model), recorded_query(self._account, options)
        form, content = file_of(audio)
        async with (
            understood(self._account, self._patience.recorded_s),
            self._http.stream(
                "POST", f"{LISTEN}?{urlencode(query)}", headers={"content-type": MEDIA_TYPES[form]}, content=content
            ) as answer,
        ):
            body = await whole(self._account, answer)
        read = partial(self._read, body, to_ms(len(audio)), options, origin)
        transcript = await asyncio.to_thread(read) if len(body) > _LARGE_BYTES else read()
        for segment in transcript.segments:
            heard(segment)
        return transcript

    def _read(self, body: bytes, length_ms: int, options: Options, origin: Origin) -> Transcript:
        said = parsed(self._account, Recorded, body)
        return _transcript(said, length_ms, options, origin)

    def stream(
        self, audio: AsyncIterator[StreamInput], options: Options
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """See `Dispatcher.stream`. Raises `UnknownModel` and `UnsupportedOption` at once; a `BackendError` comes from
        the iterator, and ends the stream in the middle of its utterance."""
        out = Outbox()
        stream = LiveStream(self._account, live_query(self._account, options), options, out, self._patience)
        return out.filled_by(lambda: stream.run(audio))

    async def aclose(self) -> None:
        """Closes the connections, except those of live streams."""
        await self._http.aclose()


def _transcript(said: Recorded, length_ms: int, options: Options, origin: Origin) -> Transcript:
    (channel,) = said.results.channels
    best = channel.alternatives[0]
    segments = _segments(said.results.utterances or _as_one(best), length_ms, words=options.words)
    text = Deltas()
    for segment in segments:
        text.add(segment.text)
    sayable(len(text.said), length_ms)
    language = language_of(channel.detected_language, options.language)
    return Transcript(text.said, language, length_ms, segments, origin)


def _as_one(said: Alternative) -> tuple[SaidUtterance, ...]:
    """For an answer that tells of no utterances."""
    start, end = (said.words[0].start, said.words[-1].end) if said.words else (0.0, _ENDLESS_S)
    return (SaidUtterance(start=start, end=end, transcript=said.transcript, words=said.words),)


def _segments(said: tuple[SaidUtterance, ...], length_ms: int, *, words: bool) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    end_ms = 0
    for utterance in said:
        if text := clean(utterance.transcript):
            start_ms = at_ms(utterance.start, end_ms, length_ms)
            end_ms = at_ms(utterance.end, start_ms, length_ms)
            timed = words_of(utterance.words, start_ms, end_ms) if words else ()
            segments.append(Segment(start_ms, end_ms, text, words=timed))
    return tuple(segments)
