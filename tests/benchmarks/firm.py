"""How often firm text is revised, and how late it is: each clip of a sample script's folder through the stream's own
voice detection, engine and stabiliser, with hypotheses that cost no time.

A real stream's hypotheses come when the engine has time for them; here they come for each quarter of a second of
speech, so that a change of the rules is the only thing that changes.
"""

from __future__ import annotations

import asyncio
import time
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
    Heard,
    Options,
    Pcm,
    Samples,
    SpeechStarted,
    StreamInput,
    Transcript,
    ignore,
)

FRAME = SAMPLE_RATE // 10
QUIET_S = 2.0


class Prompt(LocalBackend):
    """An engine for which the stream waits. `rest_s` is how long its last answer took, for so long a stream rests."""

    def __init__(self) -> None:
        super().__init__(MICRO, workers=1)
        self.answered = asyncio.Event()
        self.answered.set()
        self.rest_s = 0.0

    async def transcribe(self, audio: Samples, options: Options, heard: Heard = ignore) -> Transcript:
        began = time.monotonic()
        self.answered.clear()
        try:
            return await super().transcribe(audio, options, heard)
        finally:
            self.rest_s = time.monotonic() - began
            self.answered.set()


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
    clips = sorted((samples or MICRO_SAMPLES).glob("clip*.wav"))
    console.print(asyncio.run(_replayed(clips)))


async def _replayed(clips: list[Path]) -> Table:
    vad, engine, tally = SileroVad.load(), Prompt(), Tally()
    await engine.warm()
    chance = np.random.default_rng(5)
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
        if not engine.answered.is_set():
            await engine.answered.wait()
            await asyncio.sleep(engine.rest_s)


def _told(clips: int, tally: Tally) -> Table:
    table = Table("", "", title=f"{clips} clips, {tally.finals} finals")
    table.add_row("finals that revised", f"{tally.revised} ({100 * tally.revised / tally.finals:.1f} %)")
    mean, late = np.mean(tally.first) / 1000, np.percentile(tally.first, 95) / 1000
    table.add_row("first delta after the utterance's start, mean, p95", f"{mean:.2f} s, {late:.2f} s")
    return table
