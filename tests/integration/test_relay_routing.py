"""A whole gateway between its callers and providers that speak their true formats, and fail in every way they can."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from dispatchers import registry
from dispatchers.audio.decode import load
from dispatchers.health import Breaker, Limits
from gateway.errors import MEANINGS
from policy import policies
from policy.policies import PolicyBody
from policy.pricing import amount_nano
from policy.resolve import TENANTS_DEFAULT
from policy.tenants import Tenant
from runtime.settings import Settings
from tests.providers.deepgram import DeepgramServer, Quirks, Said, deepgram_server
from tests.providers.http import FAULTS, Fault
from tests.providers.openai import ALL_FORMATS, GROQ, KEY, OPENAI, OpenAIServer, openai_server
from tests.relays import RELAY_COST_NANO_PER_HOUR, RELAY_NANO_PER_HOUR, Plugged, relay, until
from tests.server import CLIP, CLIP_TEXT, LONG, PRICE_NANO_PER_HOUR, Served, assert_problem, post, serving
from tests.streaming import Talk, assert_well_formed, talking

MODEL = "whisper-1"
CLIP_MS = len(load(CLIP)) // 16


@pytest.fixture(scope="module")
async def gateway(settings: Settings) -> AsyncIterator[Served]:
    changes = {"model": "micro", "engine_workers": 1, "relay_refresh_s": 0.1, "chunk_ms": 10_000}
    async with serving(settings, **changes) as running:
        yield running


@pytest.fixture(scope="module")
async def provider() -> AsyncIterator[OpenAIServer]:
    async with openai_server(replace(OPENAI, formats={**OPENAI.formats, "micro": ALL_FORMATS})) as server:
        yield server


@pytest.fixture
async def plugged(gateway: Served, provider: OpenAIServer) -> AsyncIterator[Plugged]:
    """A relay of its own, whose breaker nobody has touched, to a provider that is well."""
    provider.http.fault = None
    provider.http.faults.clear()
    async with relay(gateway, "openai", provider.base_url, KEY, models=(MODEL, "micro")) as plugged:
        yield plugged
    provider.http.fault = None


@dataclass(frozen=True)
class Row:
    backend: str
    start_ms: int
    end_ms: int
    amount_nano: int


@dataclass(frozen=True)
class LegRow:
    backend: str
    outcome: str
    start_ms: int
    audio_ms: int
    charged_ms: int
    cost_nano: int
    has_credential: bool


async def accounts(served: Served, tenant: Tenant) -> tuple[list[Row], list[LegRow]]:
    """All that was billed to the tenant, and all that it cost."""
    async with served.gateway.resources.database.across_tenants("test") as tx:
        ledger = await tx.execute(
            text(
                "select backend, start_ms, end_ms, amount_nano from usage_ledger where tenant_id = :id "
                "order by source_id, segment_no"
            ),
            {"id": tenant.id},
        )
        legs = await tx.execute(
            text(
                "select backend, outcome, start_ms, audio_ms, charged_ms, cost_nano, credential_id is not null "
                "from legs where tenant_id = :id order by id"
            ),
            {"id": tenant.id},
        )
        return [Row(*row) for row in ledger], [LegRow(*row) for row in legs]


async def ask(served: Served, tenant: Tenant, **fields: Any) -> httpx.Response:
    async with served.http(served.token(tenant)) as http:
        return await post(http, model="micro", **fields)


# --- which backend ----------------------------------------------------------------------------------------------------


async def test_the_policys_order_decides(gateway: Served, plugged: Plugged, provider: OpenAIServer) -> None:
    tenant = await plugged.tenant()
    answer = await ask(gateway, tenant)
    assert answer.headers["x-stenogate-backend"] == plugged.name
    assert answer.json()["text"].startswith("The quick brown")
    ledger, legs = await accounts(gateway, tenant)
    assert ledger == [Row(plugged.name, 0, CLIP_MS, amount_nano(CLIP_MS, RELAY_NANO_PER_HOUR))]
    cost = amount_nano(CLIP_MS, RELAY_COST_NANO_PER_HOUR)
    assert legs == [LegRow(plugged.name, "completed", 0, CLIP_MS, CLIP_MS, cost, has_credential=True)]


async def test_a_preference_reorders(gateway: Served, plugged: Plugged) -> None:
    tenant = await plugged.tenant(backends=["self_hosted", "relay"])
    assert (await ask(gateway, tenant)).headers["x-stenogate-backend"] == "self_hosted"
    preferring = await ask(gateway, tenant, backend_preference="prefer_relay")
    assert preferring.headers["x-stenogate-backend"] == plugged.name
    forbidden = await plugged.tenant(forbid_relay=True)
    kept_in = await ask(gateway, forbidden, backend_preference="prefer_relay")
    assert (kept_in.headers["x-stenogate-backend"], kept_in.json()["text"]) == ("self_hosted", CLIP_TEXT)


async def test_models_of_relays_are_listed_to_those_who_may_use_them(gateway: Served, plugged: Plugged) -> None:
    async with gateway.http(gateway.token(await plugged.tenant())) as http:
        models = {entry["id"]: entry for entry in (await http.get("/v1/models")).json()["data"]}
    assert models[MODEL]["owned_by"] in (plugged.name, "stenogate")
    async with gateway.http(gateway.token(await plugged.tenant(forbid_relay=True))) as http:
        listed = (await http.get("/v1/models")).json()["data"]
    assert all(entry["owned_by"] == "stenogate" for entry in listed)


async def test_a_session_tells_who_was_asked(gateway: Served, plugged: Plugged, provider: OpenAIServer) -> None:
    tenant = await plugged.tenant()
    provider.http.faults.append(FAULTS["unavailable"])
    async with gateway.http(gateway.token(tenant)) as http:
        await post(http, model="micro")
        (session,) = (await http.get("/v1/sessions")).json()["data"]
        told = (await http.get(f"/v1/sessions/{session['id']}")).json()
    assert told["backend"] == "self_hosted"
    assert [(leg["backend"], leg["outcome"]) for leg in told["legs"]] == [
        (plugged.name, "BACKEND_UNAVAILABLE"),
        ("self_hosted", "completed"),
    ]
    assert "cost" not in json.dumps(told["legs"])


# --- failures ---------------------------------------------------------------------------------------------------------

FAILING = {
    "html": "BACKEND_FAILED",
    "truncated json": "BACKEND_FAILED",
    "an array": "BACKEND_FAILED",
    "large json": "BACKEND_FAILED",
    "nothing": "BACKEND_FAILED",
    "redirect": "BACKEND_FAILED",
    "broken off": "BACKEND_FAILED",
    "closed before the answer": "BACKEND_FAILED",
    "failed": "BACKEND_FAILED",
    "unavailable": "BACKEND_UNAVAILABLE",
    "too many": "BACKEND_THROTTLED",
    "unauthorised": "CREDENTIAL_REFUSED",
}
FREE = {"BACKEND_UNAVAILABLE", "BACKEND_THROTTLED", "CREDENTIAL_REFUSED"}


@pytest.mark.parametrize("fault", FAILING)
async def test_the_next_backend_serves(gateway: Served, plugged: Plugged, provider: OpenAIServer, fault: str) -> None:
    """And is billed, once; what the failure cost is ours."""
    tenant = await plugged.tenant()
    provider.http.fault = FAULTS[fault]
    answer = await ask(gateway, tenant)
    assert (answer.status_code, answer.json()["text"]) == (200, CLIP_TEXT)
    assert answer.headers["x-stenogate-backend"] == "self_hosted"
    ledger, legs = await accounts(gateway, tenant)
    assert ledger == [Row("self_hosted", 0, CLIP_MS, amount_nano(CLIP_MS, PRICE_NANO_PER_HOUR))]
    charged_ms = 0 if FAILING[fault] in FREE else CLIP_MS
    cost = amount_nano(charged_ms, RELAY_COST_NANO_PER_HOUR)
    assert legs == [
        LegRow(plugged.name, FAILING[fault], 0, CLIP_MS, charged_ms, cost, has_credential=True),
        LegRow("self_hosted", "completed", 0, CLIP_MS, CLIP_MS, 0, has_credential=False),
    ]


@pytest.mark.parametrize("fault", FAILING)
async def test_where_no_other_may(gateway: Served, plugged: Plugged, provider: OpenAIServer, fault: str) -> None:
    """A clear error, which quotes nothing of what the provider said; nothing is billed."""
    tenant = await plugged.tenant(fallback=False)
    provider.http.fault = FAULTS[fault]
    answer = await ask(gateway, tenant)
    code = FAILING[fault]
    problem = assert_problem(answer, MEANINGS[code].status, code)
    assert problem["retryable"] is (code != "CREDENTIAL_REFUSED")
    assert "the-secret" not in answer.text
    ledger, legs = await accounts(gateway, tenant)
    assert (ledger, [leg.outcome for leg in legs]) == ([], [code])


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/v1", "http://localhost.invalid:80/v1"])
async def test_a_provider_that_cannot_be_reached(gateway: Served, address: str) -> None:
    async with relay(gateway, "openai", "http://127.0.0.1:9/v1", KEY, models=("micro",)) as plugged:
        async with gateway.gateway.resources.database.across_tenants("test") as tx:
            await tx.execute(
                text("update relays set base_url = :url where name = :name"), {"url": address, "name": plugged.name}
            )
        tenant = await plugged.tenant()
        answer = await ask(gateway, tenant)
        assert (answer.status_code, answer.headers["x-stenogate-backend"]) == (200, "self_hosted")
        _, legs = await accounts(gateway, tenant)
        assert [(leg.outcome, leg.charged_ms) for leg in legs] == [("BACKEND_UNAVAILABLE", 0), ("completed", CLIP_MS)]


async def test_a_request_that_is_refused_is_asked_of_nobody_else(
    gateway: Served, plugged: Plugged, provider: OpenAIServer
) -> None:
    provider.http.fault = FAULTS["bad request"]
    assert_problem(await ask(gateway, await plugged.tenant()), 502, "BACKEND_REFUSED")


async def test_what_a_backend_cannot_take_is_asked_of_the_next(gateway: Served, live: Plugged) -> None:
    """Deepgram takes no prompt. That is no failure of its, and reason enough only where nobody else may be asked."""
    tenant = await live.tenant()
    async with gateway.http(gateway.token(tenant)) as http:
        for _ in range(12):
            answer = await post(http, model=TENANTS_DEFAULT, prompt="the fox")
            assert (answer.status_code, answer.headers["x-stenogate-backend"]) == (200, "self_hosted"), answer.text
        assert (await post(http, model=TENANTS_DEFAULT)).headers["x-stenogate-backend"] == live.name
    _, legs = await accounts(gateway, tenant)
    assert [(leg.backend, leg.outcome, leg.charged_ms) for leg in legs[:2]] == [
        (live.name, "UNSUPPORTED_OPTION", 0),
        ("self_hosted", "completed", CLIP_MS),
    ]
    alone = await live.tenant(fallback=False)
    async with gateway.http(gateway.token(alone)) as http:
        problem = assert_problem(await post(http, model=TENANTS_DEFAULT, prompt="the fox"), 400, "UNSUPPORTED_OPTION")
    assert problem["error"]["param"] == "prompt"


async def test_only_who_listens_is_told_at_once(gateway: Served, provider: OpenAIServer) -> None:
    """A model that tells its text as it finds it says no times, and what was told cannot be told by another."""
    async with relay(gateway, "openai", provider.base_url, KEY, models=("gpt-4o-transcribe",)) as plugged:
        tenant = await plugged.tenant(backends=[plugged.name])
        async with gateway.http(gateway.token(tenant)) as http:
            for stream in ("true", "false"):
                assert (await post(http, model="gpt-4o-transcribe", stream=stream)).status_code == 200
    assert [form.fields.get("stream") for form in provider.asked[-2:]] == [("true",), None]


async def test_a_refused_key_is_named_and_not_used_again(
    gateway: Served, plugged: Plugged, provider: OpenAIServer
) -> None:
    tenant = await plugged.tenant(fallback=False)
    provider.http.fault = FAULTS["unauthorised"]
    problem = assert_problem(await ask(gateway, tenant), 502, "CREDENTIAL_REFUSED")
    assert KEY[:4] in problem["detail"]
    assert KEY not in problem["detail"]
    asked = len(provider.http.requests)
    again = await ask(gateway, tenant)
    assert_problem(again, 503, "BACKEND_UNAVAILABLE")
    assert len(provider.http.requests) == asked
    assert KEY[:4] in plugged.offer().why_down
    provider.http.fault = None
    await plugged.credential(KEY)  # another row, the same account: the provider has come to its senses
    assert (await ask(gateway, tenant)).status_code == 200


async def test_a_provider_that_asks_for_a_pause_gets_one(
    gateway: Served, plugged: Plugged, provider: OpenAIServer
) -> None:
    tenant = await plugged.tenant(fallback=False)
    provider.http.fault = FAULTS["too many"]
    problem = await ask(gateway, tenant)
    assert_problem(problem, 503, "BACKEND_THROTTLED")
    assert problem.headers["retry-after"] == "7"
    provider.http.fault, asked = None, len(provider.http.requests)
    waiting = await ask(gateway, tenant)
    assert_problem(waiting, 503, "BACKEND_UNAVAILABLE")
    assert 1 <= int(waiting.headers["retry-after"]) <= 7
    assert len(provider.http.requests) == asked


async def test_one_that_fails_too_often_is_left_alone(
    gateway: Served, plugged: Plugged, provider: OpenAIServer
) -> None:
    tenant = await plugged.tenant()
    provider.http.fault = FAULTS["failed"]
    asked = len(provider.http.requests)
    for _ in range(7):
        assert (await ask(gateway, tenant)).headers["x-stenogate-backend"] == "self_hosted"
    assert len(provider.http.requests) == asked + 5
    assert not plugged.offer().up
    async with gateway.http() as http:
        metrics = (await http.get("/metrics")).text
    assert f'stenogate_backend_up{{backend="{plugged.name}"}} 0.0' in metrics
    assert f'stenogate_backend_credentials{{backend="{plugged.name}",state="open"}} 1.0' in metrics


async def test_a_caller_who_leaves_pays_nothing_and_costs_what_was_asked(
    gateway: Served, plugged: Plugged, provider: OpenAIServer
) -> None:
    tenant = await plugged.tenant()
    provider.http.faults.append(FAULTS["silent"])
    asking = asyncio.create_task(ask(gateway, tenant))
    await until(lambda: not provider.http.faults)
    asking.cancel()
    await asyncio.wait({asking})
    async with asyncio.timeout(10):
        while not (found := await accounts(gateway, tenant))[1]:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.05)
    assert found == (
        [],
        [
            LegRow(
                plugged.name,
                "cancelled",
                0,
                CLIP_MS,
                CLIP_MS,
                amount_nano(CLIP_MS, RELAY_COST_NANO_PER_HOUR),
                has_credential=True,
            )
        ],
    )
    assert gateway.gateway.door._registry.plugs()[plugged.name].recogniser._requests.taken == 0  # type: ignore[attr-defined]


async def test_one_that_is_well_again_is_found_without_a_request(
    gateway: Served, provider: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a question that costs nothing."""
    monkeypatch.setattr(registry, "Breaker", partial(Breaker, limits=Limits(in_a_row=1, open_s=0.3)))
    async with relay(gateway, "openai", provider.base_url, KEY, models=("micro",)) as plugged:
        provider.http.fault = FAULTS["failed"]
        await ask(gateway, await plugged.tenant())
        breaker = gateway.gateway.door._registry.plugs()[plugged.name].breaker
        assert breaker is not None
        assert breaker.state == "open"
        asked = len(provider.http.requests)
        await until(lambda: len(provider.http.requests) > asked)  # in vain
        provider.http.fault = None
        await until(lambda: breaker.state == "closed")
        assert {request.path for request in provider.http.requests[asked:]} == {"/v1/models"}


# --- credentials ------------------------------------------------------------------------------------------------------


async def test_a_tenants_own_key_comes_before_the_shared_one(
    gateway: Served, plugged: Plugged, provider: OpenAIServer
) -> None:
    ours, theirs = await plugged.tenant(fallback=False), await plugged.tenant(fallback=False)
    own = await plugged.credential("sk-wrong-0123456789abcdef", tenant=theirs)
    refused = assert_problem(await ask(gateway, theirs), 502, "CREDENTIAL_REFUSED")
    assert "sk-wr" in refused["detail"]
    assert (await ask(gateway, ours)).status_code == 200  # whose credential is another, and so its breaker
    _, (leg,) = await accounts(gateway, theirs)
    assert leg.has_credential
    assert plugged.offer(ours).up
    assert not plugged.offer(theirs).up
    assert own is not None


async def test_a_key_is_rotated_under_a_running_request(
    gateway: Served, plugged: Plugged, provider: OpenAIServer
) -> None:
    tenant = await plugged.tenant(fallback=False)
    provider.http.faults.append(Fault(wait_s=1.0))
    running = asyncio.create_task(ask(gateway, tenant))
    await until(lambda: not provider.http.faults)
    await plugged.credential(KEY)
    assert (await running).status_code == 200
    assert (await ask(gateway, tenant)).status_code == 200


# --- streams ----------------------------------------------------------------------------------------------------------

SPEECH = load(LONG)
WORDS: tuple[Said, ...] = tuple(
    (entry["word"], entry["start"], entry["end"]) for entry in json.loads(LONG.with_suffix(".words.json").read_text())
)
SECONDS = 22
SAID = [word for word, _, end in WORDS if end < SECONDS]
PCM = SPEECH[: SECONDS * 16_000].tobytes()


@pytest.fixture
async def deepgram() -> AsyncIterator[DeepgramServer]:
    async with deepgram_server(WORDS) as server:
        yield server


@pytest.fixture
async def live(gateway: Served, deepgram: DeepgramServer) -> AsyncIterator[Plugged]:
    async with relay(gateway, "deepgram", deepgram.http.url, deepgram.key) as plugged:
        yield plugged


async def stream(served: Served, tenant: Tenant, *, pause_s: float = 0.0) -> Talk:
    """What came of `PCM`, at some speed."""
    async with talking(served, served.token(tenant), "?sample_rate=16000") as talk:
        await talk.until("ready")
        for at in range(0, len(PCM), 32_000):
            await talk.speak(PCM[at : at + 32_000])
            await asyncio.sleep(pause_s)
        await talk.say("stop")
        await talk.end()
    return talk


def words(talk: Talk) -> list[str]:
    return re.findall("[a-z']+", talk.text.lower())


def check_billed_once(ledger: list[Row]) -> None:
    """Without a gap, and without an overlap."""
    assert [row.start_ms for row in ledger] == [0, *(row.end_ms for row in ledger[:-1])]
    assert ledger[-1].end_ms == 1000 * SECONDS
    for row in ledger:
        price = PRICE_NANO_PER_HOUR if row.backend == "self_hosted" else RELAY_NANO_PER_HOUR
        assert row.amount_nano == amount_nano(row.end_ms - row.start_ms, price)


async def test_a_stream_at_a_relay(gateway: Served, live: Plugged) -> None:
    tenant = await live.tenant()
    talk = await stream(gateway, tenant)
    assert talk.all("ready")[0]["backend"] == live.name
    assert words(talk) == SAID
    assert_well_formed(talk.events)
    ledger, (leg,) = await accounts(gateway, tenant)
    check_billed_once(ledger)
    assert {row.backend for row in ledger} == {live.name}
    cost = amount_nano(1000 * SECONDS, RELAY_COST_NANO_PER_HOUR)
    assert leg == LegRow(live.name, "completed", 0, 1000 * SECONDS, 1000 * SECONDS, cost, has_credential=True)


@pytest.mark.parametrize("ending", ["1011", "reset", "half-closed"])
@pytest.mark.parametrize("most_s", [0.5, 4.5, 13.2])
async def test_a_relay_that_dies_in_the_middle(
    gateway: Served, live: Plugged, deepgram: DeepgramServer, ending: Any, most_s: float
) -> None:
    """The engine here hears the unfinished utterance again: no word is lost or doubled, and none is paid for twice."""
    deepgram.quirks = Quirks(most_s=most_s, ending=ending)
    tenant = await live.tenant()
    talk = await stream(gateway, tenant, pause_s=0.02)
    assert words(talk) == SAID
    assert_well_formed(talk.events)
    assert talk.all("gap") == []
    ledger, legs = await accounts(gateway, tenant)
    check_billed_once(ledger)
    first, second = legs
    assert (first.backend, second.backend) == (live.name, "self_hosted")
    assert first.outcome in ("BACKEND_FAILED", "BACKEND_TIMEOUT", "BACKEND_UNAVAILABLE")
    assert first.charged_ms == first.audio_ms
    assert second == LegRow(
        "self_hosted",
        "completed",
        second.start_ms,
        1000 * SECONDS - second.start_ms,
        second.charged_ms,
        0,
        has_credential=False,
    )
    billed_there = sum(row.end_ms - row.start_ms for row in ledger if row.backend == live.name)
    assert billed_there in (0, second.start_ms, first.audio_ms // 15_000 * 15_000) or billed_there >= second.start_ms


async def test_a_stream_whose_relay_cannot_be_reached(gateway: Served, live: Plugged, deepgram: DeepgramServer) -> None:
    deepgram.http.fault = FAULTS["unauthorised"]
    tenant = await live.tenant()
    talk = await stream(gateway, tenant)
    assert words(talk) == SAID
    ledger, legs = await accounts(gateway, tenant)
    check_billed_once(ledger)
    assert {row.backend for row in ledger} == {"self_hosted"}
    assert [(leg.backend, leg.outcome) for leg in legs] == [
        (live.name, "CREDENTIAL_REFUSED"),
        ("self_hosted", "completed"),
    ]


async def test_a_stream_whose_relay_cannot_take_what_is_asked(gateway: Served, live: Plugged) -> None:
    tenant, other = await live.tenant(), await live.tenant(backends=["self_hosted"])
    said = []
    for one in (tenant, other):
        async with talking(gateway, gateway.token(one), "?sample_rate=16000&prompt=the+fox") as talk:
            await talk.until("ready")
            await talk.speak(PCM)
            await talk.say("stop")
            await talk.end()
        assert_well_formed(talk.events)
        said.append([(final["text"], final["start_ms"]) for final in talk.all("final")])
    assert len(said[0]) > 3
    assert said[0] == said[1]
    _, legs = await accounts(gateway, tenant)
    assert [(leg.backend, leg.outcome, leg.charged_ms > 0) for leg in legs] == [
        (live.name, "UNSUPPORTED_OPTION", False),
        ("self_hosted", "completed", True),
    ]


async def test_a_stream_with_nobody_left(gateway: Served, live: Plugged, deepgram: DeepgramServer) -> None:
    """It is tried there once more; then what was told stands, the rest is a gap, and the stream ends, 4503."""
    deepgram.quirks = Quirks(most_s=4.5)
    tenant = await live.tenant(backends=[live.name])
    async with talking(gateway, gateway.token(tenant), "?sample_rate=16000") as talk:
        await talk.until("ready")
        await talk.speak(PCM[: 2 * 16_000 * 12])
        code, _ = await talk.end()
    assert code == 4503
    assert talk.all("error")[-1]["code"] == "BACKEND_UNAVAILABLE"
    assert talk.all("error")[-1]["fatal"] is True
    assert talk.all("gap")
    _, legs = await accounts(gateway, tenant)
    assert {leg.outcome for leg in legs} == {"BACKEND_FAILED"}
    assert len(legs) >= 2


async def test_a_provider_of_recordings_hears_streams_too(gateway: Served, provider: OpenAIServer) -> None:
    """Cut into utterances here, each of which is paid for; there are no partials."""
    async with (
        openai_server(GROQ) as groq,
        relay(gateway, "groq", groq.base_url, KEY) as plugged,
    ):
        tenant = await plugged.tenant()
        talk = await stream(gateway, tenant)
        assert_well_formed(talk.events)
        finals = talk.all("final")
        assert len(finals) > 3
        assert (talk.all("partial"), talk.all("delta")) == ([], [])
        ledger, (leg,) = await accounts(gateway, tenant)
        check_billed_once(ledger)
        assert leg.charged_ms >= 10_000 * len(finals) > leg.audio_ms


async def test_a_provider_of_recordings_that_fails_in_a_stream(gateway: Served, provider: OpenAIServer) -> None:
    async with relay(gateway, "openai", provider.base_url, KEY, models=(MODEL,)) as plugged:
        tenant = await plugged.tenant()
        provider.http.fault = FAULTS["failed"]
        talk = await stream(gateway, tenant)
        assert words(talk) == SAID
        ledger, legs = await accounts(gateway, tenant)
        check_billed_once(ledger)
        assert [(leg.backend, leg.outcome) for leg in legs] == [
            (plugged.name, "BACKEND_FAILED"),
            ("self_hosted", "completed"),
        ]


async def test_a_later_policy_moves_a_running_stream(gateway: Served, live: Plugged) -> None:
    """At the next block, to the next backend that it still allows; where there is none, the stream ends."""
    tenant = await live.tenant()
    async with talking(gateway, gateway.token(tenant), "?sample_rate=16000") as talk:
        await talk.until("ready")
        await talk.speak(PCM[: 2 * 16_000 * 8])
        await put_policy(gateway, tenant, backends=("self_hosted",))
        gateway.gateway.door.terms.forget()
        for at in range(2 * 16_000 * 8, len(PCM), 32_000):
            await talk.speak(PCM[at : at + 32_000])
            await asyncio.sleep(0.05)
        await talk.say("stop")
        await talk.end()
    assert words(talk) == SAID
    assert_well_formed(talk.events)
    ledger, legs = await accounts(gateway, tenant)
    check_billed_once(ledger)
    assert [leg.backend for leg in legs] == [live.name, "self_hosted"]
    assert ledger[-1].backend == "self_hosted"


async def put_policy(served: Served, tenant: Tenant, **body: Any) -> None:
    async with served.gateway.resources.database.across_tenants("test") as tx:
        await policies.put(tx, tenant.id, PolicyBody(**body), actor="test")


# --- jobs -------------------------------------------------------------------------------------------------------------


async def test_a_job_whose_relay_fails_between_two_chunks(
    gateway: Served, plugged: Plugged, provider: OpenAIServer
) -> None:
    """Each chunk is billed to who did it."""
    tenant = await plugged.tenant()
    provider.http.faults += [None, None, FAULTS["failed"]]
    async with gateway.http(gateway.token(tenant)) as http:
        job = (await post(http, LONG.read_bytes(), model="micro", **{"async": "true"})).json()
        done = (await http.get(f"/v1/jobs/{job['id']}", params={"wait": "60"})).json()
    assert done["status"] == "completed", done
    ledger, legs = await accounts(gateway, tenant)
    assert [row.backend for row in ledger] == [plugged.name, "self_hosted"]
    assert (ledger[0].start_ms, ledger[0].end_ms) == (0, ledger[1].start_ms)
    assert ledger[1].end_ms == len(SPEECH) // 16
    outcomes = [(leg.backend, leg.outcome) for leg in legs]
    assert outcomes[:4] == [
        (plugged.name, "completed"),
        (plugged.name, "completed"),
        (plugged.name, "BACKEND_FAILED"),
        ("self_hosted", "completed"),
    ]
    served = [leg for leg in legs if leg.outcome == "completed"]
    assert sum(leg.audio_ms for leg in served) == ledger[1].end_ms
    assert [leg.start_ms for leg in served][:2] == [0, legs[1].start_ms]


# --- a gateway of relays only -----------------------------------------------------------------------------------------


async def test_a_gateway_without_an_engine(
    settings: Settings, provider: OpenAIServer, deepgram: DeepgramServer
) -> None:
    async with serving(settings, backend="none", relay_refresh_s=0.1) as served:
        tenant = await served.tenant(backends=("relay",))
        nothing = await ask(served, tenant)
        assert_problem(nothing, 503, "BACKEND_UNAVAILABLE")
        async with served.http() as http:
            assert (await http.get("/readyz")).status_code == 200
        async with relay(served, "deepgram", deepgram.http.url, deepgram.key) as plugged:
            tenant = await plugged.tenant()
            talk = await stream(served, tenant)
            assert words(talk) == SAID


async def test_a_gateway_without_an_engine_loads_no_model() -> None:
    """Nor anything that runs one."""
    code = (
        "import sys, dispatchers.assembly, gateway.app; "
        "print([name for name in ('ctranslate2', 'faster_whisper', 'onnxruntime', 'av') if name in sys.modules])"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    told, _ = await process.communicate()
    assert (process.returncode, told.decode().strip()) == (0, "[]")
