"""Whatever takes an id answers another tenant's with 404, and with nothing that tells it from one that never was."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest
from starlette.routing import Route

from gateway.app import ROUTES
from runtime.ids import show, uuid7
from tests.providers.http import closed
from tests.server import Served, assert_problem, post
from tests.streaming import talking

OWNED = {"job_id": "job", "session_id": "sess", "webhook_id": "hook", "delivery_id": "dlv"}
"""Path parameters that name an object of a tenant; `model` names none, and a tenant's token opens no `/v1/admin`."""

BODIES = {"/v1/webhooks/{webhook_id}/replay": {"since": 0}}
"""What a call needs to be understood."""

WITH_ID = sorted(
    (method, route.path)
    for route in ROUTES
    if isinstance(route, Route) and (set(re.findall(r"\{(\w+)", route.path)) & set(OWNED))
    for method in (route.methods or set()) - {"HEAD"}
)


@dataclass(frozen=True)
class Two:
    """Tenant A with a job and sessions, and both their clients. `doomed` may be deleted."""

    ours: httpx.AsyncClient
    theirs: httpx.AsyncClient
    ids: dict[str, str]
    doomed: dict[str, str]


@pytest.fixture(scope="module")
async def two(served: Served) -> AsyncIterator[Two]:
    async with (
        served.http(their_token := served.token(await served.tenant(keep_audio=True))) as theirs,
        served.http(served.token(await served.tenant())) as ours,
    ):
        job = (await post(theirs, **{"async": "true"})).json()["id"]
        await theirs.get(f"/v1/jobs/{job}", params={"wait": "30"})
        await post(theirs)
        session, doomed = [await recorded(served, theirs, their_token) for _ in range(2)]
        hook, delivery = await told(theirs)
        doomed_hook, _ = await told(theirs)
        ids = {"job_id": job, "session_id": session, "webhook_id": hook, "delivery_id": delivery}
        yield Two(ours, theirs, ids, ids | {"session_id": doomed, "webhook_id": doomed_hook})


async def recorded(served: Served, http: httpx.AsyncClient, token: str) -> str:
    """A live session whose audio is kept."""
    async with talking(served, token) as talk:
        await talk.say("start")
        session_id = str((await talk.until("ready"))["session_id"])
        await talk.speak(bytes(16_000))
        await talk.say("stop")
        await talk.end()
    async with asyncio.timeout(20):
        while (await http.get(f"/v1/sessions/{session_id}")).json()["audio"]["status"] != "kept":  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return session_id


async def told(http: httpx.AsyncClient) -> tuple[str, str]:
    """A webhook, and a delivery that nobody takes."""
    hook = str((await http.post("/v1/webhooks", json={"url": closed()})).json()["id"])
    await http.post(f"/v1/webhooks/{hook}/test")
    async with asyncio.timeout(20):
        while not (found := (await http.get(f"/v1/webhooks/{hook}/deliveries")).json()["data"]):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return hook, str(found[0]["id"])


def test_every_parameter_is_known() -> None:
    paths = [path for route in ROUTES if not (path := getattr(route, "path", "")).startswith("/v1/admin/")]
    assert {name for path in paths for name in re.findall(r"\{(\w+)", path)} == {*OWNED, "model"}
    assert len(WITH_ID) >= 6


@pytest.mark.parametrize(("method", "path"), WITH_ID)
async def test_their_objects_are_not_found(two: Two, method: str, path: str) -> None:
    def filled(ids: dict[str, str]) -> str:
        return re.sub(r"\{(\w+)[^}]*\}", lambda match: ids[match[1]], path)

    nobodys = {name: show(kind, uuid7()) for name, kind in OWNED.items()}  # type: ignore[arg-type]
    ids = two.doomed if method == "DELETE" else two.ids
    body = BODIES.get(path)
    theirs = assert_problem(await two.ours.request(method, filled(ids), json=body), 404, "NOT_FOUND")
    assert (await two.theirs.request(method, filled(ids), json=body)).is_success
    none = assert_problem(await two.ours.request(method, filled(nobodys), json=body), 404, "NOT_FOUND")
    assert theirs | {"request_id": ""} == none | {"request_id": ""}
    for nonsense in ("x", "job_", "sess_%00", two.ids["job_id"].upper(), "'; drop table jobs"):
        nowhere = filled(dict.fromkeys(OWNED, nonsense))
        assert_problem(await two.ours.request(method, nowhere, json=body), 404, "NOT_FOUND")


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/sessions", "/v1/usage", "/v1/webhooks"])
async def test_their_rows_are_not_listed(two: Two, path: str) -> None:
    assert (await two.theirs.get(path)).json()["data"]
    assert (await two.ours.get(path)).json()["data"] == []


async def test_their_cursor_shows_nothing_of_theirs(two: Two) -> None:
    for path in ("/v1/jobs", "/v1/sessions"):
        await post(two.theirs, **{"async": "true"})
        cursor = (await two.theirs.get(path, params={"limit": "1"})).json()["next_cursor"]
        assert cursor
        response = await two.ours.get(path, params={"cursor": cursor})
        assert response.status_code == 400 or response.json()["data"] == []


async def test_a_retry_joins_no_one_elses_job(served: Served) -> None:
    again = {"x-stainless-retry-count": "1", "prefer": "respond-async"}
    jobs = []
    for _ in range(2):
        async with served.http(served.token(await served.tenant())) as http:
            response = await post(http, headers=again)
            assert response.status_code == 202
            jobs.append(response.json()["id"])
    assert len(set(jobs)) == 2
