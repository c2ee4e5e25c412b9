"""Deltas are append-only, and end as the final."""

from itertools import accumulate
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from dispatchers.audio.stabilise import Stabiliser, normal

words = st.lists(st.sampled_from(["we", "need", "to", "cancel", "We", "need,", "日", "本", "日本語", "a"]), max_size=6)
texts = words.map(" ".join)
LATER = 60_000  # there was time to say any of it


def test_what_three_hypotheses_agree_on_is_firm_but_for_the_newest_word():
    stabiliser = Stabiliser()
    assert stabiliser.partial("we need", LATER) == (None, 0, "we need")
    assert stabiliser.partial("we need to", LATER) == (None, 0, "we need to")
    assert stabiliser.partial("we need to", LATER) == ("we need", 7, "we need to")
    assert stabiliser.partial("we need to", LATER) == (None, 7, "we need to")
    assert stabiliser.partial("we need to cancel", LATER) == (" to", 10, "we need to cancel")
    assert stabiliser.final("we need to cancel the") == (" cancel the", False)


def test_the_newest_three_words_need_a_third_hypothesis():
    stabiliser = Stabiliser()
    stabiliser.partial("we need to cancel the", LATER)
    assert stabiliser.partial("we need to cancel the", LATER)[0] == "we need"
    assert stabiliser.partial("we need to cancel the address book", LATER)[0] == " to cancel the"
    assert stabiliser.partial("we need to cancel the address book", LATER)[0] is None
    assert stabiliser.partial("we need to cancel the address book for", LATER)[0] == " address book"
    assert stabiliser.partial("we need to cancel the address book for four", LATER)[0] is None
    assert stabiliser.partial("we need to cancel the address book for four", LATER)[0] == " for"


def test_firm_text_is_shown_even_when_a_hypothesis_leaves_it():
    stabiliser = Stabiliser()
    for _ in range(3):
        stabiliser.partial("we need to go", LATER)
    assert stabiliser.partial("he needs to go now", LATER) == (None, 10, "we need to go now")
    assert stabiliser.final("he needs to go") == (None, True)


def test_nothing_firm_and_nothing_left():
    assert Stabiliser().final("hello") == ("hello", False)
    assert Stabiliser().final("  ") == (None, False)
    stabiliser = Stabiliser()
    for _ in range(3):
        stabiliser.partial("a b c", LATER)
    assert stabiliser.final("a b") == (None, False)


def test_scripts_without_spaces_firm_up_by_sign():
    stabiliser = Stabiliser()
    stabiliser.partial("今日は", LATER)
    assert stabiliser.partial("今日は晴", LATER) == ("今", 1, "今日は晴")
    assert stabiliser.partial("今日は晴", LATER) == ("日は", 3, "今日は晴")


def test_what_a_recogniser_is_unsure_of_needs_five_alike():
    stabiliser = Stabiliser()
    for _ in range(4):
        assert stabiliser.partial("we need to", LATER, unsure=True)[0] is None
    assert stabiliser.partial("we need to", LATER, unsure=True)[0] == "we need"
    assert stabiliser.partial("we need to cancel", LATER)[0] == " to", "a sure one needs no more than ever"


def test_nothing_is_firm_before_there_was_time_to_say_it():
    stabiliser = Stabiliser(start_ms=1_000)
    assert stabiliser.partial("what is the doctor", 1_300)[0] is None
    assert stabiliser.partial("what is the doctor is in the", 1_700)[0] is None
    assert stabiliser.partial("what is the doctor is in", 1_800)[0] == "what"
    assert stabiliser.partial("what is the doctor is in the car", 2_300)[0] == " is the"
    signs = Stabiliser()
    signs.partial("今日は晴れ", 700)
    assert signs.partial("今日は晴れ", 750)[0] == "今日", "a sign is said faster than a word"


@settings(deadline=None)
@given(st.lists(st.tuples(texts, st.booleans(), st.integers(0, 900)), max_size=8), texts)
def test_deltas_are_never_taken_back(hypotheses: list[tuple[str, bool, int]], final: str):
    stabiliser, sent, now = Stabiliser(), "", 0
    for hypothesis, unsure, step in hypotheses:
        now += step
        delta, stable, shown = stabiliser.partial(hypothesis, now, unsure=unsure)
        assert delta != ""
        assert sent or not (delta or "").startswith(" ")
        sent += delta or ""
        assert shown[:stable] == sent
        assert len(sent) == stable
    delta, revised = stabiliser.final(final)
    if revised:
        assert delta is None
        assert not normal(final).startswith(sent)
    else:
        assert sent + (delta or "") == normal(final)


@settings(deadline=None)
@given(words)
def test_a_steady_recogniser_is_never_revised(said: list[str]):
    stabiliser = Stabiliser()
    for count in range(len(said)):
        stabiliser.partial(" ".join(said[:count]), LATER)
    assert stabiliser.final(" ".join(said))[1] is False


def test_what_is_overdue_is_firm_as_it_stands():
    stabiliser = Stabiliser(start_ms=1_000)
    assert stabiliser.overdue(9_000) is None
    stabiliser.partial("we need", 1_500)
    assert stabiliser.overdue(999) is None
    assert stabiliser.overdue(1_000) == "we need"
    assert stabiliser.overdue(1_000) is None
    stabiliser.partial("we need to cancel", 2_000)
    assert stabiliser.overdue(1_499) is None
    assert stabiliser.partial("we needed to", 2_500) == (None, 7, "we needed to")
    assert stabiliser.overdue(1_500) == "ed to"
    assert stabiliser.partial("he needs it now please", 3_000) == (None, 12, "we needed to now please")
    assert stabiliser.overdue(2_500) == " now please", (
        "a word shown is sent, also after a hypothesis that left the text"
    )
    assert stabiliser.final("we needed to now please") == (None, False)


spoken = st.lists(
    st.tuples(st.integers(50, 600), st.sampled_from(["we", "need", "to", "cancel"])), min_size=1, max_size=12
)


@settings(deadline=None)
@given(spoken, st.lists(st.integers(100, 900), min_size=1, max_size=20), st.integers(700, 2_000), st.randoms())
def test_no_word_that_was_heard_is_late(said: list[tuple[int, str]], steps: list[int], max_delay: int, chance: Random):
    """A recogniser that hears every word once it is spoken, and is wrong about any of them."""
    ends = list(accumulate(length for length, _ in said))
    stabiliser, sent, now = Stabiliser(), "", 0
    for step in steps:
        now += step
        heard = [
            word if chance.random() < 0.8 else "um" for (_, word), end in zip(said, ends, strict=True) if end <= now
        ]
        delta, _, shown = stabiliser.partial(" ".join(heard), now)
        sent += delta or ""
        sent += stabiliser.overdue(now - max_delay) or ""
        assert shown.startswith(sent)
        late = sum(end <= now - max_delay for end in ends)
        assert len(sent.split()) >= late
    final = " ".join(word for _, word in said)
    delta, revised = stabiliser.final(final)
    assert revised == (not final.startswith(sent))
    assert revised or sent + (delta or "") == final
