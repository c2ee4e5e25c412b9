"""Policies over the API: put, scheduled, checked, explained by an operator; in force for requests, jobs and streams."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from dispatchers import meter
from policy import operators, policies, relays, terms
from policy.identity import SCOPES
from policy.policies import PolicyBody
from policy.pricing import set_price
from policy.relays import Relay
from policy.tenants import Tenant
from runtime.database import Database
from runtime.settings import Settings
from tests.server import PRICE_NANO_PER_HOUR, Served, assert_problem, post, serving
from tests.streaming import Talk, talking

EVER_S = 10.0
SECOND = bytes(32_000)


@pytest.fixture(scope="module")
async def server(settings: Settings, database: Database) -> AsyncIterator[Served]:
    await forget_relays(database)
    async with serving(settings, backend="scripted") as running:
        yield running


@pytest.fixture
async def customer(server: Served) -> Tenant:
    """A tenant at version 2, with a price."""
    return await server.tenant()


@pytest.fixture
async def admin(server: Served, customer: Tenant) -> AsyncIterator[httpx.AsyncClient]:
    """The operator, at that tenant's policies."""
    async with server.http(operator_token(server)) as http:
        http.base_url = f"{server.url}/v1/admin/tenants/{customer.slug}"
        yield http


@pytest.fixture
async def caller(server: Served, customer: Tenant) -> AsyncIterator[httpx.AsyncClient]:
    """That tenant itself."""
    async with server.http(server.token(customer)) as http:
        yield http


async def forget_relays(database: Database) -> None:
    """They are the installation's, and so is what a check knows of."""
    async with database.across_tenants("test") as tx:
        await tx.execute(text("delete from relay_credentials"))
        await tx.execute(text("delete from relays"))


def operator_token(served: Served) -> str:
    settings, key = served.gateway.settings, served.gateway.resources.signing_key
    return operators.mint(key, issuer=settings.issuer, audience=settings.audience, subject="olga", ttl_s=600)


async def put(admin: httpx.AsyncClient, body: dict[str, Any], **when: Any) -> dict[str, Any]:
    response = await admin.put("/policies", json={"body": body, **when})
    assert response.status_code == 201, response.text
    told: dict[str, Any] = response.json()
    return told


async def audit(server: Served, customer: Tenant) -> Any:
    query = text("select * from audit_log where tenant_id = :id order by seq desc limit 1")
    async with server.gateway.resources.database.across_tenants("test") as tx:
        return (await tx.execute(query, {"id": customer.id})).one()


# --- put, list, show --------------------------------------------------------------------------------------------------


async def test_a_version_is_put_shown_and_in_force_at_once(
    server: Served, customer: Tenant, admin: httpx.AsyncClient, caller: httpx.AsyncClient
) -> None:
    assert (await caller.get("/v1/policy")).json()["version"] == 2
    response = await admin.put("/policies", json={"body": {"max_streams": 3, "aliases": {"best": "scripted"}}})
    told = response.json()
    assert (response.status_code, response.headers["cache-control"]) == (201, "no-store")
    assert (told["object"], told["version"], told["status"], told["tenant"]) == (
        "policy.version", 3, "in_force", customer.slug
    )  # fmt: skip
    assert (told["created_by"], told["effective_until"]) == ("operator/olga", None)
    assert abs(told["effective_from"] - time.time()) < 60
    assert (await admin.get("/policies/current")).json() == (await admin.get("/policies/3")).json() == told
    mine = (await caller.get("/v1/policy")).json()
    assert mine == {"object": "policy", "version": 3, "body": told["body"]}
    decision = (await caller.post("/v1/policy/explain", json={"model": "best"})).json()
    assert (decision["policy_version"], decision["candidates"][0]["model"]) == (3, "scripted")
    row = await audit(server, customer)
    assert (row.actor, row.action, row.after) == ("operator/olga", "policy.put", told["body"])
    assert row.request_id == response.headers["x-request-id"]


async def test_what_postgres_cannot_store_is_refused(admin: httpx.AsyncClient) -> None:
    response = await admin.put("/policies", json={"body": {"aliases": {"a\0b": "scripted"}}})
    assert_problem(response, 400, "BAD_PARAMETERS")


async def test_text_that_no_answer_could_repeat_is_no_json(caller: httpx.AsyncClient) -> None:
    response = await caller.post("/v1/policy/explain", content=rb'{"features": ["\ud800"]}')
    assert_problem(response, 400, "BAD_REQUEST")


async def test_what_cannot_be_a_slug_is_no_tenant(server: Served) -> None:
    async with server.http(operator_token(server)) as http:
        assert_problem(await http.get("/v1/admin/tenants/a%00b/policies"), 404, "NOT_FOUND")


async def test_the_list_tells_versions_newest_first_by_pages(admin: httpx.AsyncClient) -> None:
    later = int(time.time()) + 3600
    await put(admin, {}, effective_from=later)
    first = (await admin.get("/policies", params={"limit": 2})).json()
    rest = (await admin.get("/policies", params={"cursor": first["next_cursor"]})).json()
    told = [(entry["version"], entry["status"]) for entry in (*first["data"], *rest["data"])]
    assert told == [(3, "scheduled"), (2, "in_force"), (1, "past")]
    assert first["data"][0]["effective_from"] == first["data"][1]["effective_until"] == later
    assert rest["next_cursor"] is None
    assert "body" not in first["data"][0]


async def test_a_scheduled_version_takes_effect_and_another_is_withdrawn(
    admin: httpx.AsyncClient, caller: httpx.AsyncClient
) -> None:
    soon = int(time.time()) + 2
    await put(admin, {"max_streams": 5}, effective_from=soon)
    await put(admin, {"max_streams": 6}, effective_from=soon + 3600)
    assert (await caller.get("/v1/policy")).json()["version"] == 2
    assert (await admin.delete("/policies/4")).status_code == 204
    assert_problem(await admin.delete("/policies/4"), 409, "CONFLICT")
    assert_problem(await admin.delete("/policies/2"), 409, "CONFLICT")
    assert_problem(await admin.delete("/policies/current"), 400, "BAD_PARAMETERS")
    async with asyncio.timeout(EVER_S):
        while (version := (await caller.get("/v1/policy")).json()["version"]) == 2:
            assert time.time() < soon + 1
            await asyncio.sleep(0.02)
    assert version == 3
    assert time.time() >= soon - 0.05


async def test_rollback_and_diff(server: Served, customer: Tenant, admin: httpx.AsyncClient) -> None:
    await put(admin, {"max_streams": 3})
    await put(admin, {"languages": ["en"], "max_streams": 3})
    changed = (await admin.get("/policies/diff", params={"from": 2, "to": 4})).json()
    assert changed["changes"] == [
        {"field": "languages", "from": None, "to": ["en"]},
        {"field": "max_streams", "from": 8, "to": 3},
    ]
    assert (await admin.get("/policies/diff", params={"from": 3})).json()["to"] == 4
    back = await admin.post("/policies/rollback", json={"version": 2})
    assert (back.status_code, back.json()["version"], back.json()["body"]["max_streams"]) == (201, 5, 8)
    assert (await admin.get("/policies/diff", params={"from": 2, "to": 5})).json()["changes"] == []
    assert (await audit(server, customer)).action == "policy.rollback"


async def test_of_two_writers_one_is_told_that_there_is_a_newer_version(admin: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(
        *(admin.put("/policies", json={"body": {"max_streams": streams}, "newest": 2}) for streams in range(6))
    )
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409, 409]
    refused = next(answer for answer in answers if answer.status_code == 409)
    assert "Version 3 was put meanwhile" in assert_problem(refused, 409, "CONFLICT")["detail"]


# --- checked ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "field", "told"),
    [
        ({"backends": ["deepgram"]}, "backends", "there are: self_hosted, relay"),
        ({"backends": []}, "backends", "at least 1"),
        ({"models": ["large"]}, "models", "there are: scripted"),
        ({"aliases": {"a": "b", "b": "a"}}, "aliases", "circle"),
        ({"aliases": {"a": "nothing"}}, "aliases.a", "no model `nothing`"),
        ({"regions": ["mars"]}, "body", "leaves no backend"),
        ({"forbid_relay": True, "backends": ["relay"]}, "forbid_relay", "leaves no backend"),
        ({"max_stream": 1}, "max_stream", "did you mean `max_streams`?"),
        ({"max_price_per_hour": 0.5}, "max_price_per_hour", "valid string"),
    ],
)
async def test_what_is_wrong_is_told_and_nothing_is_put(
    admin: httpx.AsyncClient, body: dict[str, Any], field: str, told: str
) -> None:
    problem = assert_problem(await admin.put("/policies", json={"body": body}), 400, "BAD_PARAMETERS")
    assert (problem["param"], told in problem["detail"]) == (field, True)
    checked = (await admin.post("/policies/check", json={"body": body})).json()
    assert (checked["accepted"], checked["problems"][0]["field"]) == (False, field)
    assert told in checked["problems"][0]["reason"]
    assert (await admin.get("/policies/current")).json()["version"] == 2


async def test_a_relay_is_known_by_its_name_and_models_before_it_is_plugged_in(
    database: Database, admin: httpx.AsyncClient
) -> None:
    relay = Relay("vllm-eu", "openai-compatible", "https://vllm.example/v1", "eu", ("whisper",))
    try:
        async with database.across_tenants("test") as tx:
            await relays.put(tx, relay, providers={relay.provider: None}, allow_http=False, actor="test")
        for body in (
            {"backends": ["vllm-eu"], "regions": ["eu"], "aliases": {"best": "vllm-eu/whisper"}},
            {"backends": ["relay"], "backend_models": {"vllm-eu": ["whisper"]}},
        ):
            assert (await admin.post("/policies/check", json={"body": body})).json()["problems"] == []
        wrong = {"backends": ["vllm-eu"], "regions": ["us"], "backend_models": {"vllm-eu": ["whispr"]}}
        problem = (await admin.post("/policies/check", json={"body": wrong})).json()["problems"][0]
        assert problem["reason"] == "There is no model `whispr` at `vllm-eu`; there are: whisper."
    finally:
        await forget_relays(database)


async def test_a_check_tells_what_would_change(admin: httpx.AsyncClient) -> None:
    checked = (await admin.post("/policies/check", json={"body": {"max_streams": 1}})).json()
    assert checked == {
        "object": "policy.check",
        "accepted": True,
        "problems": [],
        "changes": [{"field": "max_streams", "from": 8, "to": 1}],
    }
    assert (await admin.get("/policies/current")).json()["version"] == 2


@pytest.mark.parametrize(
    ("method", "path", "sent"),
    [
        ("PUT", "", {}),
        ("PUT", "", {"body": []}),
        ("PUT", "", {"body": {}, "more": 1}),
        ("PUT", "", {"body": {}, "effective_from": "tomorrow"}),
        ("PUT", "", {"body": {}, "effective_from": 1}),
        ("PUT", "", {"body": {}, "effective_from": 10**18}),
        ("PUT", "", {"body": {}, "newest": -1}),
        ("PUT", "", {"body": {"models": ["\x00"]}}),
        ("PUT", "", {"body": {"max_requests": 10**400}}),
        ("POST", "/rollback", {}),
        ("POST", "/rollback", {"version": 10**12}),
        ("POST", "/check", {}),
        ("POST", "/explain", {"question": {"kind": "song"}}),
        ("POST", "/explain", {"body": {}, "version": 1}),
        ("POST", "/explain", {"body": {"models": ["large"]}}),
        ("GET", "/diff?from=x", None),
        ("GET", "?limit=0", None),
        ("GET", "?cursor=abc", None),
    ],
)
async def test_what_cannot_be_read_is_refused(
    admin: httpx.AsyncClient, method: str, path: str, sent: dict[str, Any] | None
) -> None:
    content = None if sent is None else json.dumps(sent).encode()
    assert_problem(await admin.request(method, f"/policies{path}", content=content), 400, "BAD_PARAMETERS")


async def test_what_is_not_there_is_not_found(server: Served, admin: httpx.AsyncClient) -> None:
    for path in ("/policies/99", "/policies/0", "/policies/x", "/policies/99999999999999999999"):
        assert_problem(await admin.get(path), 404, "NOT_FOUND")
    assert_problem(await admin.delete("/policies/99"), 404, "NOT_FOUND")
    assert_problem(await admin.post("/policies/rollback", json={"version": 99}), 404, "NOT_FOUND")
    async with server.http(operator_token(server)) as http:
        for slug in ("%00", "%F0%9F%8E%99", "..", "A", "a" * 300):
            assert_problem(await http.get(f"/v1/admin/tenants/{slug}/policies"), 404, "NOT_FOUND")
        for method, path in (("GET", ""), ("PUT", ""), ("POST", "/check"), ("POST", "/explain"), ("GET", "/diff")):
            address = f"/v1/admin/tenants/nobody/policies{path}"
            assert_problem(await http.request(method, address, json={"body": {}}), 404, "NOT_FOUND")


async def test_none_of_it_is_a_tenants_to_use(server: Served, customer: Tenant) -> None:
    address = f"/v1/admin/tenants/{customer.slug}/policies"
    ways = [
        ("GET", ""), ("PUT", ""), ("GET", "/1"), ("DELETE", "/2"), ("GET", "/diff"),
        ("POST", "/rollback"), ("POST", "/check"), ("POST", "/explain"),
    ]  # fmt: skip
    for method, path in ways:
        async with server.http(server.token(customer, SCOPES)) as http:
            assert_problem(await http.request(method, address + path, json={"body": {}}), 403, "FORBIDDEN")
        async with server.http() as http:
            assert_problem(await http.request(method, address + path, json={"body": {}}), 401, "TOKEN_MISSING")


# --- explained --------------------------------------------------------------------------------------------------------


async def test_explain_tells_what_an_hour_costs_the_tenant_and_not_what_it_costs_us(
    server: Served, customer: Tenant, caller: httpx.AsyncClient
) -> None:
    async with server.gateway.resources.database.across_tenants("test") as tx:
        await set_price(
            tx, backend="self_hosted", model="scripted", price_nano_per_hour=258_000_000,
            cost_nano_per_hour=77_700_000, currency="USD", tenant_id=customer.id, actor="test",
        )  # fmt: skip
    server.gateway.door.terms.forget()
    response = await caller.post("/v1/policy/explain", json={})
    assert response.json() == {
        "object": "policy.decision",
        "policy_version": 2,
        "currency": "USD",
        "candidates": [
            {
                "backend": "self_hosted",
                "model": "scripted",
                "reason": "It comes first in the tenant's policy among those that can serve this request.",
                "price_per_hour": "0.258000",
            }
        ],
        "refused": [],
    }
    assert "777" not in response.text


async def test_explain_and_the_request_agree_on_prices(admin: httpx.AsyncClient, caller: httpx.AsyncClient) -> None:
    exact = f"{PRICE_NANO_PER_HOUR / 10**9:.2f}"
    await put(admin, {"max_price_per_hour": exact})
    assert (await caller.post("/v1/policy/explain", json={})).status_code == 200
    assert (await post(caller, model="scripted")).status_code == 200
    await put(admin, {"max_price_per_hour": "0.359999999"})
    dry = assert_problem(await caller.post("/v1/policy/explain", json={}), 403, "FORBIDDEN")
    real = assert_problem(await post(caller, model="scripted"), 403, "FORBIDDEN")
    assert dry["detail"] == real["detail"] == "It costs 0.360000 USD an hour; the tenant's policy allows 0.359999999."


async def test_the_operator_asks_under_a_draft_or_another_version(
    admin: httpx.AsyncClient, caller: httpx.AsyncClient
) -> None:
    await put(admin, {"aliases": {"best": "scripted"}})
    question = {"kind": "stream", "model": "best"}
    asked = await admin.post("/policies/explain", json={"question": question})
    assert (asked.json()["policy_version"], asked.json()["candidates"][0]["model"]) == (3, "scripted")
    assert_problem(
        await admin.post("/policies/explain", json={"question": question, "version": 2}), 404, "MODEL_NOT_FOUND"
    )
    draft = {"features": ["words"], "aliases": {"best": "scripted"}}
    assert_problem(await admin.post("/policies/explain", json={"question": question, "body": draft}), 403, "FORBIDDEN")
    allowed = await admin.post("/policies/explain", json={"question": {"model": "best"}, "body": draft})
    assert (allowed.json()["policy_version"], len(allowed.json()["candidates"])) == (None, 1)
    assert (await caller.get("/v1/policy")).json()["version"] == 3


async def test_a_relay_without_a_price_is_refused_in_explain_and_serves_once_it_has_one(
    server: Served, database: Database, customer: Tenant, admin: httpx.AsyncClient, caller: httpx.AsyncClient
) -> None:
    relay = Relay("vllm-eu", "openai-compatible", "https://vllm.example/v1", "eu", ("whisper",))
    registry = server.gateway.door._registry
    try:
        async with database.across_tenants("test") as tx:
            await relays.put(tx, relay, providers={relay.provider: None}, allow_http=False, actor="test")
        await registry.refresh()
        await put(admin, {"backends": ["self_hosted", "relay"], "aliases": {"theirs": "vllm-eu/whisper"}})
        preferring = {"backend_preference": "prefer_relay"}
        told = (await caller.post("/v1/policy/explain", json=preferring)).json()
        assert [entry["backend"] for entry in told["candidates"]] == ["self_hosted"]
        assert told["refused"] == [
            {
                "backend": "vllm-eu",
                "model": "whisper",
                "reason": "No price in USD is set for vllm-eu with whisper, so it is not for sale.",
            }
        ]
        assert_problem(await caller.post("/v1/policy/explain", json={"model": "theirs"}), 403, "NO_PRICE")
        async with database.across_tenants("test") as tx:
            await set_price(
                tx,
                backend="vllm-eu",
                price_nano_per_hour=1_000_000,
                currency="USD",
                tenant_id=customer.id,
                actor="test",
            )
        told = (await caller.post("/v1/policy/explain", json={"model": "theirs"})).json()
        assert [entry["price_per_hour"] for entry in told["candidates"]] == ["0.001000"]
        told = (await caller.post("/v1/policy/explain", json=preferring)).json()
        assert [entry["backend"] for entry in told["candidates"]] == ["vllm-eu", "self_hosted"]
        await put(admin, {"backends": ["self_hosted", "relay"], "regions": ["here"]})
        told = (await caller.post("/v1/policy/explain", json=preferring)).json()
        assert [entry["backend"] for entry in told["candidates"]] == ["self_hosted"]
        assert "`eu`" in told["refused"][0]["reason"]
    finally:
        await forget_relays(database)
        await registry.refresh()


async def test_the_decision_is_kept_with_the_session(admin: httpx.AsyncClient, caller: httpx.AsyncClient) -> None:
    await put(admin, {"aliases": {"best": "scripted"}})
    assert (await post(caller, model="best")).status_code == 200
    session = (await caller.get("/v1/sessions")).json()["data"][0]
    kept = (await caller.get(f"/v1/sessions/{session['id']}")).json()
    assert (kept["policy_version"], kept["backend"], kept["model"]) == (3, "self_hosted", "scripted")
    assert [entry["backend"] for entry in kept["decision"]["candidates"]] == ["self_hosted"]
    assert kept["decision"]["refused"] == []


# --- what runs already ------------------------------------------------------------------------------------------------


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of a second, so that a stream need not be long."""
    monkeypatch.setattr(meter, "BLOCK_MS", 1_000)
    monkeypatch.setattr(terms, "KEPT_S", 0.2)
    yield


async def spoken(talk: Talk, until_closed: float) -> None:
    """Silence at about eight times its pace, until the stream ends."""
    async with asyncio.timeout(until_closed):
        while not talk.over:
            await talk.speak(SECOND[:6_400])
            await asyncio.sleep(0.025)


FORBIDDING = [{"regions": ["eu"]}, {"features": ["words"]}, {"languages": ["de"]}, {"backends": ["relay"]}]


@pytest.mark.parametrize("later", FORBIDDING)
async def test_a_later_policy_ends_a_running_stream_that_it_forbids_at_the_next_block(
    server: Served, customer: Tenant, short_blocks: None, later: dict[str, Any]
) -> None:
    async with talking(server, server.token(customer), "?language=en") as talk:
        await talk.until("ready")
        await talk.speak(SECOND * 2)
        async with server.gateway.resources.database.across_tenants("test") as tx:  # as another process would
            await policies.put(tx, customer.id, PolicyBody(**later), actor="test")
        await spoken(talk, EVER_S)
        code, _ = await talk.end()
        assert code == 4403
        assert talk.all("error")[-1]["code"] == "FORBIDDEN"
    async with server.http(server.token(customer)) as http:
        session = (await http.get("/v1/sessions")).json()["data"][0]
    assert session["billed_ms"] == session["accepted_ms"] > 0
    assert session["code"] == "FORBIDDEN"


async def test_a_running_stream_goes_on_under_a_policy_that_lets_it(
    server: Served, customer: Tenant, admin: httpx.AsyncClient, short_blocks: None
) -> None:
    async with talking(server, server.token(customer), "?language=en") as talk:
        await talk.until("ready")
        await put(admin, {"max_streams": 0, "max_price_per_hour": "0", "languages": ["en"]})
        for count in range(1, 5):
            await talk.speak(SECOND)
            await talk.until("usage", count)
        await talk.say("stop")
        assert (await talk.end())[0] == 1000
