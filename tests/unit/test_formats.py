"""The five shapes of a transcript."""

import json
import re
from dataclasses import replace

import pytest
from openai.types.audio import TranscriptionVerbose

from dispatchers.errors import UnsupportedOption
from dispatchers.formats import FORMATS, render
from dispatchers.interface import Origin, Segment, Transcript, Word
from dispatchers.languages import NAMES


def segment(text: str, start_ms: int, end_ms: int, words: bool = True) -> Segment:
    spoken = text.replace(",", "").replace(".", "").split()
    step = (end_ms - start_ms) // len(spoken)
    return Segment(
        start_ms,
        end_ms,
        text,
        words=tuple(Word(word, start_ms + at * step, start_ms + (at + 1) * step, 0.9) for at, word in enumerate(spoken))
        if words
        else (),
        tokens=(1, 2),
        avg_logprob=-0.2,
    )


def transcript(*segments: Segment, duration_ms: int = 3_200) -> Transcript:
    text = " ".join(each.text for each in segments)
    return Transcript(text, "en", duration_ms, segments, Origin("self_hosted", "faster-whisper", "micro"))


HELLO = transcript(segment("Hello world.", 0, 1_000), segment("A <b> & c.", 3_661_500, 3_662_001))
LONG = "The first of many words is short, " * 8 + "and here it ends."


def body(fmt: str, of: Transcript = HELLO, **asked: bool) -> str:
    return render(of, fmt, **asked)[0]


def test_json():
    assert json.loads(body("json")) == {
        "text": "Hello world. A <b> & c.",
        "usage": {"type": "duration", "seconds": 4},
    }


@pytest.mark.parametrize(("ms", "seconds"), [(0, 0), (1, 1), (1_000, 1), (1_001, 2)])
def test_usage_rounds_up(ms: int, seconds: int):
    assert json.loads(body("json", replace(HELLO, duration_ms=ms)))["usage"]["seconds"] == seconds


def test_text_ends_its_line():
    assert body("text") == "Hello world. A <b> & c.\n"


def test_verbose_json_is_what_strict_clients_parse():
    shown = json.loads(body("verbose_json", words=True))
    assert TranscriptionVerbose.model_validate(shown, strict=True).duration == 3.2
    assert (shown["task"], shown["language"]) == ("transcribe", "english")
    assert shown["segments"][0] == {
        "id": 0,
        "seek": 0,
        "start": 0.0,
        "end": 1.0,
        "text": " Hello world.",
        "tokens": [1, 2],
        "temperature": 0.0,
        "avg_logprob": -0.2,
        "compression_ratio": 1.0,
        "no_speech_prob": 0.0,
    }
    assert shown["words"][:2] == [
        {"word": "Hello", "start": 0.0, "end": 0.5},
        {"word": "world", "start": 0.5, "end": 1.0},
    ]


def test_verbose_json_shows_what_was_asked():
    assert "words" not in json.loads(body("verbose_json"))
    only_words = json.loads(body("verbose_json", words=True, segments=False))
    assert "segments" not in only_words
    assert len(only_words["words"]) == 6


def test_translations_are_english():
    shown = json.loads(body("verbose_json", replace(HELLO, task="translate", language="fr")))
    assert (shown["task"], shown["language"]) == ("translate", "english")
    assert json.loads(body("verbose_json", replace(HELLO, language="fr")))["language"] == "french"
    assert json.loads(body("verbose_json", replace(HELLO, language="xx")))["language"] == "xx"


def test_srt():
    assert body("srt") == (
        "1\n00:00:00,000 --> 00:00:01,000\nHello world.\n\n2\n01:01:01,500 --> 01:01:02,001\nA <b> & c.\n"
    )


def test_vtt():
    assert body("vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nHello world.\n\n01:01:01.500 --> 01:01:02.001\nA &lt;b&gt; &amp; c.\n"
    )


def test_subtitles_of_nothing():
    assert body("srt", transcript()) == ""
    assert body("vtt", transcript()) == "WEBVTT\n"


def milliseconds(stamp: str) -> int:
    hours, minutes, seconds, ms = map(int, re.split("[:,]", stamp))
    return ((hours * 60 + minutes) * 60 + seconds) * 1000 + ms


def test_long_segments_are_split_where_words_are():
    blocks = body("srt", transcript(segment(LONG, 1_000, 29_000))).strip().split("\n\n")
    assert len(blocks) > 3
    said, end = [], 1_000
    for number, block in enumerate(blocks, start=1):
        head, times, *lines = block.split("\n")
        assert head == str(number)
        assert len(lines) <= 2
        assert all(len(line) <= 42 for line in lines)
        start, stop = map(milliseconds, times.split(" --> "))
        assert end <= start < stop <= start + 7_000
        end = stop
        said += lines
    assert " ".join(said) == LONG


def test_without_word_times_a_long_segment_is_only_wrapped():
    _, times, *lines = body("srt", transcript(segment(LONG, 0, 28_000, words=False))).strip().split("\n")
    assert times == "00:00:00,000 --> 00:00:28,000"
    assert " ".join(lines) == LONG


def test_one_word_too_long_for_a_cue_stays_whole():
    slow = transcript(segment("Mmmm yes", 0, 20_000))
    assert body("srt", slow).count("-->") == 2


def test_media_types():
    kinds = {fmt: render(HELLO, fmt)[1] for fmt in FORMATS}
    assert kinds["json"] == kinds["verbose_json"] == "application/json"
    assert kinds["text"] == kinds["srt"] == "text/plain; charset=utf-8"
    assert kinds["vtt"] == "text/vtt; charset=utf-8"


def test_other_formats_are_refused():
    with pytest.raises(UnsupportedOption) as raised:
        render(HELLO, "docx")
    assert raised.value.param == "response_format"


def test_every_language_whisper_knows_has_a_name():
    from faster_whisper.tokenizer import _LANGUAGE_CODES

    assert set(NAMES) == set(_LANGUAGE_CODES)
