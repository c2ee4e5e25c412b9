"""The schema's history, walked on a database of its own."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy.engine import make_url

import migrations
from runtime.bootstrap import bootstrap
from runtime.embedded import prepare
from runtime.postgres import EmbeddedServer, embedded_postgres
from runtime.settings import Settings

VERSIONS = Path(migrations.__file__).parent / "versions"
ROLES = {"app_role": "walk_app", "system_role": "walk_system"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with embedded_postgres(tmp_path_factory.mktemp("walk"), fast=True) as running:
        yield running


def url_of(server: EmbeddedServer, role: str) -> str:
    url = make_url(server.admin_url("walk")).set(username=role, password=f"{role}-password")
    return url.render_as_string(hide_password=False)


@pytest.fixture
def owner_url(server: EmbeddedServer) -> str:
    urls = {name: url_of(server, f"walk_{name}") for name in ("owner", "app", "system")}
    asyncio.run(bootstrap(server.admin_url(), owner_url=urls["owner"], app_url=urls["app"], system_url=urls["system"]))
    return urls["owner"]


def tables(owner_url: str) -> set[str]:
    async def read() -> set[str]:
        connection = await asyncpg.connect(owner_url)
        try:
            rows = await connection.fetch("select tablename from pg_tables where schemaname = 'public'")
        finally:
            await connection.close()
        return {row["tablename"] for row in rows} - {"alembic_version"}

    return asyncio.run(read())


def test_up_down_and_up_again(owner_url: str) -> None:
    assert asyncio.run(migrations.revision(owner_url)) is None
    migrations.upgrade(owner_url, **ROLES)
    full = tables(owner_url)
    assert {"tenants", "usage_ledger", "jobs"} <= full
    assert asyncio.run(migrations.revision(owner_url)) == migrations.head()
    migrations.downgrade(owner_url, **ROLES, revision="base")
    assert tables(owner_url) == set()
    migrations.upgrade(owner_url, **ROLES)
    assert tables(owner_url) == full
    migrations.upgrade(owner_url, **ROLES)  # again: nothing to do


def test_an_operators_database_is_prepared_from_nothing_and_again(server: EmbeddedServer) -> None:
    urls = {
        "migration_database_url": url_of(server, "other_owner").replace("/walk?", "/other?"),
        "database_url": url_of(server, "other_app").replace("/walk?", "/other?"),
        "system_database_url": url_of(server, "other_system").replace("/walk?", "/other?"),
    }
    settings = Settings.model_validate(urls)
    for _ in range(2):
        prepare(server.admin_url(), settings)
    assert "tenants" in tables(urls["migration_database_url"])


def test_files_are_one_line_of_descent_and_say_when_they_run() -> None:
    names = sorted(path.name for path in VERSIONS.glob("*.py"))
    assert all(re.fullmatch(r"\d{4}_(pre|post)_[a-z0-9_]+\.py", name) for name in names)
    assert [name[:4] for name in names] == [f"{number:04}" for number in range(1, len(names) + 1)]
