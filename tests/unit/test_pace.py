"""How fast frames are taken, by a clock of our own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from gateway.live.pace import BURST_S, Pace


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_passes_and_the_rest_is_spread_out() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    waits = [pace.wait_s() for _ in range(round(10 * BURST_S) + 5)]
    assert waits[:20] == [0.0] * 20
    assert waits[20:] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_who_keeps_to_the_rate_never_waits() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    for _ in range(1_000):
        clock.now += 0.1
        assert pace.wait_s() == 0.0


def test_in_the_long_run_the_rate_holds() -> None:
    clock = Clock()
    pace = Pace(50, clock)
    for _ in range(1_000):
        clock.now += pace.wait_s()
    assert clock.now - 100.0 == pytest.approx(1_000 / 50 - BURST_S, abs=0.1)


def test_a_long_silence_saves_up_no_more_than_a_burst() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    clock.now += 3_600
    waits = [pace.wait_s() for _ in range(round(10 * BURST_S) + 2)]
    assert sum(wait > 0 for wait in waits) == 2
