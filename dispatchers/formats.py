"""A transcript in the shapes that OpenAI's transcription API answers with."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from dispatchers.errors import UnsupportedOption
from dispatchers.interface import Segment, Transcript, Word
from dispatchers.languages import NAMES

Format: TypeAlias = Literal["json", "text", "srt", "verbose_json", "vtt"]
FORMATS: tuple[str, ...] = get_args(Format)

_LINE_CHARS = 42
_CUE_LINES = 2
_CUE_MS = 7_000


def render(transcript: Transcript, fmt: str, *, words: bool = False, segments: bool = True) -> tuple[str, str]:
    """The body and its media type. `words` and `segments` are the granularities that `verbose_json` shows.

    Subtitles read best from a transcript that has word times, whatever `words` says: without them a long segment
    cannot be split. Raises `UnsupportedOption` for a format that is none of `FORMATS`.
    """
    match fmt:
        case "json":
            return _dumps(as_json(transcript)), "application/json"
        case "verbose_json":
            return _dumps(as_verbose_json(transcript, words=words, segments=segments)), "application/json"
        case "text":
            return f"{transcript.text}\n", "text/plain; charset=utf-8"
        case "srt":
            return as_srt(transcript), "text/plain; charset=utf-8"
        case "vtt":
            return as_vtt(transcript), "text/vtt; charset=utf-8"
    raise UnsupportedOption(f"The response format must be one of {', '.join(FORMATS)}.", param="response_format")


def as_json(transcript: Transcript) -> dict[str, Any]:
    """`{"text", "usage"}`."""
    return {"text": transcript.text, "usage": usage(transcript.duration_ms)}


def as_verbose_json(transcript: Transcript, *, words: bool = False, segments: bool = True) -> dict[str, Any]:
    """Times in seconds, the language by its lower-case English name, and every figure that strict clients need."""
    translated = transcript.task == "translate"
    body: dict[str, Any] = {
        "task": transcript.task,
        "language": "english" if translated else NAMES.get(transcript.language, transcript.language),
        "duration": transcript.duration_ms / 1000,
        "text": transcript.text,
    }
    if segments:
        body["segments"] = [_segment(number, segment) for number, segment in enumerate(transcript.segments)]
    if words:
        body["words"] = [_word(word) for segment in transcript.segments for word in segment.words]
    return body | {"usage": usage(transcript.duration_ms)}


def as_srt(transcript: Transcript) -> str:
    """SubRip: numbered cues, a comma before the milliseconds."""
    blocks = [
        f"{number}\n{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}\n{cue.wrapped}\n"
        for number, cue in enumerate(_cues(transcript), start=1)
    ]
    return "\n".join(blocks)


def as_vtt(transcript: Transcript) -> str:
    """WebVTT, its text escaped."""
    blocks = [
        f"{_clock(cue.start_ms, '.')} --> {_clock(cue.end_ms, '.')}\n{_escaped(cue.wrapped)}\n"
        for cue in _cues(transcript)
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def usage(duration_ms: int) -> dict[str, Any]:
    """Billed by time: whole seconds, rounded up."""
    return {"type": "duration", "seconds": -(-duration_ms // 1000)}


def _segment(number: int, segment: Segment) -> dict[str, Any]:
    return {
        "id": number,
        "seek": segment.start_ms // 10,  # Whisper counts frames of 10 ms
        "start": segment.start_ms / 1000,
        "end": segment.end_ms / 1000,
        "text": f" {segment.text}",  # so that joined segments read as the text
        "tokens": list(segment.tokens),
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob,
    }


def _word(word: Word) -> dict[str, Any]:
    return {"word": word.text, "start": word.start_ms / 1000, "end": word.end_ms / 1000}


def _dumps(body: dict[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


# --- subtitles ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cue:
    start_ms: int
    end_ms: int
    text: str

    @property
    def wrapped(self) -> str:
        return "\n".join(textwrap.wrap(self.text, _LINE_CHARS))

    @property
    def fits(self) -> bool:
        lines = len(textwrap.wrap(self.text, _LINE_CHARS))
        return lines <= _CUE_LINES and self.end_ms - self.start_ms <= _CUE_MS


def _cues(transcript: Transcript) -> Iterator[_Cue]:
    for segment in transcript.segments:
        whole = _Cue(segment.start_ms, segment.end_ms, " ".join(segment.text.split()))
        if whole.fits:
            yield from [whole] if whole.text else []
        else:
            yield from _split(whole, segment.words)


def _split(whole: _Cue, words: tuple[Word, ...]) -> Iterator[_Cue]:
    """Cues of as many words as fit, cut where the words stand in the text, which keeps its punctuation. A text that
    its words do not spell stays whole."""
    places = _places(whole.text, words)
    if not places:
        yield whole
        return
    first = 0
    for last in range(1, len(words) + 1):
        done = last == len(words)
        longer = _piece(whole, words, places, first, last + 1)
        if done or not longer.fits:
            yield _piece(whole, words, places, first, last)
            first = last


def _piece(whole: _Cue, words: tuple[Word, ...], places: list[int], first: int, last: int) -> _Cue:
    """The words from `first` up to `last`, with whatever stands between them and the next."""
    last = min(last, len(words))
    start = 0 if first == 0 else places[first]
    end = len(whole.text) if last == len(words) else places[last]
    return _Cue(words[first].start_ms, words[last - 1].end_ms, whole.text[start:end].strip())


def _places(text: str, words: tuple[Word, ...]) -> list[int]:
    """Where each word begins in the text; nothing if one is not found."""
    places, cursor = [], 0
    for word in words:
        at = text.find(word.text, cursor)
        if at < 0:
            return []
        places.append(at)
        cursor = at + len(word.text)
    return places


def _clock(ms: int, point: str) -> str:
    seconds, ms = divmod(ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{ms:03}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
