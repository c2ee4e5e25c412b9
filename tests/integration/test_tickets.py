"""Tickets over real sockets: they work once, for a while, for one tenant, and for no more than they were made for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import jwt
import pytest
from sqlalchemy import text
from websockets.exceptions import InvalidStatus

from gateway.live.seats import SEATS
from policy import identity, tenants, tickets
from policy.tenants import Tenant
from runtime.ids import read
from runtime.settings import Settings
from tests.server import Served, assert_problem, serving
from tests.streaming import clip, denial, refused, talking
from workers.schedule import tidied

SILENCE = bytes(32_000)
USED = (401, "TOKEN_INVALID")


@pytest.fixture(scope="module")
async def two(settings: Settings) -> AsyncIterator[tuple[Served, Served]]:
    """Two gateways on one database."""
    async with serving(settings, backend="scripted") as first, serving(settings, backend="scripted") as second:
        yield first, second
    assert SEATS.taken == 0


@pytest.fixture
def server(two: tuple[Served, Served]) -> Served:
    return two[0]


async def asked(server: Served, token: str | None, **body: Any) -> httpx.Response:
    async with server.http(token) as http:
        return await http.post("/v1/tickets", json=body)


async def ticket_of(server: Served, token: str, **body: Any) -> str:
    response = await asked(server, token, **body)
    assert response.status_code == 201, response.text
    assert response.headers["cache-control"] == "no-store"
    value: str = response.json()["ticket"]
    return value


async def opened(server: Served, query: str) -> dict[str, Any]:
    """The `ready` of a stream that is opened with nothing but its address, and stopped."""
    async with talking(server, None, query) as talk:
        ready = await talk.until("ready")
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    return ready


# --- once ---------------------------------------------------------------------------------------------------------


async def test_a_ticket_opens_one_stream(server: Served) -> None:
    samples, _ = clip("clip05.wav")
    ticket = await ticket_of(server, server.token(await server.tenant()))
    async with talking(server, None, f"?ticket={ticket}") as talk:
        await talk.say("start", language="en")
        await talk.speak(samples.tobytes())
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    assert talk.text
    assert await refused(server, None, f"?ticket={ticket}") == USED
    assert (await denial(server, None, f"?ticket={ticket}")).headers["www-authenticate"] == "Bearer"


async def test_of_twenty_at_two_gateways_one_gets_in(two: tuple[Served, Served]) -> None:
    ticket = await ticket_of(two[0], two[0].token(await two[0].tenant()))

    async def knock(server: Served) -> int:
        try:
            await opened(server, f"?ticket={ticket}&language=en")
        except InvalidStatus as refusal:
            return refusal.response.status_code
        return 101

    answers = await asyncio.gather(*(knock(two[number % 2]) for number in range(20)))
    assert sorted(answers) == [101] + [401] * 19


async def test_a_ticket_of_one_gateway_opens_a_stream_at_another(two: tuple[Served, Served]) -> None:
    ticket = await ticket_of(two[0], two[0].token(await two[0].tenant()))
    await opened(two[1], f"?ticket={ticket}&language=en")
    assert await refused(two[0], None, f"?ticket={ticket}") == USED


@pytest.mark.parametrize("ticket", ["", "x", "ticket_" + "A" * 43, "A" * 1_000, "%00", "%F0%9F%8E%AB"])
async def test_what_is_no_ticket_is_refused(server: Served, ticket: str) -> None:
    assert await refused(server, None, f"?ticket={ticket}") == USED


async def test_a_token_goes_before_a_ticket_which_stays_good(server: Served) -> None:
    token = server.token(await server.tenant())
    ticket = await ticket_of(server, token)
    async with talking(server, token, f"?ticket={ticket}&language=en") as talk:
        await talk.until("ready")
    assert await refused(server, "rubbish", f"?ticket={ticket}") == USED
    await opened(server, f"?ticket={ticket}&language=en")


# --- for a while --------------------------------------------------------------------------------------------------


async def test_a_late_ticket_is_refused_and_its_row_goes(server: Served) -> None:
    tenant = await server.tenant()
    token = server.token(tenant)
    ticket, other = await ticket_of(server, token, ttl_s=1), await ticket_of(server, token, ttl_s=60)
    database = server.gateway.resources.database
    count = text("select count(*), count(*) filter (where expires_at <= now()) as late from tickets")
    async with database.tenant(tenant.id) as tx:
        assert (await tx.execute(count)).one().count == 2
    await asyncio.sleep(1.1)
    assert await refused(server, None, f"?ticket={ticket}") == USED
    await tickets.purge(database)
    async with database.tenant(tenant.id) as tx:
        assert tuple((await tx.execute(count)).one()) == (1, 0)
    await opened(server, f"?ticket={other}&language=en")


async def test_late_tickets_are_removed_by_themselves(server: Served) -> None:
    tenant = await server.tenant()
    resources = server.gateway.resources
    late = text("""
        insert into tickets (tenant_id, digest, subject, scopes, token_id, token_expires_at, expires_at)
        values (:tenant, sha256('late'), 'tester', '{transcribe}', 'tok', 1, now())
    """)
    async with resources.database.tenant(tenant.id) as tx:
        await tx.execute(late, {"tenant": tenant.id})
    async with tidied(resources.database, resources.blobs), asyncio.timeout(20):
        left = 1
        while left:
            async with resources.database.tenant(tenant.id) as tx:
                left = (await tx.execute(text("select count(*) from tickets"))).scalar_one()


async def test_only_a_digest_is_kept(server: Served) -> None:
    tenant = await server.tenant()
    ticket = await ticket_of(server, server.token(tenant))
    async with server.gateway.resources.database.tenant(tenant.id) as tx:
        row = (await tx.execute(text("select * from tickets"))).one()
    assert ticket not in str(row)
    assert ticket.removeprefix("ticket_").encode() not in row.digest


async def test_the_answer_says_how_long(server: Served) -> None:
    token = server.token(await server.tenant())
    async with server.gateway.resources.database.across_tenants("test") as tx:
        now = (await tx.execute(text("select extract(epoch from now())"))).scalar_one()
    for body, most in (({}, 30), ({"ttl_s": 60}, 60), ({"ttl_s": 1}, 1)):
        response = await asked(server, token, **body)
        assert most - 1 <= response.json()["expires_at"] - now <= most + 10


# --- for no more than it was made for -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"ttl_s": 0}, "ttl_s"),
        ({"ttl_s": 61}, "ttl_s"),
        ({"ttl_s": "30"}, "ttl_s"),
        ({"scopes": []}, "scopes"),
        ({"scope": ["transcribe"]}, "scope"),
        ({"start": []}, "start"),
        ({"start": {"sample_rate": 7_999}}, "sample_rate"),
        ({"start": {"encoding": "mulaw", "sample_rate": 16_000}}, None),
        ({"start": {"resume_token": "x"}}, "resume_token"),
    ],
)
async def test_what_cannot_be_asked_of_a_ticket(server: Served, body: dict[str, Any], param: str | None) -> None:
    async with server.http(server.token(await server.tenant())) as http:
        response = await http.post("/v1/tickets", content=json.dumps(body))
    problem = assert_problem(response, 400, "BAD_PARAMETERS")
    assert param is None or problem["param"] == param


async def test_half_a_character_is_no_text(server: Served) -> None:
    async with server.http(server.token(await server.tenant())) as http:
        response = await http.post("/v1/tickets", content=json.dumps({"start": {"prompt": "\ud800"}}))
    assert_problem(response, 400, "BAD_REQUEST")


async def test_who_may_not_stream_gets_no_ticket_and_nobody_one_with_more_rights(server: Served) -> None:
    tenant = await server.tenant()
    assert_problem(await asked(server, None), 401, "TOKEN_MISSING")
    assert_problem(await asked(server, server.token(tenant, ["usage"])), 403, "FORBIDDEN")
    plain = server.token(tenant, ["transcribe"])
    assert_problem(await asked(server, plain, scopes=["transcribe", "admin"]), 403, "FORBIDDEN")
    assert_problem(await asked(server, plain, scopes=["anything"]), 403, "FORBIDDEN")
    wide = server.token(tenant, ["transcribe", "usage"])
    ticket = await ticket_of(server, wide, scopes=["usage"])
    assert await refused(server, None, f"?ticket={ticket}") == (403, "FORBIDDEN")
    ticket = await ticket_of(server, wide)
    for path in ("/v1/sessions", "/v1/usage"):  # it opens a stream, and nothing else
        async with server.http(ticket) as http:
            assert_problem(await http.get(path, params={"ticket": ticket}), 401, "TOKEN_INVALID")


async def test_fixed_fields_hold_and_cannot_be_changed(server: Served) -> None:
    token = server.token(await server.tenant())
    start = {"type": "start", "language": "en-GB", "customer": "acme", "metadata": {"call": "7"}, "prompt": "a\x00b"}
    ticket = await ticket_of(server, token, start=start)
    assert await refused(server, None, f"?ticket={ticket}&customer=other") == (400, "BAD_PARAMETERS")
    ticket = await ticket_of(server, token, start=start)
    ready = await opened(server, f"?ticket={ticket}&sample_rate=44100")  # what it leaves open is the client's
    assert (ready["language"], ready["sample_rate"]) == ("en", 44_100)
    async with server.http(token) as http:
        session = (await http.get(f"/v1/sessions/{ready['session_id']}")).json()
    assert (session["customer"], session["metadata"], session["subject"]) == ("acme", {"call": "7"}, "tester")


async def test_a_start_frame_changes_nothing_of_a_ticket_with_fields(server: Served) -> None:
    ticket = await ticket_of(server, server.token(await server.tenant()), start={"customer": "acme"})
    async with talking(server, None, f"?ticket={ticket}") as talk:
        await talk.until("ready")
        await talk.say("start", customer="other")
        assert await talk.end() == (4400, "BAD_PARAMETERS")


async def test_a_ticket_with_fields_is_refused_over_http_and_one_without_by_a_close_code(server: Served) -> None:
    token = server.token(await server.tenant())
    ticket = await ticket_of(server, token, start={"model": "nothing-like-it"})
    assert await refused(server, None, f"?ticket={ticket}") == (404, "MODEL_NOT_FOUND")
    ticket = await ticket_of(server, token)
    async with talking(server, None, f"?ticket={ticket}") as talk:
        await talk.say("start", model="nothing-like-it")
        assert await talk.end() == (4400, "MODEL_NOT_FOUND")


# --- for one tenant -----------------------------------------------------------------------------------------------


async def test_a_ticket_speaks_for_its_tenant_only(server: Served) -> None:
    ours, theirs = await server.tenant(), await server.tenant()
    ticket = await ticket_of(server, server.token(ours))
    async with server.gateway.resources.database.tenant(theirs.id) as tx:
        assert (await tx.execute(text("select count(*) from tickets"))).scalar_one() == 0
    ready = await opened(server, f"?ticket={ticket}&language=en")
    session_id = read("sess", ready["session_id"])
    for tenant, seen in ((ours, 1), (theirs, 0)):
        async with server.gateway.resources.database.tenant(tenant.id) as tx:
            query = text("select count(*) from sessions where id = :id")
            assert (await tx.execute(query, {"id": session_id})).scalar_one() == seen


# --- it stands and falls with its token -----------------------------------------------------------------------------


async def revoke(server: Served, tenant: Tenant, token: str) -> None:
    claims = jwt.decode(token, options={"verify_signature": False})
    async with server.gateway.resources.database.across_tenants("test") as tx:
        await identity.revoke(tx, tenant_id=tenant.id, token_id=claims["jti"], expires_at=claims["exp"], actor="test")


async def suspend(server: Served, tenant: Tenant, _: str) -> None:
    async with server.gateway.resources.database.across_tenants("test") as tx:
        await tenants.set_status(tx, tenant.id, "suspended", actor="test")


ENDS = [(revoke, 401, 4401, "TOKEN_REVOKED"), (suspend, 403, 4403, "TENANT_SUSPENDED")]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end[-1])
async def test_what_ends_the_token_ends_ticket_and_stream(server: Served, end: Sequence[Any]) -> None:
    act, status, close, code = end
    tenant = await server.tenant()
    token = server.token(tenant)
    unused = await ticket_of(server, token)
    async with talking(server, None, f"?ticket={await ticket_of(server, token)}") as talk:
        await talk.say("start")
        await talk.until("ready")
        await act(server, tenant, token)
        while not talk.over:  # as a microphone does
            await talk.speak(SILENCE)
            await asyncio.sleep(0.05)
        assert await talk.end() == (close, code)
    assert await refused(server, None, f"?ticket={unused}") == (status, code)


async def test_a_ticket_does_not_outlive_its_token(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "LEEWAY_S", 0)
    ticket = await ticket_of(server, server.token(await server.tenant(), ttl_s=2), ttl_s=60)
    await asyncio.sleep(2.1)
    assert await refused(server, None, f"?ticket={ticket}") == (401, "TOKEN_EXPIRED")
