"""Files through the gateway, and the same files through bare `WhisperModel.transcribe` with its best thread setting.

Closed loop: so many callers, each sends the next clip when it has the answer to the last. Bare and gateway take turns,
so a drift of the machine's speed meets both; the ratio is of medians over the rounds.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dispatchers.engine.models import MICRO, MICRO_SAMPLES
from dispatchers.engine.whisper import STOCK_WINDOW
from dispatchers.wer import word_errors
from gateway.commands.client import Client
from gateway.commands.local import local_gateway

ROUNDS = 5
REQUESTS = 24
CALLERS = (1, 4, 8)
LONG = MICRO_SAMPLES / "long.wav"
CLIPS = sorted(MICRO_SAMPLES.glob("clip*.wav"))
THREAD_SETTINGS = ((1, 2), (2, 1))  # (threads of a worker, workers)


@dataclass
class Side:
    """One way to transcribe: a blocking call that returns the text. Results: seconds of each round, words wrong."""

    name: str
    transcribe: Callable[[Path], str]


def run(console: Console) -> None:
    bare = _best_bare(console)
    with tempfile.TemporaryDirectory(prefix="stenogate-bench-") as scratch:
        for title, settings in (
            ("as shipped (a window is as long as its speech needs)", {}),
            ("padded to 30 s as faster-whisper does", {"shortest_window": str(STOCK_WINDOW)}),
        ):
            with local_gateway(Path(scratch) / str(len(settings)), model="micro", **settings) as gateway:
                _compare(console, title, bare, _gateway_side(gateway.client))


def _compare(console: Console, title: str, bare: Side, gateway: Side) -> None:
    table = Table("files", "callers", "bare", "gateway", "gateway ÷ bare", "WER bare", "WER gateway", title=title)
    for files, callers, count in (([LONG], 1, 1), *((CLIPS, callers, REQUESTS) for callers in CALLERS)):
        sides: dict[str, list[float]] = {bare.name: [], gateway.name: []}
        wrong: dict[str, float] = {}
        for side in (bare, gateway):
            _round(side, files, callers, count)  # warms
        for _ in track(range(ROUNDS), f"{files[0].stem} × {callers}", console=console, transient=True):
            for side in (bare, gateway):
                seconds, wrong[side.name] = _round(side, files, callers, count)
                sides[side.name].append(seconds)
        one, other = (statistics.median(sides[name]) for name in (bare.name, gateway.name))
        table.add_row(
            "long.wav (60 s)" if files == [LONG] else "12 clips",
            str(callers),
            *(f"{count / seconds:.1f}/s, {1000 * seconds / count:.0f} ms each" for seconds in (one, other)),
            f"{one / other:.2f} × the speed",
            *(f"{100 * wrong[name]:.1f} %" for name in (bare.name, gateway.name)),
        )
    console.print(table)


def _round(side: Side, files: list[Path], callers: int, count: int) -> tuple[float, float]:
    work = list(itertools.islice(itertools.cycle(files), count))
    begun = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        texts = list(pool.map(side.transcribe, work))
    took = time.perf_counter() - begun
    counted = [word_errors(_spoken(path), text) for path, text in zip(work, texts, strict=True)]
    return took, sum(errors for errors, _ in counted) / sum(words for _, words in counted)


def _best_bare(console: Console) -> Side:
    """Bare faster-whisper with the thread setting that is fastest here, on clips by four callers."""
    best: tuple[float, Side] | None = None
    for threads, workers in THREAD_SETTINGS:
        side = _bare_side(threads, workers)
        _round(side, CLIPS, 4, len(CLIPS))
        seconds = min(_round(side, CLIPS, 4, len(CLIPS))[0] for _ in range(3))
        console.print(f"{side.name}: {len(CLIPS) / seconds:.1f} clips/s by 4 callers", style="dim")
        best = min(best, (seconds, side), key=lambda pair: pair[0]) if best else (seconds, side)
    if best is None:
        raise AssertionError
    console.print(f"bare means {best[1].name}\n", style="dim")
    return best[1]


def _bare_side(threads: int, workers: int) -> Side:
    from faster_whisper import WhisperModel

    model = WhisperModel(MICRO.source, device="cpu", compute_type="int8", cpu_threads=threads, num_workers=workers)

    def transcribe(path: Path) -> str:
        segments, _ = model.transcribe(str(path), language="en", condition_on_previous_text=False)
        return " ".join(segment.text.strip() for segment in segments)

    return Side(f"bare, {workers} workers of {threads} threads", transcribe)


def _gateway_side(client: Client) -> Side:
    http = httpx.Client(
        base_url=client.url,
        headers={"Authorization": f"Bearer {client.token}"},
        timeout=120,
        trust_env=False,
        limits=httpx.Limits(max_connections=max(CALLERS)),
    )

    def transcribe(path: Path) -> str:
        with path.open("rb") as file:
            form = {"model": "micro", "language": "en"}
            answer = http.post("/v1/audio/transcriptions", data=form, files={"file": (path.name, file)})
        answer.raise_for_status()
        text: str = answer.json()["text"]
        return text

    return Side("gateway", transcribe)


def _spoken(path: Path) -> str:
    if path == LONG:
        return " ".join(line.split("\t")[-1] for line in path.with_suffix(".tsv").read_text().splitlines()[1:])
    rows = ((MICRO_SAMPLES / "transcripts.tsv").read_text()).splitlines()
    return next(row.split("\t")[-1] for row in rows if row.startswith(path.name))
