"""What opens a `/v1/stream`: the fields of its `start` frame or of its query string, within their bounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator
from starlette.datastructures import QueryParams

from dispatchers.audio.live import Encoding, Wire
from dispatchers.audio.resample import RATES_HZ
from dispatchers.interface import Options
from dispatchers.languages import NAMES
from gateway.live.codec import Resume, Setup
from policy.endpointing import WIDEST
from policy.errors import Invalid
from policy.resolve import Demand, Preference

_NO_NUL = r"^[^\x00]*$"  # which Postgres cannot store

Form = TypeVar("Form", bound=BaseModel)

Hotword = Annotated[str, StringConstraints(min_length=1, max_length=100)]
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=_NO_NUL)]
MetadataValue = Annotated[str, StringConstraints(max_length=512, pattern=_NO_NUL)]

_CREDENTIALS = frozenset({"token", "ticket"})
_JSON_FIELDS = frozenset({"metadata", "vad"})


def _vad(name: str) -> Any:
    """None: the policy's own."""
    return Field(None, ge=WIDEST[name].least, le=WIDEST[name].most)


class Vad(BaseModel):
    """Endpointing; speech probability and ms."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: float | None = _vad("threshold")
    silence_ms: int | None = _vad("silence_ms")
    min_speech_ms: int | None = _vad("min_speech_ms")
    max_utterance_ms: int | None = _vad("max_utterance_ms")


class Start(BaseModel):
    """The first frame, or the query string."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["start"] = "start"
    encoding: Encoding = "pcm_s16le"
    sample_rate: int | None = Field(None, ge=RATES_HZ.start, lt=RATES_HZ.stop)
    channels: int = Field(1, ge=1, le=2)
    per_channel: bool = False
    language: str | None = None
    model: str | None = Field(None, min_length=1, max_length=200, pattern=_NO_NUL)
    backend_preference: Preference = "any"
    partials: bool = True
    deltas: bool = False
    partial_interval_ms: int = Field(250, ge=100, le=5_000)
    max_delay_ms: int | None = Field(None, ge=700, le=20_000)
    words: bool = False
    prompt: str | None = Field(None, max_length=4_000)
    hotwords: tuple[Hotword, ...] = Field((), max_length=100)
    customer: str | None = Field(None, min_length=1, max_length=128, pattern=_NO_NUL)
    metadata: dict[MetadataKey, MetadataValue] = Field(default_factory=dict, max_length=16)
    vad: Vad = Vad()

    @field_validator("language")
    @classmethod
    def _known_language(cls, language: str | None) -> str | None:
        """The primary subtag, which is what recognisers go by."""
        primary = None if language is None else language.partition("-")[0].lower()
        if primary is not None and primary not in NAMES:
            raise ValueError("this is not the code of a language that can be recognised")
        return primary

    @model_validator(mode="after")
    def _delay_of_deltas(self) -> Start:
        if self.max_delay_ms is not None and not (self.partials or self.deltas):
            raise ValueError("max_delay_ms: without partials and deltas there is nothing but finals to hurry")
        return self

    @model_validator(mode="after")
    def _telephone(self) -> Start:
        if self.encoding not in ("mulaw", "alaw"):
            return self
        if self.sample_rate not in (None, Wire.default_rate(self.encoding)):
            raise ValueError(f"sample_rate: {self.encoding} is always {Wire.default_rate(self.encoding)} Hz")
        if self.channels != 1:
            raise ValueError(f"channels: {self.encoding} is always of one channel")
        return self

    @model_validator(mode="after")
    def _channels_apart(self) -> Start:
        if self.per_channel and self.channels != 2 and not self.wire.contained:
            raise ValueError("per_channel: there must be two channels, so `channels` must be 2")
        return self

    @property
    def wire(self) -> Wire:
        return Wire.of(self.encoding, self.sample_rate, 2 if self.channels == 2 else 1, apart=self.per_channel)

    def setup(self, request_id: str) -> Setup:
        """The same in the words of those who do the work."""
        demand = Demand(
            kind="stream",
            channels=self.wire.transcribed,
            model=self.model,
            language=self.language,
            backend_preference=self.backend_preference,
            features=frozenset({"words"}) if self.words else frozenset(),
            vad=self.vad.model_dump(exclude_none=True),
            customer=self.customer,
            metadata=self.metadata,
            request_id=request_id,
        )
        options = Options(
            language=self.language,
            prompt=self.prompt,
            hotwords=self.hotwords,
            words=self.words,
            partials=self.partials or self.deltas,
            partial_interval_ms=self.partial_interval_ms,
            max_delay_ms=self.max_delay_ms,
            channels=self.wire.transcribed,
        )
        return Setup(demand, options, self.wire)


class _Resume(BaseModel):
    """The first frame, or the query string, of one who comes back."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["start"] = "start"
    resume_token: str = Field(min_length=1, max_length=256)
    last_seq: int = Field(ge=0, lt=2**53)
    resend_from_ms: int | None = Field(None, ge=0, lt=2**53)


def resume_of_frame(fields: Mapping[str, Any]) -> Resume | None:
    """None where it carries no `resume_token`. Raises `Invalid`, which names the field."""
    return _resume(fields, strict=True)


def resume_of_query(query: QueryParams) -> Resume | None:
    """The same."""
    return _resume({name: query[name] for name in query if name not in _CREDENTIALS}, strict=False)


def start_of_frame(fields: Mapping[str, Any]) -> Start:
    """Raises `Invalid`, which names the field."""
    if fields.get("type") != "start":
        raise Invalid("The first text frame must be `start`.", param="type")
    return _read(Start, fields, strict=True)


def start_of_query(query: QueryParams, fixed: Mapping[str, Any]) -> Start | None:
    """The fields of the address and those that a ticket fixed; None where there are neither. Raises `Invalid`, which
    names the field."""
    names = [name for name in query if name not in _CREDENTIALS]
    if taken := next((name for name in names if name in fixed), None):
        raise Invalid(f"`{taken}` was fixed when the ticket was made.", param=taken)
    fields = {name: _query_value(query, name) for name in names} | dict(fixed)
    return _read(Start, fields, strict=False) if fields else None


def start_of_opening(fields: Mapping[str, Any]) -> Start:
    """The fields of a `start` that was checked before. Raises `Invalid`."""
    return _read(Start, fields, strict=False)


def fixed_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `start` for a ticket to fix, checked. Raises `Invalid`, which names the field."""
    _read(Start, fields, strict=True)
    return {name: value for name, value in fields.items() if name != "type"}


def _resume(fields: Mapping[str, Any], *, strict: bool) -> Resume | None:
    if fields.get("resume_token") is None:
        return None
    read = _read(_Resume, fields, strict=strict)
    return Resume(read.resume_token, read.last_seq, read.resend_from_ms)


def _read(form: type[Form], fields: Mapping[str, Any], *, strict: bool) -> Form:
    try:
        # as JSON, in which a strict tuple may come as a list
        return form.model_validate_json(json.dumps(fields), strict=strict)
    except ValidationError as error:
        raise _refusal(error) from None


def _query_value(query: QueryParams, name: str) -> Any:
    if name == "hotwords":
        return query.getlist(name)
    if name not in _JSON_FIELDS:
        return query[name]
    try:
        return json.loads(query[name])
    except (ValueError, RecursionError):
        raise Invalid(f"`{name}` must be a JSON object.", param=name) from None


def _refusal(error: ValidationError) -> Invalid:
    """The first complaint, with the field's name."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = ".".join(str(part) for part in first["loc"])[:64] or "start"
    if first["type"] == "extra_forbidden":
        return Invalid(f"There is no field `{name}`.", param=name)
    return Invalid(f"`{name}`: {first['msg'].removeprefix('Value error, ')}.", param=name)
