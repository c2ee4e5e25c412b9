import pytest

from dispatchers.engine.rhythm import LONGEST_WINDOW_S, Rhythm


def beaten(*gaps: float) -> tuple[Rhythm, float]:
    rhythm, now = Rhythm(), 100.0
    for gap in gaps:
        now += gap
        rhythm.beat(now)
    return rhythm, now


def test_at_rest_nothing_is_waited_for() -> None:
    assert Rhythm().window(8, 0) == 0
    rhythm, now = beaten(*[0.5] * 10)
    assert rhythm.window(8, now) == 0


def test_under_load_it_waits_for_as_many_as_are_missing_and_never_long() -> None:
    rhythm, now = beaten(*[0.001] * 60)
    assert rhythm.window(3, now) == pytest.approx(0.003, rel=0.05)
    assert rhythm.window(1000, now) == LONGEST_WINDOW_S


def test_a_rest_ends_the_rush_and_a_rush_the_rest() -> None:
    rhythm, now = beaten(*[0.001] * 60)
    assert rhythm.window(3, now + 1) == 0
    rhythm.beat(now + 60)
    assert rhythm.window(3, now + 60) == 0
    rhythm, now = beaten(60, *[0.001] * 20)
    assert rhythm.window(3, now) > 0


def test_what_was_in_vain_is_not_tried_again_at_once() -> None:
    """One caller with quick answers: the pieces are close, and never together."""
    rhythm, now = Rhythm(), 100.0
    windows = 0
    for _ in range(600):  # about 10 s
        now += 0.016
        rhythm.beat(now)
        if rhythm.window(7, now) > 0:
            windows += 1
            now += LONGEST_WINDOW_S
            rhythm.gathered(now, company=False)
    assert 3 < windows < 15
    rhythm, now = beaten(*[0.001] * 60)
    rhythm.gathered(now, company=True)
    assert rhythm.window(3, now) > 0
