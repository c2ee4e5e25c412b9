"""When a backend is asked, and when it is left alone."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatchers.errors import (
    AudioTooLong,
    BackendFailed,
    BackendRefused,
    BackendTimeout,
    BackendUnavailable,
    CredentialRefused,
    DispatchError,
    Overloaded,
    Throttled,
    UnsupportedOption,
)
from dispatchers.health import Breaker, Limits, RetryBudget
from policy.errors import TokenExpired

LIMITS = Limits()


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Asked:
    """A breaker and its clock."""

    clock: Clock = field(default_factory=Clock)
    breaker: Breaker = field(init=False)

    def __post_init__(self) -> None:
        self.breaker = Breaker("deepgram", clock=self.clock)

    def ask(self, outcome: Exception | None = None) -> None:
        """A request that passes."""
        expected = () if outcome is None else (type(outcome),)
        with suppress(*expected), self.breaker.attempt():
            if outcome is not None:
                raise outcome

    def fail(self, times: int = LIMITS.in_a_row) -> None:
        for _ in range(times):
            self.ask(BackendFailed())


def test_failures_in_a_row_open_it() -> None:
    asked = Asked()
    asked.fail(LIMITS.in_a_row - 1)
    asked.ask()
    asked.fail(LIMITS.in_a_row - 1)
    assert asked.breaker.up
    asked.fail(1)
    assert (asked.breaker.state, asked.breaker.up) == ("open", False)
    with pytest.raises(BackendUnavailable) as refusal, asked.breaker.attempt():
        pytest.fail("nothing passes")
    assert refusal.value.retry_after_s == pytest.approx(LIMITS.open_s)


def test_every_other_failure_opens_it_too() -> None:
    asked = Asked()
    for _ in range(LIMITS.least // 2):
        assert asked.breaker.up
        asked.ask()
        asked.ask(BackendTimeout())
    assert asked.breaker.state == "open"


def test_failures_of_long_ago_do_not_count() -> None:
    asked = Asked()
    for _ in range(4 * LIMITS.least):
        asked.ask()
        asked.ask(BackendTimeout())
        asked.clock.now += LIMITS.window_s / 3
    assert asked.breaker.state == "closed"


def test_one_request_decides_when_the_time_is_over() -> None:
    asked = Asked()
    asked.fail()
    asked.clock.now += LIMITS.open_s
    assert (asked.breaker.state, asked.breaker.up) == ("half_open", True)
    with asked.breaker.attempt():
        assert not asked.breaker.up
        with pytest.raises(BackendUnavailable), asked.breaker.attempt():
            pytest.fail("a second one does not pass")
    assert asked.breaker.state == "closed"


def test_each_time_it_is_open_for_longer_but_not_for_ever() -> None:
    asked = Asked()
    asked.fail()
    waits = []
    for _ in range(10):
        waits.append(asked.breaker.retry_after_s or 0.0)
        asked.clock.now += waits[-1]
        asked.ask(BackendFailed())
    assert waits[:3] == [5.0, 10.0, 20.0]
    assert waits[-1] == LIMITS.open_most_s
    asked.clock.now += LIMITS.open_most_s
    asked.ask()
    asked.clock.now += LIMITS.open_most_s + 1  # well for long enough: it begins anew
    asked.fail()
    assert asked.breaker.retry_after_s == pytest.approx(LIMITS.open_s)


async def test_a_cancelled_probe_leaves_the_place_to_the_next() -> None:
    asked = Asked()
    asked.fail()
    asked.clock.now += LIMITS.open_s

    async def probe() -> None:
        with asked.breaker.attempt():
            await asyncio.Event().wait()

    task = asyncio.create_task(probe())
    await asyncio.sleep(0)
    assert not asked.breaker.up
    task.cancel()
    await asyncio.wait({task})
    assert asked.breaker.up


def test_a_pause_that_was_asked_for_is_no_failure() -> None:
    asked = Asked()
    asked.ask(Throttled(retry_after_s=7.0))
    assert (asked.breaker.state, asked.breaker.up) == ("cooling", False)
    assert asked.breaker.retry_after_s == pytest.approx(7.0)
    asked.clock.now += 7.0
    assert asked.breaker.state == "closed"
    asked.fail(LIMITS.in_a_row - 1)
    assert asked.breaker.up


def test_a_credential_that_is_refused_stays_so() -> None:
    asked = Asked()
    asked.ask(CredentialRefused("deepgram does not accept the credential dg-123…"))
    asked.clock.now += 1e9
    assert (asked.breaker.state, asked.breaker.up, asked.breaker.retry_after_s) == ("refused", False, None)
    assert "dg-123…" in asked.breaker.why_down


@pytest.mark.parametrize(
    "error",
    [BackendRefused(), Overloaded(), TokenExpired(), DispatchError(), UnsupportedOption(), AudioTooLong()],
)
def test_what_is_not_the_backends_fault_never_counts(error: Exception) -> None:
    asked = Asked()
    for _ in range(100):
        asked.ask(error)
    assert asked.breaker.state == "closed"


def test_a_refused_request_shows_that_it_lives() -> None:
    asked = Asked()
    asked.fail()
    asked.clock.now += LIMITS.open_s
    asked.ask(BackendRefused())
    assert asked.breaker.state == "closed"


@pytest.mark.parametrize("error", [UnsupportedOption(), AudioTooLong()])
def test_what_it_was_not_asked_shows_nothing(error: Exception) -> None:
    asked = Asked()
    asked.fail()
    asked.clock.now += LIMITS.open_s
    asked.ask(error)
    assert (asked.breaker.state, asked.breaker.up) == ("half_open", True)


def test_what_nobody_foresaw_is_a_failure() -> None:
    asked = Asked()
    for _ in range(LIMITS.in_a_row):
        asked.ask(KeyError("results"))
    assert asked.breaker.state == "open"


OUTCOMES = st.sampled_from([None, BackendFailed(), Throttled(retry_after_s=3.0), BackendRefused(), Overloaded()])


@given(st.lists(st.tuples(OUTCOMES, st.floats(0, 20)), max_size=200))
def test_whatever_happens_it_is_tried_again(history: list[tuple[Exception | None, float]]) -> None:
    """It is never stuck, and never lets one pass that it said would not."""
    asked = Asked()
    for outcome, later in history:
        if asked.breaker.up:
            asked.ask(outcome)
        else:
            with pytest.raises(BackendUnavailable), asked.breaker.attempt():
                pytest.fail("it said no")
        asked.clock.now += later
    asked.clock.now += LIMITS.open_most_s
    assert asked.breaker.up
    asked.ask()
    assert asked.breaker.state == "closed"


# --- the retry budget -------------------------------------------------------------------------------------------------


def test_a_few_may_always_be_tried_elsewhere() -> None:
    budget = RetryBudget(clock=Clock())
    assert [budget.take() for _ in range(12)] == [True] * 10 + [False] * 2


def test_of_many_a_fifth() -> None:
    clock = Clock()
    budget = RetryBudget(clock=clock)
    for _ in range(1000):
        budget.asked()
    assert sum(budget.take() for _ in range(1000)) == 200
    clock.now += 10.0
    assert not budget.take()  # what was before this window counts for one more
    clock.now += 10.0
    assert budget.take()
