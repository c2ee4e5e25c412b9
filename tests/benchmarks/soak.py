"""`make soak`: hours of live streams, one session after the other, and what that does to the server's memory.

Each sample goes to a CSV at once, so that a run that is cut short has told what it saw. Interrupted, it still prints.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import itertools
import random
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from gateway.commands.client import Client
from gateway.commands.local import local_gateway
from tests.benchmarks.stream import MIB, STARTS_WITHIN_S, Talk, final_after, first_text_after, percentile, script, speak

SESSION_S = (20.0, 90.0)
WARM_UP = 0.2  # of the time, and at most:
WARM_UP_MIN = 10.0
WINDOW_MIN = 10.0


@dataclass
class Tally:
    """What the clients sent and got. `late` has (minute, seconds) of every final."""

    sessions: int = 0
    sent: int = 0
    finals: int = 0
    failures: list[str] = field(default_factory=list)
    late: list[tuple[float, float]] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    def note(self, talk: Talk, minute: float) -> None:
        late = final_after([talk])
        self.sessions += 1
        self.sent += len(talk.said)
        self.finals += len(late)
        self.late += [(minute, each) for each in late]
        self.first += first_text_after([talk])
        if talk.heard[-1][1]["type"] != "closed":
            self.failures.append(str(talk.heard[-1][1])[:200])


@dataclass(frozen=True)
class Sample:
    """The server at one minute. MiB: resident and proportional over its process tree, resident in the gateway."""

    minute: float
    resident: float
    proportional: float
    gateway: float
    processes: int
    files: int
    threads: int
    sessions: int
    sent: int
    finals: int


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--streams", type=int, default=12, help="at once")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between samples")
    parser.add_argument("--csv", type=Path, default=Path("soak.csv"), help="where the samples go")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the server")
    given = parser.parse_args()
    console, tally, samples = Console(width=150), Tally(), []
    settings = dict(pair.split("=", 1) for pair in given.set)
    with tempfile.TemporaryDirectory(prefix="stenogate-soak-") as scratch:
        with local_gateway(Path(scratch), model="micro", **settings) as gateway:
            server = psutil.Process(gateway.pid)
            with suppress(KeyboardInterrupt):
                asyncio.run(_soak(gateway.client, server, given, tally, samples))
    _show(console, samples, tally)


async def _soak(
    client: Client, server: psutil.Process, given: argparse.Namespace, tally: Tally, samples: list[Sample]
) -> None:
    begun = time.monotonic()
    until = begun + given.minutes * 60
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(_watch(server, begun, given, tally, samples))
        talking = [tasks.create_task(_talk(client, number, begun, until, tally)) for number in range(given.streams)]
        await asyncio.wait(talking)
        watching.cancel()


async def _talk(client: Client, number: int, begun: float, until: float, tally: Tally) -> None:
    """Sessions of various lengths until the time is over."""
    chance = random.Random(number)
    wait_s = chance.uniform(0, STARTS_WITHIN_S)
    for turn in itertools.count():
        left = until - time.monotonic()
        if left <= 0:
            return
        talk = await asyncio.to_thread(script, 1000 * number + turn, min(chance.uniform(*SESSION_S), max(left, 5.0)))
        try:
            await speak(client, talk, 0.0 if turn else wait_s)
        except Exception as error:
            tally.failures.append(f"{type(error).__name__}: {error}"[:200])
            tally.sent += len(talk.said)
            await asyncio.sleep(1.0)
        else:
            tally.note(talk, (time.monotonic() - begun) / 60)


async def _watch(
    server: psutil.Process, begun: float, given: argparse.Namespace, tally: Tally, samples: list[Sample]
) -> None:
    with given.csv.open("w", newline="") as file:
        rows = csv.DictWriter(file, [each.name for each in fields(Sample)])
        rows.writeheader()
        for turn in itertools.count(1):
            await asyncio.sleep(begun + turn * given.every - time.monotonic())
            sample = await asyncio.to_thread(_sample, server, (time.monotonic() - begun) / 60, tally)
            samples.append(sample)
            rows.writerow(asdict(sample))
            file.flush()


def _sample(server: psutil.Process, minute: float, tally: Tally) -> Sample:
    resident = proportional = 0.0
    processes = files = threads = 0
    for process in (server, *server.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # Postgres' own come and go
            memory = process.memory_full_info()
            resident += memory.rss / MIB
            proportional += memory.pss / MIB
            files += process.num_fds()
            threads += process.num_threads()
            processes += 1
    return Sample(
        round(minute, 2),
        round(resident, 1),
        round(proportional, 1),
        round(server.memory_info().rss / MIB, 1),
        processes,
        files,
        threads,
        tally.sessions,
        tally.sent,
        tally.finals,
    )


def _show(console: Console, samples: list[Sample], tally: Tally) -> None:
    table = Table(
        *(each.name for each in fields(Sample)), title="MiB; sessions, utterances and finals of ended sessions"
    )
    for sample in samples:
        table.add_row(*map(str, astuple(sample)))
    console.print(table)
    if not samples:
        return
    warm = [sample for sample in samples if sample.minute >= min(WARM_UP_MIN, WARM_UP * samples[-1].minute)]
    for name in ("resident", "proportional", "gateway"):
        console.print(f"slope, {name}: {_slope(warm, name):+.1f} MiB an hour over {len(warm)} samples after warm-up")
    for start in np.arange(0, max((minute for minute, _ in tally.late), default=0.0), WINDOW_MIN):
        late = [each for minute, each in tally.late if start <= minute < start + WINDOW_MIN]
        console.print(
            f"sessions that ended in minutes {start:.0f} to {start + WINDOW_MIN:.0f}: final after the end of speech"
            f" p50 {percentile(late, 50):.2f} s, p95 {percentile(late, 95):.2f} s of {len(late)}"
        )
    console.print(f"first text after the start of speech p50 {percentile(tally.first, 50):.2f} s")
    console.print(
        f"{tally.sessions} sessions, {tally.sent} utterances, {tally.finals} finals,"
        f" {tally.sent - tally.finals} dropped, {len(tally.failures)} failures {tally.failures[:3] or ''}"
    )


def _slope(samples: list[Sample], name: str) -> float:
    """MiB an hour, by least squares."""
    if len(samples) < 2:
        return float("nan")
    return float(np.polyfit([each.minute / 60 for each in samples], [getattr(each, name) for each in samples], 1)[0])


if __name__ == "__main__":
    main()
