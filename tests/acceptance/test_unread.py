"""A client that asks and asks and never reads costs a running gateway no memory to speak of, and is let go."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import psutil
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from gateway.commands.client import Client
from gateway.commands.local import local_gateway

MIB = 1024 * 1024
MOST = 48 * MIB
PATIENCE_S = 60.0
SECOND = bytes(32_000)
QUESTION = json.dumps({"type": "ping", "id": "x" * 60_000})


async def asks(socket: ClientConnection) -> None:
    """An hour of silence and thousands of long questions, as fast as they are taken."""
    try:
        while True:
            await socket.send(SECOND)
            await socket.send(QUESTION)
    except ConnectionClosed:
        pass


async def live_streams(client: Client) -> float:
    async with httpx.AsyncClient(base_url=client.url, trust_env=False) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("stenogate_live_streams{"))


async def never_reads(client: Client, gateway: psutil.Process) -> int:
    """What the gateway's memory grew by at most, while it had the stream."""
    headers = {"Authorization": f"Bearer {client.token}"}
    address = client.url.replace("http", "ws", 1) + "/v1/stream?sample_rate=16000"
    before = peak = gateway.memory_info().rss
    async with connect(
        address,
        additional_headers=headers,
        compression=None,
        proxy=None,
        max_queue=1,
        ping_interval=None,
        close_timeout=0,
    ) as socket:
        asking = asyncio.create_task(asks(socket))
        assert await live_streams(client) == 1
        async with asyncio.timeout(PATIENCE_S):
            while await live_streams(client):
                peak = max(peak, gateway.memory_info().rss)
                await asyncio.sleep(0.1)
        asking.cancel()
        await asyncio.wait({asking})
        socket.transport.abort()
    return peak - before


def test_memory_is_bounded(tmp_path: Path) -> None:
    with local_gateway(tmp_path, backend="scripted", stream_resume_s="1") as gateway:
        grown = asyncio.run(never_reads(gateway.client, psutil.Process(gateway.pid)))
        rows = asyncio.run(gateway.client.get("/v1/models"))
    assert rows.status_code == 200
    assert grown < MOST, f"{grown / MIB:.0f} MiB"
