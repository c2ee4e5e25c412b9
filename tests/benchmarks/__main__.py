"""`make bench`: the gateway against bare faster-whisper, in the same run, what it holds in memory, what batches gain.
`make bench-stream`: live streams at their own pace. `make bench-density`: as many as one core carries.
`make bench-engine`: what the network costs an engine, and live streams when one of two is killed.
`make bench-overhead`: what the gateway adds to a request.
`make bench-relay`: what a request to a provider costs, by the HTTP client.

Figures are of the micro model, which is tiny; a real model's are another matter. Ratios travel, seconds do not.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from rich.console import Console

from tests.benchmarks import (
    batch,
    density,
    engine,
    failover,
    fairness,
    firm,
    memory,
    overhead,
    relay_transport,
    sounds,
    stream,
    together,
    words,
)

Section: TypeAlias = Callable[[Console, argparse.Namespace], None]


def settings_of(given: argparse.Namespace) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in given.set)


def live(console: Console, given: argparse.Namespace) -> None:
    streams = given.streams or [1, 8, 24]
    if given.compare:
        stream.compare(console, streams, given.seconds)
    elif given.fairness:
        fairness.run(console, given.seconds, settings_of(given))
    elif given.words:
        words.run(console, settings_of(given), given.samples)
    else:
        stream.run(console, streams, given.seconds, settings_of(given), given.events)


FILES: dict[str, Section] = {
    "batch": lambda console, _: batch.run(console),
    "memory": lambda console, _: memory.run(console),
    "together": lambda console, _: together.run(console),
    "sounds": lambda console, _: sounds.run(console),
}
"""What runs where no section is named."""

SECTIONS: dict[str, Section] = FILES | {
    "stream": live,
    "density": lambda console, given: density.run(
        console, given.streams or [100, 300, 400], given.seconds, settings_of(given)
    ),
    "firm": lambda console, given: firm.run(console, given.samples),
    "engine": lambda console, _: engine.run(console),
    "failover": lambda console, given: failover.run(console, (given.streams or [50])[0], given.seconds),
    "overhead": lambda console, given: overhead.run(console, given.rate, given.seconds, settings_of(given)),
    "relay": lambda console, _: relay_transport.run(console),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("section", nargs="*", choices=[*SECTIONS, []], help=f"default: {' '.join(FILES)}")
    streams = parser.add_argument_group("stream, density, failover")
    streams.add_argument("--streams", type=int, nargs="+", help="at once, a run for each number")
    streams.add_argument("--seconds", type=float, default=28.0, help="of speech in each stream")
    streams.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the server")
    streams.add_argument("--events", type=Path, help="a file to add all that was heard to")
    streams.add_argument("--compare", action="store_true", help="beside padded windows and batching")
    streams.add_argument("--fairness", action="store_true", help="a quiet tenant beside one that floods")
    streams.add_argument("--words", action="store_true", help="word error, early words and revisions over 1,000 words")
    streams.add_argument("--samples", type=Path, help="for --words and firm: a folder that the sample script made")
    parser.add_argument("--rate", type=int, default=overhead.RATE, help="for overhead: requests a second")
    given = parser.parse_args()
    console = Console(width=160)
    console.print(f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}\n")
    for name in given.section or FILES:
        console.rule(name, align="left")
        SECTIONS[name](console, given)


if __name__ == "__main__":
    main()
