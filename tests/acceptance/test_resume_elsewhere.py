"""A live session goes on in another gateway, whatever became of the first: every word once, every millisecond billed
once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from websockets.asyncio.client import connect

from dispatchers.audio.decode import load
from dispatchers.interface import Samples, to_ms
from policy.admission import reap
from runtime.database import Database
from runtime.ids import read
from runtime.postgres import embedded_postgres
from tests.server import SAMPLES
from tests.streaming import Event, Talk, assert_well_formed

ROLES = ("owner", "app", "system")
STEP = 1_600


@dataclass(frozen=True)
class Installation:
    """A Postgres and a Redis that several gateways share, and a tenant's token."""

    settings: dict[str, str]
    token: str

    @contextmanager
    def gateway(self, data_dir: Path) -> Iterator[Gateway]:
        data_dir.mkdir()
        with (data_dir / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "serve"],
                env={**os.environ, **self.settings, "STENOGATE_DATA_DIR": str(data_dir)},
                stdout=log,
                stderr=log,
            )
        try:
            deadline = time.monotonic() + 60
            while not (data_dir / "serve.json").exists():
                assert process.poll() is None, (data_dir / "log").read_text()
                assert time.monotonic() < deadline, (data_dir / "log").read_text()
                time.sleep(0.05)
            url = json.loads((data_dir / "serve.json").read_text())["url"]
            yield Gateway(process, url, self.token, data_dir / "log")
        finally:
            process.kill()
            process.wait()

    def database(self) -> Database:
        return Database(self.settings["STENOGATE_DATABASE_URL"], self.settings["STENOGATE_SYSTEM_DATABASE_URL"], pool=2)


@dataclass(frozen=True)
class Gateway:
    process: subprocess.Popen[bytes]
    url: str
    token: str
    log: Path

    @asynccontextmanager
    async def talking(self) -> AsyncIterator[Talk]:
        address = self.url.replace("http", "ws", 1) + "/v1/stream"
        headers = {"Authorization": f"Bearer {self.token}"}
        async with connect(address, additional_headers=headers, compression=None, proxy=None) as socket:
            talk = Talk(socket)
            listening = asyncio.create_task(talk.listen())
            try:
                yield talk
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory, redis_url: str) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("shared")
    with embedded_postgres(folder / "server", fast=True) as server:
        urls = {
            role: make_url(server.admin_url("gateway")).set(username=f"op_{role}", password=f"{role}-secret")
            for role in ROLES
        }
        owner, app, system = (urls[role].render_as_string(hide_password=False) for role in ROLES)
        settings = {
            "STENOGATE_DATABASE_URL": app,
            "STENOGATE_SYSTEM_DATABASE_URL": system,
            "STENOGATE_MIGRATION_DATABASE_URL": owner,
            "STENOGATE_REDIS_URL": redis_url,
            "STENOGATE_BLOB_URL": f"file://{folder}/blobs",
            "STENOGATE_SIGNING_KEY": "k" * 32,
            "STENOGATE_MODEL": "micro",
            "STENOGATE_ENGINE_WORKERS": "1",
            "STENOGATE_PORT": "0",
            "STENOGATE_STREAM_DRAIN_S": "1",
        }

        def chore(*arguments: str) -> str:
            return subprocess.run(
                [sys.executable, "-m", "gateway", *arguments],
                env={**os.environ, **settings, "STENOGATE_DATA_DIR": str(folder)},
                check=True,
                capture_output=True,
                text=True,
                timeout=60,
            ).stdout.strip()

        chore("migrate", "--bootstrap", server.admin_url())
        chore("tenant", "create", "acme")
        chore("price", "set", "0.36")
        yield Installation(settings, chore("token", "--tenant", "acme"))


@pytest.fixture(scope="module")
def speech() -> Samples:
    return load(SAMPLES / "long.wav")[: 40 * 16_000]


async def row_of(installation: Installation, session_id: str) -> Any:
    """The session's row, with what ledger and holds say of it."""
    query = text("""
        select s.*, (select coalesce(sum(l.billed_ms), 0) from usage_ledger l where l.source_id = s.id) ledger_ms,
            (select count(*) from budget_holds h where h.session_id = s.id and h.state = 'open') open_holds
        from sessions s where s.id = :id
    """)
    database = installation.database()
    try:
        async with database.across_tenants("a test looks") as tx:
            return (await tx.execute(query, {"id": read("sess", session_id)})).one()
    finally:
        await database.aclose()


async def spoken(talk: Talk, samples: Samples, from_ms: int, until: int) -> None:
    for at in range(from_ms * 16, until, STEP):
        await talk.socket.send(samples[at : min(at + STEP, until)].tobytes())


async def whole(gateway: Gateway, samples: Samples) -> list[str]:
    """The finals of a session that nothing disturbs."""
    async with gateway.talking() as talk:
        await talk.say("start")
        await talk.speak(samples.tobytes())
        await talk.say("stop")
        assert await talk.end() == (1000, "")
    return [event["text"] for event in talk.all("final")]


def texts(events: list[Event]) -> list[str]:
    return [event["text"] for event in events if event["type"] == "final" and event["text"]]


async def resumed(talk: Talk, events: list[Event], **fields: Any) -> Event:
    token = next(event["resume_token"] for event in reversed(events) if event["type"] == "ready")
    last_seq = max(event["seq"] for event in events)
    await talk.say("start", resume_token=token, last_seq=last_seq, **fields)
    ready = await talk.until("ready")
    assert (ready["seq"], ready["resumed"], ready["session_id"]) == (0, True, events[0]["session_id"])
    return ready


End = Callable[[Gateway], None]


def drained(gateway: Gateway) -> None:
    gateway.process.send_signal(signal.SIGTERM)


def killed(gateway: Gateway) -> None:
    gateway.process.kill()


@pytest.mark.parametrize("ended", [drained, killed])
async def test_a_session_goes_on_in_another_gateway(
    installation: Installation, speech: Samples, tmp_path: Path, ended: End
) -> None:
    half = len(speech) // 2 + 777  # in the middle of a word
    with installation.gateway(tmp_path / "b") as second:
        expected = await whole(second, speech)
        with installation.gateway(tmp_path / "a") as first:
            async with first.talking() as talk:
                await talk.say("start")
                await talk.until("ready")
                await spoken(talk, speech, 0, half)
                await talk.until("final", 3)
                ended(first)
                code, _ = await talk.end()
                assert code == (1012 if ended is drained else None) or ended is killed
            if ended is drained:
                assert first.process.wait(30) == 0
            events = [event for event in talk.events if event["type"] not in ("draining", "error")]
            every = list(talk.events)
        async with second.talking() as talk:
            ready = await resumed(talk, every)
            assert ready["resend_from_ms"] == max(event["end_ms"] for event in events if event["type"] == "final")
            await spoken(talk, speech, ready["resend_from_ms"], len(speech))
            await talk.say("stop")
            assert await talk.end() == (1000, "")
    every += [event for event in talk.events if event["seq"]]
    assert_well_formed(every)
    assert texts(every) == [each for each in expected if each]
    closed = every[-1]
    assert (closed["type"], closed["coverage"]) == ("closed", 1.0)
    assert closed["accepted_ms"] == closed["billed_ms"] == to_ms(len(speech))
    row = await row_of(installation, every[0]["session_id"])
    assert (row.status, row.ledger_ms, row.open_holds, row.turn) == ("completed", to_ms(len(speech)), 0, 1)
    assert row.text == " ".join(texts(every))
    for log in (first.log, second.log):
        assert expected[0] not in log.read_text()


async def test_a_killed_gateway_leaves_text_and_bill_to_the_chores(
    installation: Installation, speech: Samples, tmp_path: Path
) -> None:
    with installation.gateway(tmp_path / "a") as gateway:
        async with gateway.talking() as talk:
            await talk.say("start")
            await talk.until("ready")
            await spoken(talk, speech, 0, 20 * 16_000)
            used = await talk.until("usage")
            killed(gateway)
            await talk.end()
    session_id = talk.events[0]["session_id"]
    left = await row_of(installation, session_id)
    assert left.status == "open"
    database = installation.database()
    try:
        assert await reap(database, 0) >= 1
    finally:
        await database.aclose()
    row = await row_of(installation, session_id)
    assert (row.status, row.open_holds) == ("interrupted", 0)
    assert row.ledger_ms == row.accepted_ms == row.billed_ms >= used["billed_ms"]
    assert row.text
    assert " ".join(texts(talk.events)).startswith(row.text)
