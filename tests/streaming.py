"""A client of the live API that writes down everything it hears."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Response

from dispatchers.audio.decode import load
from dispatchers.interface import SAMPLE_RATE, Samples
from tests.server import SAMPLES, Served

EVER_S = 30.0

Event = dict[str, Any]


def clip(name: str) -> tuple[Samples, str]:
    """A sample of the micro model and what is said in it."""
    rows = [line.split("\t") for line in (SAMPLES / "transcripts.tsv").read_text().splitlines()[1:]]
    return load(SAMPLES / name), next(row[-1] for row in rows if row[0] == name)


def encoded(samples: Samples, form: str, codec: str, rate: int) -> bytes:
    """The samples as FFmpeg's muxer `form` writes them to a socket."""

    class Sink:
        def __init__(self) -> None:
            self.data = bytearray()

        def write(self, data: bytes) -> int:
            self.data += data
            return len(data)

    sink = Sink()
    with av.open(sink, "w", format=form) as container:
        out: Any = container.add_stream(codec, rate=rate)
        out.layout = "mono"
        frame = av.AudioFrame.from_ndarray(samples[np.newaxis], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        container.mux(out.encode(frame))
        container.mux(out.encode(None))
    return bytes(sink.data)


@dataclass
class Talk:
    """One connection and all that was heard on it."""

    socket: ClientConnection
    events: list[Event] = field(default_factory=list)
    over: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self) -> None:
        try:
            async for frame in self.socket:
                self.events.append(json.loads(frame))
                self._news.set()
        except ConnectionClosed:
            pass
        finally:
            self.over = True
            self._news.set()

    async def say(self, kind: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": kind, **fields}))

    async def speak(self, data: bytes, step: int = 6_400) -> None:
        """Sends audio as fast as it goes; what a server that has closed no longer takes is lost."""
        try:
            for at in range(0, len(data), step):
                await self.socket.send(data[at : at + step])
        except ConnectionClosed:
            pass

    async def until(self, kind: str, count: int = 1) -> Event:
        """The `count`th event of this kind."""
        async with asyncio.timeout(EVER_S):
            while len(found := self.all(kind)) < count:
                assert not self.over, f"closed with {self.socket.close_code} before {kind}: {self.events[-3:]}"
                await self._wait()
        return found[count - 1]

    async def end(self) -> tuple[int | None, str | None]:
        """Close code and reason."""
        async with asyncio.timeout(EVER_S):
            while not self.over:
                await self._wait()
            await self.socket.wait_closed()
        return self.socket.close_code, self.socket.close_reason

    def all(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["type"] == kind]

    @property
    def text(self) -> str:
        return " ".join(event["text"] for event in self.all("final") if event["text"])

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()


@asynccontextmanager
async def talking(
    served: Served,
    token: str | None,
    query: str = "",
    *,
    path: str = "/v1/stream",
    extra: Mapping[str, str] | None = None,
    **options: Any,
) -> AsyncIterator[Talk]:
    """An open connection, for whose `start` the server waits, unless the query carries its fields. `extra`: headers."""
    headers = ({} if token is None else {"Authorization": f"Bearer {token}"}) | dict(extra or {})
    address = served.url.replace("http", "ws", 1) + path + query
    async with connect(address, additional_headers=headers, compression=None, proxy=None, **options) as socket:
        talk = Talk(socket)
        listening = asyncio.create_task(talk.listen())
        try:
            yield talk
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)


async def denial(served: Served, token: str | None, query: str = "", *, path: str = "/v1/stream") -> Response:
    """The answer that refuses the upgrade: a problem."""
    with pytest.raises(InvalidStatus) as refusal:
        async with talking(served, token, query, path=path):
            pass
    response = refusal.value.response
    assert response.headers["content-type"] == "application/problem+json"
    problem = json.loads(response.body or b"")
    assert problem["status"] == response.status_code
    assert problem["request_id"] == response.headers["x-request-id"]
    return response


async def refused(served: Served, token: str | None, query: str = "") -> tuple[int, str]:
    """Status and code of a refusal before the upgrade."""
    response = await denial(served, token, query)
    return response.status_code, json.loads(response.body or b"")["code"]


def assert_well_formed(events: list[Event]) -> None:
    """Numbers without gaps; each utterance announced, then heard, then one final or gap; deltas make the final."""
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    sent: dict[int, str] = {}
    done: set[int] = set()
    for event in events:
        number = event.get("utterance", 0)
        if event["type"] in ("delta", "partial", "final"):
            assert number in sent
            assert number not in done
        match event["type"]:
            case "speech_started":
                assert number == len(sent) + 1
                sent[number] = ""
            case "delta":
                sent[number] += event["text"]
            case "partial":
                assert event["text"][: event["stable"]] == sent[number]
            case "final":
                assert event["start_ms"] < event["end_ms"] or (event["revised"] and not event["text"])
                assert event["revised"] or not sent[number] or sent[number] == event["text"]
                done.add(number)
    assert done == set(sent)
