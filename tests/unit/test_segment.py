"""Utterances from probabilities, on the sample clock alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatchers.audio.segment import PRE_ROLL, TAIL, Action, Ended, Segmenter, Started
from dispatchers.audio.tape import Tape
from dispatchers.audio.vad import FRAME
from dispatchers.interface import VadOptions

OPTIONS = VadOptions(threshold=0.6, silence_ms=320, min_speech_ms=160, max_utterance_ms=3_200)


def audio(frames: int, start: int = 0) -> np.ndarray:
    """Every sample says where it stands."""
    return (np.arange(start, start + frames * FRAME) % 30_000).astype(np.int16)


def hear(segmenter: Segmenter, probabilities: list[float]) -> list[Action]:
    actions: list[Action] = []
    for probability in probabilities:
        samples = audio(1, segmenter.accepted)
        actions += segmenter.feed(samples, np.array([probability], np.float32))
    return actions


def test_an_utterance_with_its_pre_roll_and_tail():
    actions = hear(Segmenter(OPTIONS), [0.0] * 20 + [0.9] * 10 + [0.0] * 10)
    start, end = 20 * FRAME - PRE_ROLL, 30 * FRAME + TAIL
    assert actions[0] == Started(1, start)
    ended = actions[1]
    assert isinstance(ended, Ended)
    assert (ended.utterance, ended.start, ended.end) == (1, start, end)
    assert np.array_equal(ended.audio, audio(50)[start:end])
    assert len(actions) == 2


def test_pre_roll_reaches_neither_before_the_stream_nor_into_the_last_utterance():
    actions = hear(Segmenter(OPTIONS), [0.9] * 10 + [0.0] * 10 + [0.9] * 10 + [0.0] * 10)
    first, _, second, _ = actions
    assert (first, second) == (Started(1, 0), Started(2, max(10 * FRAME + TAIL, 20 * FRAME - PRE_ROLL)))


def test_a_click_never_starts():
    assert hear(Segmenter(OPTIONS), ([0.0] * 7 + [0.9] * 2) * 10 + [0.0] * 20) == []


def test_announced_as_soon_as_there_is_speech_enough():
    segmenter = Segmenter(OPTIONS)
    assert hear(segmenter, [0.9] * 4) == []
    assert hear(segmenter, [0.9]) == [Started(1, 0)]


def test_hysteresis_and_short_pauses_do_not_end():
    assert len(hear(Segmenter(OPTIONS), [0.9] * 6 + [0.5] * 30 + [0.0] * 9 + [0.5] + [0.0] * 9)) == 1


def test_in_a_lull_so_far_is_what_the_end_will_bring():
    segmenter = Segmenter(OPTIONS)
    hear(segmenter, [0.9] * 10 + [0.0] * 5)
    assert (segmenter.voiced_until, segmenter.lulled) == (10 * FRAME, False)
    hear(segmenter, [0.0])
    assert segmenter.lulled
    meanwhile = segmenter.so_far()
    (ended,) = hear(segmenter, [0.0] * 4)
    assert isinstance(ended, Ended)
    assert meanwhile is not None
    assert (meanwhile.utterance, meanwhile.start, meanwhile.end) == (ended.utterance, ended.start, ended.end)
    assert np.array_equal(meanwhile.audio, ended.audio)
    assert (segmenter.voiced_until, segmenter.lulled) == (0, False)


def test_speech_ends_a_lull():
    segmenter = Segmenter(OPTIONS)
    hear(segmenter, [0.9] * 10 + [0.0] * 8)
    assert segmenter.lulled
    hear(segmenter, [0.9])
    assert (segmenter.voiced_until, segmenter.lulled) == (19 * FRAME, False)


def test_a_cleared_utterance_reaches_to_the_last_sample():
    segmenter = Segmenter(OPTIONS)
    hear(segmenter, [0.9] * 10 + [0.0] * 9)
    dropped = segmenter.clear()
    assert dropped is not None
    assert (dropped.start, dropped.end) == (0, 19 * FRAME)


def test_long_speech_is_cut_at_its_quietest_point_and_goes_on():
    segmenter = Segmenter(OPTIONS)
    loud = np.full(100 * FRAME, 9_000, np.int16)
    quiet_at = 70 * FRAME
    loud[quiet_at : quiet_at + FRAME] = 5
    actions = list(segmenter.feed(loud, np.full(100, 0.9, np.float32)))
    started, ended, again = actions
    assert started == Started(1, 0)
    assert isinstance(ended, Ended)
    assert abs(ended.end - quiet_at - FRAME // 2) <= FRAME
    assert again == Started(2, ended.end)
    (last,) = segmenter.flush()
    assert isinstance(last, Ended)
    assert (last.start, last.end) == (ended.end, 100 * FRAME)


def test_flush_ends_at_once_and_includes_the_unfinished_frame():
    segmenter = Segmenter(OPTIONS)
    hear(segmenter, [0.9] * 10)
    list(segmenter.feed(np.ones(100, np.int16), np.empty(0, np.float32)))
    (ended,) = segmenter.flush()
    assert isinstance(ended, Ended)
    assert ended.end == segmenter.accepted == 10 * FRAME + 100
    assert list(segmenter.flush()) == []
    assert hear(segmenter, [0.9] * 5) == [Started(2, ended.end)]


def test_flush_drops_what_was_never_announced():
    segmenter = Segmenter(OPTIONS)
    hear(segmenter, [0.9] * 3)
    assert list(segmenter.flush()) == []


def test_clear_gives_back_what_it_drops():
    segmenter = Segmenter(OPTIONS)
    assert segmenter.clear() is None
    hear(segmenter, [0.9] * 6)
    dropped = segmenter.clear()
    assert dropped is not None
    assert (dropped.start, dropped.end) == (0, 6 * FRAME)
    assert hear(segmenter, [0.0] * 20) == []
    assert segmenter.so_far() is None


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]), st.integers(1, 40)), max_size=20),
    st.integers(0, FRAME - 1),
)
def test_whatever_comes_utterances_are_whole_ordered_and_bounded(runs: list[tuple[float, int]], rest: int):
    segmenter = Segmenter(OPTIONS)
    actions = hear(segmenter, [probability for probability, frames in runs for _ in range(frames)])
    actions += segmenter.feed(np.zeros(rest, np.int16), np.empty(0, np.float32))
    actions += segmenter.flush()
    assert len(actions) % 2 == 0
    floor = 0
    for number, (started, ended) in enumerate(zip(actions[::2], actions[1::2], strict=True), start=1):
        assert isinstance(started, Started)
        assert isinstance(ended, Ended)
        assert started.utterance == ended.utterance == number
        assert floor <= started.start == ended.start < ended.end <= segmenter.accepted
        assert len(ended.audio) == ended.end - ended.start <= OPTIONS.max_utterance_ms * 16 + FRAME
        floor = ended.end


def test_the_tape_forgets_and_stays_small():
    tape, said = Tape(), audio(4_000)
    for at in range(0, len(said), 1_000):
        tape.append(said[at : at + 1_000])
        tape.forget(tape.end - 3_000)
        assert np.array_equal(tape.cut(tape.start, tape.end), said[tape.start : tape.end])
    assert tape._store.nbytes <= 2 * 64_000
    with pytest.raises(IndexError):
        tape.cut(0, 10)
    tape.forget(10**9)
    assert tape.start == tape.end == len(said)


def test_the_tape_grows_for_long_utterances():
    tape, said = Tape(), audio(1_000)
    tape.append(said[:100])
    tape.append(said[100:])
    assert np.array_equal(tape.cut(0, len(said)), said)
