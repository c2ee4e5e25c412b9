"""What AssemblyAI is asked and what it answers: recordings (`/v2`) and live audio (`/v3/ws`).

Times are integer ms on the wire, too. What an answer says is checked before anybody sees it: shapes, sizes, finite
numbers. What is not asked for is not looked at.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from dispatchers.backends.relay import Account, parsed
from dispatchers.backends.said import Answered, Code, Share, Text, clean, model_of, share
from dispatchers.errors import (
    BackendError,
    BackendFailed,
    BackendUnavailable,
    CredentialRefused,
    Throttled,
    UnsupportedOption,
)
from dispatchers.interface import SAMPLE_RATE, Options, Word
from dispatchers.languages import NAMES

UPLOAD, TRANSCRIPT, LIVE = "/v2/upload", "/v2/transcript", "/v3/ws"
LIVE_HEADERS = {"AssemblyAI-Version": "2025-05-12"}

SIX = frozenset({"en", "es", "de", "fr", "it", "pt"})
MANY = frozenset(NAMES) - {"yue"}

RECORDED_TERMS_MOST, TERMS_MOST = {"universal-2": 200}, 1000
LIVE_TERMS_MOST = 100
PROMPT_CHARS = 4_000
INACTIVE_S = 60
"""After so long without audio or a `KeepAlive`, AssemblyAI ends a stream, which it charges for while it is open."""

_UPRIGHT = "universal-3"
"""Models of this kind take a prompt and punctuate live; each is sold for live audio under a name of its own."""
_LIVE_MODELS = {"universal-3-pro": "u3-rt-pro"}

Query: TypeAlias = list[tuple[str, str]]
Asked: TypeAlias = dict[str, Any]

# --- what is asked ------------------------------------------------------------------------------------------------


def languages_of(model: str) -> frozenset[str]:
    """Those that it recognises, recorded or live."""
    return SIX if model.startswith(_UPRIGHT) else MANY


def prompted(model: str) -> bool:
    """Whether it takes a prompt."""
    return model.startswith(_UPRIGHT)


def recorded_request(account: Account, options: Options) -> Asked:
    """All but the address of the audio. Raises `UnknownModel`, `UnsupportedOption`."""
    model = model_of(account, options.model)
    if options.temperature and not prompted(model):
        raise UnsupportedOption(f"This model of {account.backend} knows no temperature but 0.", param="temperature")
    asked: Asked = {"speech_models": [model], **_hints(account, options, model)}
    if options.language is None:
        asked["language_detection"] = True
    else:
        asked["language_code"] = options.language
    if options.temperature is not None and prompted(model):
        asked["temperature"] = options.temperature
    return asked


def live_query(account: Account, options: Options) -> Query:
    """The parameters for a stream of PCM. A turn ends after `silence_ms`, whatever was said. Raises `UnknownModel`,
    `UnsupportedOption`."""
    model = model_of(account, options.model)
    if options.temperature:
        raise UnsupportedOption(f"{account.backend} knows no temperature but 0 in live audio.", param="temperature")
    hints = _hints(account, options, model, live=True)
    live, silence_ms = live_model(model, options.language), str(options.vad.silence_ms)
    query = [
        ("speech_model", live),
        ("encoding", "pcm_s16le"),
        ("sample_rate", str(SAMPLE_RATE)),
        ("min_turn_silence", silence_ms),
        ("max_turn_silence", silence_ms),
        ("inactivity_timeout", str(INACTIVE_S)),
    ]
    if is_formatted_later(live):
        query.append(("format_turns", "true"))
    if options.language is None:
        query.append(("language_detection", "true"))
    elif live != "universal-streaming-english":
        query.append(("language_codes", json.dumps([options.language])))
    return query + [(name, hint if isinstance(hint, str) else json.dumps(hint)) for name, hint in hints.items()]


def live_model(model: str, language: str | None) -> str:
    """What a model is called where audio is live. Of Universal-2 there are three, by language."""
    if model != "universal-2":
        return _LIVE_MODELS.get(model, model)
    if language == "en":
        return "universal-streaming-english"
    return "universal-streaming-multilingual" if language is None or language in SIX else "whisper-rt"


def is_formatted_later(live: str) -> bool:
    """Whether the text of a turn is punctuated only when it has ended."""
    return live.startswith("universal-streaming")


def _hints(account: Account, options: Options, model: str, *, live: bool = False) -> Asked:
    """What to expect. What has no like at AssemblyAI is refused, not passed over. It takes either terms or a prompt,
    and recommends to put them into one where there are both."""
    if options.task != "transcribe":
        raise UnsupportedOption(f"{account.backend} does not translate.", param="task")
    if options.language is not None and options.language not in languages_of(model):
        raise UnsupportedOption(f"This model of {account.backend} does not know this language.", param="language")
    most = LIVE_TERMS_MOST if live else RECORDED_TERMS_MOST.get(model, TERMS_MOST)
    if len(options.hotwords) > most:
        raise UnsupportedOption(f"{account.backend} takes at most {most} hotwords here.", param="hotwords")
    terms = list(options.hotwords)
    if not options.prompt:
        return {"keyterms_prompt": terms} if terms else {}
    if not prompted(model):
        raise UnsupportedOption(
            f"This model of {account.backend} takes no prompt. Name the words to listen for as hotwords.",
            param="prompt",
        )
    context = f"\n\nContext: {', '.join(terms)}" if terms else ""
    return {"prompt": options.prompt[:PROMPT_CHARS] + context}


# --- what is answered ---------------------------------------------------------------------------------------------


class SaidWord(Answered):
    """A word and its times in ms. Of live ones, `word_is_final`: it will not change."""

    text: Annotated[str, Field(max_length=1000)]
    start: int
    end: int
    confidence: Share = 0.0
    word_is_final: bool = False


class Uploaded(Answered):
    """Where the audio is, for AssemblyAI itself."""

    upload_url: Annotated[str, Field(min_length=1, max_length=4000)]


class Job(Answered):
    """A transcription, as far as it is. `error` is why there will be none."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]
    status: Literal["queued", "processing", "completed", "error"]
    text: Text | None = None
    words: tuple[SaidWord, ...] | None = None
    language_code: Code | None = None
    error: str | None = None

    @property
    def is_silent(self) -> bool:
        """Where the language is to be detected, AssemblyAI takes silence for an error."""
        return self.status == "error" and "no spoken audio" in (self.error or "")


class Begin(Answered):
    """The first message of a stream."""


class Turn(Answered):
    """What is heard of the turn that has this number, all of it so far. `transcript` are its words that will not
    change. `end_of_turn`: a pause follows; `turn_is_formatted`: punctuated, and so on."""

    turn_order: Annotated[int, Field(ge=0)]
    turn_is_formatted: bool
    end_of_turn: bool
    transcript: Text
    words: tuple[SaidWord, ...]
    language_code: Code | None = None


class Termination(Answered):
    """The last message: everything has been answered."""


class Error(Answered):
    """AssemblyAI cannot go on."""

    error_code: int | None = None


Message: TypeAlias = Begin | Turn | Termination | Error

_MESSAGES: dict[str, type[Message]] = {"Begin": Begin, "Turn": Turn, "Termination": Termination, "Error": Error}


class _Kind(Answered):
    type: Annotated[str, Field(max_length=100)]


def load_message(account: Account, frame: str | bytes) -> Message | None:
    """A message of a stream; None: one of a kind that we need not know. Raises `BadAnswer`."""
    kind = _MESSAGES.get(parsed(account, _Kind, frame).type)
    return None if kind is None else parsed(account, kind, frame)


_KEY = {1008, 4001, 4002, 4003}
_THROTTLED = {3009, 4029, 4102}
_AWAY = {1013, 3008, 4008}


def meaning(account: Account, code: int) -> BackendError | None:
    """Of a close or error code; None: nothing particular."""
    name = account.backend
    if code in _KEY:
        return CredentialRefused(
            f"{name} does not accept the credential {account.shown} (code {code}). The operator must renew it."
        )
    if code in _THROTTLED:
        return Throttled(f"{name} takes no more streams for now.")
    if code in _AWAY:
        return BackendUnavailable(f"{name} does not go on with the stream (code {code}).")
    return None


def failure(account: Account, said: Error) -> BackendError:
    """What an error message means. Its text is not looked at."""
    known = None if said.error_code is None else meaning(account, said.error_code)
    return known or BackendFailed(f"{account.backend} cannot go on with the stream.")


# --- in our words -------------------------------------------------------------------------------------------------


def words_of(said: tuple[SaidWord, ...], start_ms: int, end_ms: int) -> tuple[Word, ...]:
    """Words in the order of their times, all within these; those without text are left out."""
    words: list[Word] = []
    from_ms = start_ms
    for one in said:
        if text := clean(one.text):
            from_ms = min(max(one.start, from_ms), end_ms)
            words.append(Word(text, from_ms, min(max(one.end, from_ms), end_ms), share(one.confidence)))
    return tuple(words)
