"""Webhooks over the API: registered, told of real jobs, looked at, replayed, changed, taken away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from standardwebhooks import Webhook

from dispatchers.backends.scripted import Scripted
from dispatchers.errors import BackendRefused
from runtime.settings import Settings
from tests.providers.http import Answer, HttpServer, Request, closed, http_server
from tests.server import Served, assert_problem, post, serving

JOB_FIELDS = {
    *("id", "object", "status", "created_at", "finished_at", "audio_ms", "customer", "metadata", "error", "links"),
}


@dataclass
class Receiver:
    """An endpoint that answers every request with `status`."""

    server: HttpServer
    status: int = 204
    secrets: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.server.url

    async def received(self, count: int = 1) -> list[tuple[Request, Any]]:
        """The first so many webhooks with their verified bodies; waits for them."""
        async with asyncio.timeout(30):
            while len(self.server.requests) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return [(request, self.verified(request)) for request in self.server.requests[:count]]

    def verified(self, request: Request) -> Any:
        return Webhook(self.secrets[request.path]).verify(request.body, dict(request.headers))

    async def register(self, http: httpx.AsyncClient, path: str = "/", **said: Any) -> dict[str, Any]:
        response = await http.post("/v1/webhooks", json={"url": self.url + path, **said})
        assert response.status_code == 201, response.text
        webhook: dict[str, Any] = response.json()
        assert response.headers["location"] == f"/v1/webhooks/{webhook['id']}"
        assert response.headers["cache-control"] == "no-store"
        self.secrets[path] = webhook["secret"]
        return webhook


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with http_server(lambda request: Answer(status=it.status)) as server:
        it = Receiver(server)
        yield it


async def log_of(http: httpx.AsyncClient, webhook: dict[str, Any], **query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await http.get(f"/v1/webhooks/{webhook['id']}/deliveries", params=query)).json()[
        "data"
    ]
    return found


async def logged(http: httpx.AsyncClient, webhook: dict[str, Any], status: str, attempts: int = 1) -> dict[str, Any]:
    """The newest delivery, once it stands so."""
    async with asyncio.timeout(30):
        while True:
            found = await log_of(http, webhook)
            if found and (found[0]["status"], found[0]["attempts"]) == (status, attempts):
                return found[0]
            await asyncio.sleep(0.02)


# --- jobs -------------------------------------------------------------------------------------------------------------


async def test_a_completed_job_is_told(http: httpx.AsyncClient, receiver: Receiver) -> None:
    webhook = await receiver.register(http)
    form = {"async": "true", "customer": "acme", "metadata": '{"case": "7"}'}
    job = (await post(http, **form)).json()
    ((request, body),) = await receiver.received()
    assert request.headers["webhook-id"].startswith("evt_")
    assert body["type"] == "job.completed"
    told = body["data"]
    assert set(told) == JOB_FIELDS
    assert (told["id"], told["status"]) == (job["id"], "completed")
    assert (told["customer"], told["metadata"], told["error"]) == ("acme", {"case": "7"}, None)
    assert (await http.get(told["links"]["transcript"])).json()["text"] not in request.body.decode()
    seen = (await http.get(told["links"]["self"])).json()
    assert {name: seen[name] for name in JOB_FIELDS - {"links"}} == {
        name: told[name] for name in JOB_FIELDS - {"links"}
    }
    delivery = await logged(http, webhook, "delivered")
    assert (delivery["event"], delivery["type"]) == (request.headers["webhook-id"], "job.completed")


async def test_a_failed_job_is_told(settings: Settings, receiver: Receiver) -> None:
    recogniser = Scripted(fail=BackendRefused)
    allow = ("127.0.0.1",)
    async with serving(settings, recogniser=recogniser, backend="scripted", egress_allow=allow) as running:
        async with running.http(running.token(await running.tenant())) as http:
            await receiver.register(http, "/all")
            await receiver.register(http, "/completed", events=["job.completed"])
            job = (await post(http, model="whisper-1", **{"async": "true"})).json()
            ((_, body),) = await receiver.received()
            assert body["type"] == "job.failed"
            assert (body["data"]["id"], body["data"]["error"]["code"]) == (job["id"], "BACKEND_REFUSED")
            assert set(body["data"]["links"]) == {"self"}
            await asyncio.sleep(0.2)
            assert [request.path for request in receiver.server.requests] == ["/all"]


# --- the log ----------------------------------------------------------------------------------------------------------


async def test_a_test_event_and_its_log(http: httpx.AsyncClient, receiver: Receiver) -> None:
    webhook = await receiver.register(http, events=["job.failed"])
    answer = await http.post(f"/v1/webhooks/{webhook['id']}/test")
    assert answer.status_code == 202
    ((request, body),) = await receiver.received()
    assert (body["type"], body["data"]) == ("webhook.test", {"object": "webhook", "id": webhook["id"]})
    assert answer.json() == {"object": "webhook.event", "id": request.headers["webhook-id"], "type": "webhook.test"}
    delivery = await logged(http, webhook, "delivered")
    whole = (await http.get(f"/v1/webhooks/{webhook['id']}/deliveries/{delivery['id']}")).json()
    assert whole["body"] == body
    (attempt,) = whole["tries"]
    assert (attempt["number"], attempt["outcome"], attempt["status"]) == (1, "delivered", 204)
    assert {name: whole[name] for name in delivery} == delivery
    assert delivery["last"] == attempt


async def test_pages_of_the_log(http: httpx.AsyncClient, receiver: Receiver) -> None:
    webhook = await receiver.register(http)
    events = [(await http.post(f"/v1/webhooks/{webhook['id']}/test")).json()["id"] for _ in range(5)]
    await receiver.received(5)
    await logged(http, webhook, "delivered")
    address, seen, cursor = f"/v1/webhooks/{webhook['id']}/deliveries", [], None
    for _ in range(3):
        page = (await http.get(address, params={"limit": "2"} | ({"cursor": cursor} if cursor else {}))).json()
        seen += [delivery["event"] for delivery in page["data"]]
        cursor = page["next_cursor"]
    assert cursor is None
    assert sorted(seen) == sorted(events)
    assert await log_of(http, webhook, status="failed") == []
    for query in ({"limit": "0"}, {"limit": "x"}, {"status": "lost"}, {"cursor": "x"}, {"cursor": webhook["id"]}):
        problem = assert_problem(await http.get(address, params=query), 400, "BAD_PARAMETERS")
        assert problem["param"] in query


async def test_a_delivery_is_replayed_under_its_id(http: httpx.AsyncClient, receiver: Receiver) -> None:
    webhook = await receiver.register(http)
    await http.post(f"/v1/webhooks/{webhook['id']}/test")
    await receiver.received()
    delivery = await logged(http, webhook, "delivered")
    address = f"/v1/webhooks/{webhook['id']}/deliveries/{delivery['id']}"
    again = await http.post(f"{address}/replay")
    assert (again.status_code, again.json()["status"], again.json()["attempts"]) == (202, "pending", 0)
    (first, _), (second, _) = await receiver.received(2)
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body
    await logged(http, webhook, "delivered")
    assert [attempt["number"] for attempt in (await http.get(address)).json()["tries"]] == [1, 2]


async def dispatched(served: Served, job: dict[str, Any]) -> None:
    """Waits until it is settled who is told of the job's end."""
    query = text("select count(*) from outbox where object_id = :id and dispatched_at is not null")
    async with asyncio.timeout(30):
        while True:
            async with served.gateway.resources.database.across_tenants("test") as tx:
                if (await tx.execute(query, {"id": job["id"].removeprefix("job_")})).scalar_one():
                    return
            await asyncio.sleep(0.05)


async def test_what_was_missed_is_replayed(served: Served, http: httpx.AsyncClient, receiver: Receiver) -> None:
    webhook = await receiver.register(http)
    address = f"/v1/webhooks/{webhook['id']}"
    receiver.status = 410
    await post(http, **{"async": "true"})
    await logged(http, webhook, "failed")
    assert (await http.get(address)).json()["disabled_why"] == "gone"
    for call in (f"{address}/test", f"{address}/deliveries/{(await log_of(http, webhook))[0]['id']}/replay"):
        assert_problem(await http.post(call), 409, "CONFLICT")
    assert_problem(await http.post(f"{address}/replay", json={"since": 0}), 409, "CONFLICT")
    job = (await post(http, **{"async": "true"})).json()
    await dispatched(served, job)
    receiver.status = 204
    mended = (await http.patch(address, json={"status": "active"})).json()
    assert (mended["status"], mended["disabled_why"], mended["failing_since"]) == ("active", None, None)
    assert (await http.post(f"{address}/replay", json={"since": 4_000_000_000})).json()["deliveries"] == 0
    answer = await http.post(f"{address}/replay", json={"since": job["created_at"] - 3600})
    assert (answer.status_code, answer.json()) == (202, {"object": "webhook.replay", "deliveries": 2})
    received = await receiver.received(3)
    ids = [request.headers["webhook-id"] for request, _ in received]
    assert len(set(ids)) == 2
    assert ids[0] in ids[1:]
    await logged(http, webhook, "delivered")
    assert (await http.post(f"{address}/replay", json={"since": 0})).json()["deliveries"] == 0


# --- the webhook itself -----------------------------------------------------------------------------------------------


async def test_the_secret_is_told_once(http: httpx.AsyncClient, receiver: Receiver) -> None:
    webhook = await receiver.register(http, description="my own")
    secret = webhook.pop("secret")
    assert secret.startswith("whsec_")
    assert (await http.get(f"/v1/webhooks/{webhook['id']}")).json() == webhook
    assert (await http.get("/v1/webhooks")).json() == {"object": "list", "data": [webhook]}
    assert webhook["events"] == ["job.completed", "job.failed", "job.cancelled"]
    assert (webhook["status"], webhook["description"]) == ("active", "my own")
    changed = (await http.patch(f"/v1/webhooks/{webhook['id']}", json={"description": ""})).json()
    assert "secret" not in changed


async def test_rotation(http: httpx.AsyncClient, receiver: Receiver) -> None:
    webhook = await receiver.register(http)
    address = f"/v1/webhooks/{webhook['id']}"
    rotated = await http.post(f"{address}/rotate")
    assert rotated.headers["cache-control"] == "no-store"
    assert rotated.json()["secret"] != webhook["secret"]
    await http.post(f"{address}/test")
    ((request, _),) = await receiver.received()  # by the old one
    receiver.secrets["/"] = rotated.json()["secret"]
    receiver.verified(request)
    for wrong in ({"overlap_s": -1}, {"overlap_s": 604_801}, {"overlap_s": "1"}, {"for_s": 1}):
        assert_problem(await http.post(f"{address}/rotate", json=wrong), 400, "BAD_PARAMETERS")


async def test_changes(http: httpx.AsyncClient, receiver: Receiver) -> None:
    webhook = await receiver.register(http)
    address = f"/v1/webhooks/{webhook['id']}"
    changed = await http.patch(address, json={"events": ["job.failed", "job.failed"], "url": f"{receiver.url}/x"})
    assert (changed.json()["events"], changed.json()["url"]) == (["job.failed"], f"{receiver.url}/x")
    off = (await http.patch(address, json={"status": "disabled"})).json()
    assert (off["status"], off["disabled_why"]) == ("disabled", "asked")
    assert (await http.delete(address)).status_code == 204
    for method, path in (("GET", address), ("DELETE", address), ("POST", f"{address}/test"), ("PATCH", address)):
        assert_problem(await http.request(method, path), 404, "NOT_FOUND")


async def test_a_deleted_webhook_leaves_nothing(served: Served, http: httpx.AsyncClient, receiver: Receiver) -> None:
    webhook = await receiver.register(http)
    await http.post(f"/v1/webhooks/{webhook['id']}/test")
    delivery = await logged(http, webhook, "delivered")
    await http.delete(f"/v1/webhooks/{webhook['id']}")
    hook, sent = webhook["id"].removeprefix("hook_"), delivery["id"].removeprefix("dlv_")
    async with served.gateway.resources.database.across_tenants("test") as tx:
        for table in ("webhook_secrets", "webhook_deliveries"):
            found = await tx.execute(text(f"select count(*) from {table} where endpoint_id = :id"), {"id": hook})
            assert found.scalar_one() == 0
        found = await tx.execute(text("select count(*) from webhook_attempts where delivery_id = :id"), {"id": sent})
        assert found.scalar_one() == 0
        query = "select action from audit_log where object = :object order by seq"
        actions = (await tx.execute(text(query), {"object": f"webhook/{webhook['id']}"})).scalars().all()
    assert actions == ["webhook.create", "webhook.delete"]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://8.8.8.8/", "URL_REFUSED"),
        ("https://8.8.8.8:22/", "URL_REFUSED"),
        ("https://169.254.169.254/latest/meta-data/", "URL_REFUSED"),
        ("https://10.0.0.1/", "URL_REFUSED"),
        ("https://[::1]/", "URL_REFUSED"),
        ("https://user:key@8.8.8.8/", "URL_REFUSED"),
        ("ftp://8.8.8.8/", "URL_REFUSED"),
        ("nonsense", "URL_REFUSED"),
        ("", "URL_REFUSED"),
        ("https://" + "x" * 3000, "URL_REFUSED"),
        ("https://no-such-host.invalid/", "URL_UNREACHABLE"),
    ],
)
async def test_urls_that_are_not_called(http: httpx.AsyncClient, receiver: Receiver, url: str, code: str) -> None:
    problem = assert_problem(await http.post("/v1/webhooks", json={"url": url}), 400, code)
    assert problem["param"] == "url"
    webhook = await receiver.register(http)
    problem = assert_problem(await http.patch(f"/v1/webhooks/{webhook['id']}", json={"url": url}), 400, code)
    assert problem["param"] == "url"
    assert (await http.get(f"/v1/webhooks/{webhook['id']}")).json()["url"] == webhook["url"]


@pytest.mark.parametrize(
    ("field_name", "body"),
    [
        ("url", {}),
        ("url", {"url": 1}),
        ("url", {"url": None}),
        ("events", {"url": "URL", "events": []}),
        ("events", {"url": "URL", "events": ["job.begun"]}),
        ("events", {"url": "URL", "events": ["webhook.test"]}),
        ("events", {"url": "URL", "events": "job.failed"}),
        ("events.0", {"url": "URL", "events": [1]}),
        ("description", {"url": "URL", "description": "x" * 201}),
        ("description", {"url": "URL", "description": "a\u0000b"}),
        ("secret", {"url": "URL", "secret": "whsec_mine"}),
    ],
)
async def test_wrong_values_name_their_field(http: httpx.AsyncClient, field_name: str, body: dict[str, Any]) -> None:
    said = {name: closed() if value == "URL" else value for name, value in body.items()}
    problem = assert_problem(await http.post("/v1/webhooks", json=said), 400, "BAD_PARAMETERS")
    assert problem["param"] == field_name
    assert (await http.get("/v1/webhooks")).json()["data"] == []


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b'"x"', b"[" * 100_000])
async def test_bodies_that_are_none(http: httpx.AsyncClient, content: bytes) -> None:
    assert_problem(await http.post("/v1/webhooks", content=content), 400, "BAD_REQUEST")


async def test_only_so_many(http: httpx.AsyncClient, receiver: Receiver) -> None:
    for _ in range(32):
        await receiver.register(http)
    problem = assert_problem(await http.post("/v1/webhooks", json={"url": receiver.url}), 409, "CONFLICT")
    assert "32" in problem["detail"]


async def test_it_takes_the_scope(served: Served) -> None:
    token = served.token(await served.tenant(), scopes=("transcribe", "usage"))
    async with served.http(token) as http:
        assert_problem(await http.get("/v1/webhooks"), 403, "FORBIDDEN")
        assert_problem(await http.post("/v1/webhooks", json={"url": closed()}), 403, "FORBIDDEN")
    async with served.http() as http:
        assert_problem(await http.post("/v1/webhooks", json={"url": closed()}), 401, "TOKEN_MISSING")
