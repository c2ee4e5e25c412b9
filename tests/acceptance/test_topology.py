"""Gateway and worker as processes of their own, on a Postgres and a Redis that somebody else runs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from dispatchers.engine.models import MICRO_SAMPLES
from gateway.commands.client import Client
from runtime.postgres import embedded_postgres

ROLES = ("owner", "app", "system")
SAID = "we need to cancel the address before friday"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[dict[str, str]]:
    """What an operator would set, on a Postgres where nothing exists yet."""
    folder = tmp_path_factory.mktemp("operated")
    with embedded_postgres(folder / "server", fast=True) as server:
        urls = {
            role: make_url(server.admin_url("gateway")).set(username=f"op_{role}", password=f"{role}-secret")
            for role in ROLES
        }
        owner, app, system = (urls[role].render_as_string(hide_password=False) for role in ROLES)
        yield {
            "ADMIN_URL": server.admin_url(),
            "STENOGATE_DATABASE_URL": app,
            "STENOGATE_SYSTEM_DATABASE_URL": system,
            "STENOGATE_MIGRATION_DATABASE_URL": owner,
            "STENOGATE_REDIS_URL": redis_url,
            "STENOGATE_BLOB_URL": f"file://{folder}/blobs",
            "STENOGATE_SIGNING_KEY": "k" * 32,
            "STENOGATE_MODEL": "micro",
            "STENOGATE_PORT": "0",
        }


def chore(settings: dict[str, str], data_dir: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        env={**os.environ, **settings, "STENOGATE_DATA_DIR": str(data_dir)},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout.strip()


@contextmanager
def role(settings: dict[str, str], data_dir: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A role in a process; it must end by itself, cleanly, when asked to."""
    data_dir.mkdir()
    with (data_dir / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", name],
            env={**os.environ, **settings, "STENOGATE_DATA_DIR": str(data_dir)},
            stdout=log,
            stderr=log,
        )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


def announced(data_dir: Path) -> dict[str, str]:
    deadline = time.monotonic() + 60
    while not (data_dir / "serve.json").exists():
        assert time.monotonic() < deadline, (data_dir / "log").read_text()
        time.sleep(0.05)
    found: dict[str, str] = json.loads((data_dir / "serve.json").read_text())
    return found


async def by_job(client: Client) -> tuple[dict[str, object], str]:
    accepted = await client.transcribe(MICRO_SAMPLES / "clip02.wav", model="micro", **{"async": "true"})
    assert accepted.status_code == 202
    links = accepted.json()["links"]
    *_, job = [job async for job in client.job_events(links["events"])]
    return job, (await client.get(f"{links['self']}/transcript", format="text")).text.strip()


def test_a_gateway_without_an_engine_room_of_its_own_hands_jobs_to_a_worker(
    settings: dict[str, str], tmp_path: Path
) -> None:
    chore(settings, tmp_path, "migrate", "--bootstrap", settings["ADMIN_URL"])
    chore(settings, tmp_path, "tenant", "create", "acme")
    chore(settings, tmp_path, "price", "set", "0.36")
    token = chore(settings, tmp_path, "token", "--tenant", "acme")
    with role(settings, tmp_path / "gateway", "serve"), role(settings, tmp_path / "worker", "work"):
        serving = announced(tmp_path / "gateway")
        assert serving["token"] is None  # a demo tenant is the embedded gateway's only
        client = Client(serving["url"], token)
        job, text = asyncio.run(by_job(client))
        assert (job["status"], text) == ("completed", SAID)
        finals = asyncio.run(client.stream(MICRO_SAMPLES / "clip02.wav", lambda _: None, model="micro", pace=False))
        assert finals == [SAID]
    bill = json.loads(chore(settings, tmp_path, "statement", "--tenant", "acme", "--format", "json"))
    assert bill["reconciliation"]["balanced"] is True
    assert bill["reconciliation"]["ledger_rows"] == 2
    assert bill["reconciliation"]["billed_ms"] == 2 * 3883
    logs = (tmp_path / "gateway" / "log").read_text() + (tmp_path / "worker" / "log").read_text()
    assert "friday" not in logs  # no transcript
    assert token not in logs
    assert "op_app" not in logs  # no database address
