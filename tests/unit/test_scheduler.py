import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from dispatchers.engine.scheduler import Scheduler
from dispatchers.errors import BackendUnavailable, Overloaded
from dispatchers.interface import Urgency


@pytest.fixture
async def one() -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(workers=1, queue_limit=8)
    yield scheduler
    await scheduler.aclose()


class Gate:
    """Work that holds its thread until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> str:
        self.entered.set()
        assert self.open.wait(30)
        return "done"

    async def wait_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 30)


async def hold(scheduler: Scheduler) -> tuple[Gate, asyncio.Task[str]]:
    gate = Gate()
    task = asyncio.create_task(scheduler.run(gate))
    await gate.wait_entered()
    return gate, task


async def test_it_runs_in_a_thread_and_returns(one: Scheduler) -> None:
    assert await one.run(lambda a, b: (a + b, threading.current_thread().name), 1, 2) == (3, "engine_0")
    with pytest.raises(ZeroDivisionError):
        await one.run(lambda: 1 // 0)
    assert await one.run(lambda: 5) == 5


async def test_order(one: Scheduler) -> None:
    gate, held = await hold(one)
    order: list[str] = []
    asked: list[tuple[str, Urgency, str]] = [
        ("batch", "batch", "a"),
        ("partial a", "partial", "a"),
        ("final a1", "final", "a"),
        ("final a2", "final", "a"),
        ("final a3", "final", "a"),
        ("final b1", "final", "b"),
        ("final b2", "final", "b"),
    ]
    tasks = [
        asyncio.create_task(one.run(order.append, name, urgency=urgency, share=share)) for name, urgency, share in asked
    ]
    await asyncio.sleep(0)
    assert (one.waiting, one.running) == (7, 1)
    gate.open.set()
    await asyncio.gather(held, *tasks)
    assert order == ["final a1", "final b1", "final a2", "final b2", "final a3", "partial a", "batch"]
    await asyncio.sleep(0)
    assert one.waiting == 0


async def test_all_workers_work_at_once() -> None:
    scheduler = Scheduler(workers=2, queue_limit=0)
    barrier = threading.Barrier(2, timeout=30)
    await asyncio.gather(scheduler.run(barrier.wait), scheduler.run(barrier.wait))
    await scheduler.aclose()


async def test_a_full_queue_refuses_its_own_class_only() -> None:
    scheduler = Scheduler(workers=1, queue_limit=1)
    gate, held = await hold(scheduler)
    batch = asyncio.create_task(scheduler.run(lambda: 1))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refused:
        await scheduler.run(lambda: 2)
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s > 0
    final = asyncio.create_task(scheduler.run(lambda: 3, urgency="final"))
    await asyncio.sleep(0)
    gate.open.set()
    assert await asyncio.gather(held, batch, final) == ["done", 1, 3]
    await scheduler.aclose()


async def test_cancelling_takes_waiting_work_out(one: Scheduler) -> None:
    gate, held = await hold(one)
    ran: list[int] = []
    tasks = [asyncio.create_task(one.run(ran.append, i)) for i in range(3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.wait([tasks[1]])
    assert one.waiting == 2
    gate.open.set()
    await asyncio.gather(held, tasks[0], tasks[2])
    assert ran == [0, 2]


async def test_cancelled_work_keeps_its_seat_until_it_ends(one: Scheduler) -> None:
    gate, held = await hold(one)
    held.cancel()
    with pytest.raises(asyncio.CancelledError):
        await held
    after = asyncio.create_task(one.run(gate.open.is_set))
    await asyncio.sleep(0)
    assert (one.waiting, one.running) == (1, 1)
    gate.open.set()
    assert await after is True


async def test_a_seat_offered_to_a_cancelled_task_goes_to_the_next(one: Scheduler) -> None:
    gate, held = await hold(one)
    first, second = (asyncio.create_task(one.run(lambda n=n: n)) for n in (1, 2))
    await asyncio.sleep(0)
    gate.open.set()
    await held
    first.cancel()
    assert await second == 2
    await asyncio.gather(first, return_exceptions=True)
    assert await one.run(lambda: 3) == 3


async def test_the_limit_does_not_count_the_wait(one: Scheduler) -> None:
    gate, held = await hold(one)
    waiting = asyncio.create_task(one.run(lambda: "ran", timeout_s=0.05))
    await asyncio.sleep(0.2)
    gate.open.set()
    await held
    assert await waiting == "ran"


async def test_the_limit_ends_the_wait_for_hung_work(one: Scheduler) -> None:
    gate = Gate()
    with pytest.raises(TimeoutError):
        await one.run(gate, timeout_s=0.05)
    gate.open.set()
    assert await one.run(lambda: 1) == 1


async def test_closing_refuses_what_waits_and_ends_what_runs() -> None:
    scheduler = Scheduler(workers=1, queue_limit=8)
    gate, held = await hold(scheduler)
    waiting = asyncio.create_task(scheduler.run(lambda: 1))
    await asyncio.sleep(0)
    closing = asyncio.create_task(scheduler.aclose())
    with pytest.raises(BackendUnavailable):
        await waiting
    gate.open.set()
    await closing
    assert await held == "done"
    with pytest.raises(BackendUnavailable):
        await scheduler.run(lambda: 1)


async def test_the_wait_of_live_work_goes_by_live_work(one: Scheduler) -> None:
    assert one.wait_s == 0
    gate, held = await hold(one)
    batches = [asyncio.create_task(one.run(lambda: 1, urgency="batch")) for _ in range(4)]
    await asyncio.sleep(0)
    assert one.wait_s == 0  # batches stand behind
    partials = [asyncio.create_task(one.run(lambda: 1, urgency="partial")) for _ in range(2)]
    finals = [asyncio.create_task(one.run(lambda: 1, urgency="final")) for _ in range(2)]
    await asyncio.sleep(0)
    before = one.wait_s
    assert before == 4.0  # four in front, of a second each as long as nothing is known
    gate.open.set()
    await asyncio.gather(held, *batches, *partials, *finals)
    assert one.wait_s == 0
    gate, held = await hold(one)
    waiting = asyncio.create_task(one.run(lambda: 1, urgency="final"))
    await asyncio.sleep(0)
    assert 0 < one.wait_s < before / 4  # quick work has been measured meanwhile
    gate.open.set()
    await asyncio.gather(held, waiting)
