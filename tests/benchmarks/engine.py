"""What the network costs an engine, and what batching across requests gains it.

The same clips by so many callers in a closed loop: through the engine in this process, and through `stenogate engine`
in one of its own, by the client that a pool uses; then through two such engines, one that batches and one that does
not. The sides take turns, so a drift of the machine's speed meets both; a ratio is the median of those of its rounds.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from dispatchers.audio.decode import load
from dispatchers.backends.addresses import at_address, place
from dispatchers.backends.engine import EngineClient
from dispatchers.backends.local import LocalBackend
from dispatchers.engine.models import MICRO, MICRO_SAMPLES, STOCK_WINDOW
from dispatchers.interface import Dispatcher, Options, Samples
from tests.engines import TOKEN, RunningEngine, engine_process

CORES = 2
ROUNDS = 5
REQUESTS = 48
CALLERS = (1, 4, 16)
BATCH = 8
WINDOWS = {
    "over HTTP, windows as short as the micro model needs": MICRO.shortest_window,
    "over HTTP, windows of 30 s, as a stock Whisper model has them": STOCK_WINDOW,
}
ASKED = Options(model="micro", language="en", urgency="final")


def run(console: Console) -> None:
    uvloop.run(_run(console))


@dataclass(frozen=True)
class Side:
    """One way to ask. `process` is the engine's, if that is another."""

    dispatcher: Dispatcher
    process: psutil.Process | None = None

    def cpu_s(self) -> float:
        """What has been spent so far."""
        there = sum(self.process.cpu_times()[:2]) if self.process is not None else 0.0
        return time.process_time() + there


@dataclass(frozen=True)
class Round:
    """Requests a second, CPU seconds of a request, and the texts."""

    rate: float
    cpu_s: float
    texts: tuple[str, ...]


async def _run(console: Console) -> None:
    for title, frames in WINDOWS.items():
        local = LocalBackend(MICRO, workers=CORES, device="cpu", shortest_window=frames)
        await local.warm()
        with engine_process(engine_workers=str(CORES), shortest_window=str(frames)) as engine:
            sides = {"in this process": Side(local), "over HTTP": await _over_http(engine)}
            await _compare(console, title, sides)
        await local.aclose()
    limits = {"one at a time": "1", f"batches of up to {BATCH}": str(BATCH)}
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(engine_process(engine_workers=str(CORES), engine_batch=limit))
            for name, limit in limits.items()
        }
        sides = {name: await _over_http(engine) for name, engine in engines.items()}
        await _compare(console, "batches across requests, over HTTP", sides)


async def _over_http(engine: RunningEngine) -> Side:
    client = EngineClient(at_address(engine.url, place(engine.url)[0], TOKEN))
    await client.refresh()
    return Side(client, psutil.Process(engine.process.pid))


async def _compare(console: Console, title: str, sides: Mapping[str, Side]) -> None:
    clips = [load(path) for path in sorted(MICRO_SAMPLES.glob("clip*.wav"))]
    heads = (f"{name}\n{what}" for name in sides for what in ("a second", "CPU each"))
    table = Table("callers", *heads, "throughput", "of rounds", "CPU", "the same text", title=title)
    for callers in CALLERS:
        rounds = [[await _round(side, clips, callers) for side in sides.values()] for _ in range(ROUNDS + 1)]
        pairs = list(zip(*rounds[1:], strict=True))  # the first one warms
        ratios = sorted(other.rate / one.rate for one, other in rounds[1:])
        cpu = [statistics.median(each.cpu_s for each in side) for side in pairs]
        rates = [statistics.median(each.rate for each in side) for side in pairs]
        figures = (
            text for rate, cpu_s in zip(rates, cpu, strict=True) for text in (f"{rate:.1f}", f"{1000 * cpu_s:.1f} ms")
        )
        table.add_row(
            str(callers),
            *figures,
            f"{statistics.median(ratios):.3f} ×",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            f"{cpu[1] / cpu[0]:.3f} ×",
            "yes" if len({each.texts for pair in rounds for each in pair}) == 1 else "NO",
        )
    console.print(table)
    for side in sides.values():
        if side.process is not None:
            await side.dispatcher.aclose()


async def _round(side: Side, clips: list[Samples], callers: int) -> Round:
    work = iter(list(itertools.islice(enumerate(itertools.cycle(clips)), REQUESTS)))
    texts = [""] * REQUESTS

    async def call() -> None:
        for number, samples in work:
            texts[number] = (await side.dispatcher.transcribe(samples, ASKED)).text

    began, cpu_s = time.perf_counter(), side.cpu_s()
    await asyncio.gather(*(call() for _ in range(callers)))
    took = time.perf_counter() - began
    return Round(REQUESTS / took, (side.cpu_s() - cpu_s) / REQUESTS, tuple(texts))
