"""Deepgram's recognisers: recordings by `POST /v1/listen`, live audio by a WebSocket of that name.

https://developers.deepgram.com/reference/speech-to-text-api/listen
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from urllib.parse import urlencode

import httpx

from dispatchers.adapters.outbox import Outbox
from dispatchers.audio.encode import MEDIA_TYPES, WAV_HEADER_BYTES, encoder
from dispatchers.backends.deepgram_live import LiveStream
from dispatchers.backends.deepgram_wire import (
    LISTEN,
    Alternative,
    Recorded,
    SaidUtterance,
    clean,
    language_of,
    live_query,
    load_recorded,
    model_of,
    recorded_query,
    to_ms,
    words_of,
)
from dispatchers.backends.relay import Account, client, understood, whole
from dispatchers.deltas import Deltas
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
)
from dispatchers.interface import to_ms as duration_ms

ENGINE = "deepgram"
BASE_URL = "https://api.deepgram.com"
EU_BASE_URL = "https://api.eu.deepgram.com"
MODELS = ("nova-3", "nova-2")
_LANGUAGES = """
af ar be bg bn bs ca cs da de el en es et fa fi fr gu he hi hr hu hy id it ja ka kk kn ko lt lv mk mr ms ne nl no pa pl
pt ro ru sk sl sr sv ta te th tl tr uk ur vi yue zh
"""
LANGUAGES = frozenset(_LANGUAGES.split())
"""What Nova-3 is told to recognise; Nova-2 knows fewer."""

LONGEST_MS = 60 * 60 * 1000
"""Far below Deepgram's own limits (2 GB, 10 min of work): the words of an hour fit in the longest answer we read."""

READ_S = 120.0
_AT_ONCE = 512 * 1024
"""Samples sent in one piece."""
_ENDLESS_S = 1e9


class DeepgramRelay:
    """One account at Deepgram. Use from one event loop."""

    def __init__(self, account: Account, *, transport: httpx.AsyncBaseTransport | None = None):
        self._account = account
        headers = {"Authorization": f"Token {account.key}"}
        self._http = client(account, headers, read_s=READ_S, transport=transport)
        secure = account.base_url.startswith("https:")
        self._tls: ssl.SSLContext | None = httpx.create_ssl_context(trust_env=False) if secure else None

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
        """See `Dispatcher.transcribe`. Raises `UnknownModel`, `UnsupportedOption`, or a `BackendError`."""
        origin, query = self.origin(options.model), recorded_query(self._account, options)
        length = WAV_HEADER_BYTES + audio.nbytes
        headers = {"Content-Type": MEDIA_TYPES["wav"], "Content-Length": str(length)}
        address = f"{LISTEN}?{urlencode(query)}"
        async with (
            understood(self._account),
            self._http.stream("POST", address, headers=headers, content=_wav(audio)) as answer,
        ):
            body = await whole(self._account, answer)
        transcript = _transcript(load_recorded(self._account, body), duration_ms(len(audio)), options, origin)
        for segment in transcript.segments:
            heard(segment)
        return transcript

    def stream(
        self, audio: AsyncIterator[StreamInput], options: Options
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """See `Dispatcher.stream`. Raises `UnknownModel` and `UnsupportedOption` at once; a `BackendError` comes from
        the iterator, and ends the stream in the middle of its utterance."""
        out = Outbox()
        stream = LiveStream(self._account, live_query(self._account, options), options, out, self._tls)
        return out.filled_by(lambda: stream.run(audio))

    async def aclose(self) -> None:
        """Closes the connections, except those of live streams."""
        await self._http.aclose()


async def _wav(audio: Samples) -> AsyncIterator[bytes]:
    """A recording a piece at a time: it may be mapped from a file."""
    wav = encoder("wav", len(audio))
    for at in range(0, len(audio), _AT_ONCE):
        yield wav.feed(audio[at : at + _AT_ONCE])
    yield wav.end()


def _transcript(said: Recorded, length_ms: int, options: Options, origin: Origin) -> Transcript:
    (channel,) = said.results.channels
    best = channel.alternatives[0]
    segments = _segments(said.results.utterances or _as_one(best), length_ms, words=options.words)
    text = Deltas()
    for segment in segments:
        text.add(segment.text)
    language = language_of(channel.detected_language, options.language)
    return Transcript(text.said, language, length_ms, segments, origin)


def _as_one(said: Alternative) -> tuple[SaidUtterance, ...]:
    """For an answer that tells of no utterances."""
    start, end = (said.words[0].start, said.words[-1].end) if said.words else (0.0, _ENDLESS_S)
    return (SaidUtterance(start=start, end=end, transcript=said.transcript, words=said.words),)


def _segments(said: tuple[SaidUtterance, ...], length_ms: int, *, words: bool) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    at_ms = 0
    for utterance in said:
        if text := clean(utterance.transcript):
            start_ms = to_ms(utterance.start, at_ms, length_ms)
            at_ms = to_ms(utterance.end, start_ms, length_ms)
            timed = words_of(utterance.words, start_ms, at_ms) if words else ()
            segments.append(Segment(start_ms, at_ms, text, words=timed))
    return tuple(segments)
