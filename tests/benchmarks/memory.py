"""What `serve` holds: idle, and while a gigabyte is uploaded. Proportional set size over the process tree, so that what
Postgres' processes share counts once."""

from __future__ import annotations

import asyncio
import io
import tempfile
import time
import wave
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from gateway.commands.client import Client
from gateway.commands.local import local_gateway

MIB = 1024 * 1024
UPLOAD = 1024 * MIB
BLOCK = 256 * 1024
SETTLE_S = 5.0
RATE, CHANNELS = 48_000, 2


def run(console: Console) -> None:
    with tempfile.TemporaryDirectory(prefix="stenogate-bench-") as scratch:
        with local_gateway(Path(scratch), model="micro") as gateway:
            asyncio.run(_measure(console, gateway.client, psutil.Process(gateway.pid)))


async def _measure(console: Console, client: Client, process: psutil.Process) -> None:
    await client.get("/v1/models")
    await asyncio.sleep(SETTLE_S)
    idle_tree, idle_gateway = _tree(process), _one(process)
    peak, took, status = await _watched(client, process)
    table = Table("", "MiB")
    table.add_row("idle, whole tree (gateway, model, embedded Postgres)", f"{idle_tree:.0f}")
    table.add_row("idle, gateway process alone", f"{idle_gateway:.0f}")
    table.add_row(f"gateway's peak while {UPLOAD // MIB} MiB stream in ({took:.1f} s, HTTP {status})", f"{peak:.0f}")
    table.add_row("more than idle", f"{peak - idle_gateway:.0f}")
    console.print(table)


async def _watched(client: Client, process: psutil.Process) -> tuple[float, float, int]:
    """The gateway's peak, the seconds and the answer of one upload."""
    peak = 0.0
    done = asyncio.Event()

    async def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _one(process))
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    begun = time.perf_counter()
    async with httpx.AsyncClient(base_url=client.url, timeout=300, trust_env=False) as http:
        headers = {
            "Authorization": f"Bearer {client.token}",
            "Content-Type": "multipart/form-data; boundary=bench",
            "Prefer": "respond-async",
        }
        answer = await http.post("/v1/audio/transcriptions", headers=headers, content=_body())
    took = time.perf_counter() - begun
    done.set()
    await watching
    return peak, took, answer.status_code


async def _body() -> AsyncIterator[bytes]:
    """A multipart body with a wav of silence, never whole in this process's memory either."""
    field = '--bench\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
    yield (field.format("model", "") + "micro\r\n" + field.format("file", '; filename="big.wav"')).encode()
    yield _header(UPLOAD // (2 * CHANNELS))
    block = bytes(BLOCK)
    for _ in range(UPLOAD // BLOCK):
        yield block
    yield b"\r\n--bench--\r\n"


def _header(frames: int) -> bytes:
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(CHANNELS)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.setnframes(frames)
        file.writeframes(b"")
    header = bytearray(made.getvalue())
    size = frames * 2 * CHANNELS
    header[4:8], header[40:44] = (36 + size).to_bytes(4, "little"), size.to_bytes(4, "little")
    return bytes(header)


def _one(process: psutil.Process) -> float:
    return process.memory_full_info().pss / MIB


def _tree(process: psutil.Process) -> float:
    return sum(_one(member) for member in (process, *process.children(recursive=True)))
