"""A database for one chore."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from runtime.database import Database
from runtime.embedded import with_database
from runtime.errors import Misconfigured
from runtime.settings import Settings
from runtime.telemetry import configure_logging

T = TypeVar("T")


def with_doors(settings: Settings, work: Callable[[Database], Awaitable[T]]) -> T:
    """The chore's result, its database opened for it and closed again: the embedded one too, if nothing serves it."""
    configure_logging("warning", "console")
    with with_database(settings) as completed:
        if completed.database_url is None or completed.system_database_url is None:
            raise Misconfigured("STENOGATE_SYSTEM_DATABASE_URL is not set; it goes with STENOGATE_DATABASE_URL")
        app_url, system_url = (
            completed.database_url.get_secret_value(),
            completed.system_database_url.get_secret_value(),
        )

        async def run() -> T:
            database = Database(app_url, system_url, pool=2)
            try:
                return await work(database)
            finally:
                await database.aclose()

        return asyncio.run(run())
