import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from dispatchers.engine.meeting import Meeting


class Model:
    """Doubles numbers, and keeps what it was asked together."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self._lock = threading.Lock()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        with self._lock:
            self.batches.append(sorted(numbers))
        if 13 in numbers:
            raise ValueError("unlucky")
        return [2 * number for number in numbers]


def meet(*members: Callable[[Meeting], object]) -> list[object]:
    """What each member returns or raises."""
    meeting = Meeting(len(members))

    def attend(member: Callable[[Meeting], object]) -> object:
        try:
            return member(meeting)
        except ValueError as error:
            return error
        finally:
            meeting.leave()

    with ThreadPoolExecutor(len(members)) as threads:
        return list(threads.map(attend, members, timeout=30))


def test_alone_is_a_batch_of_one() -> None:
    model = Model()
    assert Meeting().call("double", 3, model) == 6
    assert model.batches == [[3]]


def test_calls_of_one_kind_go_together_and_answers_are_not_mixed_up() -> None:
    model = Model()
    members = [lambda meeting, n=n: meeting.call(n % 2, n, model) for n in range(6)]
    assert meet(*members) == [0, 2, 4, 6, 8, 10]
    assert sorted(model.batches) == [[0, 2, 4], [1, 3, 5]]


def test_who_leaves_is_not_waited_for() -> None:
    model = Model()
    assert meet(lambda _: None, lambda meeting: meeting.call("", 1, model)) == [None, 2]
    assert model.batches == [[1]]


def test_in_a_batch_that_fails_each_is_tried_alone() -> None:
    model = Model()
    first, bad, last = meet(*(lambda meeting, n=n: meeting.call("", n, model) for n in (1, 13, 2)))
    assert (first, last) == (2, 4)
    assert isinstance(bad, ValueError)
    assert sorted(map(len, model.batches)) == [1, 1, 1, 3]


@pytest.mark.parametrize("seed", range(20))
def test_any_number_of_rounds(seed: int) -> None:
    """Members make different numbers of calls of different kinds; all are answered, and none waits for ever."""
    model, draw = Model(), random.Random(seed)
    plans = [
        [(draw.choice("ab"), draw.randrange(20)) for _ in range(draw.randrange(6))] for _ in range(draw.randrange(1, 7))
    ]

    def member(plan: list[tuple[str, int]]) -> Callable[[Meeting], object]:
        def attend(meeting: Meeting) -> list[int | None]:
            found: list[int | None] = []
            for kind, number in plan:
                try:
                    found.append(meeting.call(kind, number, model))
                except ValueError:
                    found.append(None)
            return found

        return attend

    expected = [[None if number == 13 else 2 * number for _, number in plan] for plan in plans]
    assert meet(*map(member, plans)) == expected
