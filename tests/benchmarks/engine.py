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

import httpx
from rich.console import Console
from rich.table import Table

from dispatchers.audio.decode import load
from dispatchers.backends.engine import PATIENCE, EngineClient
from dispatchers.backends.local import LocalBackend
from dispatchers.engine.models import MICRO, MICRO_SAMPLES
from dispatchers.interface import Dispatcher, Options, Samples
from tests.engines import TOKEN, engine_process

CORES = 2
ROUNDS = 9
REQUESTS = 48
CALLERS = (1, 4, 16)
BATCH = 8
ASKED = Options(model="micro", language="en", urgency="final")


def run(console: Console) -> None:
    asyncio.run(_run(console))


async def _run(console: Console) -> None:
    local = LocalBackend(MICRO, workers=CORES, device="cpu")
    await local.warm()
    with ExitStack() as stack:
        engine = stack.enter_context(engine_process(engine_workers=str(CORES)))
        over_http = await _client(engine.url)
        await _compare(console, "the engine over HTTP", {"in this process": local, "over HTTP": over_http})
        await over_http.aclose()
    await local.aclose()
    with ExitStack() as stack:
        limits = {"one at a time": "1", f"batches of up to {BATCH}": str(BATCH)}
        sides: dict[str, Dispatcher] = {}
        for name, limit in limits.items():
            batching = stack.enter_context(engine_process(engine_workers=str(CORES), engine_batch=limit))
            sides[name] = await _client(batching.url)
        await _compare(console, "batches across requests, over HTTP", sides)
        for side in sides.values():
            await side.aclose()


async def _client(url: str) -> EngineClient:
    headers = {"authorization": f"Bearer {TOKEN}"}
    client = EngineClient(httpx.AsyncClient(base_url=url, headers=headers, timeout=PATIENCE, trust_env=False))
    await client.refresh()
    return client


async def _compare(console: Console, title: str, sides: Mapping[str, Dispatcher]) -> None:
    clips = [load(path) for path in sorted(MICRO_SAMPLES.glob("clip*.wav"))]
    (first, one), (second, other) = sides.items()
    table = Table("callers", first, second, "ratio", "of rounds", "the same text", title=title)
    for callers in CALLERS:
        rates: list[tuple[float, float]] = []
        texts: set[tuple[tuple[str, ...], ...]] = set()
        for number in range(ROUNDS + 1):
            (rate, said), (other_rate, other_said) = [await _round(side, clips, callers) for side in (one, other)]
            texts.add((said, other_said))
            if number:  # the first one warms
                rates.append((rate, other_rate))
        ratios = sorted(later / before for before, later in rates)
        rate, other_rate = (statistics.median(each) for each in zip(*rates, strict=True))
        table.add_row(
            str(callers),
            f"{rate:.1f} a second",
            f"{other_rate:.1f} a second",
            f"{statistics.median(ratios):.3f}",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            "yes" if all(said == other_said for said, other_said in texts) else "NO",
        )
    console.print(table)


async def _round(side: Dispatcher, clips: list[Samples], callers: int) -> tuple[float, tuple[str, ...]]:
    """Requests a second, and their texts."""
    work = iter(list(itertools.islice(enumerate(itertools.cycle(clips)), REQUESTS)))
    texts = [""] * REQUESTS

    async def call() -> None:
        for number, samples in work:
            texts[number] = (await side.transcribe(samples, ASKED)).text

    began = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(callers)))
    return REQUESTS / (time.perf_counter() - began), tuple(texts)
