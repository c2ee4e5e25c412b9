"""The schema's history. `upgrade` brings a database to its head; the role names to grant to come from the caller.

A file is named `NNNN_pre_…` when the previous release's code still runs on its result, `NNNN_post_…` when only the new
code does.
"""

from __future__ import annotations

from pathlib import Path


def upgrade(owner_url: str, *, app_role: str, system_role: str, revision: str = "head") -> None:
    """Runs what is missing, up to `revision`. Blocking: alembic drives its own event loop, so call it in a thread."""
    _run("upgrade", owner_url, app_role, system_role, revision)


def downgrade(owner_url: str, *, app_role: str, system_role: str, revision: str) -> None:
    """Takes back what came after `revision`. Blocking, like `upgrade`."""
    _run("downgrade", owner_url, app_role, system_role, revision)


def head() -> str:
    """The newest revision."""
    return max(path.name.partition("_")[0] for path in (Path(__file__).parent / "versions").glob("[0-9]*.py"))


async def revision(owner_url: str) -> str | None:
    """Where a database stands; None when it has no schema of ours, or its owner cannot enter."""
    import asyncpg

    try:
        connection = await asyncpg.connect(owner_url, timeout=10)
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError):
        return None
    try:
        found: str | None = await connection.fetchval("select version_num from alembic_version")
    except asyncpg.UndefinedTableError:
        return None
    finally:
        await connection.close()
    return found


def _run(verb: str, owner_url: str, app_role: str, system_role: str, revision: str) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes.update(owner_url=owner_url, app_role=app_role, system_role=system_role)
    getattr(command, verb)(config, revision)
