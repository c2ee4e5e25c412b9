"""`make bench`: the gateway against bare faster-whisper, in the same run, what it holds in memory, what batches gain.
`make bench-stream`: live streams at their own pace. `make bench-density`: as many as one core carries.
`make bench-overhead`: what the gateway adds to a request.
`make bench-engine`: what the network costs an engine, and live streams when one of two is killed.
`make bench-relay`: what a request to a provider costs, by the HTTP client.

Figures are of the micro model, which is tiny; a real model's are another matter. Ratios travel, seconds do not.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from tests.benchmarks import (
    batch,
    density,
    engine,
    failover,
    fairness,
    memory,
    overhead,
    relay_transport,
    sounds,
    stream,
    together,
    words,
)

FILES: dict[str, Callable[[Console], None]] = {
    "batch": batch.run,
    "memory": memory.run,
    "together": together.run,
    "sounds": sounds.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "section",
        nargs="*",
        choices=[*SECTIONS, []],
        help=f"default: {' '.join(FILES)}",
    )
    live = parser.add_argument_group("stream and density")
    live.add_argument("--streams", type=int, nargs="+", help="at once, a run for each number")
    live.add_argument("--seconds", type=float, default=28.0, help="of speech in each stream")
    live.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the server")
    live.add_argument("--events", type=Path, help="a file to add all that was heard to")
    live.add_argument("--compare", action="store_true", help="beside padded windows and batching")
    live.add_argument("--fairness", action="store_true", help="a quiet tenant beside one that floods")
    live.add_argument("--words", action="store_true", help="word error, early words and revisions over 1,000 words")
    live.add_argument("--samples", type=Path, help="for --words: a folder that the sample script made")
    parser.add_argument("--rate", type=int, default=overhead.RATE, help="for overhead: requests a second")
    given = parser.parse_args()
    console = Console(width=160)
    console.print(f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}\n")
    for name in given.section or FILES:
        console.rule(name, align="left")
        SECTIONS[name](console, given)


def _streams(console: Console, given: argparse.Namespace) -> None:
    streams = given.streams or [1, 8, 24]
    if given.compare:
        stream.compare(console, streams, given.seconds)
    elif given.fairness:
        fairness.run(console, given.seconds, _set(given))
    elif given.words:
        words.run(console, _set(given), given.samples)
    else:
        stream.run(console, streams, given.seconds, _set(given), given.events)


def _set(given: argparse.Namespace) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in given.set)


SECTIONS: dict[str, Callable[[Console, argparse.Namespace], None]] = {
    **{name: lambda console, _, run=run: run(console) for name, run in FILES.items()},
    "stream": _streams,
    "density": lambda console, given: density.run(
        console, given.streams or [100, 300, 400], given.seconds, _set(given)
    ),
    "engine": lambda console, _: engine.run(console),
    "failover": lambda console, given: failover.run(console, (given.streams or [50])[0], given.seconds),
    "overhead": lambda console, given: overhead.run(console, given.rate, given.seconds, _set(given)),
    "relay": lambda console, _: relay_transport.run(console),
}


if __name__ == "__main__":
    main()
