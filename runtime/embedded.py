"""Settings completed by an embedded Postgres where the operator named none.

The embedded default is the same code on other parts: afterwards everybody sees three Postgres URLs and knows no more.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import SecretStr
from sqlalchemy.engine import make_url

import migrations
from runtime.bootstrap import bootstrap
from runtime.postgres import EmbeddedServer, embedded_postgres
from runtime.sealing import master_keys
from runtime.settings import Settings

DATABASE = "stenogate"


@contextmanager
def with_database(settings: Settings, *, fast: bool = False) -> Iterator[Settings]:
    """The settings with every database URL set: as given, or of an embedded Postgres that is started (or joined, when
    another process runs it on the same data dir), bootstrapped and migrated; with its sealing keys. Blocking; for the
    main thread.

    `fast` gives up durability, for tests.
    """
    if settings.database_url is not None:
        yield settings
        return
    with embedded_postgres(settings.data_dir, fast=fast) as server:
        completed = settings.model_copy(
            update={
                "database_url": SecretStr(_role_url(server, "stenogate_app")),
                "system_database_url": SecretStr(_role_url(server, "stenogate_system")),
                "migration_database_url": SecretStr(_role_url(server, "stenogate_owner")),
                "sealing_keys": master_keys(settings),
            }
        )
        owner_url = _role_url(server, "stenogate_owner")
        if asyncio.run(migrations.revision(owner_url)) != migrations.head():
            prepare(server.admin_url(), completed)
        yield completed


def prepare(admin_url: str | None, settings: Settings) -> None:
    """Creates roles and database (where an admin URL is given) and migrates to the head. Blocking."""
    owner, app, system = (
        url.get_secret_value()
        for url in (settings.migration_database_url, settings.database_url, settings.system_database_url)
        if url is not None
    )
    if admin_url is not None:
        asyncio.run(bootstrap(admin_url, owner_url=owner, app_url=app, system_url=system))
    migrations.upgrade(owner, app_role=make_url(app).username or "", system_role=make_url(system).username or "")


def _role_url(server: EmbeddedServer, role: str) -> str:
    password = hmac.new(server.password.encode(), role.encode(), hashlib.sha256).hexdigest()
    url = make_url(server.admin_url(DATABASE)).set(username=role, password=password)
    return url.render_as_string(hide_password=False)
