"""The roles that migrations grant to, made once by somebody who may.

A managed Postgres may forbid its owner to create roles; then an administrator makes them (docs/operations/database.md)
and this step is skipped. Three roles: the owner (migrations), the app (bound by row-level security, owns nothing) and
the system role (its own policies let it see every tenant).
"""

from __future__ import annotations

from collections.abc import Iterable

import asyncpg
from sqlalchemy.engine import make_url


async def bootstrap(admin_url: str, *, owner_url: str, app_url: str, system_url: str) -> None:
    """Creates the three roles (or sets their passwords) and the owner's database, as named by the URLs."""
    database = make_url(owner_url).database
    if database is None:
        raise ValueError("the migration URL names no database")
    connection = await asyncpg.connect(admin_url, timeout=10)
    try:
        await connection.execute("select pg_advisory_lock(hashtext('stenogate.bootstrap'))")
        for url in (owner_url, app_url, system_url):
            await _ensure_role(connection, url)
        if not await connection.fetchval("select 1 from pg_database where datname = $1", database):
            # An administrator who is no superuser may give a database only to a role of which it is a member.
            await connection.execute(f"grant {_quoted([_user(owner_url)])} to current_user")
            await connection.execute(f"create database {_quoted([database])} owner {_quoted([_user(owner_url)])}")
        await connection.execute(f"revoke all on database {_quoted([database])} from public")
        names = _quoted([_user(app_url), _user(system_url)])
        await connection.execute(f"grant connect on database {_quoted([database])} to {names}")
    finally:
        await connection.close()


async def _ensure_role(connection: asyncpg.Connection[asyncpg.Record], url: str) -> None:
    name, password = _user(url), make_url(url).password or ""
    verb = "alter" if await connection.fetchval("select 1 from pg_roles where rolname = $1", name) else "create"
    literal = await connection.fetchval("select quote_literal($1::text)", password)
    await connection.execute(
        f"{verb} role {_quoted([name])} login nosuperuser nobypassrls nocreatedb nocreaterole password {literal}"
    )


def _user(url: str) -> str:
    name = make_url(url).username
    if not name:
        raise ValueError("the database URL names no user")
    return name


def _quoted(names: Iterable[str]) -> str:
    return ", ".join('"' + name.replace('"', '""') + '"' for name in names)
