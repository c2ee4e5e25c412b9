"""The operator's part of the API, over real sockets: settings changed while gateways run, and who may."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt
import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import RSAAlgorithm
from pydantic import SecretStr
from sqlalchemy import text
from websockets.exceptions import InvalidStatus

from dispatchers.interface import Origin
from gateway.live.gauges import tell_metrics
from gateway.live.seats import SEATS
from gateway.live.sight import Sight
from gateway.live_settings import LiveSettings, live_settings
from policy import issuers, operators, overrides
from policy.errors import Invalid, LedgerUnavailable
from policy.identity import SCOPES, mint
from policy.tenants import Tenant
from runtime import telemetry
from runtime.database import Database
from runtime.ids import uuid7
from runtime.resources import open_resources
from runtime.settings import CHANGEABLE, Settings
from tests.server import CLIP, Served, assert_problem, post, serving
from tests.streaming import Talk, refused, talking

EVER_S = 10.0
THEIRS = rsa.generate_private_key(65537, 2048)
SILENCE = bytes(3_200)
FULL = (503, "NO_SEAT")


@pytest.fixture(autouse=True)
async def as_before(database: Database) -> AsyncIterator[None]:
    """The database is shared: no override outlives its test."""
    yield
    async with database.across_tenants("test") as tx:
        await tx.execute(text("delete from setting_overrides"))


@pytest.fixture
async def server(settings: Settings) -> AsyncIterator[Served]:
    async with serving(settings, backend="scripted", poll_s=0.05) as running:
        yield running
    assert SEATS.taken == 0


def operator_token(served: Served, *, ttl_s: int = 600) -> str:
    settings = served.gateway.settings
    key = served.gateway.resources.signing_key
    return operators.mint(key, issuer=settings.issuer, audience=settings.audience, subject="olga", ttl_s=ttl_s)


async def patch(served: Served, **changes: Any) -> httpx.Response:
    async with served.http(operator_token(served)) as http:
        return await http.patch("/v1/admin/config", json=changes)


async def told(served: Served) -> dict[str, dict[str, Any]]:
    """What GET says, by name."""
    async with served.http(operator_token(served)) as http:
        response = await http.get("/v1/admin/config")
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    return {entry["name"]: entry for entry in response.json()["data"]}


async def until_told(served: Served, name: str, value: Any) -> None:
    async with asyncio.timeout(EVER_S):
        while (await told(served))[name]["value"] != value:  # noqa: ASYNC110 — it polls
            await asyncio.sleep(0.02)


async def listening(stack: AsyncExitStack, served: Served, token: str, query: str = "?language=en") -> Talk:
    talk = await stack.enter_async_context(talking(served, token, query))
    await talk.until("ready")
    return talk


# --- what is told, what is refused --------------------------------------------------------------------------------


async def test_it_tells_every_changeable_setting_with_class_source_and_bounds(settings: Settings) -> None:
    async with serving(settings, backend="scripted", max_streams=7) as server:
        await patch(server, max_queue_wait_s=2, log_level="info")
        entries = await told(server)
    assert set(entries) == set(CHANGEABLE)
    assert entries["max_streams"] == {
        "name": "max_streams", "value": 7, "source": "environment", "change": "live", "default": 256,
        "type": "integer", "minimum": 1, "maximum": 100_000,
        "description": "Live streams in one process; `per_channel`, each channel counts.",
    }  # fmt: skip
    assert (entries["max_queue_wait_s"]["value"], entries["max_queue_wait_s"]["source"]) == (2, "override")
    assert entries["log_level"]["enum"] == ["debug", "info", "warning", "error"]
    assert (entries["stream_idle_s"]["source"], entries["stream_idle_s"]["change"]) == ("default", "new_sessions")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_streams", 0),
        ("max_streams", 100_001),
        ("max_streams", "300"),
        ("max_streams", True),
        ("max_streams", 1.5),
        ("max_streams", [1]),
        ("max_queue_wait_s", -1),
        ("upload_idle_s", 0),
        ("token_in_url", "yes"),
        ("log_level", "chatty"),
        ("origins", "https://a.example"),
        ("origins", ["https://a.example/path"]),
        ("origins", ["https://a.\u0000example"]),
        ("no_such_setting", 1),
        ("MAX_STREAMS", 1),
        ("", 1),
        ("model_fields", 1),
    ],
)
async def test_what_is_no_value_is_refused_by_name_and_changes_nothing(server: Served, name: str, value: Any) -> None:
    before = await told(server)
    problem = assert_problem(await patch(server, **{"max_queue_wait_s": 1.0, name: value}), 400, "BAD_PARAMETERS")
    assert problem["param"] == name
    assert await told(server) == before


async def test_what_json_does_not_have_is_refused(server: Served) -> None:
    async with server.http(operator_token(server)) as http:
        for body in (b'{"upload_idle_s": 1e999}', b'{"upload_idle_s": NaN}', b'{"max_streams": -Infinity}'):
            assert_problem(await http.patch("/v1/admin/config", content=body), 400, "BAD_PARAMETERS")
        for body in (b"[]", b"{", b'"max_streams"'):
            assert_problem(await http.patch("/v1/admin/config", content=body), 400, "BAD_REQUEST")


async def test_what_is_read_at_the_start_is_refused_with_the_remedy(server: Served) -> None:
    before = await told(server)
    for name in set(Settings.model_fields) - set(CHANGEABLE):
        response = await patch(server, **{"max_streams": 9, name: None})
        problem = assert_problem(response, 409, "SETTING_FIXED")
        assert problem["param"] == name
        assert f"STENOGATE_{name.upper()}" in problem["detail"]
    assert await told(server) == before


async def test_no_secret_is_ever_told(settings: Settings) -> None:
    secret = "0123456789abcdef-this-is-the-key-0123456789"
    changes = {"signing_key": SecretStr(secret), "engine_token": SecretStr("the-engine-token")}
    async with serving(settings, backend="scripted", **changes) as server, server.http(operator_token(server)) as http:
        said = [
            (await http.get("/v1/admin/config")).text,
            (await http.patch("/v1/admin/config", json={"max_streams": 5})).text,
            *[(await http.patch("/v1/admin/config", json={name: "x"})).text for name in Settings.model_fields],
        ]
        assert settings.database_url is not None
        for hidden in (secret, "the-engine-token", settings.database_url.get_secret_value()):
            assert not [answer for answer in said if hidden in answer]


# --- who may ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "PATCH"])
async def test_a_tenants_token_is_not_enough_whatever_its_scopes(server: Served, method: str) -> None:
    tenant = await server.tenant()
    async with server.http(server.token(tenant, SCOPES)) as http:
        assert_problem(await http.request(method, "/v1/admin/config", json={"max_streams": 1}), 403, "FORBIDDEN")
        assert_problem(await http.get("/v1/admin/streams"), 403, "FORBIDDEN")
    async with server.http() as http:
        assert_problem(await http.request(method, "/v1/admin/config"), 401, "TOKEN_MISSING")


def forgeries(served: Served, tenant: Tenant) -> dict[str, str]:
    """Tokens that are almost an operator's."""
    settings, key = served.gateway.settings, served.gateway.resources.signing_key
    good = jwt.decode(operator_token(served), options={"verify_signature": False})

    def signed(claims: dict[str, Any], *, with_key: Any = key, algorithm: str = "HS256", **header: Any) -> str:
        return jwt.encode(claims, with_key, algorithm=algorithm, headers={"typ": operators.TOKEN_TYPE} | header)

    tenants_own = mint(
        key, issuer=settings.issuer, audience=settings.audience, tenant=tenant, subject="x", scopes=SCOPES, ttl_s=60
    )
    theirs = jwt.decode(tenants_own, options={"verify_signature": False})
    return {
        "another key": signed(good, with_key=b"another-key-another-key-another-key"),
        "no signature": signed(good, with_key=None, algorithm="none"),
        "another algorithm": signed(good, algorithm="HS512"),
        "a tenant's type": signed(good, typ="at+jwt"),
        "no type": signed(good, typ=None),
        "another audience": signed(good | {"aud": "elsewhere"}),
        "another issuer": signed(good | {"iss": "https://login.example"}),
        "another scope": signed(good | {"scope": "admin"}),
        "more scopes": signed(good | {"scope": "operator admin"}),
        "a tenant's claims": signed(theirs | {"scope": "operator"}),
        "no id": signed({name: value for name, value in good.items() if name != "jti"}),
        "no end": signed({name: value for name, value in good.items() if name != "exp"}),
        "critical": signed(good, crit=["x"], x=1),
        "no token": "operator",
    }


async def test_nothing_else_passes_for_an_operators_token(server: Served) -> None:
    for why, token in forgeries(server, await server.tenant()).items():
        async with server.http(token) as http:
            response = await http.get("/v1/admin/config")
        assert response.status_code in (401, 403), why
        assert response.json()["code"] in ("TOKEN_INVALID", "FORBIDDEN"), why


@pytest.fixture
async def key_server() -> AsyncIterator[str]:
    """Serves the public half of `THEIRS`."""
    key = {**RSAAlgorithm.to_jwk(THEIRS.public_key(), as_dict=True), "kid": "k", "alg": "RS256"}
    body = json.dumps({"keys": [key]}).encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/jwks"


async def test_a_tenants_identity_provider_can_make_no_operator(settings: Settings, key_server: str) -> None:
    """It may write into its tokens what it likes; its tenant is what they mean."""
    async with serving(settings, backend="scripted", jwks_allow_http=True) as server:
        tenant = await server.tenant()
        trusted = {"audience": "stenogate", "jwks_uri": key_server, "algorithms": ["RS256"], "tenant_claim": "org"}
        async with server.gateway.resources.database.across_tenants("test") as tx:
            for issuer in ("https://login.example", server.gateway.settings.issuer):
                await issuers.add(
                    tx, tenant.id, issuer=issuer, tenant_claim_value=tenant.slug, actor="test", **trusted
                )  # fmt: skip
        boast = {"org": tenant.slug, "scope": "operator admin transcribe", "scopes": ["operator"], "operator": True}
        good = jwt.decode(operator_token(server), options={"verify_signature": False}) | boast
        theirs = good | {"iss": "https://login.example"}
        header = {"typ": operators.TOKEN_TYPE, "kid": "k"}
        pem = THEIRS.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        confused = ".".join(jwt.encode(good, b"x" * 32, headers=header).split(".")[:2])
        mac = base64.urlsafe_b64encode(hmac.digest(pem, confused.encode(), "sha256")).rstrip(b"=").decode()
        for token, code in (
            (jwt.encode(theirs, THEIRS, "RS256", header), "FORBIDDEN"),  # good, and a tenant's
            (jwt.encode(good, THEIRS, "RS256", header), "TOKEN_INVALID"),  # speaks as the gateway
            (f"{confused}.{mac}", "TOKEN_INVALID"),  # signed with what everybody knows
        ):
            async with server.http(token) as http:
                assert (await http.get("/v1/models")).status_code == (200 if code == "FORBIDDEN" else 401)
                for method, path in (("GET", "config"), ("PATCH", "config"), ("GET", "streams")):
                    refusal = await http.request(method, f"/v1/admin/{path}", json={"max_streams": 1})
                    assert refusal.json()["code"] == code
        assert (await told(server))["max_streams"]["source"] == "default"


async def test_an_operators_token_ends_and_opens_no_tenants_door(server: Served) -> None:
    async with server.http(operator_token(server)) as http:
        assert (await http.get("/v1/admin/config")).status_code == 200
        for path in ("/v1/models", "/v1/usage", "/v1/sessions"):
            assert_problem(await http.get(path), 401, "TOKEN_INVALID")
    assert await refused(server, operator_token(server)) == (401, "TOKEN_INVALID")
    key, settings = server.gateway.resources.signing_key, server.gateway.settings
    claims = jwt.decode(operator_token(server), options={"verify_signature": False}) | {"exp": 1}
    assert claims["iss"] == settings.issuer
    async with server.http(jwt.encode(claims, key, headers={"typ": operators.TOKEN_TYPE})) as http:
        assert_problem(await http.get("/v1/admin/config"), 401, "TOKEN_EXPIRED")
    for ttl_s in (0, -1, operators.LONGEST_S + 1):
        with pytest.raises(Invalid):
            operator_token(server, ttl_s=ttl_s)


# --- what a change does -------------------------------------------------------------------------------------------


async def test_seats_are_given_and_taken_away_without_a_restart(server: Served) -> None:
    token = server.token(await server.tenant())
    assert (await patch(server, max_streams=1)).status_code == 200
    async with AsyncExitStack() as stack:
        first = await listening(stack, server, token)
        assert await refused(server, token, "?language=en") == FULL
        assert (await patch(server, max_streams=2)).status_code == 200
        second = await listening(stack, server, token)
        assert await refused(server, token, "?language=en") == FULL
        assert (await patch(server, max_streams=1)).status_code == 200  # nobody inside is put out for it
        for talk in (first, second):
            await talk.speak(SILENCE)
            await talk.say("stop")
            assert await talk.end() == (1000, "")
    assert (await patch(server, max_streams=None)).status_code == 200
    assert (await told(server))["max_streams"]["source"] == "default"


async def test_every_gateway_follows_and_the_next_one_begins_with_it(settings: Settings) -> None:
    async with (
        serving(settings, backend="scripted", poll_s=0.05) as first,
        serving(settings, backend="scripted", poll_s=0.05) as second,
    ):
        answer = await patch(first, max_streams=11, origins=["https://b.example", "https://a.example"])
        assert {entry["name"]: entry["value"] for entry in answer.json()["data"]}["max_streams"] == 11
        await until_told(second, "max_streams", 11)
        assert (await told(second))["origins"]["value"] == ["https://a.example", "https://b.example"]
        await patch(second, stream_idle_s=7.5, max_streams=None)
        await until_told(first, "stream_idle_s", 7.5)
        assert (await told(first))["max_streams"]["source"] == "default"
        for server in (first, second):
            async with server.http() as http:
                assert (await http.get("/v1/config")).json()["limits"]["idle_ms"] == 7_500
    async with serving(settings, backend="scripted", poll_s=3600) as third:
        assert (await told(third))["stream_idle_s"]["source"] == "override"
        assert (await patch(third, origins=None, stream_idle_s=None)).status_code == 200


async def test_a_session_keeps_what_it_was_opened_with(server: Served) -> None:
    token = server.token(await server.tenant())
    async with AsyncExitStack() as stack:
        old = await listening(stack, server, token)
        await patch(server, stream_idle_s=0.3, stream_resume_s=0)
        new = await listening(stack, server, token)
        assert (old.all("ready")[0]["limits"]["idle_ms"], new.all("ready")[0]["limits"]["idle_ms"]) == (60_000, 300)
        assert old.all("ready")[0]["resume_token"] is not None
        assert new.all("ready")[0]["resume_token"] is None
        assert (await new.end())[0] == 4408
        await old.speak(SILENCE)
        await old.say("stop")
        assert (await old.end())[0] == 1000


async def test_live_settings_of_the_door_act_on_the_next_knock(server: Served) -> None:
    tenant = await server.tenant()
    token = server.token(tenant)
    assert (await refused(server, None, f"?token={token}&language=en"))[0] == 401
    await patch(server, token_in_url=True, max_streams_per_address=1)
    async with AsyncExitStack() as stack:
        talk = await stack.enter_async_context(talking(server, None, f"?token={token}&language=en"))
        await talk.until("ready")
        assert await refused(server, token, "?language=en") == (429, "CONCURRENCY_LIMITED")
        await patch(server, max_streams_per_address=2)
        await listening(stack, server, token)
    headers = {"Origin": "https://a.example"}
    for origins, status in ((None, 403), (["https://a.example"], 101), (["*"], 101), ([], 403)):
        await patch(server, origins=origins, max_streams_per_address=None)
        try:
            async with talking(server, token, "?language=en", extra=headers) as talk:
                await talk.until("ready")
                found = 101
        except InvalidStatus as refusal:
            found = refusal.response.status_code
        assert found == status, origins


async def test_upload_limits_act_on_the_next_upload(server: Served) -> None:
    async with server.http(server.token(await server.tenant())) as http:
        assert (await post(http, model="whisper-1")).status_code == 200
        await patch(server, max_upload_bytes=len(CLIP.read_bytes()) - 1)
        assert_problem(await post(http, model="whisper-1"), 413, "TOO_LARGE")
        for threshold in ("job_threshold_bytes", "job_threshold_ms"):
            await patch(server, max_upload_bytes=None, **{threshold: 1})
            assert (await post(http, model="whisper-1")).status_code == 202
            await patch(server, **{threshold: None})
        assert (await post(http, model="whisper-1")).status_code == 200


async def test_a_stalled_upload_is_cut_off_when_the_operator_says(server: Served) -> None:
    await patch(server, upload_idle_s=0.2)
    token = server.token(await server.tenant())

    address = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(f"POST /v1/tickets HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n".encode())
    writer.write(b"content-length: 9\r\n\r\n{")
    async with asyncio.timeout(EVER_S):
        assert b" 408 " in await reader.readline()
    writer.close()


async def test_a_waiting_engine_lets_nobody_in_from_the_wait_that_the_operator_says(settings: Settings) -> None:
    async with serving(settings, backend="scripted") as server:
        object.__setattr__(server.gateway, "queue_wait_s", lambda: 3.0)
        token = server.token(await server.tenant())
        await patch(server, max_queue_wait_s=2.9)
        assert await refused(server, token, "?language=en") == FULL
        await patch(server, max_queue_wait_s=3.1)
        async with talking(server, token, "?language=en") as talk:
            await talk.until("ready")


async def test_the_log_level_follows(server: Served) -> None:
    before = logging.getLogger().level
    try:
        await patch(server, log_level="error")
        assert logging.getLogger().level == logging.ERROR
        await patch(server, log_level="debug")
        assert logging.getLogger().level == logging.DEBUG
        assert logging.getLogger("httpx").level == logging.WARNING
    finally:
        telemetry.set_log_level("info")
        structlog.reset_defaults()
        logging.getLogger().setLevel(before)


# --- the books, and outages ---------------------------------------------------------------------------------------


async def test_each_change_is_in_the_audit_log_once_and_with_its_actor(server: Served, database: Database) -> None:
    async with database.across_tenants("test") as tx:
        start = (await tx.execute(text("select coalesce(max(seq), 0) from audit_log"))).scalar_one()
    response = await patch(server, max_streams=4, log_level="info")
    await patch(server, max_streams=4)  # is so already
    await patch(server, max_streams=0, log_level="debug")  # refused
    await patch(server, max_streams=None)
    query = text("select * from audit_log where seq > :start and action = 'settings.change' order by seq")
    async with database.across_tenants("test") as tx:
        rows = list(await tx.execute(query, {"start": start}))
    assert [(row.actor, row.tenant_id, row.before, row.after) for row in rows] == [
        ("operator/olga", None, {"max_streams": None, "log_level": None}, {"max_streams": 4, "log_level": "info"}),
        ("operator/olga", None, {"max_streams": 4}, {"max_streams": None}),
    ]
    assert rows[0].request_id == response.headers["x-request-id"]


async def test_no_tenants_transaction_sees_or_changes_them(database: Database, tenant: Tenant) -> None:
    for statement in (
        "select * from setting_overrides",
        "insert into setting_overrides values ('max_streams', '1', 'x')",
        "delete from setting_overrides",
    ):
        with pytest.raises(Exception, match="permission denied"):
            async with database.tenant(tenant.id) as tx:
                await tx.execute(text(statement))


async def test_what_another_release_wrote_is_left_out_and_the_rest_holds(server: Served, database: Database) -> None:
    async with database.across_tenants("test") as tx:
        await tx.execute(
            text("""insert into setting_overrides (name, value, changed_by) values
                ('of_the_future', '1', 'x'), ('host', '"0.0.0.0"', 'x'), ('max_streams', '0', 'x'),
                ('stream_idle_s', '9', 'x')""")
        )
    await until_told(server, "stream_idle_s", 9)
    entries = await told(server)
    assert {name for name, entry in entries.items() if entry["source"] == "override"} == {"stream_idle_s"}
    assert server.gateway.settings.host == "127.0.0.1"


async def test_changes_at_once_follow_one_another(settings: Settings, database: Database) -> None:
    names = ("max_streams", "job_threshold_ms")
    async with serving(settings, backend="scripted") as first, serving(settings, backend="scripted") as second:
        asked = [(gateway, name, 50 + at) for at in range(8) for gateway in (first, second) for name in names]
        answers = await asyncio.gather(*(patch(gateway, **{name: value}) for gateway, name, value in asked))
        assert {answer.status_code for answer in answers} == {200}
    query = text("select before, after from audit_log where action = 'settings.change' order by seq desc limit :count")
    async with database.across_tenants("test") as tx:
        rows = list(reversed(list(await tx.execute(query, {"count": len(asked)}))))
        stored = await overrides.read(tx)
    for name in names:
        told = [(row.before[name], row.after[name]) for row in rows if name in row.after]
        assert all(before == former for (_, former), (before, _) in pairwise(told))
        assert told[-1][1] == stored[name]


async def test_without_postgres_the_last_known_values_stand(settings: Settings) -> None:
    async with open_resources(settings) as resources:
        live = LiveSettings(resources)
        await live.change({"max_streams": 3}, actor="test", request_id=None)
        assert live.current.max_streams == 3
    nowhere = SecretStr("postgresql://nobody:x@127.0.0.1:1/none")
    async with aclosing(Database(nowhere.get_secret_value(), nowhere.get_secret_value(), pool=1)) as gone:
        live._database = gone
        with pytest.raises(OSError):
            await live.refresh()
        with pytest.raises(LedgerUnavailable):
            await live.change({"max_streams": 4}, actor="test", request_id=None)
        assert live.current.max_streams == 3


async def test_a_gateway_starts_without_postgres(settings: Settings) -> None:
    nowhere = SecretStr("postgresql://nobody:x@127.0.0.1:1/none")
    away = settings.model_copy(update={"database_url": nowhere, "system_database_url": nowhere})
    async with open_resources(away) as resources, live_settings(resources) as live:
        assert live.current.max_streams == 256


# --- what is going on ---------------------------------------------------------------------------------------------


async def test_the_operator_sees_live_sessions_and_nothing_said_in_them(server: Served) -> None:
    tenant, other = await server.tenant(), await server.tenant()
    await patch(server, max_streams=3)
    async with AsyncExitStack() as stack:
        query = "?language=en&customer=secret-customer&prompt=secret-prompt"
        talk = await listening(stack, server, server.token(tenant), query)
        await listening(stack, server, server.token(other))
        await talk.speak(bytes(64_000))
        http = await stack.enter_async_context(server.http(operator_token(server)))
        async with asyncio.timeout(EVER_S):
            body = (await http.get("/v1/admin/streams")).json()
            while body["data"][0]["accepted_ms"] < 1_900:
                body = (await http.get("/v1/admin/streams")).json()
        assert body["seats_free"] == 1
        first, second = body["data"]
        assert (first["tenant"], second["tenant"]) == (tenant.slug, other.slug)
        assert first["id"] == talk.all("ready")[0]["session_id"]
        assert (first["backend"], first["model"], first["connected"]) == ("scripted", "scripted", True)
        assert set(first) == {
            "id", "tenant", "started_at", "connected", "backend", "engine", "model", "accepted_ms", "lag_ms"
        }  # fmt: skip
        assert "secret" not in json.dumps(body)
        async with server.http(server.token(tenant)) as mine:
            sessions = (await mine.get("/v1/sessions")).json()["data"]
        assert abs(first["started_at"] - sessions[0]["started_at"]) <= 2
    async with server.http(operator_token(server)) as http, asyncio.timeout(EVER_S):
        while (await http.get("/v1/admin/streams")).json()["seats_free"] != 3:
            pass


async def test_the_metrics_tell_seats_and_lag(server: Served) -> None:
    tell_metrics(server.gateway)
    token = server.token(await server.tenant())
    await patch(server, max_streams=2)
    async with AsyncExitStack() as stack:
        await listening(stack, server, token)
        http = await stack.enter_async_context(server.http())
        exposed = (await http.get("/metrics")).text
        assert "stenogate_seats_free 1.0" in exposed
        for quantile in ("0.5", "0.95", "1"):
            assert re.search(rf'^stenogate_stream_lag_seconds{{quantile="{quantile}"}} \d', exposed, re.MULTILINE)
        await patch(server, max_streams=1)
        assert "stenogate_seats_free 0.0" in (await http.get("/metrics")).text


async def test_lag_is_what_was_received_and_not_taken(server: Served) -> None:
    def standing(lag_ms: int) -> Any:
        sight = Sight(uuid7(), "acme", Origin("self_hosted", "x", "y"), True, 0, lag_ms)
        return type("Standing", (), {"seen": lambda self: sight})()

    tell_metrics(server.gateway)
    for lag_ms in range(100, 2_100, 100):
        server.gateway.roster._sessions[asyncio.create_task(asyncio.sleep(0))] = standing(lag_ms)
    async with server.http() as http:
        exposed = (await http.get("/metrics")).text
    server.gateway.roster._sessions.clear()
    found = dict(re.findall(r'^stenogate_stream_lag_seconds{quantile="([\d.]+)"} ([\d.]+)', exposed, re.MULTILINE))
    assert found == {"0.5": "1.0", "0.95": "1.9", "1": "2.0"}
