"""AssemblyAI's `/v2` and `/v3/ws` on loopback, to the letter of what it publishes, without a recogniser: the words of a
script are heard where they stand, if there is any sound there.

    async with assemblyai_server(said("Hello there. How are you?")) as server:
        relay = AssemblyAIRelay(server.account())
        server.http.fault = FAULTS["html"]      # of recordings and handshakes
        server.quirks = Quirks(ignored=frozenset({"ForceEndpoint"}))     # of live streams
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from dispatchers.backends.relay import Account
from dispatchers.errors import AudioError
from dispatchers.interface import SAMPLE_RATE, Samples
from tests.providers.http import Answer, HttpServer, Request, http_server
from tests.providers.script import Said, decoded, heard_of, said
from tests.providers.websocket import Socket

KEY = "aai-test-0123456789abcdef"
MODELS = ("universal-3-pro", "universal-2")
LIVE_MODELS = ("u3-rt-pro", "universal-streaming-english", "universal-streaming-multilingual", "whisper-rt")
SIX = ("en", "es", "de", "fr", "it", "pt")

STEP_S = 0.25
"""How often a stream is looked at, on its own clock."""
FIRM_S = 0.3
"""How long after it was said a word will not change."""
AHEAD_S = 310.0
"""How much more audio than time it bears."""

Mangled: TypeAlias = Callable[[dict[str, Any]], list[str | bytes]]


@dataclass(frozen=True)
class Quirks:
    """What is wrong with live streams. `ignored`: kinds of messages that nothing happens upon. `mangle` gives what is
    sent in place of a message. After `most_s` of audio comes the `ending`: an error's code, of which a message tells
    before the close; `close CODE`, without one; or worse."""

    ignored: frozenset[str] = frozenset()
    mangle: Mangled | None = None
    most_s: float = float("inf")
    ending: str = "3005"
    ahead_s: float = AHEAD_S
    idle_s: float | None = None


@dataclass
class Transcript:
    """One that was asked for. `looks` are left until it is there."""

    id: str
    asked: dict[str, Any]
    audio: Samples | None
    looks: int
    deleted: bool = False


@dataclass
class AssemblyAIServer:
    """A provider that listens. `transcripts` are those asked for; each is there after `looks`. `queries` are those of
    live streams, `heard` their messages by kind, `frames` the audio of each in ms, `streams` those that were open once,
    `told` what was said on them."""

    script: tuple[Said, ...]
    key: str
    looks: int = 1
    quirks: Quirks = field(default_factory=Quirks)
    uploads: list[Samples | None] = field(default_factory=list)
    transcripts: dict[str, Transcript] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    queries: list[dict[str, str]] = field(default_factory=list)
    heard: Counter[str] = field(default_factory=Counter)
    frames: list[float] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)
    streams: int = 0
    open: int = 0
    closed_with: list[int | None] = field(default_factory=list)
    http: HttpServer = field(init=False)

    def account(
        self, *, backend: str = "assemblyai", key: str | None = None, models: tuple[str, ...] = MODELS
    ) -> Account:
        """An account there."""
        given = key or self.key
        return Account(backend, self.http.url, given, given[:7], models)

    @property
    def kept(self) -> list[Transcript]:
        """Those that nobody has deleted."""
        return [transcript for transcript in self.transcripts.values() if not transcript.deleted]

    def respond(self, request: Request) -> Answer:
        """The answer to a request, or to a handshake that fails."""
        try:
            self._authorised(request)
            return _json(self._answer(request))
        except Refused as refused:
            return refused.answer()

    async def upgrade(
        self, request: Request, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """A live stream, to its end; or the refusal of one. What is wrong with its parameters is told on it."""
        try:
            self._authorised(request, live=True)
        except Refused as refused:
            answer = refused.answer()
            head_ = f"HTTP/1.1 {answer.status} -\r\nContent-Length: {len(answer.body)}\r\n\r\n"
            writer.write(head_.encode() + answer.body)
            await writer.drain()
            return
        socket = await Socket.accepted(head, {}, reader, writer)
        self.streams, self.open = self.streams + 1, self.open + 1
        query = dict(request.query)
        self.queries.append(query)
        try:
            await _Live(self, socket, query).run()
        finally:
            self.open -= 1
            self.closed_with.append(None if socket.closed is None else socket.closed.code)

    def _authorised(self, request: Request, *, live: bool = False) -> None:
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        token = dict(request.query).get("token", key)
        if key != self.key and not (live and self.tokens.pop(token, None)):
            raise Refused(401, f"Authentication error, API token missing/invalid: {key}")
        if live and request.path != "/v3/ws":
            raise Refused(404, "Not found")

    def _answer(self, request: Request) -> dict[str, Any]:
        match request.method, request.path.strip("/").split("/"):
            case "POST", ["v2", "upload"]:
                return self._uploaded(request.body)
            case "POST", ["v2", "transcript"]:
                return self._asked(request.body)
            case "GET", ["v2", "transcript", known] if known in self.transcripts:
                return self._looked_at(self.transcripts[known])
            case "DELETE", ["v2", "transcript", known] if known in self.transcripts:
                return self._deleted(self.transcripts[known])
            case "GET", ["v3", "token"]:
                seconds = int(dict(request.query)["expires_in_seconds"])
                self.tokens[token := f"token-{len(self.tokens)}"] = seconds
                return {"token": token, "expires_in_seconds": seconds}
        raise Refused(404, f"Transcript lookup error, transcript id not found: {request.path}")

    def _uploaded(self, body: bytes) -> dict[str, Any]:
        try:
            self.uploads.append(decoded(body))
        except AudioError:
            self.uploads.append(None)  # it looks at files when it transcribes them
        return {"upload_url": f"https://cdn.example/upload/{len(self.uploads) - 1}"}

    def _asked(self, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        _check_recorded(asked)
        place = re.fullmatch(r"https://cdn\.example/upload/(\d+)", asked["audio_url"])
        if place is None or int(place[1]) >= len(self.uploads):
            raise Refused(400, "audio_url should start with http")
        job = Transcript(f"t-{len(self.transcripts)}", asked, self.uploads[int(place[1])], self.looks)
        self.transcripts[job.id] = job
        return _transcript(job, "queued")

    def _looked_at(self, job: Transcript) -> dict[str, Any]:
        if job.deleted:
            return _transcript(job, "completed", text="Deleted by user.", words=[])
        job.looks -= 1
        return recorded(job, self.script) if job.looks <= 0 else _transcript(job, "processing")

    def _deleted(self, job: Transcript) -> dict[str, Any]:
        if job.looks > 0:
            raise Refused(400, "Cannot delete a transcript that is being processed")
        job.deleted = True
        return _transcript(job, "completed", audio_url="http://deleted_by_user", text="Deleted by user.", words=[])


@asynccontextmanager
async def assemblyai_server(
    script: tuple[Said, ...] = said(), *, key: str = KEY, looks: int = 1
) -> AsyncIterator[AssemblyAIServer]:
    """A provider of its own, in this event loop."""
    server = AssemblyAIServer(script, key, looks)
    async with http_server(server.respond, server.upgrade) as server.http:
        yield server


class Refused(Exception):
    """The provider refuses."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message

    def answer(self) -> Answer:
        return _json({"error": self.message}, self.status)


def _json(body: dict[str, Any], status: int = 200) -> Answer:
    return Answer(json.dumps(body).encode(), status)


# --- recordings ---------------------------------------------------------------------------------------------------

_KNOWN = {
    "audio_url",
    "speech_models",
    "language_code",
    "language_detection",
    "keyterms_prompt",
    "prompt",
    "temperature",
}


def _check_recorded(asked: Mapping[str, Any]) -> None:
    """What the service would not take, or would quietly pass over, is an error here."""
    if unknown := set(asked) - _KNOWN:
        raise Refused(400, f"Invalid endpoint schema: {unknown}")
    models = asked.get("speech_models")
    if not models or not set(models) <= set(MODELS):
        raise Refused(400, f'"speech_models" must be a non-empty list containing one or more of: {MODELS}')
    if ("language_code" in asked) == (asked.get("language_detection") is True):
        raise Refused(400, "Either language_code or language_detection.")
    if models[0] == "universal-3-pro" and asked.get("language_code", "en") not in SIX:
        raise Refused(400, "The following models are not available in this language: universal-3-pro")
    if models[0] == "universal-2" and {"prompt", "temperature"} & set(asked):
        raise Refused(400, "prompt and temperature are for universal-3-pro")
    if "prompt" in asked and "keyterms_prompt" in asked:
        raise Refused(400, "prompt and keyterms_prompt cannot be used in the same request")
    if len(asked.get("keyterms_prompt", ())) > (1000 if models[0] == "universal-3-pro" else 200):
        raise Refused(400, "Too many keyterms")


def _transcript(job: Transcript, status: str, **members: Any) -> dict[str, Any]:
    return {
        "id": job.id,
        "status": status,
        "audio_url": job.asked["audio_url"],
        "language_code": job.asked.get("language_code"),
        "text": None,
        "words": None,
        "utterances": None,
        "confidence": None,
        "audio_duration": None,
        "speech_model": None,
        "webhook_auth": False,
        "webhook_status_code": None,
        "error": None,
        **members,
    }


def recorded(job: Transcript, script: tuple[Said, ...]) -> dict[str, Any]:
    """The answer when it is there."""
    if job.audio is None:
        return _transcript(job, "error", error="Transcoding failed. File does not appear to contain audio.")
    heard = heard_of(job.audio, script)
    if not heard and job.asked.get("language_detection"):
        error = "language_detection cannot be performed on files with no spoken audio."
        return _transcript(job, "error", error=error)
    return _transcript(
        job,
        "completed",
        text=" ".join(word for word, *_ in heard),
        words=[_word(*word) | {"speaker": None, "channel": None} for word in heard],
        confidence=0.97,
        audio_duration=len(job.audio) // SAMPLE_RATE,
        language_code=job.asked.get("language_code", "en_us"),
        speech_model_used=job.asked["speech_models"][0],
    )


def _word(text: str, start: float, end: float) -> dict[str, Any]:
    return {"text": text, "start": round(start * 1000), "end": round(end * 1000), "confidence": 0.97}


# --- live streams -------------------------------------------------------------------------------------------------

_PARAMETERS = {
    *("speech_model", "encoding", "sample_rate", "min_turn_silence", "max_turn_silence", "inactivity_timeout"),
    *("format_turns", "language_detection", "language_codes", "keyterms_prompt", "prompt", "token"),
}


class _Wrong(Exception):
    """Told on the stream, which is then closed."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


class _Live:
    """One stream. The words since `self._from` are of the current turn."""

    def __init__(self, server: AssemblyAIServer, socket: Socket, query: dict[str, str]):
        self._server = server
        self._quirks = server.quirks
        self._socket = socket
        self._query = query
        self._audio = bytearray()
        self._looked = 0.0
        self._from = 0.0
        self._turn = 0
        self._shown: list[Any] = []
        self._opened = time.monotonic()

    @property
    def _now(self) -> float:
        return len(self._audio) / 2 / SAMPLE_RATE

    async def run(self) -> None:
        try:
            _check_live(self._query)
            self._classic = self._query["speech_model"].startswith("universal-streaming")
            self._format = self._classic and self._query.get("format_turns", "").lower() == "true"
            self._silence_s = int(self._query.get("max_turn_silence", 1280)) / 1000
            configuration = {"model": self._query["speech_model"]}
            begin = {"id": "3e0b6a4c-52c4-4f3f-bb43-0a5e3f1d2a91", "expires_at": 1_760_000_000}
            await self._say({"type": "Begin", **begin, "configuration": configuration})
            await self._converse()
        except _Wrong as wrong:
            await self._fail(wrong.code, str(wrong))

    async def _converse(self) -> None:
        idle_s = self._quirks.idle_s or float(self._query.get("inactivity_timeout", 3600))
        while True:
            try:
                async with asyncio.timeout(idle_s):
                    messages = await self._socket.receive()
            except TimeoutError:
                raise _Wrong(3008, "Session Expired: no activity") from None
            if not messages:
                return
            for message in messages:
                if not await self._take(message):
                    return

    async def _take(self, message: str | bytes) -> bool:
        """False: the stream is over."""
        if isinstance(message, bytes):
            return await self._take_audio(message)
        try:
            kind = json.loads(message)["type"]
        except (ValueError, KeyError, TypeError):
            raise _Wrong(3006, "Invalid Message") from None
        self._server.heard[kind] += 1
        if kind in self._quirks.ignored:
            return True
        match kind:
            case "ForceEndpoint":
                if self._words(self._now):
                    await self._end_turn(self._now)
            case "KeepAlive" | "UpdateConfiguration":
                pass
            case "Terminate":
                if self._words(self._now):
                    await self._end_turn(self._now)
                lasted = round(time.monotonic() - self._opened)
                told = {"audio_duration_seconds": int(self._now), "session_duration_seconds": lasted}
                await self._say({"type": "Termination", **told})
                await self._socket.close()
                return False
            case _:
                raise _Wrong(3006, "Invalid Message Type")
        return True

    async def _take_audio(self, data: bytes) -> bool:
        self._server.heard["audio"] += 1
        ms = len(data) / 2 / SAMPLE_RATE * 1000
        self._server.frames.append(ms)
        if not 50 <= ms <= 1000:
            raise _Wrong(3007, f"Input Duration Error: {ms} ms. Expected between 50 and 1000 ms")
        self._audio += data
        lasted = time.monotonic() - self._opened
        if self._now - lasted > self._quirks.ahead_s:
            message = f"Audio Transmission Rate Exceeded: Received {self._now} sec. audio in {lasted} sec"
            raise _Wrong(3007, message)
        while self._looked + STEP_S <= self._now:
            self._looked += STEP_S
            if self._looked > self._quirks.most_s:
                await self._break()
                return False
            await self._look(self._looked)
        return True

    async def _look(self, now: float) -> None:
        words = self._words(now)
        if not words:
            return
        if now - words[-1][2] >= self._silence_s:
            await self._end_turn(now)
            return
        told = [self._told(word, now) for word in words]
        if told != self._shown:
            if not self._shown and not self._classic:
                await self._say({"type": "SpeechStarted", "timestamp": told[0]["start"]})
            self._shown = told
            await self._say(self._turn_of(told))

    def _words(self, until: float) -> tuple[Said, ...]:
        """Of the current turn."""
        audio = np.frombuffer(bytes(self._audio[: 2 * round(until * SAMPLE_RATE)]), "<i2")
        return tuple(word for word in heard_of(audio, self._server.script) if word[1] >= self._from)

    def _told(self, word: Said, now: float) -> dict[str, Any]:
        """A word that is still being said is misheard."""
        text, start, end = word
        firm = now - end >= FIRM_S
        text = text if end < now else text[:1]
        return _word(_plain(text) if self._classic else text, start, end) | {"word_is_final": firm}

    def _turn_of(self, told: list[dict[str, Any]], **members: Any) -> dict[str, Any]:
        transcript = " ".join(word["text"] for word in told if word["word_is_final"])
        detected = self._query.get("language_detection", "").lower() == "true"
        return {
            "type": "Turn",
            "turn_order": self._turn,
            "turn_is_formatted": False,
            "end_of_turn": False,
            "transcript": transcript,
            "utterance": "",
            "end_of_turn_confidence": 0.01,
            "words": told,
            **({"language_code": "en", "language_confidence": 0.99} if detected else {}),
            **members,
        }

    async def _end_turn(self, now: float) -> None:
        words = self._words(now)
        plain = [_word(_plain(text), start, end) | {"word_is_final": True} for text, start, end in words]
        written = [_word(*word) | {"word_is_final": True} for word in words]
        ended = {"end_of_turn": True, "end_of_turn_confidence": 0.9}
        if self._classic:
            await self._say(self._turn_of(plain, **ended, utterance=" ".join(word["text"] for word in plain)))
        if self._format or not self._classic:
            await self._say(self._turn_of(written, **ended, turn_is_formatted=True))
        self._turn += 1
        self._from = words[-1][1] + 0.001
        self._shown = []

    async def _say(self, message: dict[str, Any]) -> None:
        self._server.told.append(message)
        frames = [json.dumps(message)] if self._quirks.mangle is None else self._quirks.mangle(message)
        for frame in frames:
            await self._socket.send(frame)

    async def _fail(self, code: int, message: str) -> None:
        await self._say({"type": "Error", "error_code": code, "error": message})
        await self._socket.close(code, message[:100])

    async def _break(self) -> None:
        match self._quirks.ending.split():
            case ["reset"]:
                self._socket.reset()
            case ["half-closed"]:
                self._socket.half_close()
                while await self._socket.receive():
                    pass
            case ["silence"]:
                while await self._socket.receive():
                    pass
            case ["not", *_]:
                await self._socket.raw(b"HTTP/1.1 500 -\r\n\r\n" * 10)
                while await self._socket.receive():
                    pass
            case ["close", code]:
                await self._socket.close(int(code), f"the-secret {KEY}")
            case [code]:
                await self._fail(int(code), f"the-secret {KEY}")


def _plain(text: str) -> str:
    return text.strip(".,?!").lower()


def _check_live(query: Mapping[str, str]) -> None:
    if unknown := set(query) - _PARAMETERS:
        raise _Wrong(3006, f"Unknown parameter: {unknown}")
    model = query.get("speech_model")
    if model not in LIVE_MODELS:
        raise _Wrong(3006, f"Invalid speech_model: {model}")
    _check_forms(query)
    if query.get("encoding", "pcm_s16le") != "pcm_s16le" or query.get("sample_rate") != str(SAMPLE_RATE):
        raise _Wrong(3006, "encoding and sample_rate")
    if model == "universal-streaming-english" and {"language_codes", "language_detection"} & set(query):
        raise _Wrong(3006, "This model knows English only")
    if "prompt" in query and ("keyterms_prompt" in query or model != "u3-rt-pro"):
        raise _Wrong(3006, "prompt cannot be used here")


def _check_forms(query: Mapping[str, str]) -> None:
    for name in ("format_turns", "language_detection"):
        if query.get(name, "true").lower() not in ("true", "false"):
            raise _Wrong(3006, f"{name} must be a boolean")
    for name in ("min_turn_silence", "max_turn_silence", "inactivity_timeout"):
        if not query.get(name, "0").isdigit():
            raise _Wrong(3006, f"{name} must be an integer")
    for name, most in (("keyterms_prompt", 100), ("language_codes", 10)):
        listed = json.loads(query.get(name, "[]"))
        if not isinstance(listed, list) or len(listed) > most or not all(isinstance(each, str) for each in listed):
            raise _Wrong(3006, f"{name} must be a list of at most {most}")
