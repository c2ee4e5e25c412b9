"""What it gains to recognise short pieces together: one worker of one engine, the same clips in batches of each size,
in turns. On a GPU where there is one. Features are made side by side, so on a CPU the CPU time is what counts."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dispatchers.audio.decode import load
from dispatchers.engine.meeting import Meeting
from dispatchers.engine.models import MICRO, MICRO_SAMPLES
from dispatchers.engine.whisper import WhisperEngine
from dispatchers.interface import Options, Samples, Urgency

SIZES = (1, 2, 4, 8)
CLIPS = 8
ROUNDS = 7
URGENCIES: tuple[Urgency, ...] = ("partial", "final")


def run(console: Console) -> None:
    engine = WhisperEngine(MICRO, Path(MICRO.source), cores=1)
    clips = [load(MICRO_SAMPLES / f"clip{number:02}.wav") for number in range(1, CLIPS + 1)]
    table = Table("together", *(f"{urgency}, {what}, ms a clip" for urgency in URGENCIES for what in ("wall", "CPU")))
    took: dict[tuple[int, Urgency], list[tuple[float, float]]] = {
        (size, urgency): [] for size in SIZES for urgency in URGENCIES
    }
    with ThreadPoolExecutor(CLIPS) as threads:
        for number in range(ROUNDS + 1):
            for (size, urgency), times in took.items():
                wall, cpu = time.perf_counter(), time.process_time()
                for first in range(0, CLIPS, size):
                    _together(engine, threads, clips[first : first + size], Options(language="en", urgency=urgency))
                if number:  # the first round warms up
                    times.append((time.perf_counter() - wall, time.process_time() - cpu))
    engine.close()
    for size in SIZES:
        figures = [
            statistics.median(times) for urgency in URGENCIES for times in zip(*took[size, urgency], strict=True)
        ]
        table.add_row(str(size), *(f"{seconds / CLIPS * 1000:.1f}" for seconds in figures))
    console.print(table)


def _together(engine: WhisperEngine, threads: ThreadPoolExecutor, clips: list[Samples], options: Options) -> None:
    meeting = Meeting(len(clips))

    def attend(samples: Samples) -> None:
        try:
            engine.transcribe(samples, options, lambda _: None, lambda: False, meeting)
        finally:
            meeting.leave()

    list(threads.map(attend, clips))
