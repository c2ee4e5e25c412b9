"""The fields of OpenAI's transcription forms, and ours beside them, read into one frozen value."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

from dispatchers.errors import UnsupportedOption
from dispatchers.formats import FORMATS
from dispatchers.interface import Options
from dispatchers.languages import NAMES
from policy.errors import Invalid
from policy.resolve import Demand, Preference

Task: TypeAlias = Literal["transcribe", "translate"]
Async: TypeAlias = Literal["auto", "true", "false"]

PROMPT_CHARS = 4_000
KEYWORDS_MOST = 100
KEYWORD_CHARS = 100
METADATA_MOST = 16
METADATA_KEY_CHARS = 64
METADATA_VALUE_CHARS = 512
CUSTOMER_CHARS = 128

_GRANULARITIES = ("word", "segment")
_STREAMED = ("json", "text")


@dataclass(frozen=True, slots=True)
class Parameters:
    """What one request asks for."""

    model: str
    task: Task
    response_format: str
    language: str | None
    prompt: str | None
    hotwords: tuple[str, ...]
    temperature: float | None
    words: bool
    segments: bool
    stream: bool
    backend_preference: Preference
    customer: str | None
    metadata: dict[str, str]
    asynchronous: Async

    def demand(self, kind: Literal["file", "job"], *, audio_ms: int | None, request_id: str) -> Demand:
        """As the policy sees it."""
        return Demand(
            kind=kind,
            model=self.model,
            language=self.language,
            task=self.task,
            backend_preference=self.backend_preference,
            features=frozenset({"words"}) if self.words else frozenset(),
            audio_ms=audio_ms,
            customer=self.customer,
            metadata=self.metadata,
            request_id=request_id,
        )

    def options(self) -> Options:
        """As a recogniser sees it. Subtitles are cut at words, so they want their times, too."""
        return Options(
            task=self.task,
            language=self.language,
            prompt=self.prompt,
            hotwords=self.hotwords,
            temperature=self.temperature,
            words=self.words or self.response_format in ("srt", "vtt"),
        )


def parse(fields: Sequence[tuple[str, str]], task: Task) -> Parameters:
    """Reads the form. Unknown fields are ignored, as OpenAI's own extensions come and go.

    Raises `Invalid` or `UnsupportedOption`, each naming its `param`.
    """
    form = _Form(fields)
    response_format = form.choice("response_format", FORMATS, "json")
    stream = form.flag("stream")
    if stream and response_format not in _STREAMED:
        raise UnsupportedOption(
            f"response_format '{response_format}' cannot be streamed. Use 'json' or 'text'.", param="response_format"
        )
    granularities = form.listed("timestamp_granularities")
    if unknown := [name for name in granularities if name not in _GRANULARITIES]:
        raise Invalid(f"'{unknown[0][:40]}' is none of: word, segment.", param="timestamp_granularities")
    if granularities and response_format != "verbose_json":
        raise UnsupportedOption(
            "Timestamp granularities need response_format 'verbose_json'.", param="timestamp_granularities"
        )
    return Parameters(
        model=form.required("model", 200),
        task=task,
        response_format=response_format,
        language=_language(form.text("language", 40)),
        prompt=form.text("prompt", PROMPT_CHARS),
        hotwords=_keywords(form.listed("keywords")),
        temperature=form.number("temperature", 0.0, 1.0) or None,  # 0 asks for the recogniser's own ladder
        words="word" in granularities,
        segments="segment" in granularities or not granularities,
        stream=stream,
        backend_preference=cast(Preference, form.choice("backend_preference", get_args(Preference), "any")),
        customer=form.text("customer", CUSTOMER_CHARS),
        metadata=_metadata(form),
        asynchronous=cast(Async, form.choice("async", get_args(Async), "auto")),
    )


class _Form:
    """Values by name. `name[]` is a list's element, `name[key]` an object's member; both are common."""

    def __init__(self, fields: Iterable[tuple[str, str]]):
        self._values: dict[str, list[str]] = {}
        for name, value in fields:
            self._values.setdefault(name, []).append(value)

    def text(self, name: str, most: int) -> str | None:
        values = self._values.get(name, [])
        if len(values) > 1:
            raise Invalid(f"`{name}` was given more than once.", param=name)
        if not values or not values[0]:
            return None
        if len(values[0]) > most:
            raise Invalid(f"`{name}` is longer than {most} characters.", param=name)
        return values[0]

    def required(self, name: str, most: int) -> str:
        value = self.text(name, most)
        if value is None:
            raise Invalid(f"You must provide `{name}`.", param=name)
        return value

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        value = self.text(name, 40) or default
        if value not in choices:
            raise Invalid(f"'{value}' is none of: {', '.join(choices)}.", param=name)
        return value

    def flag(self, name: str) -> bool:
        value = (self.text(name, 40) or "false").lower()
        if value not in ("true", "false", "1", "0"):
            raise Invalid(f"`{name}` must be true or false.", param=name)
        return value in ("true", "1")

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.text(name, 40)
        if value is None:
            return None
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise Invalid(f"`{name}` must be a number from {least:g} to {most:g}.", param=name)
        return number

    def listed(self, name: str) -> list[str]:
        """`name[]`, `name`, or a JSON list in `name`; values are never split at commas."""
        values = [*self._values.get(f"{name}[]", []), *self._values.get(name, [])]
        if len(values) == 1 and values[0].startswith("["):
            read = _json(values[0], name)
            if not isinstance(read, list) or not all(isinstance(item, str) for item in read):
                raise Invalid(f"`{name}` must be a list of strings.", param=name)
            return read
        return values

    def members(self, name: str) -> dict[str, object]:
        """`name[key]`, or a JSON object in `name`."""
        found: dict[str, object] = {}
        if whole := self.text(name, 64 * 1024):
            read = _json(whole, name)
            if not isinstance(read, dict):
                raise Invalid(f"`{name}` must be a JSON object.", param=name)
            found.update(read)
        for field, values in self._values.items():
            if field.startswith(f"{name}[") and field.endswith("]"):
                found[field[len(name) + 1 : -1]] = values[-1]
        return found


def _json(text: str, name: str) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        raise Invalid(f"`{name}` is not valid JSON.", param=name) from None
    return value


def _language(given: str | None) -> str | None:
    """An ISO 639 code that the recognisers know; a region, which some clients add, is dropped."""
    if given is None:
        return None
    code = given.split("-")[0].lower()
    if code not in NAMES:
        raise Invalid(f"'{given}' is not a language code. Use ISO 639-1, such as 'en'.", param="language")
    return code


def _keywords(given: Sequence[str]) -> tuple[str, ...]:
    if len(given) > KEYWORDS_MOST or any(len(word) > KEYWORD_CHARS for word in given):
        raise Invalid(f"At most {KEYWORDS_MOST} keywords of {KEYWORD_CHARS} characters.", param="keywords")
    return tuple(word for word in given if word.strip())


def _metadata(form: _Form) -> dict[str, str]:
    given = form.members("metadata")
    if len(given) > METADATA_MOST:
        raise Invalid(f"`metadata` may have {METADATA_MOST} members.", param="metadata")
    metadata: dict[str, str] = {}
    for key, value in given.items():
        if not isinstance(value, str) or len(value) > METADATA_VALUE_CHARS or not 0 < len(key) <= METADATA_KEY_CHARS:
            raise Invalid(
                f"`metadata` maps names of up to {METADATA_KEY_CHARS} characters to strings of up to"
                f" {METADATA_VALUE_CHARS}.",
                param="metadata",
            )
        if "\x00" in key + value:  # a JSON escape; Postgres cannot hold it
            raise Invalid("`metadata` must not contain NUL.", param="metadata")
        metadata[key] = value
    return metadata
