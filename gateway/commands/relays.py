"""Relays and their credentials, on a database connection of its own."""

from __future__ import annotations

from uuid import UUID

from gateway.commands.database import with_doors
from policy import credentials, relays, tenants
from policy.relays import Relay, Status
from runtime.database import Database
from runtime.sealing import sealer_of
from runtime.settings import Settings
from workers import signing

ACTOR = "cli"


def put(settings: Settings, relay: Relay) -> Relay:
    """A new relay, or another in its place. Raises `Invalid`, `Conflict`."""
    from gateway.providers import PROVIDERS  # late: numpy comes with them

    async def work(database: Database) -> Relay:
        async with database.across_tenants("put a relay") as tx:
            allow_http = settings.relay_allow_http
            return (await relays.put(tx, relay, providers=PROVIDERS, allow_http=allow_http, actor=ACTOR)).relay

    return with_doors(settings, work)


def set_status(settings: Settings, name: str, status: Status) -> Relay:
    """Puts a relay out of use, or in use again. Raises `NotFound`."""

    async def work(database: Database) -> Relay:
        async with database.across_tenants("change a relay's status") as tx:
            return (await relays.set_status(tx, name, status, actor=ACTOR)).relay

    return with_doors(settings, work)


def remove(settings: Settings, name: str) -> None:
    """Raises `NotFound`, `Conflict`."""

    async def work(database: Database) -> None:
        async with database.across_tenants("remove a relay") as tx:
            await relays.remove(tx, name, actor=ACTOR)

    with_doors(settings, work)


def listing(settings: Settings) -> list[Relay]:
    """Every relay, by name."""

    async def work(database: Database) -> list[Relay]:
        async with database.across_tenants("list relays") as tx:
            return [record.relay for record in await relays.listing(tx)]

    return with_doors(settings, work)


def add_credential(settings: Settings, relay: str, key: str, slug: str | None) -> credentials.Record:
    """A key, used from now on in place of the one before it. Raises `Invalid`, `NotFound`, `Misconfigured`."""

    async def work(database: Database) -> credentials.Record:
        async with database.across_tenants("add a credential") as tx:
            tenant_id = None if slug is None else (await tenants.by_slug(tx, slug)).id
            return await credentials.add(tx, sealer_of(settings), relay, key, tenant_id=tenant_id, actor=ACTOR)

    return with_doors(settings, work)


def list_credentials(settings: Settings, relay: str | None) -> list[credentials.Record]:
    """Those of a relay, or of all, retired ones too."""

    async def work(database: Database) -> list[credentials.Record]:
        async with database.across_tenants("list credentials") as tx:
            return await credentials.listing(tx, relay)

    return with_doors(settings, work)


def retire_credential(settings: Settings, credential_id: UUID) -> credentials.Record:
    """Takes a credential out of use for good. Raises `NotFound`."""

    async def work(database: Database) -> credentials.Record:
        async with database.across_tenants("retire a credential") as tx:
            return await credentials.retire(tx, credential_id, actor=ACTOR)

    return with_doors(settings, work)


def rewrap(settings: Settings) -> tuple[int, str]:
    """Puts every data key under the first master key, those of webhooks' secrets too; returns how many were under
    another, and its id.

    Raises `Misconfigured`, `Unsealable`.
    """
    sealer = sealer_of(settings)

    async def work(database: Database) -> int:
        async with database.across_tenants("rewrap credentials and secrets") as tx:
            return await credentials.rewrap(tx, sealer, actor=ACTOR) + await signing.rewrap(tx, sealer)

    return with_doors(settings, work), sealer.current
