"""An engine killed outright under live streams: two `stenogate engine` of one core each behind one gateway, streams at
their own pace. What counts: no utterance is lost, and how late the finals of those come that were spoken when it died.
"""

from __future__ import annotations

import asyncio
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gateway.commands.local import LocalGateway, local_gateway
from tests.benchmarks.stream import SEED, STARTS_WITHIN_S, Said, Talk, percentile, script, speak
from tests.engines import TOKEN, RunningEngine, engine_process

HELD_S = 0.25
"""It is held still for so long before, so that it surely dies with work in its hands."""
AFFECTED_S = 2.0
"""An utterance is affected if its final was due within so long after the end of an engine, or it was being spoken."""


def run(console: Console, streams: int, seconds: float) -> None:
    with engine_process() as doomed, engine_process() as other, tempfile.TemporaryDirectory() as scratch:
        settings = {"engines": f"{doomed.url},{other.url}", "engine_token": TOKEN, "model": "micro"}
        with local_gateway(Path(scratch), max_queue_wait_s="60", **settings) as gateway:
            talks, died = asyncio.run(_together(gateway, doomed, streams, seconds))
            retries = asyncio.run(_retries(gateway))
    _print(console, streams, talks, died, retries)


async def _together(
    gateway: LocalGateway, doomed: RunningEngine, streams: int, seconds: float
) -> tuple[list[Talk], float]:
    await speak(gateway.client, script(0, 5.0))  # warms
    talks = [script(SEED + number, seconds) for number in range(streams)]
    offsets = random.Random(SEED)
    speaking = [asyncio.create_task(speak(gateway.client, talk, offsets.uniform(0, STARTS_WITHIN_S))) for talk in talks]
    await asyncio.sleep(STARTS_WITHIN_S + seconds / 2)
    doomed.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(HELD_S)
    died = time.monotonic()
    doomed.process.kill()
    await asyncio.gather(*speaking)
    return talks, died


async def _retries(gateway: LocalGateway) -> float:
    found: dict[str, Any] = (await gateway.client.get("/metrics.json")).json()["stenogate_engine_retries"]
    return sum(float(value["value"]) for value in found["values"])


def _print(console: Console, streams: int, talks: list[Talk], died: float, retries: float) -> None:
    said = [(talk, words) for talk in talks for words in talk.said]
    affected = [(talk, words) for talk, words in said if _is_affected(talk, words, died)]
    apart = [(talk, words) for talk, words in said if not _is_affected(talk, words, died)]
    told = [event for talk in talks for _, event in talk.heard]
    table = Table("", "affected", "all others", title=f"an engine of two killed under {streams} streams")
    table.add_row("utterances", str(len(affected)), str(len(apart)))
    table.add_row(
        "without a final", *(str(sum(_final_s(*pair) is None for pair in part)) for part in (affected, apart))
    )
    for percent in (50, 95, 99, 100):
        late = ([late_s for pair in part if (late_s := _final_s(*pair)) is not None] for part in (affected, apart))
        name = "latest" if percent == 100 else f"p{percent}"
        table.add_row(
            f"final after the end of speech, {name}", *(f"{percentile(part, percent):.2f} s" for part in late)
        )
    console.print(table)
    gaps, errors = (sum(event["type"] == kind for event in told) for kind in ("gap", "error"))
    console.print(f"gaps: {gaps}, errors told: {errors}, recognitions given to the other engine: {retries:.0f}")


def _is_affected(talk: Talk, words: Said, died: float) -> bool:
    at = died - talk.began
    return words.start - HELD_S <= at <= words.end + AFFECTED_S


def _final_s(talk: Talk, words: Said) -> float | None:
    heard = talk.during(words, "final")
    return heard[-1][0] - words.end if heard else None
