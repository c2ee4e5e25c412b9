"""A stream's words against a recording's, on more than 1,000 words that the micro model's sample script says with
another seed: word error of both, words told before they were spoken, and finals that revised what had been told.

The script needs libespeak-ng (Debian: libespeak-ng1), soxr and soundfile, which nothing else here needs.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dispatchers.audio.decode import load
from dispatchers.engine.models import MICRO_SAMPLES
from dispatchers.interface import SAMPLE_RATE, Samples
from dispatchers.wer import word_errors
from gateway.commands.client import Client
from gateway.commands.local import local_gateway
from tests.benchmarks.stream import PAUSE_S, SEED, STARTS_WITHIN_S, Said, Talk, speak

SCRIPT = MICRO_SAMPLES.parent / "training" / "make_samples.py"
CLIPS, CLIPS_SEED = 200, 777
STREAMS = 8
LAST_SILENCE_S = 3.0
SHOWN = 20
REMEDY = (
    "The sample script did not run. It needs libespeak-ng (apt install libespeak-ng1) and, for this Python, soxr and\
 soundfile. Samples made elsewhere can be given with --samples."
)

Event = dict[str, Any]


@dataclass(frozen=True)
class Clip:
    """`starts`: of each word, in s."""

    path: Path
    audio: Samples
    text: str
    start: float
    end: float
    starts: list[float]


@dataclass
class Told:
    """An utterance as a stream told it, with the times of its words' beginnings, of the ends of the audio that its
    deltas are of, and of its partials' arrival, on the stream's clock."""

    said: Said
    starts: list[float]
    deltas: list[tuple[float, str]] = field(default_factory=list)
    partials: list[tuple[float, str]] = field(default_factory=list)


def run(console: Console, settings: dict[str, str], samples: Path | None = None) -> None:
    with tempfile.TemporaryDirectory(prefix="stenogate-bench-") as scratch:
        clips = _clips(samples or _made(Path(scratch) / "samples"))
        with local_gateway(Path(scratch) / "data", model="micro", **settings) as gateway:
            recorded = asyncio.run(_recorded(gateway.client, clips))
            talks = asyncio.run(_streamed(gateway.client, clips))
    _show(console, clips, recorded, talks)


# --- what is said ---


def _made(folder: Path) -> Path:
    command = [sys.executable, SCRIPT.name, "--out", str(folder), "--n", str(CLIPS), "--seed", str(CLIPS_SEED)]
    made = subprocess.run([*command, "--words"], cwd=SCRIPT.parent, capture_output=True, text=True, check=False)
    if made.returncode:
        raise SystemExit(f"{made.stderr[-600:]}\n{REMEDY}")
    return folder


def _clips(folder: Path) -> list[Clip]:
    words = json.loads((folder / "words.json").read_text())
    rows = [line.split("\t") for line in (folder / "transcripts.tsv").read_text().splitlines()[1:]]
    return [
        Clip(
            folder / name,
            load(folder / name),
            text,
            float(start),
            float(end),
            [word["start"] for word in words[name]],
        )
        for name, _, start, end, text in rows
    ]


def _script(clips: list[Clip], seed: int) -> tuple[Talk, list[Told]]:
    chance, noise = random.Random(seed), np.random.default_rng(seed)
    parts: list[Samples] = []
    told: list[Told] = []
    at = 0
    for clip in clips:
        begun = at / SAMPLE_RATE
        told.append(Told(Said(begun + clip.start, begun + clip.end, clip.text), [begun + each for each in clip.starts]))
        pause = LAST_SILENCE_S if clip is clips[-1] else chance.uniform(*PAUSE_S)
        parts += [clip.audio, noise.integers(-3, 4, int(pause * SAMPLE_RATE)).astype(np.int16)]
        at += len(parts[-2]) + len(parts[-1])
    return Talk(np.concatenate(parts), [each.said for each in told]), told


# --- what is heard ---


async def _recorded(client: Client, clips: list[Clip]) -> list[str]:
    texts = []
    for clip in clips:
        answer = await client.transcribe(clip.path, model="micro", language="en")
        texts.append(str(answer.json()["text"]))
    return texts


async def _streamed(client: Client, clips: list[Clip]) -> list[tuple[Talk, list[Told]]]:
    talks = [_script(clips[number::STREAMS], SEED + number) for number in range(STREAMS)]
    offsets = random.Random(SEED)
    await asyncio.gather(*(speak(client, talk, offsets.uniform(0, STARTS_WITHIN_S)) for talk, _ in talks))
    for talk, told in talks:
        for each in told:
            each.deltas = [(event["end_ms"] / 1000, event["text"]) for _, event in talk.during(each.said, "delta")]
            each.partials = [(at, event["text"]) for at, event in talk.during(each.said, "partial")]
    return talks


def early(told: Told) -> list[tuple[str, float]]:
    """Words of the deltas whose speaking had not begun where the audio ends that the recogniser had heard for the delta
    (its `end_ms`; the server had accepted at least that), and how many seconds were missing. A word stands for the one
    at its place, right or wrong."""
    heard = [(word, end) for end, text in told.deltas for word in text.split()]
    places = _places([word for word, _ in heard], told.said.text.split())
    starts = [told.starts[min(place, len(told.starts) - 1)] for place in places]
    return [(word, start - end) for (word, end), start in zip(heard, starts, strict=True) if end < start]


def _places(heard: list[str], said: list[str]) -> list[int]:
    """For each word heard so far, which of the words said it stands for: the cheapest edits of a beginning of what was
    said; of several the shortest beginning. (What is not yet told is not missing.)"""
    rows = [list(range(len(said) + 1))]
    for word in heard:
        above = rows[-1]
        row = [above[0] + 1]
        for at, other in enumerate(said):
            row.append(min(above[at] + (word != other), above[at + 1] + 1, row[at] + 1))
        rows.append(row)
    at, places = rows[-1].index(min(rows[-1])), [0] * len(heard)
    for number in range(len(heard), 0, -1):
        while at and rows[number][at] == rows[number][at - 1] + 1:
            at -= 1  # said, and not heard
        if at and rows[number][at] == rows[number - 1][at - 1] + (heard[number - 1] != said[at - 1]):
            at -= 1
        places[number - 1] = at
    return places


# --- the figures ---


def _show(console: Console, clips: list[Clip], recorded: list[str], talks: list[tuple[Talk, list[Told]]]) -> None:
    pairs = [word_errors(clip.text, text) for clip, text in zip(clips, recorded, strict=True)]
    streamed = [word_errors(" ".join(said.text for said in talk.said), _finals(talk)) for talk, _ in talks]
    deltas = [word for _, told in talks for each in told for _, text in each.deltas for word in text.split()]
    finals = [event for talk, _ in talks for _, event in talk.heard if event["type"] == "final"]
    revised = [event for event in finals if event["revised"]]
    soon = [word for _, told in talks for each in told for word in early(each)]
    words = sum(count for _, count in pairs)
    table = Table("", "", title=f"{len(clips)} clips, {words} words, {len(talks)} streams")
    table.add_row("word error of the recordings", _percent(sum(wrong for wrong, _ in pairs), words))
    table.add_row("word error of the streams' finals", _percent(sum(wrong for wrong, _ in streamed), words))
    table.add_row(
        "words told in deltas before they were spoken",
        f"{len(soon)} of {len(deltas)}" + "".join(f", {word} by {by:.2f} s" for word, by in soon[:SHOWN]),
    )
    table.add_row("finals that revised", f"{len(revised)} of {len(finals)} ({_percent(len(revised), len(finals))})")
    console.print(table)
    for talk, told in talks:
        for each in told:
            if any(event["revised"] for _, event in talk.during(each.said, "final")):
                console.print(_story(talk, each), style="dim", highlight=False)


def _story(talk: Talk, told: Told) -> str:
    lines = [f"said     {told.said.text}"]
    for at, event in sorted(talk.during(told.said, "partial", "delta", "final"), key=lambda pair: pair[0]):
        lines.append(f"{at - told.said.start:5.2f} {event['type']:8} {event['text']}")
    return "\n".join(lines) + "\n"


def _finals(talk: Talk) -> str:
    return " ".join(event["text"] for _, event in talk.heard if event["type"] == "final")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"
