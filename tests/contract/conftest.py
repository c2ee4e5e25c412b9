"""Every dispatcher there is. A new one is one more line in `MAKERS`."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path

import pytest

from dispatchers.adapters.guarded import Guarded
from dispatchers.adapters.per_channel import PerChannel
from dispatchers.adapters.segmenting import Segmenting
from dispatchers.adapters.tallied import Tallied, Tally
from dispatchers.audio.decode import load
from dispatchers.audio.vad import SileroVad
from dispatchers.backends.assemblyai import AssemblyAIRelay
from dispatchers.backends.deepgram import DeepgramRelay
from dispatchers.backends.local import LocalBackend
from dispatchers.backends.openai import OpenAIRelay, Quirks
from dispatchers.backends.pool import EnginePool
from dispatchers.backends.scripted import Scripted
from dispatchers.engine.further import recognisers
from dispatchers.engine.models import MICRO, find
from dispatchers.health import Breaker
from dispatchers.interface import Dispatcher, Samples
from dispatchers.local import engine_child
from dispatchers.providers import PROVIDERS
from runtime.settings import Settings
from tests.engines import TOKEN, engine_process
from tests.providers.assemblyai import assemblyai_server
from tests.providers.deepgram import deepgram_server
from tests.providers.openai import GROQ, OPENAI, Flavour, openai_server
from tests.providers.script import Said

SCRIPT: tuple[Said, ...] = (
    *(("where", 0.45, 0.76), ("is", 0.76, 0.94), ("the", 0.94, 1.12), ("hospital", 1.12, 1.79)),
    *(("please", 3.1, 3.52), ("update", 3.52, 4.08), ("my", 4.08, 4.28), ("project", 4.28, 4.92)),
    *(("before", 4.92, 5.34), ("sunday", 5.34, 5.95), ("thank", 6.5, 6.88)),
)
"""What is said in `speech`, for recognisers that are not here."""

FURTHER = Path(__file__).parents[1] / "fixtures/further"
SAMPLES = Path(__file__).parents[2] / "dispatchers/engine/micro/samples"


async def scripted() -> Dispatcher:
    return Scripted()


async def local() -> Dispatcher:
    return LocalBackend(MICRO, workers=1)


async def child() -> Dispatcher:
    started = engine_child(Settings(model="micro", engine_workers=1))
    await started.start()
    return started


def attended(relay: Dispatcher, server: AsyncExitStack) -> Dispatcher:
    """The relay, which closes the provider that it speaks to with itself."""
    server.push_async_callback(relay.aclose)
    relay.aclose = server.aclose  # type: ignore[method-assign]
    return relay


def relay(provider: str, flavour: Flavour) -> Callable[[], Awaitable[Dispatcher]]:
    async def hosted() -> Dispatcher:
        server = AsyncExitStack()
        opened = await server.enter_async_context(openai_server(flavour))
        quirks = PROVIDERS[provider].quirks
        assert isinstance(quirks, Quirks)
        return attended(OpenAIRelay(opened.account(), quirks), server)

    return hosted


async def deepgram() -> Dispatcher:
    server = AsyncExitStack()
    provider = await server.enter_async_context(deepgram_server(SCRIPT))
    return attended(DeepgramRelay(provider.account()), server)


async def assemblyai() -> Dispatcher:
    server = AsyncExitStack()
    provider = await server.enter_async_context(assemblyai_server(SCRIPT))
    return attended(AssemblyAIRelay(provider.account()), server)


@contextmanager
def installed() -> Iterator[None]:
    """With the engine of `FURTHER` found by its entry point, as if it had been installed."""
    sys.path.append(str(FURTHER))
    recognisers.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(FURTHER))
        recognisers.cache_clear()


async def further() -> Dispatcher:
    with installed():
        backend = LocalBackend(find("loudness"), workers=1)
        await backend.warm()
        return backend


class Engines(EnginePool):
    """A pool whose engines are started for it, and end with it."""

    def __init__(self, count: int) -> None:
        self._engines = ExitStack()
        running = [self._engines.enter_context(engine_process()) for _ in range(count)]
        super().__init__([engine.url for engine in running], token=TOKEN)

    async def aclose(self) -> None:
        await super().aclose()
        self._engines.close()


async def pool() -> Dispatcher:
    engines = Engines(2)
    await engines.start()
    return engines


def streaming(batch: Callable[[], Awaitable[Dispatcher]]) -> Callable[[], Awaitable[Dispatcher]]:
    async def segmenting() -> Dispatcher:
        return Segmenting(await batch(), SileroVad.load())

    return segmenting


def per_channel(within: Callable[[], Awaitable[Dispatcher]]) -> Callable[[], Awaitable[Dispatcher]]:
    async def apart() -> Dispatcher:
        return PerChannel(await within())

    return apart


def guarded(within: Callable[[], Awaitable[Dispatcher]]) -> Callable[[], Awaitable[Dispatcher]]:
    async def careful() -> Dispatcher:
        return Tallied(Guarded(await within(), Breaker("relay")), Tally())

    return careful


MAKERS: dict[str, Callable[[], Awaitable[Dispatcher]]] = {
    "scripted": scripted,
    "local": local,
    "child": child,
    "openai": relay("openai", OPENAI),
    "groq": relay("groq", GROQ),
    "segmenting openai": streaming(relay("openai", OPENAI)),
    "deepgram": deepgram,
    "assemblyai": assemblyai,
    "further": further,
    "pool": pool,
    "segmenting scripted": streaming(scripted),
    "segmenting local": streaming(local),
    "segmenting child": streaming(child),
    "segmenting further": streaming(further),
    "segmenting pool": streaming(pool),
    "guarded deepgram": guarded(deepgram),
    "guarded segmenting scripted": guarded(streaming(scripted)),
    "per channel scripted": per_channel(streaming(scripted)),
    "per channel deepgram": per_channel(deepgram),
    "per channel assemblyai": per_channel(assemblyai),
}


@pytest.fixture(scope="module", params=MAKERS)
async def dispatcher(request: pytest.FixtureRequest) -> AsyncIterator[Dispatcher]:
    made = await MAKERS[request.param]()
    yield made
    await made.aclose()


@pytest.fixture(scope="session")
def speech() -> Samples:
    """Seven seconds with two utterances that all voices of the test model are sure of, and the start of a third."""
    return load(SAMPLES / "long.wav")[: 7 * 16_000]
