"""A gateway in a process of its own on this machine, for the demo, the benchmarks and the tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gateway.commands.client import Client, ClientError

START_TIMEOUT_S = 600  # a first Whisper model is a download
STOP_TIMEOUT_S = 40


@dataclass(frozen=True)
class LocalGateway:
    """A running `stenogate serve` and a client that holds its demo tenant's token."""

    client: Client
    pid: int


@contextmanager
def local_gateway(data_dir: Path, **settings: str) -> Iterator[LocalGateway]:
    """Starts `stenogate serve` over the data dir on a free loopback port, with these settings and no others, and stops
    it. Raises `ClientError` with the end of its log when it does not start."""
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir / "serve.log"
    with log.open("ab") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "serve"],
            env=_environment(data_dir, settings),
            stdout=subprocess.DEVNULL,
            stderr=sink,
        )
    try:
        announced = _announced(process, data_dir, log)
        yield LocalGateway(Client(announced["url"], announced["token"]), process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _environment(data_dir: Path, settings: dict[str, str]) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("STENOGATE_")}
    given = {"data_dir": str(data_dir), "port": "0", **settings}
    return inherited | {f"STENOGATE_{name.upper()}": value for name, value in given.items()}


def _announced(process: subprocess.Popen[bytes], data_dir: Path, log: Path) -> dict[str, str]:
    announcement = data_dir / "serve.json"
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise ClientError("the gateway did not start:\n" + "".join(log.read_text().splitlines(True)[-10:]))
        if announcement.exists():
            found: dict[str, str] = json.loads(announcement.read_text())
            if int(found["pid"]) == process.pid:
                return found
        time.sleep(0.05)
