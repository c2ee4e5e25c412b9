"""What Deepgram is asked and what it answers, for recordings and live audio alike (`/v1/listen`).

Times are seconds on the wire, and ms outside of here. What an answer says is checked before anybody sees it: shapes,
sizes, finite numbers. What is not asked for is not looked at.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from dispatchers.backends.relay import Account, Seconds, at_ms, parsed
from dispatchers.backends.said import Answered, Code, Share, Text, clean, model_of, share
from dispatchers.errors import UnsupportedOption
from dispatchers.interface import SAMPLE_RATE, Options, Word

LISTEN = "/v1/listen"
_LANGUAGES = """
af ar be bg bn bs ca cs da de el en es et fa fi fr gu he hi hr hu hy id it ja ka kk kn ko lt lv mk mr ms ne nl no pa pl
pt ro ru sk sl sr sv ta te th tl tr uk ur vi yue zh
"""
LANGUAGES = frozenset(_LANGUAGES.split())
"""What Nova-3 is told to recognise; Nova-2 knows fewer."""

KEYTERMS_MOST = 100
UTTERANCE_END_LEAST_MS = 1000
_MULTILINGUAL = ("nova-2", "nova-2-general", "nova-3", "nova-3-general")
_WIRE_CODES = {"yue": "zh-HK"}

Query: TypeAlias = list[tuple[str, str]]

# --- what is asked ------------------------------------------------------------------------------------------------


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
    if options.language is not None and options.language not in LANGUAGES:
        raise UnsupportedOption(f"{account.backend} does not know this language.", param="language")
    if len(options.hotwords) > KEYTERMS_MOST:
        raise UnsupportedOption(f"{account.backend} takes at most {KEYTERMS_MOST} hotwords.", param="hotwords")
    if model.startswith("nova-3"):
        return [("keyterm", term) for term in options.hotwords]
    return [("keywords", term.replace(":", " ")) for term in options.hotwords]  # what follows a colon is a weight


def _wire_code(language: str) -> str:
    return _WIRE_CODES.get(language, language)


# --- what is answered ---------------------------------------------------------------------------------------------


class SaidWord(Answered):
    """A word. Nothing but the word itself and its times is sure to be there."""

    word: Annotated[str, Field(max_length=1000)]
    start: Seconds
    end: Seconds
    confidence: Share = 0.0
    punctuated_word: Annotated[str, Field(max_length=1000)] | None = None
    language: Code | None = None


class Alternative(Answered):
    transcript: Text
    confidence: Share = 0.0
    words: tuple[SaidWord, ...] = ()
    languages: tuple[Code, ...] = ()


class Channel(Answered):
    alternatives: Annotated[tuple[Alternative, ...], Field(min_length=1, max_length=100)]
    detected_language: Code | None = None


class SaidUtterance(Answered):
    start: Seconds
    end: Seconds
    transcript: Text
    words: tuple[SaidWord, ...] = ()


class _Found(Answered):
    channels: Annotated[tuple[Channel, ...], Field(min_length=1, max_length=1)]
    utterances: tuple[SaidUtterance, ...] = ()


class Recorded(Answered):
    """The answer to a recording."""

    results: _Found


class Results(Answered):
    """What is heard from `start` on, for so long. `is_final`: it will not change; `speech_final`: a pause follows;
    `from_finalize`: it answers a `Finalize`."""

    start: Seconds
    duration: Seconds
    is_final: bool = False
    speech_final: bool = False
    from_finalize: bool = False
    channel: Channel


class SpeechBegan(Answered):
    timestamp: Seconds


class UtteranceEnd(Answered):
    """A gap after the last final word, which ended there; -1 where there was no word."""

    last_word_end: Seconds


class Metadata(Answered):
    """The last message: everything has been answered."""


class Error(Answered):
    """Deepgram could not read what we sent, or cannot go on."""


Message: TypeAlias = Results | SpeechBegan | UtteranceEnd | Metadata | Error

_MESSAGES: dict[str, type[Message]] = {
    "Results": Results,
    "SpeechStarted": SpeechBegan,
    "UtteranceEnd": UtteranceEnd,
    "Metadata": Metadata,
    "Error": Error,
}


class _Kind(Answered):
    type: Annotated[str, Field(max_length=100)]


def load_message(account: Account, frame: str | bytes) -> Message | None:
    """A message of a stream; None: one of a kind that we need not know. Raises `BadAnswer`."""
    kind = _MESSAGES.get(parsed(account, _Kind, frame).type)
    return None if kind is None else parsed(account, kind, frame)


# --- in our words -------------------------------------------------------------------------------------------------


def words_of(said: tuple[SaidWord, ...], start_ms: int, end_ms: int) -> tuple[Word, ...]:
    """Words in the order of their times, all within these."""
    words: list[Word] = []
    from_ms = start_ms
    for one in said:
        if text := clean(one.punctuated_word or one.word):
            from_ms = at_ms(one.start, from_ms, end_ms)
            words.append(Word(text, from_ms, at_ms(one.end, from_ms, end_ms), share(one.confidence)))
    return tuple(words)
