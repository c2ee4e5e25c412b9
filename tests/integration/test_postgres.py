"""The embedded Postgres with real processes: sharing, killing, and running as root where nobody else may go."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import psutil
import pytest

from runtime import postgres_binaries
from runtime.postgres import EmbeddedServer, PostgresError, embedded_postgres

ROOT = Path(__file__).parents[2]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives up its rights to run Postgres")

WRITER = """
import asyncio, sys
from pathlib import Path
import asyncpg
from runtime.postgres import embedded_postgres

async def write(url):
    connection = await asyncpg.connect(url)
    await connection.execute("create table if not exists kept (n int primary key)")
    for n in range(1_000_000):
        await connection.execute("insert into kept values ($1)", n)
        print(n, flush=True)

with embedded_postgres(Path(sys.argv[1])) as server:
    asyncio.run(write(server.admin_url()))
"""

HOLDER = """
import sys
from pathlib import Path
from runtime.postgres import embedded_postgres

with embedded_postgres(Path(sys.argv[1]), fast=True) as server:
    print(server.owner, server.admin_url(), flush=True)
    sys.stdin.read()
"""


def ask(url: str, query: str) -> object:
    async def fetch() -> object:
        connection = await asyncpg.connect(url, timeout=10)
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    with asyncio.Runner() as runner:
        return runner.run(fetch())


@contextmanager
def python(code: str, data_dir: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.defpath}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(data_dir)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
            process.communicate(timeout=30)  # closes its input, which ends a holder
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def is_gone(server: EmbeddedServer, data_dir: Path) -> bool:
    return not server.socket_dir.exists() and not (data_dir / "postgres" / "server.json").exists()


def test_starts_stops_and_keeps_what_was_written(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path) as server:
        assert server.owner
        assert (server.socket_dir.stat().st_mode & 0o777) == 0o700
        ask(server.admin_url(), "create table t as select 'ß' as c")
        assert ask(server.admin_url(), "show listen_addresses") == ""
        assert ask(server.admin_url(), "show fsync") == "on"
        assert ask(server.admin_url(), "show data_checksums") == "on"
        locale = "select format('%s %s', datlocprovider, datlocale) from pg_database where datname = 'postgres'"
        assert ask(server.admin_url(), locale) == "b C.UTF-8"
    assert is_gone(server, tmp_path)
    with embedded_postgres(tmp_path, fast=True) as again:
        assert ask(again.admin_url(), "select c from t") == "ß"
        assert ask(again.admin_url(), "show fsync") == "off"
        assert again.password == server.password


def test_a_wrong_password_is_refused_and_the_right_one_is_not_shown(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path, fast=True) as server:
        with pytest.raises(asyncpg.InvalidPasswordError):
            ask(server.admin_url().replace(server.password, "wrong"), "select 1")
        assert server.password not in repr(server)
        for name in ("server.json", "superuser.password"):
            assert ((tmp_path / "postgres" / name).stat().st_mode & 0o777) == 0o600


def test_a_second_process_joins_and_leaves_it_running(tmp_path: Path) -> None:
    with python(HOLDER, tmp_path) as owner:
        owned, url = said(owner).split()
        with embedded_postgres(tmp_path) as server:
            assert (owned, server.owner) == ("True", False)
            assert server.admin_url() == url
            assert ask(server.admin_url(), "select 1") == 1
        assert ask(url, "select 1") == 1
    assert owner.returncode == 0
    assert is_gone(server, tmp_path)


def test_two_processes_that_start_together_share_one_server(tmp_path: Path) -> None:
    with python(HOLDER, tmp_path) as one, python(HOLDER, tmp_path) as two:
        answers = [said(one).split(), said(two).split()]
        assert sorted(owned for owned, _ in answers) == ["False", "True"]
        assert len({url for _, url in answers}) == 1


def test_a_killed_owner_loses_no_acknowledged_row(tmp_path: Path) -> None:
    with python(WRITER, tmp_path) as writer:
        acknowledged = [int(said(writer)) for _ in range(300)]
        leftover = Path(json.loads((tmp_path / "postgres" / "server.json").read_text())["socket_dir"])
        writer.send_signal(signal.SIGKILL)
        assert writer.stdout is not None
        acknowledged += [int(line) for line in writer.stdout.read().split()]
        assert leftover.is_dir()
    with embedded_postgres(tmp_path) as server:
        assert server.owner
        kept = ask(server.admin_url(), "select array_agg(n order by n) from kept")
    assert isinstance(kept, list)
    # One more may have been committed than the killed process could say.
    assert kept[: len(acknowledged)] == acknowledged
    assert len(kept) <= len(acknowledged) + 1
    assert not leftover.exists()


def test_a_killed_postmaster_recovers(tmp_path: Path) -> None:
    with python(WRITER, tmp_path) as writer:
        acknowledged = [int(said(writer)) for _ in range(100)][-1]
        postmaster = int((tmp_path / "postgres" / "pgdata" / "postmaster.pid").read_text().split()[0])
        os.kill(postmaster, signal.SIGKILL)
        writer.kill()
    with embedded_postgres(tmp_path) as server:
        kept = ask(server.admin_url(), "select count(*) from kept")
    assert isinstance(kept, int)
    assert kept > acknowledged


def test_a_start_that_cannot_succeed_says_why(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path, fast=True):
        pass
    (tmp_path / "postgres" / "pgdata" / "PG_VERSION").write_text("9.6\n")
    with pytest.raises(PostgresError, match=r"(?s)STENOGATE_DATABASE_URL.*incompatible"):
        with embedded_postgres(tmp_path):
            pass
    assert not (tmp_path / "postgres" / "server.json").exists()


def test_no_descriptor_and_no_child_is_left(tmp_path: Path) -> None:
    def held() -> tuple[int, set[int]]:
        us = psutil.Process()
        return us.num_fds(), {child.pid for child in us.children()}  # zombies included

    before = held()
    with embedded_postgres(tmp_path, fast=True):
        assert held() != before
    assert held() == before


@pytest.fixture
def private() -> Iterator[Path]:
    """A directory of root's that nobody else can enter, with a long name."""
    path = Path(tempfile.mkdtemp(prefix="stenogate-test-")) / ("long-" * 40)
    path.mkdir(mode=0o700)
    path.parent.chmod(0o700)
    yield path
    shutil.rmtree(path.parent)


@as_root
def test_as_root_a_private_data_dir_works_and_stays_private(private: Path) -> None:
    with embedded_postgres(private / "data", fast=True) as server:
        assert ask(server.admin_url(), "select 1") == 1
        postmaster = (private / "data" / "postgres" / "pgdata" / "postmaster.pid").read_text().split()[0]
        assert Path(f"/proc/{postmaster}").stat().st_uid != 0
    assert (private.stat().st_mode & 0o777, private.parent.stat().st_mode & 0o777) == (0o700, 0o700)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for copies of the programs that everybody can reach."""
    path = Path(tempfile.mkdtemp(prefix="stenogate-test-"))
    path.chmod(0o755)
    monkeypatch.setattr(postgres_binaries, "COPIES", path)
    yield path
    shutil.rmtree(path)


@as_root
def test_as_root_a_private_venv_works(private: Path, monkeypatch: pytest.MonkeyPatch, copies: Path) -> None:
    site_packages = postgres_binaries.programs().parents[2]
    for part in postgres_binaries.PARTS:
        shutil.copytree(site_packages / part, private / part)
    (private / "embedded_postgres" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(private))
    assert postgres_binaries.programs().is_relative_to(private)
    with embedded_postgres(private / "data", fast=True) as server:
        assert ask(server.admin_url(), "select 1") == 1
    (copy,) = copies.iterdir()
    assert (copy.stat().st_uid, copy.stat().st_mode & 0o777) == (0, 0o755)
    thinned = copy / postgres_binaries.PARTS[0] / "share" / "postgres.bki"
    thinned.unlink()
    with embedded_postgres(private / "data", fast=True) as server:
        assert ask(server.admin_url(), "select 1") == 1
    assert thinned.is_file(), "a thinned-out copy is made again"


@as_root
def test_as_root_a_copy_of_somebody_else_is_refused(copies: Path) -> None:
    source = postgres_binaries.programs().parents[2]
    copy = postgres_binaries._copied(source)
    assert copy.parent == copies
    os.chown(copy, 65534, 65534)
    with pytest.raises(PostgresError, match="not a copy"):
        postgres_binaries._copied(source)
