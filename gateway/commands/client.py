"""A small client of our own public API, for the command line and the demo. It knows nothing that a user would not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from httpx_sse import aconnect_sse
from websockets.asyncio.client import connect

from dispatchers.audio.decode import load
from dispatchers.interface import SAMPLE_RATE
from runtime.errors import StenogateError

FRAME_MS = 100
TIMEOUT = httpx.Timeout(10.0, read=600.0, write=60.0)


class ClientError(StenogateError):
    """The gateway refused, or is not there."""


@dataclass(frozen=True)
class Client:
    """One gateway, one token."""

    url: str
    token: str

    def _http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url, headers={"Authorization": f"Bearer {self.token}"}, timeout=TIMEOUT, trust_env=False
        )

    async def transcribe(
        self, path: Path, *, model: str, response_format: str = "json", **fields: str
    ) -> httpx.Response:
        """`POST /v1/audio/transcriptions`; 200 with the transcript, or 202 with a job."""
        form = {"model": model, "response_format": response_format, **fields}
        async with self._http() as http:
            try:
                with path.open("rb") as file:
                    response = await http.post("/v1/audio/transcriptions", data=form, files={"file": (path.name, file)})
            except httpx.ConnectError as error:
                raise ClientError(f"no gateway answers at {self.url}; start one with `stenogate serve`") from error
            return _checked(response)

    async def get(self, path: str, **query: str) -> httpx.Response:
        """Any resource under `/v1`."""
        async with self._http() as http:
            return _checked(await http.get(path, params=query))

    async def job_events(self, path: str) -> AsyncGenerator[dict[str, Any], None]:
        """The job at each change, until it has ended (`GET /v1/jobs/{id}/events`)."""
        async with self._http() as http, aconnect_sse(http, "GET", path) as source:
            async for event in source.aiter_sse():
                yield json.loads(event.data)

    async def stream(
        self, path: Path, on_event: Callable[[dict[str, Any]], None], *, model: str, pace: bool = True
    ) -> list[str]:
        """Sends a recording to `/v1/stream` as a microphone would, and returns its finals' texts."""
        samples = await asyncio.to_thread(load, path)
        finals: list[str] = []
        async with self._socket() as socket:
            await socket.send(json.dumps({"type": "start", "sample_rate": SAMPLE_RATE, "model": model}))

            async def speak() -> None:
                loop = asyncio.get_running_loop()
                begun = loop.time()
                step = SAMPLE_RATE * FRAME_MS // 1000
                for position in range(0, len(samples), step):
                    if pace:  # a frame leaves when its last sample has been spoken
                        await asyncio.sleep(begun + (position + step) / SAMPLE_RATE - loop.time())
                    await socket.send(samples[position : position + step].tobytes())
                await socket.send(json.dumps({"type": "stop"}))

            speaking = asyncio.create_task(speak())
            try:
                async for frame in socket:
                    event = json.loads(frame)
                    on_event(event)
                    if event["type"] == "final":
                        finals.append(event["text"])
                    elif event["type"] == "error" and event["fatal"]:
                        raise ClientError(f"{event['code']}: {event['message']}")
            finally:
                speaking.cancel()
                await asyncio.gather(speaking, return_exceptions=True)
        return finals

    def _socket(self) -> AbstractAsyncContextManager[Any]:
        address = self.url.replace("http", "ws", 1) + "/v1/stream"
        headers = {"Authorization": f"Bearer {self.token}"}
        return connect(address, additional_headers=headers, compression=None, open_timeout=10, proxy=None)


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        problem = response.json()
        reason = f"{problem['code']}: {problem['detail']} (request {problem['request_id']})"
    except (ValueError, KeyError):
        reason = f"HTTP {response.status_code}"
    raise ClientError(reason)
