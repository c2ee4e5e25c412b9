"""Live streams at their own pace against `stenogate serve`, beside what other servers did under the same load.

Each stream sends 100 ms frames on an absolute schedule: clips in a seeded order with 1.5 to 2.5 s of near-silence
between, beginning somewhere within 3 s. The clips' own table says when speech starts and ends, so what is measured
holds the endpoint's silence, the network and the client, too.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from websockets.asyncio.client import connect

from dispatchers.audio.decode import load
from dispatchers.engine.models import MICRO_SAMPLES, STOCK_WINDOW
from dispatchers.interface import SAMPLE_RATE, Samples
from dispatchers.wer import word_errors
from gateway.commands.client import Client
from gateway.commands.local import LocalGateway, local_gateway

FRAME = SAMPLE_RATE // 10
PAUSE_S = (1.5, 2.5)
STARTS_WITHIN_S = 3.0
LAST_SILENCE_S = 4.0
SEED = 20
LOOK_S = 0.5
WAYS = {
    "as shipped": {},
    "windows padded to 30 s": {"shortest_window": str(STOCK_WINDOW)},
    "batches of up to 8": {"engine_batch": "8"},
}
MIB = 1024 * 1024


@dataclass(frozen=True)
class Peers:
    """The best figure of any other server under this load, each its own best: WhisperLive 0.9.0, RealtimeSTT a89fabb,
    speaches 870e1e1 and EchoScribe 9cb6c96 with the same model and clips, client and server on the two cores of one
    machine (2026-11-20). Seconds, a share, MB."""

    final_p50: float
    final_p95: float
    first_p50: float
    first_p95: float
    word_error: float
    cpu: float
    rss: float


PEERS = {
    1: Peers(0.82, 0.87, 0.56, 0.91, 0.028, 0.148, 277),
    8: Peers(0.99, 1.22, 0.97, 1.73, 0.018, 0.133, 373),
    16: Peers(4.46, 5.99, 4.64, 6.10, 0.133, 0.092, 615),  # one server was measured at so many
}
"""By streams at once. Nobody was measured beyond 16: the last that was within 2 s is at 8."""


@dataclass(frozen=True)
class Said:
    """An utterance as it was spoken, in s of its stream."""

    start: float
    end: float
    text: str


@dataclass
class Talk:
    """A stream: what it says, when it began (monotonic clock), and what it heard, when."""

    audio: Samples
    said: list[Said]
    began: float = 0.0
    heard: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    def during(self, said: Said, *kinds: str) -> list[tuple[float, dict[str, Any]]]:
        """Texts of these kinds about this utterance, with when they came on the stream's own clock."""
        return [
            (at - self.began, event)
            for at, event in self.heard
            if event["type"] in kinds
            and event["text"]
            and event["start_ms"] / 1000 < said.end
            and event["end_ms"] / 1000 > said.start
        ]


@dataclass
class Load:
    """What a run cost: CPU seconds and peak MB of the server's processes, cores that others used meanwhile."""

    cpu_s: float = 0.0
    rss: float = 0.0
    others: float = 0.0


def run(
    console: Console, streams: Sequence[int], seconds: float, settings: dict[str, str], events: Path | None = None
) -> None:
    """One fresh server for each number of streams. `events` is a file for all that was heard, one JSON a line."""
    columns = {str(count): _measured(count, seconds, settings, events) for count in streams}
    _print(console, f"{seconds:.0f} s a stream {settings or ''}".strip(), "streams", columns)


def compare(console: Console, streams: Sequence[int], seconds: float) -> None:
    """The server as it ships beside itself with windows padded to 30 s and with batching, for each number of streams,
    in one run."""
    for count in streams:
        columns = {name: _measured(count, seconds, settings) for name, settings in WAYS.items()}
        _print(console, f"{count} streams of {seconds:.0f} s", "", columns)


def _measured(count: int, seconds: float, settings: dict[str, str], events: Path | None = None) -> dict[str, str]:
    """The figures of so many streams on a fresh server."""
    with tempfile.TemporaryDirectory(prefix="stenogate-bench-") as scratch:
        with local_gateway(Path(scratch), model="micro", **settings) as gateway:
            talks, load_ = asyncio.run(_together(gateway, count, seconds))
    if events is not None:
        with events.open("a") as file:
            file.writelines(
                json.dumps({"streams": count, "stream": number, "at": at - talk.began, **event}) + "\n"
                for number, talk in enumerate(talks)
                for at, event in talk.heard
            )
    return _figures(count, talks, load_)


def _print(console: Console, title: str, corner: str, columns: dict[str, dict[str, str]]) -> None:
    table = Table(corner, *columns, title=title)
    for name in next(iter(columns.values())):
        table.add_row(name, *(figures[name] for figures in columns.values()))
    console.print(table)
    console.print(
        "In brackets: times the best other server's figure, which beyond 8 streams is one of 16.",
        style="dim",
    )


# --- the load ---


@cache
def _clips() -> list[tuple[Samples, Said]]:
    rows = [line.split("\t") for line in (MICRO_SAMPLES / "transcripts.tsv").read_text().splitlines()[1:]]
    return [(load(MICRO_SAMPLES / row[0]), Said(float(row[2]), float(row[3]), row[4])) for row in rows]


def script(seed: int, seconds: float) -> Talk:
    """So many seconds of clips with pauses between, then a silence in which the last final can come."""
    chance = random.Random(seed)
    noise = np.random.default_rng(seed)
    parts: list[Samples] = []
    said: list[Said] = []
    at = 0

    def add(part: Samples) -> None:
        nonlocal at
        parts.append(part)
        at += len(part)

    def silence(length_s: float) -> None:
        add(noise.integers(-3, 4, int(length_s * SAMPLE_RATE)).astype(np.int16))

    while True:
        order = chance.sample(_clips(), len(_clips()))
        for audio, words in order:
            if at / SAMPLE_RATE + words.end > seconds:
                silence(LAST_SILENCE_S)
                return Talk(np.concatenate(parts), said)
            begun = at / SAMPLE_RATE
            said.append(Said(begun + words.start, begun + words.end, words.text))
            add(audio)
            silence(chance.uniform(*PAUSE_S))


async def _together(gateway: LocalGateway, count: int, seconds: float) -> tuple[list[Talk], Load]:
    await speak(gateway.client, script(0, 5.0), 0.0)  # warms
    talks = [script(SEED + number, seconds) for number in range(count)]
    offsets = random.Random(SEED)
    measured, over = Load(), asyncio.Event()
    watching = asyncio.create_task(watch(psutil.Process(gateway.pid), measured, over))
    await asyncio.gather(*(speak(gateway.client, talk, offsets.uniform(0, STARTS_WITHIN_S)) for talk in talks))
    over.set()
    await watching
    return talks, measured


async def speak(client: Client, talk: Talk, wait_s: float = 0.0, *, pace: bool = True) -> None:
    """Says all of it at its own pace or as fast as it is taken, and hears what comes back."""
    await asyncio.sleep(wait_s)
    address = client.url.replace("http", "ws", 1) + "/v1/stream"
    headers = {"Authorization": f"Bearer {client.token}"}
    async with connect(address, additional_headers=headers, compression=None, open_timeout=30, proxy=None) as socket:
        start = {"type": "start", "sample_rate": SAMPLE_RATE, "model": "micro", "language": "en"}
        await socket.send(json.dumps(start))
        ready = json.loads(await socket.recv())
        if ready["type"] != "ready":
            raise RuntimeError(f"the server did not begin: {ready}")
        talk.began = time.monotonic()

        async def listen() -> None:
            async for frame in socket:
                talk.heard.append((time.monotonic(), json.loads(frame)))

        listening = asyncio.create_task(listen())
        for at in range(0, len(talk.audio), FRAME):  # a frame leaves when its last sample has been spoken
            if pace:
                await asyncio.sleep(talk.began + (at + FRAME) / SAMPLE_RATE - time.monotonic())
            await socket.send(talk.audio[at : at + FRAME].tobytes())
        await socket.send(json.dumps({"type": "metrics"}))
        await socket.send(json.dumps({"type": "stop"}))
        await listening


async def watch(server: psutil.Process, load_: Load, done: asyncio.Event) -> None:
    """Fills in the load until it is done."""
    me = psutil.Process()
    tree = [server, *server.children(recursive=True)]
    before, mine, begun = _cpu(tree), _cpu([me]), time.monotonic()
    busy = _busy()
    while not done.is_set():
        load_.rss = max(load_.rss, sum(process.memory_info().rss for process in tree if process.is_running()) / MIB)
        await asyncio.sleep(LOOK_S)
    load_.cpu_s = _cpu(tree) - before
    load_.others = (_busy() - busy - load_.cpu_s - (_cpu([me]) - mine)) / (time.monotonic() - begun)


def _cpu(processes: Iterable[psutil.Process]) -> float:
    """CPU seconds of those that still run; Postgres' own come and go, and cost little."""
    return sum(sum(process.cpu_times()[:2]) for process in processes if process.is_running())


def _busy() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


# --- the figures ---


def final_after(talks: list[Talk]) -> list[float]:
    """Seconds from the end of speech to the final, of every utterance that got one."""
    return [heard[-1][0] - words.end for talk in talks for words in talk.said if (heard := talk.during(words, "final"))]


def first_text_after(talks: list[Talk]) -> list[float]:
    """Seconds from the start of speech to the first text."""
    kinds = ("partial", "delta", "final")
    return [heard[0][0] - words.start for talk in talks for words in talk.said if (heard := talk.during(words, *kinds))]


def _figures(count: int, talks: list[Talk], load_: Load) -> dict[str, str]:
    said = [(talk, words) for talk in talks for words in talk.said]
    late, first = final_after(talks), first_text_after(talks)
    spoken_s = sum(len(talk.audio) for talk in talks) / SAMPLE_RATE
    told = [event for talk in talks for _, event in talk.heard]
    revised = [event["revised"] for event in told if event["type"] == "final"]
    errors = [word_errors(" ".join(words.text for words in talk.said), _text(talk)) for talk in talks]
    wrong = sum(error for error, _ in errors) / sum(words for _, words in errors)
    peer = PEERS[next(size for size in PEERS if size >= min(count, max(PEERS)))]
    return {
        "utterances": str(len(said)),
        "lost": str(len(said) - len(late)),
        "final after the end of speech, p50": _beside(percentile(late, 50), peer.final_p50, " s"),
        "p95": _beside(percentile(late, 95), peer.final_p95, " s"),
        "first text after the start of speech, p50": _beside(percentile(first, 50), peer.first_p50, " s"),
        "first text, p95": _beside(percentile(first, 95), peer.first_p95, " s"),
        "word error of the finals": _beside(100 * wrong, 100 * peer.word_error, " %", 1),
        "revised finals": f"{sum(revised)} of {len(revised)}",
        "partials a second and stream": f"{sum(event['type'] == 'partial' for event in told) / spoken_s:.2f}",
        "CPU seconds a stream-second": _beside(load_.cpu_s / spoken_s, peer.cpu, "", 3),
        "peak memory": _beside(load_.rss, peer.rss, " MB", 0),
        "cores that others used": f"{load_.others:.2f}",
    }


def _text(talk: Talk) -> str:
    return " ".join(event["text"] for _, event in talk.heard if event["type"] == "final")


def percentile(figures: list[float], percent: float) -> float:
    return float(np.percentile(figures, percent)) if figures else float("nan")


def _beside(figure: float, peer: float, unit: str, digits: int = 2) -> str:
    return f"{figure:.{digits}f}{unit} ({figure / peer:.2f})"
