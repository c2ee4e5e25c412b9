"""Whom the scheduler serves when, for any workload: one worker is held, a crowd queues up, the worker is let go."""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from dispatchers.engine.scheduler import Scheduler
from dispatchers.errors import Superseded
from dispatchers.interface import Urgency

RANK: dict[Urgency, int] = {"final": 0, "partial": 1, "batch": 2}


@dataclass(frozen=True)
class Asked:
    """One piece of a workload. Seconds are quarters, which floats add up exactly."""

    urgency: Urgency
    share: str
    seconds: float
    stream: str = ""
    kind: str | None = None


SECONDS = st.integers(1, 120).map(lambda quarters: quarters / 4)
SHARES = st.sampled_from("abc")
UNTIED = st.builds(Asked, st.sampled_from(sorted(RANK)), SHARES, SECONDS)
PARTIALS = st.builds(
    lambda stream, seconds, urgency: Asked(urgency, stream[0], seconds, stream),
    st.sampled_from(["a1", "a2", "b1"]),
    SECONDS,
    st.sampled_from(["partial", "partial", "partial", "final"]),
)


async def served(crowd: Sequence[Asked], *, batch_limit: int = 1) -> tuple[list[int], list[object]]:
    """The places in the crowd of those who ran, in that order; and how each of the crowd fared: None, or its error."""
    scheduler = Scheduler(workers=1, queue_limit=len(crowd), batch_limit=batch_limit)
    open_, order = threading.Event(), list[int]()
    held = asyncio.create_task(scheduler.run(open_.wait, 30))
    await asyncio.sleep(0)
    tasks = [
        asyncio.create_task(
            scheduler.seat(
                lambda _, at=at: order.append(at),
                urgency=asked.urgency,
                share=asked.share,
                seconds=asked.seconds,
                stream=asked.stream,
                kind=asked.kind,
            )
        )
        for at, asked in enumerate(crowd)
    ]
    await asyncio.sleep(0)
    open_.set()
    fared = await asyncio.gather(*tasks, return_exceptions=True)
    await held
    assert scheduler.waiting == 0
    await scheduler.aclose()
    return order, list(fared)


@settings(max_examples=60, deadline=None)
@given(st.lists(UNTIED, min_size=1, max_size=25))
async def test_urgent_first_then_in_order_of_a_share(crowd: list[Asked]) -> None:
    order, fared = await served(crowd)
    assert sorted(order) == list(range(len(crowd)))
    assert fared == [None] * len(crowd)
    ranks = [RANK[crowd[at].urgency] for at in order]
    assert ranks == sorted(ranks)
    of_share = defaultdict(list)
    for at in order:
        of_share[crowd[at].share, crowd[at].urgency].append(at)
    assert all(places == sorted(places) for places in of_share.values())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.builds(Asked, st.just("final"), SHARES, SECONDS), min_size=2, max_size=25))
async def test_shares_that_wait_are_served_the_same_audio(crowd: list[Asked]) -> None:
    """While two shares wait, what they have been served differs by no more than the longest piece of each."""
    order, _ = await served(crowd)
    left = defaultdict(int)
    longest = defaultdict(float)
    for asked in crowd:
        left[asked.share] += 1
        longest[asked.share] = max(longest[asked.share], asked.seconds)
    got: dict[str, float] = defaultdict(float)
    for at in order:
        waiting = [share for share, count in left.items() if count]
        for one in waiting:
            for other in waiting:
                assert abs(got[one] - got[other]) <= longest[one] + longest[other]
        got[crowd[at].share] += crowd[at].seconds
        left[crowd[at].share] -= 1


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 40), SECONDS, SECONDS)
async def test_a_flood_delays_a_quiet_share_by_one_piece(flood: int, each: float, quiet: float) -> None:
    crowd = [Asked("final", "flood", each)] * flood + [Asked("final", "quiet", quiet)]
    order, _ = await served(crowd)
    assert order.index(flood) <= 1


async def test_long_pieces_count_for_more_than_short_ones() -> None:
    crowd = [Asked("final", "long", 10)] * 3 + [Asked("final", "short", 1)] * 12
    order, _ = await served(crowd)
    assert "".join(crowd[at].share[0] for at in order) == "l" + "s" * 10 + "l" + "ss" + "l"


async def test_being_idle_saves_nothing_up() -> None:
    """A share that was away while another was served 50 s gets no 50 s in a row when it comes."""
    scheduler = Scheduler(workers=1, queue_limit=64)
    for _ in range(5):
        await scheduler.seat(lambda _: None, share="steady", seconds=10)
    open_, order = threading.Event(), list[str]()
    held = asyncio.create_task(scheduler.run(open_.wait, 30, share="steady"))
    await asyncio.sleep(0)
    tasks = [
        asyncio.create_task(scheduler.seat(lambda _, share=share: order.append(share), share=share, seconds=10))
        for share in ["steady"] * 3 + ["new"] * 3
    ]
    await asyncio.sleep(0)
    open_.set()
    await asyncio.gather(held, *tasks)
    await scheduler.aclose()
    assert sorted(order[:2]) == sorted(order[2:4]) == ["new", "steady"]


@settings(max_examples=80, deadline=None)
@given(st.lists(PARTIALS, min_size=1, max_size=25))
async def test_the_latest_partial_of_a_stream_wins_and_a_final_ends_them(crowd: list[Asked]) -> None:
    order, fared = await served(crowd)
    for at, asked in enumerate(crowd):
        later = [other for other in crowd[at + 1 :] if other.stream == asked.stream]
        superseded = asked.urgency == "partial" and bool(later)
        assert isinstance(fared[at], Superseded) == superseded
        assert (at in order) != superseded


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.builds(
            Asked, st.sampled_from(sorted(RANK)), SHARES, SECONDS, st.just(""), st.sampled_from(["x", "y", None])
        ),
        min_size=1,
        max_size=25,
    ),
    st.integers(2, 4),
)
async def test_batches_lose_nothing_and_leave_nobody_behind_who_is_alone(crowd: list[Asked], limit: int) -> None:
    order, fared = await served(crowd, batch_limit=limit)
    assert sorted(order) == list(range(len(crowd)))
    assert fared == [None] * len(crowd)
    alone = [RANK[crowd[at].urgency] for at in order if crowd[at].kind is None]
    assert alone == sorted(alone)
