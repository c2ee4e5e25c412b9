"""What is told of noise, music and silence, where the right answer is nothing: by the model itself, by a recording's
transcription, and by a stream with the most permissive VAD that a client may ask for."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dispatchers.adapters.segmenting import Segmenting
from dispatchers.audio.vad import SileroVad
from dispatchers.backends.local import LocalBackend
from dispatchers.engine.models import MICRO
from dispatchers.engine.whisper import WhisperEngine
from dispatchers.interface import Final, Options, Partial, Pcm, Samples, Segment, VadOptions
from tests.sounds import sounds

PERMISSIVE = VadOptions(threshold=0.1)
STEP = 1_600


def run(console: Console) -> None:
    asyncio.run(_compare(console))


async def _compare(console: Console) -> None:
    engine = WhisperEngine(MICRO, Path(MICRO.source), device="cpu", cores=1)
    backend = LocalBackend(MICRO, workers=1)
    streams = Segmenting(backend, SileroVad.load())
    table = Table(
        "6 s of", "words of the model", "its mean log probability", "words of a recording", "words of a stream"
    )
    for name, samples in sounds().items():
        raw: list[Segment] = []
        engine.transcribe(samples, Options(language="en", urgency="final"), raw.append, lambda: False)
        recording = await backend.transcribe(samples, Options(language="en"))
        table.add_row(
            name,
            str(sum(len(segment.text.split()) for segment in raw)),
            f"{max(segment.avg_logprob for segment in raw):.2f}" if raw else "",
            str(len(recording.text.split())),
            str(await _streamed(streams, samples)),
        )
    engine.close()
    await streams.aclose()
    console.print(table)


async def _streamed(streams: Segmenting, samples: Samples) -> int:
    """How many words a stream tells, in partials or finals."""

    async def audio():  # type: ignore[no-untyped-def]
        for at in range(0, len(samples), STEP):
            yield Pcm(samples[at : at + STEP])

    async with streams.stream(audio(), Options(language="en", vad=PERMISSIVE)) as events:
        return sum([len(event.text.split()) async for event in events if isinstance(event, Partial | Final)])
