"""The two doors to Postgres, and nothing else opens one.

`database.tenant(id)` is one transaction in which row-level security shows exactly one tenant. `database.across_tenants`
goes through a second role and wants a reason in words. Both commit when their block ends and roll back when it raises;
a `commit()` inside is an error of SQLAlchemy's own. Outside them nothing is bound and every tenant table looks empty.

`database.once` is the first door again for functions of the database that every request calls, and that bind the tenant
themselves: asyncpg alone, at a tenth of what SQLAlchemy costs the event loop.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeAlias
from uuid import UUID

import asyncpg
import structlog
from sqlalchemy import text
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

log = structlog.get_logger()

Transaction: TypeAlias = AsyncConnection
"""An open transaction. It ends with the `async with` that gave it."""

CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 15

_BIND_TENANT = text("select set_config('app.tenant_id', :tenant, true)")


def async_url(url: str) -> URL:
    """The given Postgres URL for SQLAlchemy over asyncpg."""
    return make_url(url).set(drivername="postgresql+asyncpg")


_SERVER_SETTINGS = {"application_name": "stenogate", "timezone": "UTC", "jit": "off"}


def _engine(url: URL, pool: int) -> AsyncEngine:
    return create_async_engine(
        url,
        pool_size=pool,
        max_overflow=0,
        pool_timeout=CONNECT_TIMEOUT_S,
        pool_pre_ping=True,
        hide_parameters=True,  # they hold transcripts, and errors are logged
        json_serializer=_to_json,
        connect_args={
            "timeout": CONNECT_TIMEOUT_S,
            "command_timeout": STATEMENT_TIMEOUT_S,
            "server_settings": _SERVER_SETTINGS,
        },
    )


async def _single_statements(url: URL, size: int) -> asyncpg.Pool[asyncpg.Record]:
    """Connections for `once`, opened as they are needed. Whatever a statement changes of them ends with it, so nothing
    is reset between two; and its plan does not depend on its values, so it is made once."""
    given = PGDialect_asyncpg().create_connect_args(url)[1]  # type: ignore[no-untyped-call]
    where = {name: value for name, value in given.items() if not name.startswith("prepared_statement_")}
    return await asyncpg.create_pool(
        **where,
        min_size=0,
        max_size=size,
        reset=_nothing,
        timeout=CONNECT_TIMEOUT_S,
        command_timeout=STATEMENT_TIMEOUT_S,
        server_settings={**_SERVER_SETTINGS, "plan_cache_mode": "force_generic_plan"},
    )


async def _nothing(_: object) -> None:
    """There is nothing to reset."""


def _to_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


class Database:
    """A pool per role; a half of the app role's is apart, for `once`."""

    def __init__(self, app_url: str, system_url: str, *, pool: int = 16):
        self._app_url = async_url(app_url)
        self._app = _engine(self._app_url, max(1, pool - pool // 2))
        self._system = _engine(async_url(system_url), pool)
        self._single_connections = max(1, pool // 2)
        self._single: asyncpg.Pool[asyncpg.Record] | None = None
        self._opening = asyncio.Lock()

    @asynccontextmanager
    async def tenant(self, tenant_id: UUID) -> AsyncIterator[Transaction]:
        """One transaction that sees and writes only this tenant's rows."""
        async with self._app.begin() as tx:
            await tx.execute(_BIND_TENANT, {"tenant": str(tenant_id)})
            yield tx

    async def once(self, statement: str, *values: object) -> asyncpg.Record | None:
        """The first row of one statement in the app role, with asyncpg's own `$1`: a transaction of its own, which
        binds its tenant itself or sees none."""
        single = self._single or await self._opened()
        async with single.acquire(timeout=CONNECT_TIMEOUT_S) as connection:
            row: asyncpg.Record | None = await connection.fetchrow(statement, *values)
            return row

    async def _opened(self) -> asyncpg.Pool[asyncpg.Record]:
        """By whoever comes first; the others wait for it."""
        async with self._opening:
            if self._single is None:
                self._single = await _single_statements(self._app_url, self._single_connections)
            return self._single

    @asynccontextmanager
    async def across_tenants(self, reason: str) -> AsyncIterator[Transaction]:
        """One transaction that sees every tenant; `reason` goes to the debug log."""
        log.debug("database.across_tenants", reason=reason)
        async with self._system.begin() as tx:
            yield tx

    async def ping(self) -> None:
        """Raises what SQLAlchemy raises when Postgres cannot be reached."""
        async with self._app.connect() as connection:
            await connection.execute(text("select 1"))

    async def aclose(self) -> None:
        if self._single is not None:
            await self._single.close()
        await self._app.dispose()
        await self._system.dispose()
