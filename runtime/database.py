"""The two doors to Postgres, and nothing else opens one.

`database.tenant(id)` is one transaction in which row-level security shows exactly one tenant. `database.across_tenants`
goes through a second role and wants a reason in words. Both commit when their block ends and roll back when it raises;
a `commit()` inside is an error of SQLAlchemy's own. Outside them nothing is bound and every tenant table looks empty.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeAlias
from uuid import UUID

import structlog
from sqlalchemy import text
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


def _engine(url: str, pool: int) -> AsyncEngine:
    return create_async_engine(
        async_url(url),
        pool_size=pool,
        max_overflow=0,
        pool_timeout=CONNECT_TIMEOUT_S,
        pool_pre_ping=True,
        hide_parameters=True,  # they hold transcripts, and errors are logged
        json_serializer=_to_json,
        connect_args={
            "timeout": CONNECT_TIMEOUT_S,
            "command_timeout": STATEMENT_TIMEOUT_S,
            "server_settings": {"application_name": "stenogate", "timezone": "UTC", "jit": "off"},
        },
    )


def _to_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


class Database:
    """Two pools, one per role."""

    def __init__(self, app_url: str, system_url: str, *, pool: int = 10):
        self._app = _engine(app_url, pool)
        self._system = _engine(system_url, pool)

    @asynccontextmanager
    async def tenant(self, tenant_id: UUID) -> AsyncIterator[Transaction]:
        """One transaction that sees and writes only this tenant's rows."""
        async with self._app.begin() as tx:
            await tx.execute(_BIND_TENANT, {"tenant": str(tenant_id)})
            yield tx

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
        await self._app.dispose()
        await self._system.dispose()
