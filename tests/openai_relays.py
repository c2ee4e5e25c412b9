"""What tests of relays stand on: a provider on loopback, a relay to it, and something to transcribe."""

from __future__ import annotations

import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from dispatchers.audio.decode import load
from dispatchers.backends.openai import OpenAIRelay, Patience, Quirks
from dispatchers.engine.models import MICRO_SAMPLES
from dispatchers.providers import PROVIDERS
from tests.providers.openai import KEY, Flavour, OpenAIServer, openai_server

MIB = 1024 * 1024
WAV = MICRO_SAMPLES / "clip09.wav"
CLIP = load(WAV)
MINUTES_2 = np.tile(load(MICRO_SAMPLES / "long.wav"), 2)[: 120 * 16_000]
SECONDS_5 = np.zeros(5 * 16_000, np.int16)
SAID = "The quick brown fox jumps, and the dog sleeps. The quick brown"
"""What the provider hears in those five seconds."""
IMPATIENT = Patience(connect_s=0.3, silent_s=0.3, whole_s=1.0)


def quirks_of(provider: str) -> Quirks:
    """Of one that speaks OpenAI's API."""
    quirks = PROVIDERS[provider].quirks
    assert quirks is not None
    return quirks


@asynccontextmanager
async def relay_to(
    server: OpenAIServer, kind: str = "openai", patience: Patience = IMPATIENT, **account: Any
) -> AsyncIterator[OpenAIRelay]:
    """A relay that is closed afterwards."""
    opened = OpenAIRelay(server.account(**account), quirks_of(kind), patience)
    try:
        yield opened
    finally:
        await opened.aclose()


@asynccontextmanager
async def speaking(kind: str, flavour: Flavour) -> AsyncIterator[tuple[OpenAIRelay, OpenAIServer]]:
    """A relay to a provider of its own."""
    async with openai_server(flavour) as server, relay_to(server, kind, Patience()) as opened:
        yield opened, server


def tells_nothing(error: BaseException) -> None:
    """Asserts that neither the key nor what a provider said is in an error, nor in what led to it."""
    told = "".join(traceback.format_exception(error)) + repr(error)
    assert "the-secret" not in told
    assert KEY not in told


@pytest.fixture(scope="module")
async def provider() -> AsyncIterator[OpenAIServer]:
    """A provider that speaks as OpenAI does. Who puts a fault on it need not take it off."""
    async with openai_server() as opened:
        yield opened


@pytest.fixture
async def relay(provider: OpenAIServer) -> AsyncIterator[OpenAIRelay]:
    """A relay to it that does not wait long; nothing was asked yet."""
    provider.asked.clear()
    provider.http.requests.clear()
    provider.http.fault = None
    async with relay_to(provider) as opened:
        yield opened
    provider.http.fault = None
