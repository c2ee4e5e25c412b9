"""OpenAI's transcription form: received within limits, and the fields of it that an engine honours."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from dispatchers.errors import OptionError, UnsupportedOption
from dispatchers.formats import FORMATS
from dispatchers.interface import Options
from dispatchers.languages import NAMES

Task: TypeAlias = Literal["transcribe", "translate"]

STREAMED = ("json", "text")
GRANULARITIES = ("word", "segment")
FIELDS = 64
IDLE_S = 30.0


@dataclass(frozen=True, slots=True)
class Asked:
    """What one request asks for."""

    options: Options
    response_format: str
    segments: bool
    words: bool
    stream: bool


async def received(request: Request, most: int) -> FormData:
    """The form, its file spooled to disk; to be closed. `most` bytes in all, at most.

    Raises `HTTPException` (400, 408 when nothing comes for `IDLE_S`, 413), `ClientDisconnect`."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise HTTPException(400, "Send the recording as `multipart/form-data` with a part named `file`.")
    try:
        return await _Form(request, most).parse()
    except MultiPartException as error:
        raise HTTPException(400, error.message) from None


class _Form(MultiPartParser):
    """Starlette's parser, which takes a form that breaks off for a whole one. What the body raises makes it close its
    files."""

    def __init__(self, request: Request, most: int):
        super().__init__(request.headers, self._body(request, most), max_files=1, max_fields=FIELDS)
        self._whole = False

    def on_end(self) -> None:
        self._whole = True

    async def _body(self, request: Request, most: int) -> AsyncGenerator[bytes, None]:
        size, body = 0, request.stream()
        try:
            while True:
                async with asyncio.timeout(IDLE_S):
                    chunk = await anext(body)
                if not chunk:
                    break
                size += len(chunk)
                if size > most:
                    raise HTTPException(413, f"Maximum content size limit ({most}) exceeded.")
                yield chunk
        except TimeoutError:
            raise HTTPException(408, "The upload stopped arriving. Send it again.") from None
        if not self._whole:
            raise HTTPException(400, "The multipart body breaks off before its end.")


def read(items: Iterable[tuple[str, str | UploadFile]], task: Task) -> tuple[Asked, UploadFile]:
    """The request and its recording. Fields that are not known are ignored, as OpenAI's own come and go. `language` is
    that of the recording, also where a translation is asked for.

    Raises `OptionError` or `UnsupportedOption`, each naming its `param`.
    """
    fields: dict[str, list[str]] = {}
    upload: UploadFile | None = None
    for name, value in items:
        if isinstance(value, str):
            fields.setdefault(name.removesuffix("[]"), []).append(value)
        elif name == "file":
            upload = value
    if upload is None:
        raise OptionError("The form has no part named `file`. Send the recording in it.", param="file")
    return _asked(fields, task), upload


def _asked(fields: dict[str, list[str]], task: Task) -> Asked:
    response_format = _choice(fields, "response_format", FORMATS)
    stream = _choice(fields, "stream", ("false", "true")) == "true"
    if stream and response_format not in STREAMED:
        raise UnsupportedOption(
            f"'{response_format}' cannot be streamed. Use 'json' or 'text'.", param="response_format"
        )
    granularities = fields.get("timestamp_granularities", [])
    if any(name not in GRANULARITIES for name in granularities):
        raise OptionError("Granularities are: word, segment.", param="timestamp_granularities")
    if granularities and response_format != "verbose_json":
        raise UnsupportedOption("Granularities need the format 'verbose_json'.", param="timestamp_granularities")
    words = "word" in granularities
    options = Options(
        model=_text(fields, "model"),
        task=task,
        language=_language(_text(fields, "language")),
        prompt=_text(fields, "prompt") or None,
        temperature=_temperature(_text(fields, "temperature")),
        words=words or response_format in ("srt", "vtt"),  # subtitles are cut at words
    )
    return Asked(options, response_format, segments=not words or "segment" in granularities, words=words, stream=stream)


def _text(fields: dict[str, list[str]], name: str) -> str:
    values = fields.get(name, [""])
    if len(values) > 1:
        raise OptionError(f"`{name}` was given more than once.", param=name)
    return values[0]


def _choice(fields: dict[str, list[str]], name: str, choices: Sequence[str]) -> str:
    """The first choice is the default."""
    value = _text(fields, name).lower() or choices[0]
    if value not in choices:
        raise OptionError(f"`{name}` must be one of: {', '.join(choices)}.", param=name)
    return value


def _language(given: str) -> str | None:
    """An ISO 639 code that Whisper knows; a region, which some clients add, is dropped."""
    code = given.split("-", maxsplit=1)[0].lower()
    if code and code not in NAMES:
        raise OptionError("This is not a language code. Use ISO 639-1, such as 'en'.", param="language")
    return code or None


def _temperature(given: str) -> float | None:
    """0 asks for the recogniser's own ladder, as None does."""
    try:
        value = float(given or 0)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise OptionError("`temperature` must be a number from 0 to 1.", param="temperature")
    return value or None
