"""Whatever AssemblyAI says, in whatever order: our events keep their promises, and what it says well is told whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatchers.backends.assemblyai_turns import Turns
from dispatchers.backends.assemblyai_wire import Turn, load_message
from dispatchers.backends.relay import Account
from dispatchers.errors import BadAnswer
from dispatchers.interface import Cleared, Delta, Event, Final, Gap, Options, Partial, SpeechStarted, VadOptions

ACCOUNT = Account("assemblyai", "http://localhost", "key", "key", ("universal-3-pro",))
OPTIONS = Options(words=True, vad=VadOptions(silence_ms=500, max_utterance_ms=8_000))


def word(text: str, start: Any, end: Any, *, final: bool = True) -> dict[str, Any]:
    return {"text": text, "start": start, "end": end, "confidence": 0.9, "word_is_final": final}


class Told:
    """One stream: what is said of it, and every event so far."""

    def __init__(self, options: Options = OPTIONS, *, formatted: bool = False):
        self.turns = Turns(options, formatted=formatted)
        self.heard_ms = 0
        self.events: list[Event] = []

    def hear(self, ms: int) -> None:
        self.heard_ms += ms

    def say(self, order: int, words: list[dict[str, Any]], transcript: str | None = None, **flags: Any) -> list[Event]:
        """As it comes over the wire."""
        final = " ".join(each["text"] for each in words if each["word_is_final"])
        members = {
            "turn_order": order,
            "turn_is_formatted": False,
            "end_of_turn": False,
            "transcript": final if transcript is None else transcript,
            "end_of_turn_confidence": 0.5,
            "words": words,
        }
        message = load_message(ACCOUNT, json.dumps({"type": "Turn", **members, **flags}))
        assert isinstance(message, Turn)
        new = self.turns.turn(message, self.heard_ms)
        self.events += new
        return new

    def finish(self) -> list[Event]:
        new = self.turns.finish()
        self.events += new
        return new

    def clear(self) -> None:
        self.turns.drop(self.heard_ms)
        self.events += self.turns.dropped(self.heard_ms)

    @property
    def finals(self) -> list[Final]:
        return [event for event in self.events if isinstance(event, Final)]


def at(start_ms: int, text: str, firm: int | None = None) -> list[dict[str, Any]]:
    """Words of 400 ms each, the first `firm` of them final."""
    said = text.split()
    most = len(said) if firm is None else firm
    return [
        word(each, start_ms + 400 * place, start_ms + 400 * (place + 1), final=place < most)
        for place, each in enumerate(said)
    ]


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
                assert event.text
                assert event.revised == (sent[event.utterance] != event.text)
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


ms = st.one_of(st.integers(-2_000, 30_000), st.sampled_from([-(10**30), 10**30, 0, -1]))
text = st.text(st.sampled_from("ab 的\x00\x1f\n.,"), max_size=12)
words = st.lists(
    st.fixed_dictionaries(
        {"text": text, "start": ms, "end": ms, "confidence": st.floats(-2, 3), "word_is_final": st.booleans()}
    ),
    max_size=4,
)
turns = st.fixed_dictionaries(
    {
        "order": st.integers(0, 4),
        "words": words,
        "transcript": text,
        "end_of_turn": st.booleans(),
        "turn_is_formatted": st.booleans(),
    }
)
steps = st.lists(st.one_of(turns, st.integers(0, 3000), st.sampled_from(["flush", "clear", "settle"])), max_size=30)


@given(steps, st.booleans())
def test_whatever_is_said_the_events_keep_their_promises(steps: list[Any], formatted: bool) -> None:
    told = Told(formatted=formatted)
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
            case "settle":
                told.events += told.turns.settle()
            case turn:
                told.say(**turn)
    told.finish()
    check(told)


spoken = st.lists(st.lists(st.sampled_from(["One", "two", "three."]), min_size=1, max_size=6), max_size=6)


@given(spoken, st.booleans(), st.booleans(), st.integers(0, 2))
def test_what_is_final_is_told_once_and_whole(
    spoken: list[list[str]], formatted: bool, flushed: bool, unsure: int
) -> None:
    """Turns as AssemblyAI makes them: word by word, the last of them unsure; then its end, perhaps once more."""
    told = Told(formatted=formatted)
    start_ms = 0
    for order, turn in enumerate(spoken):
        written = " ".join(turn)
        plain = written.lower().replace(".", "") if formatted else written
        for count in range(1, len(turn) + 1):
            told.hear(400)
            so_far = " ".join(plain.split()[:count])
            told.say(order, at(start_ms, so_far, max(0, count - unsure)))
        told.hear(600)
        if flushed:
            told.finish()
        told.say(order, at(start_ms, plain), end_of_turn=True)
        if formatted:
            told.say(order, at(start_ms, written), end_of_turn=True, turn_is_formatted=True)
        start_ms += 400 * len(turn) + 600
    told.finish()
    check(told)
    expected = " ".join(word for turn in spoken for word in turn)
    if formatted and flushed:
        expected = expected.lower().replace(".", "")
    assert " ".join(final.text for final in told.finals) == expected
    if not formatted:
        assert not any(final.revised for final in told.finals)


def test_words_become_firm_one_by_one() -> None:
    told = Told()
    told.hear(3000)
    assert told.say(0, at(400, "Tell m", 1)) == [
        SpeechStarted(1, 400),
        Delta(1, "Tell", 400, 800),
        Partial(1, "Tell m", 4, 400, 1_200),
    ]
    assert told.say(0, at(400, "Tell me", 2)) == [Delta(1, " me", 800, 1_200)]
    *_, final = told.say(0, at(400, "Tell me more."), end_of_turn=True)
    assert isinstance(final, Final)
    assert (final.text, final.revised, final.end_ms) == ("Tell me more.", False, 1_600)


def test_what_is_formatted_later_revises() -> None:
    told = Told(formatted=True)
    told.hear(3000)
    told.say(0, at(400, "tell me"), end_of_turn=True)
    assert told.finals == []
    assert told.turns.awaits_format
    told.say(0, at(400, "Tell me."), end_of_turn=True, turn_is_formatted=True)
    (final,) = told.finals
    assert (final.text, final.revised) == ("Tell me.", True)
    assert [each.text for each in final.words] == ["Tell", "me."]
    assert told.say(0, at(400, "TELL ME."), end_of_turn=True, turn_is_formatted=True) == []
    check(told)


@pytest.mark.parametrize("late", [True, False])
def test_what_is_not_formatted_stays_as_it_is(late: bool) -> None:
    told = Told(formatted=True)
    told.hear(6000)
    told.say(0, at(400, "tell me"), end_of_turn=True)
    if late:
        told.events += told.turns.settle()
        assert told.say(0, at(400, "Tell me."), end_of_turn=True, turn_is_formatted=True) == []
    else:
        told.say(1, at(3_000, "more"))
    assert [(final.text, final.revised) for final in told.finals] == [("tell me", False)]
    told.finish()
    check(told)


def test_what_was_told_is_not_taken_back() -> None:
    told = Told()
    told.hear(3000)
    told.say(0, at(400, "their"))
    assert told.say(0, at(400, "there it", 2)) == []
    told.say(0, at(400, "there it is"), end_of_turn=True)
    assert [event.text for event in told.events if isinstance(event, Delta)] == ["their"]
    assert [(final.text, final.revised) for final in told.finals] == [("there it is", True)]
    check(told)


def test_a_longer_word_is_another() -> None:
    told = Told()
    told.hear(3000)
    told.say(0, at(400, "hi"))
    told.say(0, at(400, "high there"), end_of_turn=True)
    assert [(final.text, final.revised) for final in told.finals] == [("high there", True)]
    check(told)


def test_what_was_cut_is_not_told_again() -> None:
    told = Told()
    told.hear(3000)
    told.say(0, at(400, "Tell me m", 2))
    told.finish()
    told.hear(1000)
    told.say(0, at(400, "Tell me more. Again."), end_of_turn=True)
    assert [final.text for final in told.finals] == ["Tell me m", "Again."]
    check(told)


def test_what_was_cleared_is_not_told_though_it_is_answered_late() -> None:
    told = Told()
    told.hear(2000)
    told.say(0, at(400, "forget", 0))
    told.turns.drop(told.heard_ms)
    assert told.say(0, at(400, "forget this"), end_of_turn=True) == []
    assert told.turns.dropped(told.heard_ms) == [Gap(400, 2000, "cleared"), Cleared(2000)]
    told.hear(2000)
    told.turns.drop(told.heard_ms)
    assert told.say(1, at(2_400, "and this"), end_of_turn=True) == []
    assert told.turns.dropped(told.heard_ms) == [Gap(2_400, 4000, "cleared"), Cleared(4000)]
    told.turns.drop(told.heard_ms)
    assert told.turns.dropped(told.heard_ms) == [Cleared(4000)]


def test_nobody_says_a_book_in_a_second() -> None:
    told = Told()
    told.hear(1000)
    with pytest.raises(BadAnswer):
        told.say(0, at(0, "word " * 1000))
    with pytest.raises(BadAnswer):
        for order in range(200):
            told.say(order, at(0, "a few words"), end_of_turn=True)
            told.hear(1)


def test_scripts_without_spaces_get_none() -> None:
    told = Told()
    told.hear(4000)
    told.say(0, at(0, "你好"))
    told.say(0, at(0, "你好 世界"), transcript="你好世界", end_of_turn=True)
    assert [(final.text, final.revised) for final in told.finals] == [("你好世界", False)]


@pytest.mark.parametrize(("said", "language"), [("de", "de"), ("en_us", "en"), ("tlh", "und"), (None, "und")])
def test_the_language_is_a_code_we_know(said: str | None, language: str) -> None:
    told = Told()
    told.hear(4000)
    told.say(0, at(0, "w"), end_of_turn=True, language_code=said)
    assert told.finals[0].language == language


def test_without_partials_only_finals_are_told() -> None:
    told = Told(Options(partials=False), formatted=True)
    told.hear(4000)
    told.say(0, at(0, "tell", 0))
    told.say(0, at(0, "tell me"), end_of_turn=True)
    told.say(0, at(0, "Tell me."), end_of_turn=True, turn_is_formatted=True)
    assert [type(event) for event in told.events] == [SpeechStarted, Final]
    assert not told.finals[0].revised
    assert told.finals[0].words == ()
