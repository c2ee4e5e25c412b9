"""How alembic reaches the database: one connection as the owner, one transaction a migration, short lock waits."""

import asyncio

from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

attributes = context.config.attributes


def run(connection: Connection) -> None:
    context.configure(connection=connection, transaction_per_migration=True)
    with context.begin_transaction():
        # A migration that cannot get its lock gives up rather than queueing every request behind it.
        connection.execute(text("set lock_timeout = '5s'"))
        for role in ("app_role", "system_role"):
            setting = {"key": f"stenogate.{role}", "name": attributes[role]}
            connection.execute(text("select set_config(:key, :name, false)"), setting)
        context.run_migrations()


async def main() -> None:
    url = make_url(attributes["owner_url"]).set(drivername="postgresql+asyncpg")
    engine = create_async_engine(url, poolclass=NullPool, connect_args={"timeout": 10})
    async with engine.connect() as connection:
        # Two processes that start together migrate one after the other.
        await connection.execute(text("select pg_advisory_lock(hashtext('stenogate.migrate'))"))
        await connection.run_sync(run)
        await connection.commit()
    await engine.dispose()


asyncio.run(main())
