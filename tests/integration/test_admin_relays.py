"""The operator's relays and their keys, over real sockets."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from policy import operators, relays
from policy.identity import SCOPES
from runtime.database import Database
from runtime.sealing import LocalSealer
from runtime.settings import Settings
from tests.server import Served, assert_problem, serving

KEY, NEXT_KEY, TENANTS_KEY = (f"sk-canary-{name}-{uuid.uuid4().hex}" for name in ("first", "second", "tenants"))
HERE = "/v1/admin/relays/deepgram"
CREDENTIALS = f"{HERE}/credentials"
NOBODYS = "cred_" + "0" * 32


@pytest.fixture(scope="module")
async def server(settings: Settings) -> AsyncIterator[Served]:
    async with serving(settings, backend="scripted") as running:
        yield running


@pytest.fixture(autouse=True)
async def as_before(database: Database) -> AsyncIterator[None]:
    """The database is shared: no relay outlives its test."""
    yield
    async with database.across_tenants("test") as tx:
        for table in ("relay_credentials", "relays"):
            await tx.execute(text(f"delete from {table}"))


@pytest.fixture
async def admin(server: Served) -> AsyncIterator[httpx.AsyncClient]:
    """A client with an operator's token."""
    settings, key = server.gateway.settings, server.gateway.resources.signing_key
    token = operators.mint(key, issuer=settings.issuer, audience=settings.audience, subject="olga", ttl_s=600)
    async with server.http(token) as client:
        yield client


async def given(admin: httpx.AsyncClient, *, key: str | None = None, **fields: Any) -> dict[str, Any]:
    """A relay, with a key if named; returns what was answered last."""
    answer = await admin.put(HERE, json={"provider": "deepgram"} | fields)
    if key is not None:
        answer = await admin.post(CREDENTIALS, json={"key": key})
    assert answer.status_code in (200, 201), answer.text
    told: dict[str, Any] = answer.json()
    return told


async def test_a_relay_is_put_shown_and_removed(admin: httpx.AsyncClient) -> None:
    told = await given(admin, region="eu", models=["nova-3", "nova-2"])
    assert told == {
        "object": "relay", "name": "deepgram", "provider": "deepgram", "base_url": None, "region": "eu",
        "models": ["nova-3", "nova-2"], "status": "active", "created_by": "operator/olga",
        "created_at": told["created_at"], "changed_at": told["changed_at"], "credentials": [],
    }  # fmt: skip
    assert (await admin.get(HERE)).json() == told
    changed = await given(admin, status="disabled")
    assert (changed["status"], changed["region"], changed["models"]) == ("disabled", None, None)
    listing = await admin.get("/v1/admin/relays")
    assert listing.json() == {"object": "list", "data": [changed]}
    assert listing.headers["cache-control"] == "no-store"
    assert (await admin.delete(HERE)).status_code == 204
    assert_problem(await admin.get(HERE), 404, "NOT_FOUND")
    assert_problem(await admin.delete(HERE), 404, "NOT_FOUND")


async def test_a_key_comes_in_and_never_goes_out(server: Served, admin: httpx.AsyncClient) -> None:
    told = await given(admin, key=KEY)
    assert told == {
        "object": "relay.credential", "id": told["id"], "relay": "deepgram", "tenant": None, "prefix": "sk-cana…",
        "master_key": server.gateway.resources.sealer.current, "status": "active", "created_by": "operator/olga",
        "created_at": told["created_at"], "retired_at": None, "last_used_at": None,
    }  # fmt: skip
    tenant = await server.tenant()
    own = (await admin.post(CREDENTIALS, json={"key": TENANTS_KEY, "tenant": tenant.slug})).json()
    assert own["tenant"] == tenant.slug
    async with server.gateway.resources.database.across_tenants("test") as tx:
        _, loaded = await relays.load(tx, server.gateway.resources.sealer)
    assert [(found.tenant_id, found.key) for found in loaded] == [(None, KEY), (tenant.id, TENANTS_KEY)]
    assert (await admin.get(HERE)).json()["credentials"] == [own, told]


async def test_a_key_is_rotated_and_retired(admin: httpx.AsyncClient) -> None:
    first = await given(admin, key=KEY)
    second = (await admin.post(CREDENTIALS, json={"key": NEXT_KEY})).json()
    listed = (await admin.get(CREDENTIALS)).json()["data"]
    assert [(found["id"], found["status"]) for found in listed] == [(second["id"], "active"), (first["id"], "retired")]
    assert listed[1]["retired_at"] >= first["created_at"]
    assert [found["id"] for found in (await admin.get(HERE)).json()["credentials"]] == [second["id"]]
    assert_problem(await admin.delete(HERE), 409, "CONFLICT")
    assert_problem(await admin.put(HERE, json={"provider": "groq"}), 409, "CONFLICT")
    assert (await admin.delete(f"{CREDENTIALS}/{second['id']}")).status_code == 204
    assert_problem(await admin.delete(f"{CREDENTIALS}/{second['id']}"), 404, "NOT_FOUND")
    assert (await admin.delete(HERE)).status_code == 204


async def test_each_change_is_in_the_audit_log_and_no_key_is(server: Served, admin: httpx.AsyncClient) -> None:
    first = await given(admin, key=KEY)
    second = (await admin.post(CREDENTIALS, json={"key": NEXT_KEY})).json()
    await admin.delete(f"{CREDENTIALS}/{second['id']}", headers={"x-request-id": "req-retire"})
    await admin.delete(HERE)
    async with server.gateway.resources.database.across_tenants("test") as tx:
        query = "select * from audit_log where object like 'relay/deepgram%' order by seq desc limit 6"
        rows = list(reversed((await tx.execute(text(query))).all()))
    assert [(row.action, row.object.removeprefix("relay/deepgram")) for row in rows] == [
        ("relay.put", ""),
        ("relay_credential.add", f"/{first['id']}"),
        ("relay_credential.retire", f"/{first['id']}"),
        ("relay_credential.add", f"/{second['id']}"),
        ("relay_credential.retire", f"/{second['id']}"),
        ("relay.remove", ""),
    ]
    assert {row.actor for row in rows} == {"operator/olga"}
    assert rows[4].request_id == "req-retire"
    assert (rows[4].before["status"], rows[4].after["status"]) == ("active", "retired")
    assert rows[0].after["provider"] == "deepgram"
    assert KEY[8:] not in str(rows)
    assert NEXT_KEY[8:] not in str(rows)


BAD_RELAYS: list[tuple[dict[str, Any], str | None]] = [
    ({}, "provider"),
    ({"provider": 1}, "provider"),
    ({"provider": "whispernet"}, "provider"),
    ({"provider": "openai-compatible"}, "base_url"),
    ({"provider": "deepgram", "base_url": "http://10.0.0.7"}, "base_url"),
    ({"provider": "deepgram", "base_url": "https://me:secret@api.example"}, "base_url"),
    ({"provider": "deepgram", "models": "nova-3"}, "models"),
    ({"provider": "deepgram", "models": ["\x00"]}, "models"),
    ({"provider": "deepgram", "region": "\x00"}, "region"),
    ({"provider": "deepgram", "status": "resting"}, "status"),
    ({"provider": "deepgram", "key": KEY}, None),
]


@pytest.mark.parametrize(("body", "param"), BAD_RELAYS)
async def test_what_is_no_relay_is_refused(admin: httpx.AsyncClient, body: dict[str, Any], param: str | None) -> None:
    problem = assert_problem(await admin.put(HERE, content=json.dumps(body)), 400, "BAD_PARAMETERS")
    assert problem.get("param") == param
    assert (await admin.get("/v1/admin/relays")).json()["data"] == []


@pytest.mark.parametrize("name", ["relay", "Deepgram", "self_hosted", "a%00b", "%ff", "a" * 64])
async def test_what_is_no_name_is_refused(admin: httpx.AsyncClient, name: str) -> None:
    problem = assert_problem(
        await admin.put(f"/v1/admin/relays/{name}", json={"provider": "deepgram"}), 400, "BAD_PARAMETERS"
    )
    assert problem["param"] == "name"
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/credentials"), ("DELETE", f"/credentials/{NOBODYS}")):
        assert_problem(await admin.request(method, f"/v1/admin/relays/{name}{path}"), 404, "NOT_FOUND")
    assert_problem(await admin.post(f"/v1/admin/relays/{name}/credentials", json={"key": KEY}), 404, "NOT_FOUND")


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "BAD_PARAMETERS", "key"),
        ({"key": None}, 400, "BAD_PARAMETERS", "key"),
        ({"key": [KEY]}, 400, "BAD_PARAMETERS", "key"),
        ({"key": KEY + "\n"}, 400, "BAD_PARAMETERS", "key"),
        ({"key": f"{KEY}\ud800"}, 400, "BAD_REQUEST", None),
        ({"key": KEY * 50}, 400, "BAD_PARAMETERS", "key"),
        ({"key": KEY, "tenant": 7}, 400, "BAD_PARAMETERS", "tenant"),
        ({"key": KEY, "tenant": "a\x00"}, 400, "BAD_PARAMETERS", "tenant"),
        ({"key": KEY, "tenant": "nobody"}, 404, "NOT_FOUND", None),
        ({KEY: "key"}, 400, "BAD_PARAMETERS", "key"),
        ({"key": KEY, "api_key": KEY}, 400, "BAD_PARAMETERS", None),
    ],
)
async def test_what_is_no_credential_is_refused_and_not_quoted(
    admin: httpx.AsyncClient, body: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    await given(admin)
    answer = await admin.post(CREDENTIALS, content=json.dumps(body))
    assert assert_problem(answer, status, code).get("param") == param
    assert KEY not in answer.text
    assert (await admin.get(CREDENTIALS)).json()["data"] == []


@pytest.mark.parametrize("body", [b'{"key": "%s"' % KEY.encode(), b'["%s"]' % KEY.encode(), b"\xff"])
async def test_what_cannot_be_read_is_not_quoted(admin: httpx.AsyncClient, body: bytes) -> None:
    answer = await admin.post(CREDENTIALS, content=body)
    assert_problem(answer, 400, "BAD_REQUEST")
    assert KEY not in answer.text


async def test_an_unknown_credential_or_relay_is_not_found(admin: httpx.AsyncClient) -> None:
    assert_problem(await admin.post(CREDENTIALS, json={"key": KEY}), 404, "NOT_FOUND")
    assert_problem(await admin.get(CREDENTIALS), 404, "NOT_FOUND")
    await given(admin)
    for shown in (NOBODYS, "sess_" + "0" * 32, KEY, "%00"):
        assert_problem(await admin.delete(f"{CREDENTIALS}/{shown}"), 404, "NOT_FOUND")


async def test_a_credential_is_retired_under_its_own_relay_only(admin: httpx.AsyncClient) -> None:
    told = await given(admin, key=KEY)
    await admin.put("/v1/admin/relays/groq", json={"provider": "groq"})
    assert_problem(await admin.delete(f"/v1/admin/relays/groq/credentials/{told['id']}"), 404, "NOT_FOUND")
    assert (await admin.get(HERE)).json()["credentials"] == [told]


async def test_nothing_of_it_is_a_tenants(server: Served) -> None:
    for token, status in ((server.token(await server.tenant(), SCOPES), 403), (None, 401)):
        async with server.http(token) as http:
            answers = [
                await http.get("/v1/admin/relays"),
                await http.get(HERE),
                await http.put(HERE, json={"provider": "deepgram"}),
                await http.delete(HERE),
                await http.get(CREDENTIALS),
                await http.post(CREDENTIALS, json={"key": KEY}),
                await http.delete(f"{CREDENTIALS}/{NOBODYS}"),
            ]
        assert [answer.status_code for answer in answers] == [status] * 7
        assert all(KEY not in answer.text for answer in answers)


async def test_without_a_sealing_key_no_credential_is_taken_and_all_else_goes_on(
    settings: Settings, server: Served, admin: httpx.AsyncClient
) -> None:
    await given(admin)
    async with serving(settings, backend="scripted", sealing_keys=None) as keyless:
        async with keyless.http(admin.headers["authorization"].removeprefix("Bearer ")) as http:
            answer = await http.post(CREDENTIALS, json={"key": KEY})
            assert "STENOGATE_SEALING_KEYS" in assert_problem(answer, 500, "MISCONFIGURED")["detail"]
            assert (await http.get(HERE)).json()["credentials"] == []


async def test_two_who_rotate_at_once_leave_one_key_in_use(server: Served, admin: httpx.AsyncClient) -> None:
    await given(admin)
    answers = await asyncio.gather(*(admin.post(CREDENTIALS, json={"key": f"{KEY}-{n}"}) for n in range(8)))
    assert [answer.status_code for answer in answers] == [201] * 8
    statuses = [found["status"] for found in (await admin.get(CREDENTIALS)).json()["data"]]
    assert sorted(statuses) == ["active", *["retired"] * 7]
    async with server.gateway.resources.database.across_tenants("test") as tx:
        _, (loaded,) = await relays.load(tx, server.gateway.resources.sealer)
        assert (await relays.load(tx, LocalSealer({})))[1] == ()
    assert loaded.key.startswith(KEY)
