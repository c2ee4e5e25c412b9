"""How often firm text is revised, and how late it is: each clip of a sample script's folder through the stream's own
voice detection, engine and stabiliser, with hypotheses that cost no time.

A real stream's hypotheses come when the engine has time for them; here they come for each quarter of a second of
speech, so that a change of the rules is the only thing that changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dispatchers.adapters.segmenting import Segmenting
from dispatchers.audio.decode import load
from dispatchers.audio.vad import SileroVad
from dispatchers.backends.local import LocalBackend
from dispatchers.engine.models import MICRO, MICRO_SAMPLES
from dispatchers.interface import (
    SAMPLE_RATE,
    Delta,
    Event,
    Final,
    Options,
    Pcm,
    Samples,
    SpeechStarted,
    StreamInput,
    Transcript,
)

FRAME = SAMPLE_RATE // 10
QUIET_S = 2.0


class Prompt(LocalBackend):
    """An engine whose every answer is there before the stream goes on."""

    answers: asyncio.Event

    async def transcribe(self, audio: Samples, options: Options, *args: object) -> Transcript:
        self.answers.clear()
        try:
            return await super().transcribe(audio, options)
        finally:
            self.answers.set()


@dataclass
class Tally:
    """Of finals and of first deltas (ms after their utterance's start)."""

    finals: int = 0
    revised: int = 0
    first: tuple[int, ...] = ()

    def note(self, events: list[Event]) -> None:
        starts = {event.utterance: event.start_ms for event in events if isinstance(event, SpeechStarted)}
        firsts: dict[int, int] = {}
        for event in events:
            if isinstance(event, Delta):
                firsts.setdefault(event.utterance, event.end_ms - starts[event.utterance])
            elif isinstance(event, Final) and event.text:
                self.finals += 1
                self.revised += event.revised
        self.first += tuple(firsts.values())


def run(console: Console, samples: Path | None) -> None:
    console.print(asyncio.run(_replayed(samples or MICRO_SAMPLES)))


async def _replayed(folder: Path) -> Table:
    vad, engine, tally = SileroVad.load(), Prompt(MICRO, workers=1), Tally()
    engine.answers = asyncio.Event()
    engine.answers.set()
    await engine.warm()
    chance = np.random.default_rng(5)
    clips = sorted(folder.glob("clip*.wav"))
    for clip in track(clips, "clips"):
        quiet = chance.integers(-3, 4, int(QUIET_S * SAMPLE_RATE)).astype(np.int16)
        audio = np.concatenate([quiet[:SAMPLE_RATE], load(clip), quiet])
        options = Options(model="micro", language="en")
        async with Segmenting(engine, vad).stream(_fed(audio, engine), options) as events:
            tally.note([event async for event in events])
    await engine.aclose()
    vad.close()
    return _told(len(clips), tally)


async def _fed(audio: Samples, engine: Prompt) -> AsyncIterator[StreamInput]:
    for at in range(0, len(audio), FRAME):
        yield Pcm(audio[at : at + FRAME])
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # until what this made due has been asked
        await engine.answers.wait()


def _told(clips: int, tally: Tally) -> Table:
    table = Table("", "", title=f"{clips} clips, {tally.finals} finals")
    table.add_row("finals that revised", f"{tally.revised} ({100 * tally.revised / tally.finals:.1f} %)")
    mean, late = np.mean(tally.first) / 1000, np.percentile(tally.first, 95) / 1000
    table.add_row("first delta after the utterance's start, mean, p95", f"{mean:.2f} s, {late:.2f} s")
    return table
