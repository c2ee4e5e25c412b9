import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from dispatchers.engine.scheduler import Scheduler, Seat
from dispatchers.errors import BackendUnavailable, Overloaded, Superseded
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


# --- giving way ---------------------------------------------------------------------------------------------------


class Steps:
    """Long work in steps: does `steps`, telling each, and gives way between them."""

    def __init__(self, log: list[str], name: str, steps: int = 2) -> None:
        self.gates = [Gate() for _ in range(steps)]
        self._log, self._name = log, name

    def __call__(self, seat: Seat) -> str:
        for at, gate in enumerate(self.gates):
            gate()
            self._log.append(f"{self._name}{at}")
            seat.give_way()
        return self._name


async def test_a_batch_gives_way_between_its_steps(one: Scheduler) -> None:
    log: list[str] = []
    steps = Steps(log, "long ")
    long = asyncio.create_task(one.seat(steps))
    await steps.gates[0].wait_entered()
    next_batch = asyncio.create_task(one.run(log.append, "next"))
    final = asyncio.create_task(one.run(log.append, "final", urgency="final"))
    partial = asyncio.create_task(one.run(log.append, "partial", urgency="partial"))
    await asyncio.sleep(0)
    for gate in steps.gates:
        gate.open.set()
    assert await long == "long "
    await asyncio.gather(next_batch, final, partial)
    assert log == ["long 0", "final", "partial", "long 1", "next"]
    await asyncio.sleep(0)
    assert (one.waiting, one.running) == (0, 0)


async def test_long_batches_on_every_worker_give_way_and_all_end() -> None:
    scheduler, log = Scheduler(workers=2, queue_limit=64), list[str]()
    batches = [Steps(log, f"{n} ", 3) for n in range(4)]
    tasks = [asyncio.create_task(scheduler.seat(steps)) for steps in batches]
    for steps in batches[:2]:
        await steps.gates[0].wait_entered()
    finals = [asyncio.create_task(scheduler.run(log.append, f"final {n}", urgency="final")) for n in range(5)]
    await asyncio.sleep(0)
    for steps in batches:
        for gate in steps.gates:
            gate.open.set()
    assert await asyncio.gather(*tasks) == ["0 ", "1 ", "2 ", "3 "]
    await asyncio.gather(*finals)
    assert all(log.index(f"final {n}") < log.index("2 0") for n in range(5))
    await scheduler.aclose()
    assert (scheduler.waiting, scheduler.running) == (0, 0)


async def test_finals_do_not_give_way(one: Scheduler) -> None:
    log: list[str] = []
    steps = Steps(log, "")
    first = asyncio.create_task(one.seat(steps, urgency="final"))
    await steps.gates[0].wait_entered()
    second = asyncio.create_task(one.run(log.append, "second", urgency="final"))
    await asyncio.sleep(0)
    for gate in steps.gates:
        gate.open.set()
    await asyncio.gather(first, second)
    assert log == ["0", "1", "second"]


async def test_closing_ends_what_has_given_way() -> None:
    scheduler, log = Scheduler(workers=1, queue_limit=8), list[str]()
    steps = Steps(log, "")
    batch = asyncio.create_task(scheduler.seat(steps))
    await steps.gates[0].wait_entered()
    gate = Gate()
    final = asyncio.create_task(scheduler.run(gate, urgency="final"))
    await asyncio.sleep(0)
    for step in steps.gates:
        step.open.set()
    await gate.wait_entered()
    assert (scheduler.waiting, scheduler.running) == (1, 1)
    closing = asyncio.create_task(scheduler.aclose())
    await asyncio.sleep(0)
    gate.open.set()
    await closing
    assert (await batch, await final) == ("", "done")


# --- batches, and the one place of a stream -----------------------------------------------------------------------


def together(seat: Seat) -> int:
    """With how many a piece ran."""
    return seat.meeting.call("", 1, lambda ones: [len(ones)] * len(ones))


async def test_what_waits_of_one_kind_runs_together() -> None:
    scheduler = Scheduler(workers=1, queue_limit=64, batch_limit=3)
    gate, held = await hold(scheduler)

    tasks = [asyncio.create_task(scheduler.seat(together, kind=kind, share=str(n))) for n, kind in enumerate("xyxxxx")]
    await asyncio.sleep(0)
    gate.open.set()
    assert await asyncio.gather(*tasks) == [3, 1, 3, 3, 2, 2]
    assert await held == "done"
    await scheduler.aclose()


async def test_spread_over_workers_nobody_takes_more_than_a_part() -> None:
    scheduler = Scheduler(workers=2, queue_limit=64, batch_limit=8, spread=True)
    first, held = await hold(scheduler)
    second, held_too = await hold(scheduler)
    tasks = [asyncio.create_task(scheduler.seat(together, kind="x")) for _ in range(6)]
    await asyncio.sleep(0)
    first.open.set()
    assert sorted(await asyncio.gather(*tasks)) == [1, 2, 2, 3, 3, 3]
    second.open.set()
    await asyncio.gather(held, held_too)
    alone = await asyncio.gather(*(scheduler.seat(together, kind="x") for _ in range(2)))
    assert alone == [1, 1]
    await scheduler.aclose()


async def test_one_of_a_batch_fails_alone() -> None:
    scheduler = Scheduler(workers=1, queue_limit=64, batch_limit=4)
    gate, held = await hold(scheduler)

    def work(seat: Seat, number: int) -> float:
        return seat.meeting.call("", number, lambda numbers: [1 / n for n in numbers])

    tasks = [asyncio.create_task(scheduler.seat(lambda seat, n=n: work(seat, n), kind="x")) for n in (1, 0, 2, 4)]
    await asyncio.sleep(0)
    gate.open.set()
    one, bad, two, four = await asyncio.gather(*tasks, return_exceptions=True)
    assert (one, two, four) == (1, 0.5, 0.25)
    assert isinstance(bad, ZeroDivisionError)
    await held
    await scheduler.aclose()


async def test_a_batch_gathers_company_while_much_comes() -> None:
    """In a rush, free workers wait a little for pieces of one kind; what has no kind waits for nobody."""
    scheduler = Scheduler(workers=64, queue_limit=64, batch_limit=16)
    kinds = [None] * 40 + ["x"] * 9
    sizes = await asyncio.gather(*(scheduler.seat(together, kind=kind) for kind in kinds))
    assert sizes == [1] * 40 + [9] * 9
    await scheduler.aclose()


async def test_a_newer_partial_takes_the_place_of_the_waiting_one(one: Scheduler) -> None:
    gate, held = await hold(one)
    order: list[str] = []

    def ask(name: str, stream: str) -> asyncio.Task[None]:
        return asyncio.create_task(one.seat(lambda _: order.append(name), urgency="partial", stream=stream))

    tasks = [ask("old", "s"), ask("other", "t"), ask("new", "s")]
    await asyncio.sleep(0)
    assert one.waiting == 2
    gate.open.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(found[0], Superseded)
    assert order == ["new", "other"]
    await held


async def test_a_partial_that_runs_is_not_taken_back_and_no_other_is_wanted_meanwhile(one: Scheduler) -> None:
    gate = Gate()
    running = asyncio.create_task(one.seat(lambda _: gate(), urgency="partial", stream="s"))
    await gate.wait_entered()
    with pytest.raises(Superseded):
        await one.seat(lambda _: "newer", urgency="partial", stream="s")
    other = asyncio.create_task(one.seat(lambda _: "other", urgency="partial", stream="t"))
    final = asyncio.create_task(one.seat(lambda _: "final", urgency="final", stream="t"))
    await asyncio.sleep(0)
    gate.open.set()
    assert await running == "done"
    assert await final == "final"
    with pytest.raises(Superseded):
        await other
    assert await one.seat(lambda _: "next", urgency="partial", stream="s") == "next"


async def test_a_partial_that_nobody_waits_for_keeps_no_other_out(one: Scheduler) -> None:
    gate = Gate()
    running = asyncio.create_task(one.seat(lambda _: gate(), urgency="partial", stream="s"))
    await gate.wait_entered()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    after = asyncio.create_task(one.seat(lambda _: "after", urgency="partial", stream="s"))
    await asyncio.sleep(0)
    gate.open.set()
    assert await after == "after"
