"""What Deepgram is asked and what it answers, for recordings and live audio alike (`/v1/listen`).

Times are seconds on the wire, and ms outside of here. What an answer says is checked before anybody sees it: shapes,
sizes, finite numbers. What is not asked for is not looked at.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Annotated, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from dispatchers.backends.relay import Account
from dispatchers.errors import BadAnswer, UnknownModel, UnsupportedOption
from dispatchers.interface import SAMPLE_RATE, Options, Word
from dispatchers.languages import NAMES

LISTEN = "/v1/listen"
DEFAULT_LANGUAGE = "en"
"""What Deepgram takes speech for where it is told nothing."""

KEYTERMS_MOST = 100
UTTERANCE_END_LEAST_MS = 1000
_MULTILINGUAL = ("nova-2", "nova-2-general", "nova-3", "nova-3-general")
_WIRE_CODES = {"yue": "zh-HK"}
_OUR_CODES = {wire.lower(): ours for ours, wire in _WIRE_CODES.items()}

Query: TypeAlias = list[tuple[str, str]]
Read = TypeVar("Read")

# --- what is asked ------------------------------------------------------------------------------------------------


def model_of(account: Account, name: str) -> str:
    """The model asked for, or the default. Raises `UnknownModel`."""
    if name and name not in account.models:
        raise UnknownModel(param="model")
    return name or account.models[0]


def recorded_query(account: Account, options: Options) -> Query:
    """The parameters for a recording. Raises `UnknownModel`, `UnsupportedOption`."""
    model = model_of(account, options.model)
    language = ("detect_language", "true") if options.language is None else ("language", _wire_code(options.language))
    return [("model", model), ("punctuate", "true"), ("utterances", "true"), language, *_terms(account, options, model)]


def live_query(account: Account, options: Options) -> Query:
    """The parameters for a stream of PCM. A language that is not known is one of those that Deepgram tells apart in
    live audio, if the model does. Raises `UnknownModel`, `UnsupportedOption`."""
    model = model_of(account, options.model)
    silence_ms = options.vad.silence_ms
    query = [
        ("model", model),
        ("encoding", "linear16"),
        ("sample_rate", str(SAMPLE_RATE)),
        ("channels", "1"),
        ("punctuate", "true"),
        ("interim_results", "true"),
        ("vad_events", "true"),
        ("endpointing", str(silence_ms)),
        ("utterance_end_ms", str(max(UTTERANCE_END_LEAST_MS, silence_ms))),
    ]
    if options.language is not None:
        query.append(("language", _wire_code(options.language)))
    elif model in _MULTILINGUAL:
        query.append(("language", "multi"))
    return query + _terms(account, options, model)


def _terms(account: Account, options: Options, model: str) -> Query:
    """Words to listen for. What has no like at Deepgram is refused, not passed over."""
    if options.task != "transcribe":
        raise UnsupportedOption(f"{account.backend} does not translate.", param="task")
    if options.prompt:
        raise UnsupportedOption(
            f"{account.backend} takes no prompt. Name the words to listen for as hotwords.", param="prompt"
        )
    if options.temperature:
        raise UnsupportedOption(f"{account.backend} knows no temperature but 0.", param="temperature")
    if len(options.hotwords) > KEYTERMS_MOST:
        raise UnsupportedOption(f"{account.backend} takes at most {KEYTERMS_MOST} hotwords.", param="hotwords")
    if model.startswith("nova-3"):
        return [("keyterm", term) for term in options.hotwords]
    return [("keywords", term.replace(":", " ")) for term in options.hotwords]  # what follows a colon is a weight


def _wire_code(language: str) -> str:
    return _WIRE_CODES.get(language, language)


# --- what is answered ---------------------------------------------------------------------------------------------


class _Answered(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=1_000_000)]
Code = Annotated[str, Field(max_length=35)]


class SaidWord(_Answered):
    """A word. Nothing but the word itself and its times is sure to be there."""

    word: Annotated[str, Field(max_length=1000)]
    start: Number
    end: Number
    confidence: Number = 0.0
    punctuated_word: Annotated[str, Field(max_length=1000)] | None = None
    language: Code | None = None


class Alternative(_Answered):
    transcript: Text
    confidence: Number = 0.0
    words: tuple[SaidWord, ...] = ()
    languages: tuple[Code, ...] = ()


class Channel(_Answered):
    alternatives: Annotated[tuple[Alternative, ...], Field(min_length=1, max_length=100)]
    detected_language: Code | None = None


class SaidUtterance(_Answered):
    start: Number
    end: Number
    transcript: Text
    words: tuple[SaidWord, ...] = ()


class _Found(_Answered):
    channels: Annotated[tuple[Channel, ...], Field(min_length=1, max_length=1)]
    utterances: tuple[SaidUtterance, ...] = ()


class Recorded(_Answered):
    """The answer to a recording."""

    results: _Found


class Results(_Answered):
    """What is heard from `start` on, for so long. `is_final`: it will not change; `speech_final`: a pause follows;
    `from_finalize`: it answers a `Finalize`."""

    start: Number
    duration: Number
    is_final: bool = False
    speech_final: bool = False
    from_finalize: bool = False
    channel: Channel


class SpeechBegan(_Answered):
    timestamp: Number


class UtteranceEnd(_Answered):
    """A gap after the last final word, which ended there; -1 where there was no word."""

    last_word_end: Number


class Metadata(_Answered):
    """The last message: everything has been answered."""


class Error(_Answered):
    """Deepgram could not read what we sent, or cannot go on."""


Message: TypeAlias = Results | SpeechBegan | UtteranceEnd | Metadata | Error

_MESSAGES: dict[str, type[Message]] = {
    "Results": Results,
    "SpeechStarted": SpeechBegan,
    "UtteranceEnd": UtteranceEnd,
    "Metadata": Metadata,
    "Error": Error,
}


class _Kind(_Answered):
    type: Annotated[str, Field(max_length=100)]


def load_recorded(account: Account, body: bytes) -> Recorded:
    """Raises `BadAnswer`."""
    return _checked(account, lambda: Recorded.model_validate_json(body))


def load_message(account: Account, frame: str | bytes) -> Message | None:
    """A message of a stream; None: one of a kind that we need not know. Raises `BadAnswer`."""
    kind = _checked(account, lambda: _Kind.model_validate_json(frame)).type
    if kind not in _MESSAGES:
        return None
    return _checked(account, lambda: _MESSAGES[kind].model_validate_json(frame))


def _checked(account: Account, read: Callable[[], Read]) -> Read:
    try:
        return read()
    except ValueError:  # its text quotes what was said
        raise BadAnswer(f"The answer of {account.backend} cannot be read.") from None


# --- in our words -------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Without control characters; single spaces between words and none around them."""
    return " ".join("".join(sign if unicodedata.category(sign) != "Cc" else " " for sign in text).split())


def to_ms(seconds: float, least_ms: int, most_ms: int) -> int:
    """Whole ms within these bounds, of which `most_ms` counts where they cross."""
    return min(max(round(min(max(seconds, 0.0), most_ms / 1000) * 1000), least_ms), most_ms)


def words_of(said: tuple[SaidWord, ...], start_ms: int, end_ms: int) -> tuple[Word, ...]:
    """Words in the order of their times, all within these."""
    words: list[Word] = []
    at_ms = start_ms
    for one in said:
        if text := clean(one.punctuated_word or one.word):
            at_ms = to_ms(one.start, at_ms, end_ms)
            words.append(Word(text, at_ms, to_ms(one.end, at_ms, end_ms), min(max(one.confidence, 0.0), 1.0)))
    return tuple(words)


def language_of(said: str | None, asked: str | None) -> str:
    """ISO 639-1 of a BCP 47 tag, if that is a language we know; else what was asked for."""
    tag = (said or "").lower()
    code = _OUR_CODES.get(tag, tag.partition("-")[0])
    return code if code in NAMES else asked or DEFAULT_LANGUAGE
