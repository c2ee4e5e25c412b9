"""A whole gateway between its callers and a provider that speaks as AssemblyAI does."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from policy.pricing import amount_nano
from runtime.settings import Settings
from tests.integration.test_relay_routing import (
    SAID,
    SECONDS,
    WORDS,
    LegRow,
    accounts,
    ask,
    check_billed_once,
    stream,
    words,
)
from tests.providers.assemblyai import AssemblyAIServer, Quirks, assemblyai_server
from tests.relays import RELAY_COST_NANO_PER_HOUR, Plugged, relay, until
from tests.server import LONG, Served, serving
from tests.streaming import assert_well_formed


@pytest.fixture(scope="module")
async def gateway(settings: Settings) -> AsyncIterator[Served]:
    async with serving(settings, model="micro", engine_workers=1, relay_refresh_s=0.1) as running:
        yield running


@pytest.fixture
async def assemblyai() -> AsyncIterator[AssemblyAIServer]:
    async with assemblyai_server(WORDS) as server:
        yield server


@pytest.fixture
async def plugged(gateway: Served, assemblyai: AssemblyAIServer) -> AsyncIterator[Plugged]:
    async with relay(gateway, "assemblyai", assemblyai.http.url, assemblyai.key) as plugged:
        yield plugged


async def test_a_file(gateway: Served, plugged: Plugged, assemblyai: AssemblyAIServer) -> None:
    tenant = await plugged.tenant()
    async with gateway.http(gateway.token(tenant)) as http:
        files = {"file": ("long.wav", LONG.read_bytes())}
        data = {"model": "universal-2", "response_format": "verbose_json"}
        answer = await http.post("/v1/audio/transcriptions", files=files, data=data)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-stenogate-backend"] == plugged.name
    assert answer.json()["text"].split() == [word for word, *_ in WORDS]
    assert {job.asked["speech_models"][0] for job in assemblyai.transcripts.values()} == {"universal-2"}
    await until(lambda: assemblyai.kept == [])


async def test_a_file_of_another_model_goes_elsewhere(gateway: Served, plugged: Plugged) -> None:
    assert (await ask(gateway, await plugged.tenant())).headers["x-stenogate-backend"] == "self_hosted"


async def test_a_stream(gateway: Served, plugged: Plugged, assemblyai: AssemblyAIServer) -> None:
    tenant = await plugged.tenant()
    talk = await stream(gateway, tenant)
    assert talk.all("ready")[0]["backend"] == plugged.name
    assert words(talk) == SAID
    assert_well_formed(talk.events)
    ledger, (leg,) = await accounts(gateway, tenant)
    check_billed_once(ledger)
    assert {row.backend for row in ledger} == {plugged.name}
    cost = amount_nano(1000 * SECONDS, RELAY_COST_NANO_PER_HOUR)
    assert leg == LegRow(plugged.name, "completed", 0, 1000 * SECONDS, 1000 * SECONDS, cost, has_credential=True)
    assert assemblyai.heard["Terminate"] == 1


@pytest.mark.parametrize("ending", ["3005", "3008", "close 1013", "reset"])
async def test_a_stream_that_dies_in_the_middle(
    gateway: Served,
    plugged: Plugged,
    assemblyai: AssemblyAIServer,
    ending: str,
) -> None:
    """The engine here hears the unfinished utterance again: no word is lost or doubled, and none is paid for twice."""
    assemblyai.quirks = Quirks(most_s=4.5, ending=ending)
    tenant = await plugged.tenant()
    talk = await stream(gateway, tenant, pause_s=0.02)
    assert words(talk) == SAID
    assert_well_formed(talk.events)
    assert talk.all("gap") == []
    ledger, legs = await accounts(gateway, tenant)
    check_billed_once(ledger)
    assert [leg.backend for leg in legs] == [plugged.name, "self_hosted"]
    assert legs[0].outcome in ("BACKEND_FAILED", "BACKEND_UNAVAILABLE")
