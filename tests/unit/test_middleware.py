"""Whatever happens inside, the answer is whole, identified, and says nothing it should not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
import structlog
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from gateway.errors import BadRequest
from gateway.middleware import Answered, Identified
from gateway.sse import EventStream, message, while_connected

SECRET = "what somebody said"


async def fine(request: Request) -> Response:
    return PlainTextResponse("fine")


async def broken(request: Request) -> Response:
    raise ValueError(SECRET)


async def refused(request: Request) -> Response:
    raise BadRequest("No.")


async def broken_off(request: Request) -> Response:
    async def body() -> Any:
        yield b"begun"
        raise ValueError(SECRET)

    return StreamingResponse(body())


ROUTES = [Route(f"/v1/audio/{endpoint.__name__}", endpoint) for endpoint in (fine, broken, refused, broken_off)]
APP = Identified(Answered(Starlette(routes=ROUTES).router))


async def get(path: str, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(APP)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        return await http.get(f"/v1/audio/{path}", headers={key.replace("_", "-"): v for key, v in headers.items()})


async def test_the_unforeseen_is_a_problem_and_its_words_are_nowhere() -> None:
    with structlog.testing.capture_logs() as logs:
        response = await get("broken")
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "INTERNAL"
    failed = next(entry for entry in logs if entry["event"] == "http.failed")
    assert any(place.endswith(" broken") for place in failed["at"])
    assert SECRET not in response.text + str(logs)


async def test_a_refusal_is_not_an_error_of_ours() -> None:
    with structlog.testing.capture_logs() as logs:
        response = await get("refused")
    assert response.json()["error"]["message"] == response.json()["detail"] == "No."
    assert {entry["log_level"] for entry in logs} == {"info"}


async def test_an_answer_that_breaks_off_does_not_look_whole() -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(sending: Any) -> None:
        sent.append(sending)

    scope = {"type": "http", "method": "GET", "path": "/v1/audio/broken_off", "headers": [], "query_string": b""}
    await APP({**scope, "asgi": {"spec_version": "2.4"}}, receive, send)
    assert sent[0]["status"] == 200
    assert sent[-1]["body"] == b"begun"
    assert sent[-1]["more_body"]


async def test_ids() -> None:
    assert (await get("fine", x_request_id="a/b:c=1.2_3-4+5")).headers["x-request-id"] == "a/b:c=1.2_3-4+5"
    assert (await get("fine", x_request_id="a b")).headers["x-request-id"] != "a b"
    given = [(await get("refused")).json()["request_id"] for _ in range(2)]
    assert len(set(given)) == 2


async def test_logs_name_the_template_and_the_clients_own_id() -> None:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        response = await get("fine", x_client_request_id="theirs")
        await get("no-such-place")
    assert logs[0]["route"] == "/v1/audio/fine"
    assert (logs[0]["client_request_id"], logs[0]["request_id"]) == ("theirs", response.headers["x-request-id"])
    assert {entry["route"] for entry in logs if "route" in entry} == {"/v1/audio/fine", "?"}


# --- server-sent events -------------------------------------------------------------------------------------------


def failed(exc: Exception) -> bytes:
    return message({"failed": type(exc).__name__})


def asked(gone: asyncio.Event) -> Request:
    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}, receive)


async def sent_by(stream: EventStream, gone: asyncio.Event | None = None) -> bytes:
    bodies: list[bytes] = []

    async def send(sending: Any) -> None:
        bodies.append(sending.get("body", b""))

    request = asked(gone or asyncio.Event())
    await stream(request.scope, request.receive, send)
    return b"".join(bodies)


async def test_a_quiet_stream_is_kept_alive() -> None:
    go = asyncio.Event()

    async def events() -> AsyncGenerator[bytes, None]:
        await go.wait()
        yield message({"n": 1}, event="count")

    asyncio.get_running_loop().call_later(0.1, go.set)
    sent = await sent_by(EventStream(events(), failed, keepalive_s=0.02))
    assert sent.startswith(b": keepalive\n\n")
    assert sent.endswith(b'event: count\ndata: {"n":1}\n\n')


async def test_a_failure_is_raised_before_the_first_event_and_told_after_it() -> None:
    async def events(good: int) -> AsyncGenerator[bytes, None]:
        for n in range(good):
            yield message({"n": n})
        raise ValueError(SECRET)

    with pytest.raises(ValueError, match=SECRET):
        await EventStream(events(0), failed).begun(asked(asyncio.Event()))
    stream = await EventStream(events(1), failed).begun(asked(asyncio.Event()))
    told = (await sent_by(stream)).decode().strip().split("\n\n")
    assert [json.loads(block.removeprefix("data: ")) for block in told] == [{"n": 0}, {"failed": "ValueError"}]


@pytest.mark.parametrize("begun", [True, False])
async def test_who_leaves_ends_the_stream(begun: bool) -> None:
    ended, gone = asyncio.Event(), asyncio.Event()

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            if begun:
                yield message({"n": 0})
            await asyncio.Event().wait()
        finally:
            ended.set()

    asyncio.get_running_loop().call_later(0.05, gone.set)
    with pytest.raises(ClientDisconnect):
        await sent_by(await EventStream(events(), failed).begun(asked(gone)), gone)
    assert ended.is_set()


async def test_work_ends_with_the_client_and_a_result_is_handed_over() -> None:
    async def work(result: int | None) -> int:
        if result is None:
            await asyncio.Event().wait()
        return result or 0

    assert await while_connected(asked(asyncio.Event()), work(7)) == 7
    gone = asyncio.Event()
    gone.set()
    with pytest.raises(ClientDisconnect):
        await while_connected(asked(gone), work(None))
