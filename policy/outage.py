"""Telling a database that is gone from everything else that can go wrong in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from policy.errors import LedgerUnavailable

# SQLSTATE classes: 08 connection exception, 53 insufficient resources, 57P0x shutdown and start-up.
_GONE = ("08", "53", "57P")


@contextmanager
def ledger_reachable() -> Iterator[None]:
    """Raises `LedgerUnavailable` for a lost, refused or silent connection, and leaves every other error as it is."""
    try:
        yield
    except (OSError, PoolTimeout) as error:  # TimeoutError is an OSError
        raise LedgerUnavailable(retry_after_s=5) from error
    except DBAPIError as error:
        if error.connection_invalidated or _is_gone(error.orig):
            raise LedgerUnavailable(retry_after_s=5) from error
        raise
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:  # of `Database.once`
        if isinstance(error, asyncpg.InterfaceError) or _is_gone(error):
            raise LedgerUnavailable(retry_after_s=5) from error
        raise


def _is_gone(error: BaseException | None) -> bool:
    return (getattr(error, "sqlstate", None) or "").startswith(_GONE)
