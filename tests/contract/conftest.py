"""Every dispatcher there is. A new one is one more line in `MAKERS`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from dispatchers.adapters.per_channel import PerChannel
from dispatchers.adapters.segmenting import Segmenting
from dispatchers.audio.decode import load
from dispatchers.audio.vad import SileroVad
from dispatchers.backends.local import LocalBackend
from dispatchers.backends.scripted import Scripted
from dispatchers.engine.models import MICRO
from dispatchers.interface import Dispatcher, Samples

SAMPLES = Path(__file__).parents[2] / "dispatchers/engine/micro/samples"


def scripted() -> Dispatcher:
    return Scripted()


def local() -> Dispatcher:
    return LocalBackend(MICRO, workers=1)


def streaming(batch: Callable[[], Dispatcher]) -> Callable[[], Dispatcher]:
    return lambda: Segmenting(batch(), SileroVad.load())


MAKERS: dict[str, Callable[[], Dispatcher]] = {
    "scripted": scripted,
    "local": local,
    "segmenting scripted": streaming(scripted),
    "segmenting local": streaming(local),
    "per channel scripted": lambda: PerChannel(streaming(scripted)()),
}


@pytest.fixture(scope="module", params=MAKERS)
async def dispatcher(request: pytest.FixtureRequest) -> AsyncIterator[Dispatcher]:
    made = MAKERS[request.param]()
    yield made
    await made.aclose()


@pytest.fixture(scope="session")
def speech() -> Samples:
    """Seven seconds with two utterances that all voices of the test model are sure of, and the start of a third."""
    return load(SAMPLES / "long.wav")[: 7 * 16_000]
