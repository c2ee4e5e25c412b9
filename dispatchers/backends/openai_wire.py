"""What an OpenAI-compatible server is asked and what it answers (`POST …/audio/transcriptions`, `…/translations`).

Times are seconds on the wire, and ms outside of here. What an answer says is checked before anybody sees it.
"""

from __future__ import annotations

import math
import re
import secrets
from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Annotated, Any

from pydantic import BaseModel, Field

from dispatchers.backends.relay import Account, Seconds, at_ms, parsed, plain
from dispatchers.errors import BackendFailed, BadAnswer
from dispatchers.interface import Segment, Word
from dispatchers.languages import NAMES

UNKNOWN_LANGUAGE = "und"
"""ISO 639's code for a language that nobody named."""

_STRAY_CHARS = 32  # of punctuation between two words, at most
_CODES = {name: code for code, name in NAMES.items()}
_LONGEST_SENTENCE = 500
_SENTENCE_END = re.compile(r"\S[.!?…]+[\"'”’)\]]*\s+|[。！？]")

# --- what is asked ------------------------------------------------------------------------------------------------

Fields = Sequence[tuple[str, str]]


def form(fields: Fields, audio: bytes, filename: str, media_type: str) -> tuple[bytes, str]:
    """A multipart body (RFC 7578), the file last, and its media type."""
    boundary = secrets.token_hex(16)  # not to be guessed, so no field can end its part
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields
    ]
    parts.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n'
        f"Content-Type: {media_type}\r\n\r\n"
    )
    body = b"".join([*(part.encode(errors="replace") for part in parts), audio, f"\r\n--{boundary}--\r\n".encode()])
    return body, f"multipart/form-data; boundary={boundary}"


# --- what is answered ---------------------------------------------------------------------------------------------

Figure = Annotated[float, Field(allow_inf_nan=False)] | None


class _SaidWord(BaseModel):
    word: str
    start: Seconds
    end: Seconds
    probability: Figure = None  # not OpenAI's; speaches has it


class _SaidSegment(BaseModel):
    text: str
    start: Seconds
    end: Seconds
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = None
    temperature: Figure = None
    avg_logprob: Figure = None
    compression_ratio: Figure = None
    no_speech_prob: Figure = None


class _Code(BaseModel):
    code: Annotated[str, Field(max_length=64)]


class _Answer(BaseModel):
    """`json` and `verbose_json`. The duration is known here; vLLM gives it as a string."""

    text: str
    language: Annotated[str, Field(max_length=64)] | None = None
    languages: list[_Code] | None = None
    segments: list[_SaidSegment] | None = None
    words: list[_SaidWord] | None = None


class _Event(BaseModel):
    """What `transcript.text.delta` and `transcript.text.done` have, and a failure on the way."""

    type: str = ""
    delta: str | None = None
    text: str | None = None
    language: Annotated[str, Field(max_length=64)] | None = None
    languages: list[_Code] | None = None
    error: Any = None


@dataclass(frozen=True, slots=True)
class Said:
    """An answer, understood. `language` is a code, None where the provider does not say."""

    segments: tuple[Segment, ...]
    language: str | None
    has_words: bool


def read(account: Account, body: bytes, duration_ms: int) -> Said:
    """An answer in JSON. Without segments the whole text is one, as long as the recording. Raises `BadAnswer`."""
    answer = parsed(account, _Answer, body)
    most = _most_chars(duration_ms)
    text = plain(answer.text).strip()
    said = answer.segments or []
    if max(len(text), sum(len(segment.text) for segment in said)) > most:
        raise BadAnswer(f"{account.backend} answered with more text than can be said in the time.")
    segments = _segments(said, duration_ms) if said else _one(text, duration_ms)
    words = _words(answer.words or [], duration_ms)
    return Said(_with_words(segments, words), _language(answer), answer.words is not None)


async def heard(account: Account, lines: AsyncIterator[str], duration_ms: int) -> AsyncIterator[Segment | Said]:
    """An answer in events (server-sent, HTML's section 9.2): each sentence as a segment when it is whole, then all of
    it. No times are told, so all but the last are at 0 ms. Raises `BackendFailed`, `BadAnswer`."""
    most = _most_chars(duration_ms)
    segments: list[Segment] = []
    pending, length, done = "", 0, None
    async for event in _events(account, lines):
        if event.type == "transcript.text.done":
            done = event
            break
        pending += plain(event.delta or "")
        length += len(event.delta or "")
        if length > most:
            raise BadAnswer(f"{account.backend} answered with more text than can be said in the time.")
        while end := _sentence(pending):
            text, pending = pending[:end].strip(), pending[end:]
            if text:
                segments.append(Segment(0, 0, text))
                yield segments[-1]
    if done is None:
        raise BadAnswer(f"{account.backend} ended its answer before it was whole.")
    if not length:
        pending = plain(done.text or "")[:most]
    if text := pending.strip():
        segments.append(Segment(0, duration_ms, text))
        yield segments[-1]
    yield Said(tuple(segments), _language(done), has_words=False)


def _sentence(text: str) -> int:
    """Where the first sentence ends; 0 if it has not ended yet. One that is too long ends at a space."""
    begun = text[:_LONGEST_SENTENCE]
    if end := _SENTENCE_END.search(begun):
        return end.end()
    return (begun.rfind(" ") + 1 or _LONGEST_SENTENCE) if len(text) > _LONGEST_SENTENCE else 0


async def _events(account: Account, lines: AsyncIterator[str]) -> AsyncIterator[_Event]:
    """Each `data:` line is an event: OpenAI's are of one line each."""
    async for line in lines:
        name, _, data = line.partition(":")
        if name != "data" or data.strip() == "[DONE]":
            continue
        event = parsed(account, _Event, data)
        if event.error:
            raise BackendFailed(f"{account.backend} failed in the middle of its answer.")
        yield event


async def split(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Chunks of bytes as lines."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r").decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


# --- text, words, times -------------------------------------------------------------------------------------------


def _most_chars(duration_ms: int) -> int:
    """More than anybody says, and more than Whisper's longest loops: 224 tokens for each begun 30 s."""
    return 4_000 + duration_ms // 10


def _one(text: str, duration_ms: int) -> tuple[Segment, ...]:
    return (Segment(0, duration_ms, text),) if text else ()


def _segments(said: Sequence[_SaidSegment], duration_ms: int) -> tuple[Segment, ...]:
    """In order, within the recording, none before the end of the one before it."""
    segments: list[Segment] = []
    end_ms = 0
    for each in said:
        start_ms = at_ms(each.start, end_ms, duration_ms)
        end_ms = at_ms(each.end, start_ms, duration_ms)
        if text := plain(each.text).strip():
            figures = {
                "temperature": each.temperature,
                "avg_logprob": each.avg_logprob,
                "compression_ratio": each.compression_ratio,
                "no_speech_prob": each.no_speech_prob,
            }
            known: dict[str, Any] = {name: figure for name, figure in figures.items() if figure is not None}
            segments.append(Segment(start_ms, end_ms, text, tokens=tuple(each.tokens or ()), **known))
    return tuple(segments)


def _words(said: Sequence[_SaidWord], duration_ms: int) -> list[Word]:
    """In order, within the recording; a confidence below 0 is one that nobody told."""
    words: list[Word] = []
    start_ms = 0
    for each in said:
        start_ms = at_ms(each.start, start_ms, duration_ms)
        confidence = -1.0 if each.probability is None else min(max(each.probability, 0.0), 1.0)
        if text := plain(each.word).strip():
            words.append(Word(text, start_ms, at_ms(each.end, start_ms, duration_ms), confidence))
    return words


def _with_words(segments: tuple[Segment, ...], words: list[Word]) -> tuple[Segment, ...]:
    """Each word in its segment, with the punctuation that it has in the text: OpenAI's words have none. Words that do
    not spell the text stay as they are, where their times put them."""
    starts = list(accumulate((len(segment.text) + 1 for segment in segments), initial=0))[:-1]
    text = " ".join(segment.text for segment in segments)
    places = _places(text, words)
    if places:
        words = [replace(word, text=token) for word, token in zip(words, _tokens(text, words, places), strict=True)]
        homes = [bisect_right(starts, place) - 1 for place in places]
    else:
        times = [segment.start_ms for segment in segments]
        homes = [max(0, bisect_right(times, word.start_ms) - 1) for word in words]
    kept: list[list[Word]] = [[] for _ in segments]
    for home, word in zip(homes, words, strict=True):
        if segments:
            sure = word.confidence if word.confidence >= 0 else math.exp(min(segments[home].avg_logprob, 0.0))
            kept[home].append(replace(word, confidence=sure))
    return tuple(replace(segment, words=tuple(own)) for segment, own in zip(segments, kept, strict=True))


def _places(text: str, words: Sequence[Word]) -> list[int]:
    """Where each word begins in the text; nothing if one is not where it should be."""
    places, cursor = [], 0
    for word in words:
        at = text.find(word.text, cursor, cursor + len(word.text) + _STRAY_CHARS)
        if at < 0:
            return []
        places.append(at)
        cursor = at + len(word.text)
    return places


def _tokens(text: str, words: Sequence[Word], places: Sequence[int]) -> list[str]:
    """The words as they stand in the text: what is between two of them goes to the nearer, as spaces say."""
    cuts = [0]
    for (word, at), (_, following) in pairwise(zip(words, places, strict=True)):
        end = at + len(word.text)
        space = max(text.rfind(sign, end, following) for sign in " \n\t")
        cuts.append(following if space < 0 else space)
    return [text[start:end].strip() for start, end in pairwise([*cuts, len(text)])]


def _language(answer: _Answer | _Event) -> str | None:
    """Its code. Some say a code and some a name, some with a capital."""
    said = answer.language or (answer.languages[0].code if answer.languages else "")
    name = said.strip().lower().partition("-")[0]
    return name if name in NAMES else _CODES.get(said.strip().lower())
