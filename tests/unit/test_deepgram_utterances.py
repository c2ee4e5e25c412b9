"""Whatever Deepgram says, in whatever order: our events keep their promises, and what it says well is told whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatchers.backends.deepgram_utterances import Utterances
from dispatchers.backends.deepgram_wire import Results, SpeechBegan, UtteranceEnd, load_message
from dispatchers.backends.relay import Account
from dispatchers.errors import BadAnswer
from dispatchers.interface import Cleared, Delta, Event, Final, Gap, Options, Partial, SpeechStarted, VadOptions

ACCOUNT = Account("deepgram", "http://localhost", "key", "key", ("nova-3",))
OPTIONS = Options(words=True, vad=VadOptions(silence_ms=500, max_utterance_ms=8_000))


class Told:
    """One stream: what is said of it, and every event so far."""

    def __init__(self, options: Options = OPTIONS):
        self.utterances = Utterances(options)
        self.heard_ms = 0
        self.events: list[Event] = []

    def hear(self, ms: int) -> None:
        self.heard_ms += ms

    def say(self, kind: str, **fields: Any) -> list[Event]:
        """As it comes over the wire."""
        message = load_message(ACCOUNT, json.dumps({"type": kind, **fields}))
        match message:
            case Results():
                new = self.utterances.results(message, self.heard_ms)
            case SpeechBegan(timestamp=timestamp):
                new = self.utterances.began(timestamp, self.heard_ms)
            case UtteranceEnd(last_word_end=last_word_end):
                new = self.utterances.ended(last_word_end, self.heard_ms)
            case _:
                raise AssertionError(message)
        self.events += new
        return new

    def words(self, text: str, start: float, duration: float, **flags: bool) -> list[Event]:
        """A `Results`, its words at even distances."""
        said = text.split()
        step = duration / max(1, len(said))
        words = [
            {"word": word.lower(), "punctuated_word": word, "start": start + at * step, "end": start + (at + 1) * step}
            for at, word in enumerate(said)
        ]
        channel = {"alternatives": [{"transcript": text, "confidence": 0.9, "words": words}]}
        return self.say("Results", start=start, duration=duration, channel=channel, **flags)

    def finish(self) -> list[Event]:
        new = self.utterances.finish(self.heard_ms)
        self.events += new
        return new

    def clear(self) -> None:
        self.utterances.drop(self.heard_ms)
        self.events += self.utterances.dropped(self.heard_ms)

    @property
    def finals(self) -> list[Final]:
        return [event for event in self.events if isinstance(event, Final)]


def check(told: Told) -> None:
    """The promises of `dispatchers.interface`."""
    sent: dict[int, str] = {}
    open_: SpeechStarted | None = None
    floor = 0
    for event in told.events:
        match event:
            case SpeechStarted(number, start_ms):
                assert number == len(sent) + 1
                assert open_ is None
                assert floor <= start_ms < told.heard_ms
                open_, sent[number] = event, ""
            case Delta(number, text, start_ms, end_ms):
                assert open_ is not None
                assert number == open_.utterance
                assert text.strip()
                assert open_.start_ms <= start_ms <= end_ms <= told.heard_ms
                sent[number] += text
            case Partial(number, text, stable, start_ms, end_ms):
                assert open_ is not None
                assert (number, start_ms) == (open_.utterance, open_.start_ms)
                assert text[:stable] == sent[number]
                assert start_ms < end_ms <= told.heard_ms
            case Final():
                assert open_ is not None
                assert (event.utterance, event.start_ms) == (open_.utterance, open_.start_ms)
                assert event.text == sent[event.utterance]
                assert not event.revised
                assert event.start_ms < event.end_ms <= told.heard_ms
                assert 0 <= event.confidence <= 1
                edges = [edge for word in event.words for edge in (word.start_ms, word.end_ms)]
                assert all(event.start_ms <= edge <= event.end_ms for edge in edges)
                assert [word.start_ms for word in event.words] == sorted(word.start_ms for word in event.words)
                open_, floor = None, event.end_ms
            case Gap(start_ms, end_ms):
                assert floor <= start_ms < end_ms <= told.heard_ms
                open_, floor = None, end_ms
    assert open_ is None


seconds = st.one_of(st.floats(-2, 30), st.sampled_from([-1e300, 1e300, 0, -1]))
text = st.text(st.sampled_from("ab 的\x00\x1f\n.,"), max_size=12)
words = st.lists(
    st.fixed_dictionaries(
        {"word": text, "start": seconds, "end": seconds}, optional={"punctuated_word": text, "confidence": seconds}
    ),
    max_size=4,
)
results = st.fixed_dictionaries(
    {
        "type": st.just("Results"),
        "start": seconds,
        "duration": seconds,
        "is_final": st.booleans(),
        "speech_final": st.booleans(),
        "from_finalize": st.booleans(),
        "channel": st.builds(
            lambda transcript, heard: {"alternatives": [{"transcript": transcript, "words": heard}]}, text, words
        ),
    }
)
others = st.one_of(
    st.fixed_dictionaries({"type": st.just("SpeechStarted"), "timestamp": seconds}),
    st.fixed_dictionaries({"type": st.just("UtteranceEnd"), "last_word_end": seconds}),
)
steps = st.lists(st.one_of(results, others, st.integers(0, 3000), st.sampled_from(["flush", "clear"])), max_size=30)


@given(steps)
def test_whatever_is_said_the_events_keep_their_promises(steps: list[Any]) -> None:
    told = Told()
    told.hear(1)
    for step in steps:
        match step:
            case int():
                told.hear(step)
            case "flush":
                told.finish()
            case "clear":
                told.hear(1)  # audio that is dropped is audio
                told.clear()
            case message:
                told.say(message.pop("type"), **message)
    told.finish()
    check(told)


ranges = st.lists(
    st.tuples(
        st.lists(st.sampled_from(["one", "two", "three"]), max_size=4).map(" ".join),
        st.lists(st.sampled_from(["", "on", "one tw", "three"]), max_size=3),
        st.integers(200, 3000),
        st.booleans(),
        st.booleans(),
    ),
    max_size=12,
)


@given(ranges, st.booleans())
def test_what_is_final_is_told_once_and_whole(spoken: list[Any], flushed: bool) -> None:
    """Ranges as Deepgram makes them: each with its interims, then final; then, perhaps, the end of an utterance."""
    told = Told()
    start = 0.0
    for said, guesses, ms, pause, gap in spoken:
        told.hear(ms)
        for guess in guesses:
            told.words(guess, start, ms / 1000)
        told.words(said, start, ms / 1000, is_final=True, speech_final=pause)
        if gap:
            told.say("UtteranceEnd", channel=[0, 1], last_word_end=start + ms / 1000)
        start += ms / 1000
        if flushed:
            told.finish()
    told.finish()
    check(told)
    assert " ".join(final.text for final in told.finals).split() == " ".join(said for said, *_ in spoken).split()


def test_words_that_may_change_are_final_when_there_will_be_no_answer() -> None:
    told = Told()
    told.hear(3000)
    told.words("Tell me", 0, 1.0, is_final=True)
    told.words("more.", 1.0, 1.0)
    told.finish()
    assert [final.text for final in told.finals] == ["Tell me more."]
    told.hear(1000)
    late = told.words("more. Again", 1.0, 3.0, is_final=True, speech_final=True)
    assert [event.text for event in late if isinstance(event, Final)] == ["Again"]
    check(told)


def test_an_utterance_end_that_is_late_ends_nothing() -> None:
    told = Told()
    told.hear(6000)
    told.words("Tell me.", 0, 1.0, is_final=True, speech_final=True)
    told.words("And", 3.0, 1.0, is_final=True)
    assert told.say("UtteranceEnd", last_word_end=1.0) == []
    assert told.say("UtteranceEnd", last_word_end=-1) == []
    assert [type(event) for event in told.say("UtteranceEnd", last_word_end=4.0)] == [Final]


def test_noise_taken_for_speech_is_an_utterance_of_no_words() -> None:
    told = Told()
    told.hear(4000)
    assert told.say("SpeechStarted", timestamp=1.0) == [SpeechStarted(1, 1000)]
    assert told.say("SpeechStarted", timestamp=1.2) == []
    assert told.words("", 0, 1.1, is_final=True) == []
    (final,) = told.words("", 1.1, 1.9, is_final=True)
    assert isinstance(final, Final)
    assert (final.text, final.start_ms, final.end_ms, final.confidence) == ("", 1000, 3000, 0.0)


def test_long_speech_is_cut_where_text_is_final() -> None:
    told = Told()
    for at in range(6):
        told.hear(3000)
        told.words("on and on", at * 3.0, 3.0, is_final=True)
    told.finish()
    assert [final.end_ms - final.start_ms for final in told.finals] == [9000, 9000]


def test_what_was_cleared_is_not_told_though_it_is_answered_late() -> None:
    told = Told()
    told.hear(2000)
    told.words("for", 0.0, 2.0)
    told.utterances.drop(told.heard_ms)
    assert told.words("forget this", 0.0, 2.0, is_final=True, speech_final=True) == []
    assert told.utterances.dropped(told.heard_ms) == [Gap(0, 2000, "cleared"), Cleared(2000)]
    told.hear(2000)
    told.utterances.drop(told.heard_ms)
    assert told.words("and this", 2.0, 2.0, is_final=True) == []
    assert told.utterances.dropped(told.heard_ms) == [Gap(2000, 4000, "cleared"), Cleared(4000)]
    told.utterances.drop(told.heard_ms)
    assert told.utterances.dropped(told.heard_ms) == [Cleared(4000)]


def test_nobody_says_a_book_in_a_second() -> None:
    told = Told()
    told.hear(1000)
    with pytest.raises(BadAnswer):
        told.words("word " * 1000, 0, 1.0)
    with pytest.raises(BadAnswer):
        for _ in range(200):
            told.words("a few words", 0, 1.0, is_final=True, speech_final=True)
            told.hear(1)


def test_scripts_without_spaces_get_none() -> None:
    told = Told()
    told.hear(4000)
    told.words("你好", 0, 1.0, is_final=True)
    told.words("世界", 1.0, 1.0, is_final=True, speech_final=True)
    assert told.finals[0].text == "你好世界"


@pytest.mark.parametrize(
    ("languages", "language"),
    [(["de", "de", "en"], "de"), (["zh-HK"], "yue"), (["en-US"], "en"), (["xx", "tlh"], "und"), ([], "und")],
)
def test_the_language_is_that_of_most_words(languages: list[str], language: str) -> None:
    told = Told()
    told.hear(4000)
    words = [{"word": "w", "start": 0.1, "end": 0.2, "language": one} for one in languages]
    channel = {"alternatives": [{"transcript": "w", "words": words}]}
    told.say("Results", start=0, duration=1, is_final=True, speech_final=True, channel=channel)
    assert told.finals[0].language == language


def test_without_partials_only_finals_are_told() -> None:
    told = Told(Options(partials=False))
    told.hear(4000)
    told.words("Tell", 0, 1.0)
    told.words("Tell me.", 0, 2.0, is_final=True, speech_final=True)
    assert [type(event) for event in told.events] == [SpeechStarted, Final]
    assert told.finals[0].words == ()
