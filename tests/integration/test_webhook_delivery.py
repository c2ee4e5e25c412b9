"""Events on their way to endpoints, over real sockets: at least once, signed, and nobody waits for another's."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from standardwebhooks import Webhook

from policy import tenants
from policy.identity import Caller
from policy.tenants import Tenant
from runtime import outbox
from runtime.addresses import Allowed
from runtime.database import Database
from runtime.egress import Egress, Limits
from runtime.ids import show, uuid7
from runtime.sealing import LocalSealer
from runtime.settings import Settings, sealing_keys
from tests.outages import wired_postgres
from tests.providers.http import Answer, Fault, HttpServer, Request, closed, http_server
from workers import deliveries, endpoints, signing, webhooks
from workers.deliveries import Delivery, Told
from workers.endpoints import Made
from workers.webhooks import RETRIES_S, Sender

SEALER = LocalSealer({"k1": bytes(32)})


@dataclass
class Receiver:
    """An endpoint that answers as it is told to. `answers` are for one request each, `then` for the others."""

    server: HttpServer
    then: int = 204
    answers: list[Answer] = field(default_factory=list)

    @property
    def got(self) -> list[Request]:
        return self.server.requests

    @property
    def ids(self) -> Counter[str]:
        return Counter(request.headers["webhook-id"] for request in self.got)


@dataclass(frozen=True)
class Post:
    """A tenant, what sends for it, and the clock of its deliveries."""

    database: Database
    caller: Caller
    sender: Sender

    async def endpoint(self, url: str, **said: Any) -> Made:
        async with self.database.tenant(self.caller.tenant_id) as tx:
            return await endpoints.create(tx, SEALER, self.caller, url, **said)

    async def happens(self, topic: str = "job.completed", *, endpoint_id: UUID | None = None, **said: Any) -> UUID:
        async with self.database.tenant(self.caller.tenant_id) as tx:
            return await outbox.put(
                tx, self.caller.tenant_id, topic, uuid7(), 1, {"n": "ü", **said}, endpoint_id=endpoint_id
            )

    async def send(self) -> None:
        await self.sender.round()
        await self.sender.settled()

    async def later(self) -> None:
        """The time of every next try has come."""
        await self.write("update webhook_deliveries set next_at = now() where status = 'pending'")
        await self.write("update webhook_endpoints set quiet_until = null")

    async def write(self, statement: str, **values: Any) -> None:
        async with self.database.tenant(self.caller.tenant_id) as tx:
            await tx.execute(text(statement), values)

    async def log(self, made: Made) -> list[Delivery]:
        async with self.database.tenant(self.caller.tenant_id) as tx:
            return (await deliveries.listing(tx, self.caller.tenant_id, made.endpoint.id))[0]

    async def told(self, made: Made) -> Told:
        (delivery,) = await self.log(made)
        async with self.database.tenant(self.caller.tenant_id) as tx:
            return await deliveries.get(tx, self.caller.tenant_id, made.endpoint.id, delivery.id)

    async def standing(self, made: Made) -> tuple[str, str | None]:
        async with self.database.tenant(self.caller.tenant_id) as tx:
            found = await endpoints.get(tx, self.caller.tenant_id, made.endpoint.id)
        return found.status, found.disabled_why


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "LIMITS", Limits(most_bytes=0, total_s=3, connect_s=1, idle_s=1.5))


@pytest.fixture
def post(database: Database, tenant: Tenant) -> Post:
    return Post(database, caller_of(tenant), sender(database))


@pytest.fixture
def other_post(database: Database, other_tenant: Tenant, post: Post) -> Post:
    return Post(database, caller_of(other_tenant), post.sender)


def caller_of(tenant: Tenant) -> Caller:
    return Caller(tenant.id, tenant.slug, "tester", frozenset({"jobs"}), "token", 4_102_444_800)


def sender(database: Database, allowed: Allowed | None = None, sealer: LocalSealer = SEALER) -> Sender:
    return Sender(database, sealer, Egress(allowed or Allowed.of(["127.0.0.0/8"])))


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    def respond(request: Request) -> Answer:
        return it.answers.pop(0) if it.answers else Answer(status=it.then)

    async with http_server(respond) as server:
        it = Receiver(server)
        yield it


def verified(request: Request, secret: str) -> Any:
    """As a receiver does with the reference library: raises unless signature and time are right."""
    return Webhook(secret).verify(request.body, dict(request.headers))


async def until(true: Callable[[], bool], within_s: float = 10) -> None:
    async with asyncio.timeout(within_s):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# --- once and signed --------------------------------------------------------------------------------------------------


async def test_an_event_is_delivered_signed_once(post: Post, receiver: Receiver) -> None:
    made = await post.endpoint(f"{receiver.server.url}/hooks?a=b")
    event = await post.happens(status="completed")
    await post.send()
    await post.later()
    await post.send()
    (request,) = receiver.got
    assert (request.method, request.path, request.query) == ("POST", "/hooks", (("a", "b"),))
    assert request.headers["webhook-id"] == show("evt", event)
    assert request.headers["content-type"] == "application/json"
    assert abs(int(request.headers["webhook-timestamp"]) - time.time()) < 10
    body = verified(request, made.secret)
    assert (body["type"], body["data"]) == ("job.completed", {"n": "ü", "status": "completed"})
    assert datetime.fromisoformat(body["timestamp"]).tzinfo is not None
    told = await post.told(made)
    assert (told.delivery.status, told.delivery.attempts, told.delivery.next_at) == ("delivered", 1, None)
    assert [(each.number, each.outcome, each.status) for each in told.tries] == [(1, "delivered", 204)]
    assert told.body == body


async def test_a_wrong_secret_or_body_does_not_verify(post: Post, receiver: Receiver) -> None:
    made = await post.endpoint(receiver.server.url)
    await post.happens()
    await post.send()
    (request,) = receiver.got
    for secret, body in ((signing.PREFIX + "AAAA", request.body), (made.secret, request.body + b" ")):
        with pytest.raises(Exception, match="signature"):
            Webhook(secret).verify(body, dict(request.headers))


async def test_only_who_asked_is_told(post: Post, other_post: Post, receiver: Receiver) -> None:
    failures = await post.endpoint(f"{receiver.server.url}/failures", events=["job.failed"])
    everything = await post.endpoint(f"{receiver.server.url}/everything")
    await other_post.endpoint(f"{receiver.server.url}/theirs")
    await post.happens("job.completed")
    await post.happens("job.failed")
    await post.happens("job.failed", endpoint_id=everything.endpoint.id)
    await post.happens("job.completed", endpoint_id=failures.endpoint.id)  # it did not ask for that
    await post.send()
    assert Counter(request.path for request in receiver.got) == {"/failures": 1, "/everything": 3}


async def test_who_came_later_or_is_disabled_is_not_told(post: Post, receiver: Receiver) -> None:
    before = await post.endpoint(f"{receiver.server.url}/before")
    await post.happens()
    await post.endpoint(f"{receiver.server.url}/after")
    async with post.database.tenant(post.caller.tenant_id) as tx:
        await endpoints.change(tx, post.caller, before.endpoint.id, {"status": "disabled"})
    await post.send()
    assert receiver.got == []


async def test_what_is_rolled_back_never_happened(post: Post, receiver: Receiver) -> None:
    await post.endpoint(receiver.server.url)
    tenant_id = post.caller.tenant_id
    with pytest.raises(RuntimeError):
        async with post.database.tenant(tenant_id) as tx:
            await outbox.put(tx, tenant_id, "job.completed", uuid7(), 1, {})
            raise RuntimeError
    await post.send()
    assert receiver.got == []


async def test_what_happens_twice_is_one_event(post: Post, receiver: Receiver) -> None:
    await post.endpoint(receiver.server.url)
    tenant_id, job = post.caller.tenant_id, uuid7()
    ids = set()
    for _ in range(3):
        async with post.database.tenant(tenant_id) as tx:
            ids.add(await outbox.put(tx, tenant_id, "job.completed", job, 1, {}))
        await post.send()
    assert len(ids) == len(receiver.got) == 1
    assert outbox.event_id(tenant_id, "job.completed", job, 2) not in ids


async def test_many_senders_send_each_once(post: Post, receiver: Receiver, database: Database) -> None:
    for _ in range(3):
        await post.endpoint(receiver.server.url)
    events = [await post.happens() for _ in range(20)]
    senders = [sender(database) for _ in range(4)]
    running = [asyncio.create_task(each.run()) for each in senders]
    await until(lambda: len(receiver.got) >= 60, 20)
    await asyncio.sleep(0.3)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    assert receiver.ids == {show("evt", event): 3 for event in events}


# --- tried again ------------------------------------------------------------------------------------------------------

FAULTS = {
    "failed": (Fault(answer=Answer(b"the-secret", 500)), "refused", 500),
    "not found": (Fault(answer=Answer(status=404)), "refused", 404),
    "redirect": (Fault(answer=Answer(status=302, headers={"location": "/elsewhere"})), "refused", 302),
    "not modified": (Fault(answer=Answer(status=304)), "refused", 304),
    "silent": (Fault(wait_s=3600), "URL_UNREACHABLE", None),
    "never reads": (Fault(unread=True, wait_s=3600), "URL_UNREACHABLE", None),
    "closed": (Fault(answer=Answer(status=0)), "URL_UNREACHABLE", None),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_is_not_taken_comes_again(post: Post, receiver: Receiver, fault: str) -> None:
    receiver.server.fault, outcome, status = FAULTS[fault]
    made = await post.endpoint(receiver.server.url)
    event = await post.happens()
    await post.send()
    told = await post.told(made)
    assert (told.delivery.status, told.delivery.attempts) == ("pending", 1)
    assert [(each.outcome, each.status) for each in told.tries] == [(outcome, status)]
    assert (told.tries[0].detail is None) == (status is not None)
    receiver.server.fault = None
    await post.send()
    assert len(receiver.got) == 1  # not before its time
    await post.later()
    await post.send()
    assert receiver.ids == {show("evt", event): 2}
    if not FAULTS[fault][0].unread:
        assert receiver.got[0].body == receiver.got[1].body
    verified(receiver.got[1], made.secret)
    assert (await post.told(made)).delivery.status == "delivered"


async def test_an_answer_is_not_read(post: Post, receiver: Receiver) -> None:
    receiver.server.fault = Fault(answer=Answer(b"x" * 10_000_000), piece_bytes=1000, pause_s=0.05)
    made = await post.endpoint(receiver.server.url)
    await post.happens()
    await post.send()
    assert (await post.told(made)).delivery.status == "delivered"


async def test_for_three_days_and_then_no_more(post: Post, receiver: Receiver) -> None:
    assert sum(RETRIES_S) >= 3 * 24 * 3600
    receiver.then = 503
    made = await post.endpoint(receiver.server.url)
    event = await post.happens()
    for planned_s in RETRIES_S:
        await post.send()
        (delivery,) = await post.log(made)
        assert delivery.next_at is not None
        assert delivery.last is not None
        after_s = (delivery.next_at - delivery.last.at).total_seconds()
        assert 0.9 * planned_s <= after_s <= 1.1 * planned_s
        assert await post.standing(made) == ("active", None)
        await post.later()
    await post.send()
    told = await post.told(made)
    assert (told.delivery.status, len(told.tries)) == ("failed", 1 + len(RETRIES_S))
    assert receiver.ids == {show("evt", event): 1 + len(RETRIES_S)}
    assert await post.standing(made) == ("disabled", "failing")  # it took nothing in all the time
    await post.later()
    await post.send()
    assert len(receiver.got) == 1 + len(RETRIES_S)


async def test_who_took_something_else_meanwhile_stays(post: Post, receiver: Receiver) -> None:
    receiver.then = 503
    made = await post.endpoint(receiver.server.url)
    await post.happens()
    for number in range(1 + len(RETRIES_S)):
        if number == 3:
            receiver.then = 204
            await post.write("update webhook_deliveries set next_at = now() + interval '1 day'")
            await post.happens()
            await post.write("update webhook_endpoints set quiet_until = null")
            await post.send()
            receiver.then = 503
        await post.later()
        await post.send()
    assert sorted(delivery.status for delivery in await post.log(made)) == ["delivered", "failed"]
    assert await post.standing(made) == ("active", None)


async def test_gone_is_gone(post: Post, receiver: Receiver) -> None:
    receiver.then = 410
    made = await post.endpoint(receiver.server.url)
    await post.happens()
    await post.send()
    assert await post.standing(made) == ("disabled", "gone")
    assert (await post.told(made)).delivery.status == "failed"
    await post.happens()
    await post.send()
    assert len(receiver.got) == 1


@pytest.mark.parametrize(
    ("said", "least_s", "most_s"),
    [
        ("1200", 1200, 1201),
        ("Wed, 21 Oct 2065 07:28:00 GMT", 86_400, 86_401),
        ("1", 4, 6),
        ("soon", 4, 6),
        ("-5", 4, 6),
    ],
)
async def test_it_may_ask_for_time(post: Post, receiver: Receiver, said: str, least_s: int, most_s: int) -> None:
    receiver.answers = [Answer(status=429, headers={"retry-after": said})]
    made = await post.endpoint(receiver.server.url)
    await post.happens()
    await post.send()
    (delivery,) = await post.log(made)
    assert delivery.next_at is not None
    assert delivery.last is not None
    assert least_s <= (delivery.next_at - delivery.last.at).total_seconds() <= most_s


async def test_one_that_is_away_is_left_alone_for_a_moment(post: Post) -> None:
    made = await post.endpoint(closed())
    for _ in range(20):
        await post.happens()
    await post.send()
    tried = [delivery for delivery in await post.log(made) if delivery.attempts]
    assert len(tried) == webhooks.PER_ENDPOINT
    await post.send()
    assert [delivery for delivery in await post.log(made) if delivery.attempts] == tried


async def test_a_slow_one_holds_up_nobody(
    post: Post, other_post: Post, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "LIMITS", Limits(most_bytes=0, total_s=600, idle_s=600))
    async with http_server(lambda request: Answer()) as silent:
        silent.fault = Fault(wait_s=3600)
        await other_post.endpoint(silent.url)
        await post.endpoint(receiver.server.url)
        for _ in range(webhooks.AT_ONCE + 8):
            await other_post.happens()
        await post.happens()
        task = asyncio.create_task(post.sender.run())
        try:
            await until(lambda: len(receiver.got) == 1)
            assert len(silent.requests) <= webhooks.PER_ENDPOINT < webhooks.AT_ONCE
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


# --- whoever dies -----------------------------------------------------------------------------------------------------


async def test_what_a_dead_sender_had_is_sent_when_its_time_is_over(post: Post, receiver: Receiver) -> None:
    made = await post.endpoint(receiver.server.url)
    event = await post.happens()
    dead = sender(post.database)
    async with post.database.across_tenants("test") as tx:
        await tx.execute(webhooks._FAN_OUT, {"batch": 200, "test": "webhook.test"})
    assert len(await dead._claim(100)) >= 1  # and nothing more
    await post.send()
    assert receiver.got == []
    await post.write("update webhook_deliveries set claimed_until = now() - interval '1 s'")
    await post.send()
    assert receiver.ids == {show("evt", event): 1}
    assert (await post.told(made)).delivery.status == "delivered"


async def test_who_lost_its_claim_changes_nothing(post: Post, receiver: Receiver) -> None:
    made = await post.endpoint(receiver.server.url)
    await post.happens()
    receiver.server.faults = [Fault(wait_s=0.3, answer=Answer(status=500))]
    await post.sender.round()
    await until(lambda: len(receiver.got) == 1)
    await post.write("update webhook_deliveries set claimed_until = now() - interval '1 s'")
    other = sender(post.database)
    await other.round()
    await other.settled()
    await post.sender.settled()
    assert (await post.told(made)).delivery.status == "delivered"


async def test_who_is_asked_to_end_ends_what_it_can(post: Post, receiver: Receiver) -> None:
    made = await post.endpoint(receiver.server.url)
    await post.happens()
    receiver.server.faults = [Fault(wait_s=0.3)]
    task = asyncio.create_task(post.sender.run())
    await until(lambda: len(receiver.got) == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await post.told(made)).delivery.status == "delivered"


async def test_and_gives_back_what_it_cannot(post: Post, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "LIMITS", Limits(most_bytes=0, total_s=600, idle_s=600))
    monkeypatch.setattr(webhooks, "PARTING_S", 0.2)
    made = await post.endpoint(receiver.server.url)
    await post.happens()
    receiver.server.faults = [Fault(wait_s=3600)]
    task = asyncio.create_task(post.sender.run())
    await until(lambda: len(receiver.got) == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await post.told(made)).delivery.attempts == 0
    other = sender(post.database)
    await other.round()
    await other.settled()
    assert (await post.told(made)).delivery.status == "delivered"


async def test_a_database_that_dies_loses_nothing(settings: Settings, receiver: Receiver, tmp_path: Path) -> None:
    receiver.server.fault = Fault(wait_s=0.05)
    async with wired_postgres(settings, tmp_path) as (own, postgres, _):
        assert own.database_url is not None
        assert own.system_database_url is not None
        database = Database(own.database_url.get_secret_value(), own.system_database_url.get_secret_value())
        async with database.across_tenants("test set-up") as tx:
            tenant = await tenants.create(tx, slug="acme", actor="test")
        post = Post(database, caller_of(tenant), sender(database))
        made = await post.endpoint(receiver.server.url)
        events = {show("evt", await post.happens()) for _ in range(30)}
        task = asyncio.create_task(post.sender.run())
        await until(lambda: len(receiver.got) >= 10)
        postgres.kill()
        await asyncio.sleep(0.5)
        postgres.start()
        async with asyncio.timeout(30):
            while {delivery.status for delivery in await patiently(post, made)} != {"delivered"}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await database.aclose()
    assert set(receiver.ids) == events
    assert receiver.ids.total() <= len(events) + webhooks.PER_ENDPOINT


async def patiently(post: Post, made: Made) -> list[Delivery]:
    """The log, from a database that may not be up yet. The claims from before it died are over."""
    over = """
        update webhook_deliveries set claimed_until = now() - interval '1 s'
        where claimed_until < pg_postmaster_start_time() + make_interval(secs => :lease_s)
    """
    while True:
        try:
            await post.write(over, lease_s=webhooks.LEASE_S)
            return await post.log(made)
        except (OSError, DBAPIError):
            await asyncio.sleep(0.1)


# --- secrets ----------------------------------------------------------------------------------------------------------


async def test_secrets_change_over(post: Post, receiver: Receiver) -> None:
    made = await post.endpoint(receiver.server.url)
    secrets = [made.secret]
    async with post.database.tenant(post.caller.tenant_id) as tx:
        secrets.append((await endpoints.rotate(tx, SEALER, post.caller, made.endpoint.id)).secret)
    await post.happens()
    await post.send()
    assert len(receiver.got[0].headers["webhook-signature"].split()) == 2
    for secret in secrets:
        verified(receiver.got[0], secret)
    async with post.database.tenant(post.caller.tenant_id) as tx:
        secrets.append((await endpoints.rotate(tx, SEALER, post.caller, made.endpoint.id, overlap_s=0)).secret)
    await post.happens()
    await post.send()
    verified(receiver.got[1], secrets[0])  # its time is not over
    verified(receiver.got[1], secrets[2])
    with pytest.raises(Exception, match="signature"):
        verified(receiver.got[1], secrets[1])


async def test_only_so_many_sign_at_once(post: Post, receiver: Receiver) -> None:
    made = await post.endpoint(receiver.server.url)
    for _ in range(8):
        async with post.database.tenant(post.caller.tenant_id) as tx:
            latest = await endpoints.rotate(tx, SEALER, post.caller, made.endpoint.id)
    await post.happens()
    await post.send()
    assert len(receiver.got[0].headers["webhook-signature"].split()) == signing.AT_ONCE
    verified(receiver.got[0], latest.secret)


async def test_a_secret_is_sealed_and_erased(post: Post, database: Database) -> None:
    made = await post.endpoint("https://8.8.8.8/?key=the-key")
    async with database.across_tenants("test") as tx:
        for table in ("webhook_secrets", "webhook_endpoints", "audit_log"):
            query = f"select t.*::text from {table} t where tenant_id = :tenant_id"
            rows = await tx.execute(text(query), {"tenant_id": post.caller.tenant_id})
            stored = " ".join(str(row) for row in rows)
            assert stored
            assert made.secret.removeprefix(signing.PREFIX) not in stored
            assert "the-key" not in stored or table == "webhook_endpoints"
    async with database.tenant(post.caller.tenant_id) as tx:
        await endpoints.rotate(tx, SEALER, post.caller, made.endpoint.id, overlap_s=0)
        await tx.execute(
            text("update webhook_secrets set expires_at = now() - interval '1 s' where expires_at <= now()")
        )
    await deliveries.purge(database)
    async with database.tenant(post.caller.tenant_id) as tx:
        assert (await tx.execute(text("select count(*) from webhook_secrets"))).scalar_one() == 1


async def test_a_master_key_changes(post: Post, receiver: Receiver, database: Database, settings: Settings) -> None:
    assert settings.sealing_keys is not None
    others = sealing_keys(settings.sealing_keys.get_secret_value())  # of webhooks that other tests have left
    await deliveries.purge(database)  # what they have left that nothing opens
    made = await post.endpoint(receiver.server.url)
    await post.happens()
    missing = sender(database, sealer=LocalSealer({"k2": bytes([2]) * 32}))
    await missing.round()
    await missing.settled()
    told = await post.told(made)
    assert (told.delivery.status, told.tries[0].outcome, receiver.got) == ("pending", "MISCONFIGURED", [])
    assert told.tries[0].detail is None  # it is the operator's business
    assert await post.standing(made) == ("active", None)
    both = LocalSealer({"k2": bytes([2]) * 32, "k1": bytes(32)} | others)
    async with database.across_tenants("test") as tx:
        assert await signing.rewrap(tx, both) >= 1
        assert await signing.rewrap(tx, both) == 0
    await post.later()
    await missing.round()
    await missing.settled()
    verified(receiver.got[0], made.secret)
    async with database.across_tenants("test") as tx:
        await signing.rewrap(tx, LocalSealer(others | {"k2": bytes([2]) * 32}))


# --- where it may not go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["https://169.254.169.254/", "http://10.0.0.1/", "https://[::1]/", "https://localhost:1/"]
)
async def test_what_leads_inside_by_now_is_not_called(post: Post, url: str) -> None:
    made = await post.endpoint(url)
    await post.happens()
    strict = sender(post.database, Allowed())
    await strict.round()
    await strict.settled()
    told = await post.told(made)
    assert (told.delivery.status, told.tries[0].outcome) == ("pending", "URL_REFUSED")


# --- what is kept -----------------------------------------------------------------------------------------------------


async def long_ago(post: Post) -> UUID:
    event = uuid7()
    await post.write("update webhook_endpoints set created_at = now() - interval '60 days'")
    await post.write(
        """insert into outbox (tenant_id, id, topic, object_id, payload, created_at)
           values (:tenant_id, :id, 'job.completed', :id, '{}', now() - interval '31 days')""",
        tenant_id=post.caller.tenant_id,
        id=event,
    )
    return event


async def test_old_events_go_with_their_log(post: Post, receiver: Receiver, database: Database) -> None:
    made = await post.endpoint(receiver.server.url)
    await long_ago(post)
    fresh = await post.happens()
    await post.send()
    assert len(await post.log(made)) == 2
    await deliveries.purge(database)
    assert [delivery.event_id for delivery in await post.log(made)] == [fresh]


async def test_what_is_still_tried_is_kept(post: Post, receiver: Receiver, database: Database) -> None:
    receiver.then = 500
    made = await post.endpoint(receiver.server.url)
    event = await long_ago(post)
    await post.send()
    await deliveries.purge(database)
    assert [delivery.event_id for delivery in await post.log(made)] == [event]
    await post.write("update webhook_deliveries set asked_at = now() - interval '6 days'")
    await deliveries.purge(database)
    assert await post.log(made) == []


async def test_the_body_is_json_of_known_form() -> None:
    at = datetime.fromisoformat("2026-11-28T02:30:00+00:00")
    body = deliveries.body_of('a"b', at, '{"x":1}')
    assert json.loads(body) == {"type": 'a"b', "timestamp": "2026-11-28T02:30:00+00:00", "data": {"x": 1}}
