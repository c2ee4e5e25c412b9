"""OpenAI's and Groq's transcription APIs on loopback, to the letter of what they publish, without a recogniser: each
400 ms of audio are one word of a script. `http.py` has the faults that can be put on it.

    async with openai_server() as server:
        relay = OpenAIRelay(server.account(), QUIRKS)
        server.http.fault = FAULTS["html"]
"""

from __future__ import annotations

import io
import json
import re
import tempfile
import wave
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dispatchers.audio.decode import load
from dispatchers.backends.relay import Account
from dispatchers.errors import AudioError
from tests.providers.forms import Form, parse
from tests.providers.http import Answer, HttpServer, Request, http_server

KEY = "sk-test-0123456789abcdef"
WORD_MS = 400
SEGMENT_WORDS = 8
SCRIPT = ("The", "quick", "brown", "fox", "jumps,", "and", "the", "dog", "sleeps.")
"""Said over and over. With punctuation, which the words of `verbose_json` do not have."""

ALL_FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
SIZE_MOST = 26_214_400
SHORTEST_MS = 100
GPT_LONGEST_MS = 1_400_000
_GPT = ("json", "text")


@dataclass(frozen=True)
class Flavour:
    """How a provider differs. `formats` by model; `english`: what it calls that language; `text_duration`: it gives the
    duration as a string."""

    root: str = "/v1"
    formats: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    translates: frozenset[str] = frozenset()
    streams: frozenset[str] = frozenset()
    prompt_chars: int | None = None
    english: str = "english"
    words: bool = True
    groq: bool = False
    text_duration: bool = False


OPENAI = Flavour(
    formats={
        "whisper-1": ALL_FORMATS,
        "gpt-4o-transcribe": _GPT,
        "gpt-4o-mini-transcribe": _GPT,
        "gpt-transcribe": _GPT,
    },
    translates=frozenset({"whisper-1"}),
    streams=frozenset({"gpt-4o-transcribe", "gpt-4o-mini-transcribe", "gpt-transcribe"}),
)
GROQ = Flavour(
    root="/openai/v1",
    formats=dict.fromkeys(("whisper-large-v3-turbo", "whisper-large-v3"), ("json", "text", "verbose_json")),
    translates=frozenset({"whisper-large-v3"}),
    prompt_chars=896,
    english="English",
    groq=True,
)
VLLM = Flavour(
    formats={"openai/whisper-small": ("json", "text", "verbose_json")},
    translates=frozenset({"openai/whisper-small"}),
    english="en",
    words=False,
    text_duration=True,
)


@dataclass
class OpenAIServer:
    """A provider that listens. `asked` are the forms that came, in order."""

    flavour: Flavour
    key: str
    script: tuple[str, ...]
    asked: list[Form] = field(default_factory=list)
    http: HttpServer = field(init=False)

    @property
    def base_url(self) -> str:
        return self.http.url + self.flavour.root

    def account(self, *, backend: str = "openai", key: str | None = None, models: tuple[str, ...] = ()) -> Account:
        """An account there."""
        given = key or self.key
        return Account(backend, self.base_url, given, given[:7], models or tuple(self.flavour.formats))

    def respond(self, request: Request) -> Answer:
        """The answer to any request."""
        try:
            answer = self._respond(request)
        except Refused as refused:
            answer = refused.answer(groq=self.flavour.groq)
        return replace(answer, headers={**answer.headers, **self._headers()})

    def _respond(self, request: Request) -> Answer:
        if request.headers.get("authorization") != f"Bearer {self.key}":
            raise Refused(401, f"Incorrect API key provided: {self.key[:7]}***.", code="invalid_api_key")
        route = (request.method, request.path.removeprefix(self.flavour.root))
        if not request.path.startswith(self.flavour.root):
            raise Refused(404, f"Unknown request URL: {request.method} {request.path}.", code="unknown_url")
        if route == ("GET", "/models"):
            return _json({"object": "list", "data": [_model(name) for name in self.flavour.formats]})
        if route not in (("POST", "/audio/transcriptions"), ("POST", "/audio/translations")):
            raise Refused(404, f"Unknown request URL: {request.method} {request.path}.", code="unknown_url")
        if len(request.body) > SIZE_MOST:
            raise _too_large(len(request.body), groq=self.flavour.groq)
        form = parse(request)
        self.asked.append(form)
        return self._transcribed(form, translate=route[1].endswith("translations"))

    def _transcribed(self, form: Form, *, translate: bool) -> Answer:
        model, fmt = form.one("model"), form.one("response_format", "json")
        self._check(form, model, fmt, translate=translate)
        assert form.file is not None
        ms = _duration_ms(form.file)
        if ms < SHORTEST_MS:
            raise Refused(
                400, "Audio file is too short. Minimum audio length is 0.1 seconds.", "file", "audio_too_short"
            )
        if model.startswith("gpt-") and ms > GPT_LONGEST_MS:
            raise Refused(400, f"audio duration {ms / 1000} seconds is longer than 1400 seconds", code="invalid_value")
        said = [self.script[number % len(self.script)] for number in range(ms // WORD_MS)]
        if form.one("stream") == "true" and model in self.flavour.streams:
            return _events(said, model)
        return _bodies(said, ms, model, form, self.flavour, translate=translate)[fmt]

    def _check(self, form: Form, model: str, fmt: str, *, translate: bool) -> None:
        flavour = self.flavour
        if form.file is None:
            raise Refused(400, "'file' is a required property", "file")
        if model not in flavour.formats:
            raise Refused(404, f"The model `{model}` does not exist.", "model", "model_not_found")
        if fmt not in flavour.formats[model]:
            message = f"response_format '{fmt}' is not compatible with model '{model}'. Use 'json' or 'text' instead."
            raise Refused(400, message, "response_format", "unsupported_value")
        if translate and model not in flavour.translates:
            raise Refused(400, f"model `{model}` does not support translation", "model")
        if (asked := form.fields.get("timestamp_granularities[]")) and fmt != "verbose_json":
            raise Refused(400, "timestamp_granularities needs response_format verbose_json", "timestamp_granularities")
        if asked and not flavour.words and "word" in asked:
            raise Refused(400, "word timestamps are not supported", "timestamp_granularities")
        self._check_hints(form, translate=translate)

    def _check_hints(self, form: Form, *, translate: bool) -> None:
        flavour, prompt = self.flavour, form.one("prompt")
        if flavour.prompt_chars and len(prompt) > flavour.prompt_chars:
            raise Refused(
                400,
                f"prompt length must be {flavour.prompt_chars} characters or fewer, "
                f"but provided prompt contains {len(prompt)} characters",
            )
        if language := form.one("language"):
            if translate:
                raise Refused(400, "Unrecognized request argument supplied: language", "language")
            if not re.fullmatch("[a-z]{2}", language):
                raise Refused(400, f"Invalid language '{language}'. Language parameter must be in ISO-639-1 format.")

    def _headers(self) -> dict[str, str]:
        number = len(self.http.requests)
        if self.flavour.groq:
            return {"x-ratelimit-limit-requests": "14400", "x-ratelimit-remaining-requests": str(14400 - number)}
        return {"x-request-id": f"req_{number}", "openai-version": "2020-10-01"}


@asynccontextmanager
async def openai_server(
    flavour: Flavour = OPENAI, *, key: str = KEY, script: tuple[str, ...] = SCRIPT
) -> AsyncIterator[OpenAIServer]:
    """A provider of its own, in this event loop."""
    server = OpenAIServer(flavour, key, script)
    async with http_server(server.respond) as server.http:
        yield server


class Refused(Exception):
    """The provider refuses."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def answer(self, *, groq: bool) -> Answer:
        kind = "server_error" if self.status in (413, 500) and not groq else "invalid_request_error"
        error: dict[str, Any] = {"message": self.message, "type": kind}
        if groq:
            error |= {"code": self.code} if self.code else {}
        else:
            error |= {"param": self.param, "code": self.code}
        return _json({"error": error}, self.status)


def _duration_ms(audio: bytes) -> int:
    if audio[:4] == b"RIFF":
        with wave.open(io.BytesIO(audio)) as file:
            frames, rate = file.getnframes(), file.getframerate()
            return frames * 1000 // rate
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(audio)
        try:
            return len(load(Path(file.name))) // 16
        except AudioError:
            raise Refused(400, "Audio file might be corrupted or unsupported", "file", "invalid_value") from None


# --- answers ------------------------------------------------------------------------------------------------------


def _bodies(
    said: list[str], ms: int, model: str, form: Form, flavour: Flavour, *, translate: bool
) -> Mapping[str, Answer]:
    text = " ".join(said)
    usage: dict[str, Any] = {"type": "duration", "seconds": -(-ms // 1000)}
    if model.startswith("gpt-"):
        usage = _tokens(said)
    tail: dict[str, Any] = {"x_groq": {"id": "req_01"}} if flavour.groq else {"usage": usage}
    languages = {"languages": [{"code": "en"}]} if model == "gpt-transcribe" else {}
    verbose: dict[str, Any] = {
        "task": "translate" if translate else "transcribe",
        "language": flavour.english,
        "duration": str(ms / 1000) if flavour.text_duration else ms / 1000,
        "text": text if flavour.groq else f" {text}",
    }
    asked = form.fields.get("timestamp_granularities[]", ("segment",))
    if "segment" in asked:
        verbose["segments"] = _segments(said)
    if "word" in asked:
        verbose["words"] = _words(said)
    return {
        "json": _json({"text": text} | languages | tail),
        "verbose_json": _json(verbose | tail),
        "text": Answer(f"{text}\n".encode(), media_type="text/plain; charset=utf-8"),
        "srt": Answer("".join(_lines(said, ",", numbered=True)).encode(), media_type="text/plain; charset=utf-8"),
        "vtt": Answer("".join(["WEBVTT\n\n", *_lines(said, ".")]).encode(), media_type="text/vtt; charset=utf-8"),
    }


def _segments(said: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "seek": 0,
            "start": at / 1000,
            "end": end / 1000,
            "text": f" {line}",
            "tokens": [50364, 2425],
            "temperature": 0.0,
            "avg_logprob": -0.21,
            "compression_ratio": 0.9,
            "no_speech_prob": 0.01,
        }
        for number, (at, end, line) in enumerate(_cues(said))
    ]


def _words(said: list[str]) -> list[dict[str, Any]]:
    return [
        {"word": word.strip(",."), "start": at * WORD_MS / 1000, "end": (at + 1) * WORD_MS / 1000}
        for at, word in enumerate(said)
    ]


def _lines(said: list[str], point: str, *, numbered: bool = False) -> Iterator[str]:
    for number, (at, end, line) in enumerate(_cues(said), start=1):
        yield f"{number}\n" if numbered else ""
        yield f"{_clock(at, point)} --> {_clock(end, point)}\n{line}\n\n"


def _cues(said: list[str]) -> list[tuple[int, int, str]]:
    groups = [(at, said[at : at + SEGMENT_WORDS]) for at in range(0, len(said), SEGMENT_WORDS)]
    return [(at * WORD_MS, (at + len(group)) * WORD_MS, " ".join(group)) for at, group in groups]


def _events(said: list[str], model: str) -> Answer:
    """Deltas are tokens: a word with the space before it."""
    deltas = [word if at == 0 else f" {word}" for at, word in enumerate(said)]
    done: dict[str, Any] = {"type": "transcript.text.done", "text": "".join(deltas), "usage": _tokens(said)}
    if model == "gpt-transcribe":
        done["languages"] = [{"code": "en"}]
    events = [{"type": "transcript.text.delta", "delta": delta} for delta in deltas] + [done]
    pieces = tuple(f"data: {json.dumps(event)}\n\n".encode() for event in events)
    return Answer(pieces=(*pieces, b"data: [DONE]\n\n"), media_type="text/event-stream; charset=utf-8")


def _tokens(said: list[str]) -> dict[str, Any]:
    details = {"audio_tokens": 14, "text_tokens": 0}
    count = {"input_tokens": 14, "output_tokens": len(said), "total_tokens": 14 + len(said)}
    return {"type": "tokens", **count, "input_token_details": details}


def _too_large(size: int, *, groq: bool) -> Refused:
    if groq:
        return Refused(413, "Request Entity Too Large", code="request_too_large")
    return Refused(413, f"Maximum content size limit ({SIZE_MOST}) exceeded ({size} bytes read)")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1677532384, "owned_by": "openai-internal"}


def _json(body: dict[str, Any], status: int = 200) -> Answer:
    return Answer(json.dumps(body).encode(), status)


def _clock(ms: int, point: str) -> str:
    seconds, ms = divmod(ms, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{ms:03}"
