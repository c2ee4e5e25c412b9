"""A stream's words against a recording's, on more than 1,000 words that the micro model's sample script says with
another seed: word error of both, words told before they were spoken, and finals that revised what had been told.

The script needs libespeak-ng (Debian: libespeak-ng1), soxr and soundfile, which nothing else here needs.
"""

from __future__ import annotations

import asyncio
import difflib
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
    """An utterance as a stream told it, with the times of its words' beginnings on the stream's clock."""

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
            each.deltas = [(at, event["text"]) for at, event in talk.during(each.said, "delta")]
            each.partials = [(at, event["text"]) for at, event in talk.during(each.said, "partial")]
    return talks


def early(told: Told) -> list[tuple[str, float]]:
    """Words of the deltas that came before the speaker began to say them, and how many seconds. A word that was never
    said stands for the one at its place."""
    heard = [(word, at) for at, text in told.deltas for word in text.split()]
    starts: list[float | None] = [None] * len(heard)
    matcher = difflib.SequenceMatcher(None, [word for word, _ in heard], told.said.text.split(), autojunk=False)
    for match in matcher.get_matching_blocks():
        for offset in range(match.size):
            starts[match.a + offset] = told.starts[match.b + offset]
    found = []
    for number, (word, at) in enumerate(heard):
        start = starts[number]
        begins = told.starts[min(number, len(told.starts) - 1)] if start is None else start
        if at < begins:
            found.append((word, begins - at))
    return found


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
