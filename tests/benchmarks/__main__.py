"""`make bench`: the gateway against bare faster-whisper, in the same run, what it holds in memory, what batches gain.

Figures are of the micro model, which is tiny; a real model's are another matter. Ratios travel, seconds do not.
"""

from __future__ import annotations

import argparse
import platform

from rich.console import Console

from tests.benchmarks import batch, memory, together

SECTIONS = {"batch": batch.run, "memory": memory.run, "together": together.run}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("section", nargs="*", choices=[*SECTIONS, []], help="default: all")
    console = Console(width=120)
    console.print(f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}\n")
    for name in parser.parse_args().section or SECTIONS:
        console.rule(name, align="left")
        SECTIONS[name](console)


if __name__ == "__main__":
    main()
