"""Recordings to OpenAI, Groq, and whatever else speaks OpenAI's transcription API: vLLM, speaches, our own engine.

How one differs from another is data (`Quirks`; `dispatchers.providers` has them), not code.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import httpx

from dispatchers.audio.encode import MEDIA_TYPES, Form, encoder
from dispatchers.backends import openai_wire as wire
from dispatchers.backends.relay import CONNECT_S, Account, client, pieces, refusal, understood, whole
from dispatchers.deltas import Deltas
from dispatchers.errors import AudioTooLong, UnknownModel, UnsupportedOption
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

MIB = 1024 * 1024
FLAC_FROM_BYTES = MIB
"""A recording above this is packed before it is sent: half the bytes of speech, for 20 ms of a core a minute."""
_AT_ONCE = 256 * 1024
"""An answer above this is read in a thread."""
_ROOM = 64
"""One part in so many of a request is left for what is beside the samples: a form, a recording that does not pack."""
_BYTES_PER_MS = 32


@dataclass(frozen=True, slots=True)
class Model:
    """What a model can do beyond text. `times`: it has segments and their times (`verbose_json`); `events`: it tells
    its text as it finds it; `keywords`: it takes words to listen for in a field of their own."""

    times: bool = True
    words: bool = True
    translate: bool = False
    events: bool = False
    keywords: bool = False
    longest_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Quirks:
    """How a provider differs from others of the same API. `models` by name; one that is not among them is as `other`.
    `most_bytes` of a whole request; of a prompt the last `prompt_chars` are sent. A recording shorter than
    `least_billed_ms` costs as much. `languages` by code, None: any."""

    provider: str
    models: Mapping[str, Model] = field(default_factory=dict)
    other: Model = Model()
    most_bytes: int = 25 * MIB
    prompt_chars: int = 4_000
    least_billed_ms: int = 0
    languages: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a provider may take: to be reached, to be silent, and for all of an answer. Recognition itself is
    silent."""

    connect_s: float = CONNECT_S
    silent_s: float = 120.0
    whole_s: float = 300.0


class OpenAIRelay:
    """A batch dispatcher over a provider with OpenAI's API. Use from one event loop."""

    def __init__(self, account: Account, quirks: Quirks, patience: Patience = Patience()) -> None:
        self._account = account
        self._quirks = quirks
        self._whole_s = patience.whole_s
        headers = {"authorization": f"Bearer {account.key}"}
        self._http = client(account, headers, read_s=patience.silent_s, connect_s=patience.connect_s)

    @property
    def capabilities(self) -> Capabilities:
        """What the default model can do; another's limits are told when it is asked for."""
        default = self._model(self._account.models[0])
        return Capabilities(
            words=default.words,
            translate=default.translate,
            prompt=True,
            longest_ms=self._longest_ms(default),
            least_billed_ms=self._quirks.least_billed_ms,
            languages=self._quirks.languages,
            models=self._account.models,
        )

    def origin(self, model: str) -> Origin:
        """See `Dispatcher.origin`. Raises `UnknownModel`."""
        if model and model not in self._account.models:
            raise UnknownModel(param="model")
        return Origin(self._account.backend, self._quirks.provider, model or self._account.models[0])

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        """See `Dispatcher.transcribe`. A model without times gives one segment, as long as the recording. Raises
        `UnknownModel`, `UnsupportedOption`, `AudioTooLong`, `BackendError`."""
        origin = self.origin(options.model)
        model = self._model(origin.model)
        duration_ms = to_ms(len(audio))
        self._check(model, options, duration_ms)
        events = model.events and heard is not ignore
        fields = self._fields(origin.model, model, options, events=events)
        said = await self._asked(options.task, fields, audio, heard, duration_ms)
        if options.words and said.segments and not said.has_words:
            raise UnsupportedOption(f"{self._account.backend} has no times of words.", param="timestamp_granularities")
        english = "en" if options.task == "translate" else None
        return Transcript(
            text=_joined(said.segments),
            language=english or said.language or options.language or wire.UNKNOWN_LANGUAGE,
            duration_ms=duration_ms,
            segments=said.segments,
            origin=origin,
            task=options.task,
        )

    def stream(
        self, audio: AsyncIterator[StreamInput], options: Options
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Not possible: raises `UnsupportedOption`. The segmenting adapter makes streams of this backend."""
        raise UnsupportedOption(f"{self._account.backend} takes whole recordings only.")

    async def probe(self) -> None:
        """Asks for the list of models, which costs nothing. What is said of the key there is not believed: it may do
        one thing and not another. Raises a `BackendError` where the provider is not well."""
        async with understood(self._account), self._http.stream("GET", "models") as answer:
            if answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
                raise refusal(self._account, answer.status_code, answer.headers)

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    def _model(self, name: str) -> Model:
        return self._quirks.models.get(name, self._quirks.other)

    def _longest_ms(self, model: Model) -> int:
        """As WAV: how small a recording packs is not known beforehand."""
        most = self._quirks.most_bytes
        sendable_ms = (most - most // _ROOM) // _BYTES_PER_MS
        return min(sendable_ms, model.longest_ms or sendable_ms)

    def _check(self, model: Model, options: Options, duration_ms: int) -> None:
        backend = self._account.backend
        if options.task == "translate" and not model.translate:
            raise UnsupportedOption(f"This model of {backend} does not translate.", param="task")
        if options.words and (not model.words or options.task == "translate"):
            raise UnsupportedOption(f"{backend} has no times of words here.", param="timestamp_granularities")
        languages = self._quirks.languages
        if options.language is not None and languages is not None and options.language not in languages:
            raise UnsupportedOption(f"{backend} does not know this language.", param="language")
        if duration_ms > (longest_ms := self._longest_ms(model)):
            raise AudioTooLong(f"{backend} takes {longest_ms // 60_000} minutes at once.", param="file")

    def _fields(self, name: str, model: Model, options: Options, *, events: bool) -> wire.Fields:
        fields = [("model", name), ("response_format", "verbose_json" if model.times else "json")]
        if options.language is not None and options.task == "transcribe":
            fields.append(("language", options.language))
        hint = [options.prompt or "", "" if model.keywords else ", ".join(options.hotwords)]
        if prompt := " ".join(filter(None, hint))[-self._quirks.prompt_chars :].strip():
            fields.append(("prompt", prompt))
        if model.keywords:
            fields += [("keywords[]", word) for word in options.hotwords]
        if options.temperature is not None:
            fields.append(("temperature", str(options.temperature)))
        if model.times and options.task == "transcribe":
            granularities = ("word", "segment") if options.words else ("segment",)
            fields += [("timestamp_granularities[]", name) for name in granularities]
        return [*fields, ("stream", "true")] if events else fields

    async def _asked(self, task: str, fields: wire.Fields, audio: Samples, heard: Heard, duration_ms: int) -> wire.Said:
        path = "audio/translations" if task == "translate" else "audio/transcriptions"
        async with understood(self._account, self._whole_s):
            form: Form = "flac" if audio.nbytes > FLAC_FROM_BYTES else "wav"
            packed = await asyncio.to_thread(_packed, audio, form) if form == "flac" else _packed(audio, form)
            body, media_type = wire.form(fields, packed, f"audio.{form}", MEDIA_TYPES[form])
            headers = {"content-type": media_type}
            async with self._http.stream("POST", path, content=body, headers=headers) as answer:
                if answer.headers.get("content-type", "").startswith("text/event-stream"):
                    return await self._as_it_comes(answer, heard, duration_ms)
                content = await whole(self._account, answer)
        said = await self._read(content, duration_ms)
        for segment in said.segments:
            heard(segment)
        return said

    async def _as_it_comes(self, answer: httpx.Response, heard: Heard, duration_ms: int) -> wire.Said:
        lines = wire.split(pieces(self._account, answer))
        async for item in wire.heard(self._account, lines, duration_ms):
            if isinstance(item, Segment):
                heard(item)
            else:
                said = item
        return said

    async def _read(self, content: bytes, duration_ms: int) -> wire.Said:
        if len(content) > _AT_ONCE:
            return await asyncio.to_thread(wire.read, self._account, content, duration_ms)
        return wire.read(self._account, content, duration_ms)


def _packed(audio: Samples, form: Form) -> bytes:
    packing = encoder(form, len(audio))
    return packing.feed(audio) + packing.end()


def _joined(segments: tuple[Segment, ...]) -> str:
    deltas = Deltas()
    return "".join(deltas.add(segment.text) for segment in segments)
