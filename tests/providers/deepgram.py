"""Deepgram's `/v1/listen` on loopback, recorded and live, to the letter of what it publishes, without a recogniser: the
words of a script are heard where they stand, if there is any sound there.

    async with deepgram_server(said("Hello there. How are you?")) as server:
        relay = DeepgramRelay(server.account())
        server.http.fault = FAULTS["html"]      # of recordings and handshakes
        server.quirks = Quirks(ignored=frozenset({"Finalize"}))     # of live streams
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np

from dispatchers.backends.relay import Account
from dispatchers.errors import AudioError
from dispatchers.interface import SAMPLE_RATE, Samples
from tests.providers.http import Answer, HttpServer, Request, http_server
from tests.providers.script import Said, decoded, heard_of, said
from tests.providers.websocket import Socket

KEY = "dg-test-0123456789abcdef"
MODELS = ("nova-3", "nova-2")
STEP_S = 0.25
"""How often a stream is looked at, on its own clock."""
LONGEST_RANGE_S = 3.0
"""Text is final after so long, pause or none."""
UTTERANCE_GAP_S = 0.8
CREATED = "2026-01-02T03:04:05.678Z"
UUID = "1abfe86b-e047-4eed-858a-35e5625b41ee"
_MODEL_INFO = {"name": "general-nova-3", "version": "2026-01-01.0", "arch": "nova-3"}
_LISTEN = "/v1/listen"

Mangled: TypeAlias = Callable[[dict[str, Any]], list[str | bytes]]


@dataclass(frozen=True)
class Quirks:
    """What is wrong with live streams. `ignored`: kinds of messages that nothing happens upon. `mangle` gives what is
    sent in place of a message. After `most_s` of audio comes the `ending`; what was not sent by then never is."""

    ignored: frozenset[str] = frozenset()
    mangle: Mangled | None = None
    most_s: float = float("inf")
    ending: Literal["1011", "1008", "1012", "1000", "reset", "half-closed", "silence", "not a frame"] = "1011"
    idle_s: float = 10.0


@dataclass
class DeepgramServer:
    """A provider that listens. `queries` are those asked, `bodies` the recordings; `heard` are the messages of live
    streams by kind, `streams` those that were open once, `told` what was said on them."""

    script: tuple[Said, ...]
    key: str
    quirks: Quirks = field(default_factory=Quirks)
    queries: list[dict[str, tuple[str, ...]]] = field(default_factory=list)
    bodies: list[Request] = field(default_factory=list)
    heard: Counter[str] = field(default_factory=Counter)
    told: list[dict[str, Any]] = field(default_factory=list)
    streams: int = 0
    open: int = 0
    closed_with: list[int | None] = field(default_factory=list)
    http: HttpServer = field(init=False)

    def account(
        self, *, backend: str = "deepgram", key: str | None = None, models: tuple[str, ...] = MODELS
    ) -> Account:
        """An account there."""
        given = key or self.key
        return Account(backend, self.http.url, given, given[:7], models)

    def respond(self, request: Request) -> Answer:
        """The answer to a recording, or to a handshake that fails."""
        try:
            query = self._checked(request)
            self.bodies.append(request)
            return _json(recorded(_decoded(request.body), self.script, query), {"dg-request-id": UUID})
        except Refused as refused:
            return refused.answer()

    async def upgrade(
        self, request: Request, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """A live stream, to its end; or the refusal of one."""
        try:
            query = self._checked(request, live=True)
        except Refused as refused:
            answer = refused.answer()
            lines = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
            writer.write(
                f"HTTP/1.1 {answer.status} -\r\nContent-Length: {len(answer.body)}\r\n{lines}\r\n".encode()
                + answer.body
            )
            await writer.drain()
            return
        socket = await Socket.accepted(head, {"dg-request-id": UUID}, reader, writer)
        self.streams, self.open = self.streams + 1, self.open + 1
        try:
            await _Live(self, socket, query).run()
        finally:
            self.open -= 1
            self.closed_with.append(None if socket.closed is None else socket.closed.code)

    def _checked(self, request: Request, *, live: bool = False) -> dict[str, tuple[str, ...]]:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "token" or key != self.key:
            raise Refused(401, "INVALID_AUTH", f"Invalid credentials: {key}.")
        if (request.method, request.path) != ("GET" if live else "POST", _LISTEN):
            raise Refused(404, "NOT_FOUND", "No such path.")
        query: dict[str, tuple[str, ...]] = {}
        for name, value in request.query:
            query[name] = (*query.get(name, ()), value)
        self.queries.append(query)
        (_check_live if live else _check_recorded)(query)
        return query


@asynccontextmanager
async def deepgram_server(
    script: tuple[Said, ...] = said(),
    *,
    key: str = KEY,
) -> AsyncIterator[DeepgramServer]:
    """A provider of its own, in this event loop."""
    server = DeepgramServer(script, key)
    async with http_server(server.respond, server.upgrade) as server.http:
        yield server


class Refused(Exception):
    """The provider refuses."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message

    def answer(self) -> Answer:
        body = {"err_code": self.code, "err_msg": self.message, "request_id": UUID}
        return _json(body, {"dg-request-id": UUID, "dg-error": self.message}, self.status)


# --- requests -----------------------------------------------------------------------------------------------------

_BOOLEANS = ("punctuate", "smart_format", "utterances", "interim_results", "vad_events", "multichannel")
_ONLY_LIVE = ("interim_results", "vad_events", "endpointing", "utterance_end_ms", "sample_rate", "channels")
_ONLY_RECORDED = ("utterances", "detect_language", "utt_split", "paragraphs")


def _check(query: Mapping[str, tuple[str, ...]], unknown: tuple[str, ...]) -> None:
    """By the table of parameters: what the service would not take, or would quietly pass over, is an error here."""
    (model,) = query.get("model", ("",))
    if model not in MODELS:
        raise Refused(400, "Bad Request", f"No such model/language/tier combination found: {model}.")
    if "keyterm" in query and not model.startswith("nova-3"):
        raise Refused(400, "Bad Request", "Keyterm prompting is only available for Nova-3.")
    if "keywords" in query and model.startswith("nova-3"):
        raise Refused(400, "Bad Request", "Keywords are not available for Nova-3. Use keyterm.")
    for name in _BOOLEANS:
        if query.get(name, ("true",)) not in (("true",), ("false",)):
            raise Refused(400, "Bad Request", f"{name} must be true or false.")
    if misplaced := set(unknown) & set(query):
        raise Refused(400, "Bad Request", f"Not here: {misplaced}.")


def _check_recorded(query: Mapping[str, tuple[str, ...]]) -> None:
    _check(query, _ONLY_LIVE)
    if "detect_language" in query and "language" in query:
        raise Refused(400, "Bad Request", "Either detect_language or language.")


def _check_live(query: Mapping[str, tuple[str, ...]]) -> None:
    _check(query, _ONLY_RECORDED)
    if query.get("encoding") != ("linear16",) or query.get("sample_rate") != (str(SAMPLE_RATE),):
        raise Refused(400, "Bad Request", "encoding and sample_rate are required for raw audio.")
    if "utterance_end_ms" in query:
        if query.get("interim_results") != ("true",):
            raise Refused(400, "Bad Request", "utterance_end_ms needs interim_results=true.")
        if int(query["utterance_end_ms"][0]) < 1000:
            raise Refused(400, "Bad Request", "utterance_end_ms must be 1000 or more.")


def _decoded(body: bytes) -> Samples:
    try:
        return decoded(body)
    except AudioError:
        raise Refused(400, "Bad Request", "failed to process audio: corrupt or unsupported data") from None


# --- what is heard ------------------------------------------------------------------------------------------------


def _words(heard: tuple[Said, ...], query: Mapping[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    words: list[dict[str, Any]] = []
    for word, start, end in heard:
        plain = word.strip(".,?!").lower()
        entry = {"word": plain, "start": round(start, 3), "end": round(end, 3), "confidence": 0.97}
        if query.get("punctuate") == ("true",):
            entry["punctuated_word"] = word
        if query.get("language") == ("multi",):
            entry["language"] = "en"
        words.append(entry)
    return words


def _alternative(heard: tuple[Said, ...], query: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    words = _words(heard, query)
    text = " ".join(word.get("punctuated_word", word["word"]) for word in words)
    said_in = {"languages": ["en"]} if query.get("language") == ("multi",) and words else {}
    return {"transcript": text, "confidence": 0.99 if words else 0.0, "words": words, **said_in}


def recorded(audio: Samples, script: tuple[Said, ...], query: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The answer to a recording."""
    heard = heard_of(audio, script)
    channel: dict[str, Any] = {"alternatives": [_alternative(heard, query)]}
    if query.get("detect_language") == ("true",):
        channel |= {"detected_language": "en", "language_confidence": 0.98}
    results: dict[str, Any] = {"channels": [channel]}
    if query.get("utterances") == ("true",):
        results["utterances"] = [_utterance(group, query) for group in _utterances(heard)]
    return {
        "metadata": {
            "transaction_key": "deprecated",
            "request_id": UUID,
            "sha256": hashlib.sha256(audio.tobytes()).hexdigest(),
            "created": CREATED,
            "duration": len(audio) / SAMPLE_RATE,
            "channels": 1,
            "models": [UUID],
            "model_info": {UUID: _MODEL_INFO},
        },
        "results": results,
    }


def _utterances(heard: tuple[Said, ...]) -> list[tuple[Said, ...]]:
    cuts = [at for at, (one, next_one) in enumerate(pairwise(heard), 1) if next_one[1] - one[2] >= UTTERANCE_GAP_S]
    edges = [0, *cuts, len(heard)]
    return [heard[start:end] for start, end in pairwise(edges) if start < end]


def _utterance(group: tuple[Said, ...], query: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    best = _alternative(group, query)
    return {"start": group[0][1], "end": group[-1][2], "channel": 0, "id": UUID, **best}


# --- live streams -------------------------------------------------------------------------------------------------


class _Live:
    """One stream. The words of `[self._start, now)` are not final yet."""

    def __init__(self, server: DeepgramServer, socket: Socket, query: Mapping[str, tuple[str, ...]]):
        self._server = server
        self._quirks = server.quirks
        self._socket = socket
        self._query = query
        self._audio = bytearray()
        self._start = 0.0
        self._looked = 0.0
        self._final: list[Said] = []
        self._speaking = False
        self._missed = True  # whether an utterance's end was told
        (endpointing,) = query.get("endpointing", ("10",))
        self._pause_s = None if endpointing == "false" else int(endpointing) / 1000
        self._gap_s = int(query["utterance_end_ms"][0]) / 1000 if "utterance_end_ms" in query else None

    @property
    def _now(self) -> float:
        return len(self._audio) / 2 / SAMPLE_RATE

    async def run(self) -> None:
        try:
            while True:
                async with asyncio.timeout(self._quirks.idle_s):
                    messages = await self._socket.receive()
                if not messages:
                    return
                for message in messages:
                    if not await self._take(message):
                        return
        except TimeoutError:
            await self._socket.close(
                1011,
                "Deepgram did not receive audio data or a text message within the timeout window. "
                "See https://dpgr.am/net0001",
            )

    async def _take(self, message: str | bytes) -> bool:
        """False: the stream is over."""
        if isinstance(message, bytes):
            return await self._take_audio(message)
        try:
            kind = json.loads(message)["type"]
        except (ValueError, KeyError, TypeError):
            error = {"description": "Could not deserialize last text message", "message": message}
            await self._say({"type": "Error", "variant": "SchemaError", **error})
            return True
        self._server.heard[kind] += 1
        if kind in self._quirks.ignored:
            return True
        match kind:
            case "Finalize":
                if self._now - self._start > 0.02:
                    await self._settle(from_finalize=True)
            case "CloseStream":
                if self._now > self._start:
                    await self._settle(speech_final=bool(self._unsettled(self._now)))
                await self._say(self._metadata())
                await self._socket.close()
                return False
        return True

    async def _take_audio(self, data: bytes) -> bool:
        self._server.heard["audio"] += 1
        self._audio += data
        while self._looked + STEP_S <= self._now:
            self._looked += STEP_S
            if self._looked > self._quirks.most_s:
                await self._end()
                return False
            await self._look(self._looked)
        return True

    async def _look(self, now: float) -> None:
        words = self._unsettled(now)
        if words and not self._speaking:
            self._speaking = True
            if self._query.get("vad_events") == ("true",):
                await self._say({"type": "SpeechStarted", "channel": [0, 1], "timestamp": words[0][1]})
        paused = bool(words) and self._pause_s is not None and now - words[-1][2] >= self._pause_s
        if paused or now - self._start >= LONGEST_RANGE_S:
            await self._settle(now, speech_final=paused)
        elif self._query.get("interim_results") == ("true",):
            await self._say(self._results(words, now, guess=True))
        gap = self._gap_s is not None and bool(self._final) and now - self._final[-1][2] >= self._gap_s
        if gap and not self._missed and not self._unsettled(now):
            self._missed = True
            await self._say({"type": "UtteranceEnd", "channel": [0, 1], "last_word_end": self._final[-1][2]})

    def _unsettled(self, until: float) -> tuple[Said, ...]:
        """What was heard since the last final range; the last word may still be being said."""
        audio = np.frombuffer(bytes(self._audio[: 2 * round(until * SAMPLE_RATE)]), "<i2")
        after = self._final[-1][1] if self._final else -1.0
        return tuple(word for word in heard_of(audio, self._server.script) if word[1] > after)

    async def _settle(
        self, now: float | None = None, *, speech_final: bool = False, from_finalize: bool = False
    ) -> None:
        until = self._now if now is None else now
        words = self._unsettled(until)
        message = self._results(words, until) | {"is_final": True, "speech_final": speech_final}
        await self._say(message | {"from_finalize": from_finalize})
        self._final += words
        self._start = self._looked = max(until, self._start)
        self._missed = self._missed and not words
        if speech_final:
            self._speaking = False

    def _results(self, words: tuple[Said, ...], until: float, *, guess: bool = False) -> dict[str, Any]:
        """A guess mishears the word that is still being said."""
        if guess and words and words[-1][2] >= until:
            words = (*words[:-1], (words[-1][0][:1], *words[-1][1:]))
        return {
            "type": "Results",
            "channel_index": [0, 1],
            "duration": round(until - self._start, 3),
            "start": round(self._start, 3),
            "is_final": False,
            "speech_final": False,
            "from_finalize": False,
            "channel": {"alternatives": [_alternative(words, self._query)]},
            "metadata": {"request_id": UUID, "model_info": _MODEL_INFO, "model_uuid": UUID},
        }

    def _metadata(self) -> dict[str, Any]:
        return {
            "type": "Metadata",
            "transaction_key": "deprecated",
            "request_id": UUID,
            "sha256": hashlib.sha256(self._audio).hexdigest(),
            "created": CREATED,
            "duration": self._now,
            "channels": 1,
        }

    async def _say(self, message: dict[str, Any]) -> None:
        self._server.told.append(message)
        frames = [json.dumps(message)] if self._quirks.mangle is None else self._quirks.mangle(message)
        for frame in frames:
            await self._socket.send(frame)

    async def _end(self) -> None:
        match self._quirks.ending:
            case "reset":
                self._socket.reset()
            case "half-closed":
                self._socket.half_close()
                while await self._socket.receive():
                    pass
            case "silence":
                while await self._socket.receive():
                    pass
            case "not a frame":
                await self._socket.raw(b"HTTP/1.1 500 -\r\n\r\n" * 10)
                while await self._socket.receive():
                    pass
            case code:
                await self._socket.close(int(code), f"DATA-0000: {KEY}")


def _json(body: dict[str, Any], headers: Mapping[str, str], status: int = 200) -> Answer:
    return Answer(json.dumps(body).encode(), status, headers=headers)
