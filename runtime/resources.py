"""Opens what a process stands on, and closes it again in the opposite order."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pydantic import SecretStr

from runtime.addresses import Allowed
from runtime.blobs import Blobs
from runtime.coordination import Coordination, InProcess, RedisCoordination
from runtime.database import Database
from runtime.egress import Egress
from runtime.errors import Misconfigured
from runtime.sealing import Sealer, sealer_of
from runtime.settings import Settings
from runtime.signing import signing_key


@dataclass(frozen=True)
class Resources:
    """Open connections, shared by everything in the process."""

    settings: Settings
    database: Database
    coordination: Coordination
    blobs: Blobs
    signing_key: bytes
    sealer: Sealer
    egress: Egress


@asynccontextmanager
async def open_resources(settings: Settings) -> AsyncIterator[Resources]:
    """The resources of settings whose database URLs are set (`runtime.embedded.with_database` sets them)."""
    if settings.database_url is None or settings.system_database_url is None:
        raise Misconfigured("set STENOGATE_DATABASE_URL and STENOGATE_SYSTEM_DATABASE_URL, or neither")
    database = Database(
        settings.database_url.get_secret_value(),
        settings.system_database_url.get_secret_value(),
        pool=settings.database_pool,
    )
    coordination = _coordination(settings.redis_url)
    egress = Egress(Allowed.of(settings.egress_allow or ()))
    try:
        yield Resources(
            settings=settings,
            database=database,
            coordination=coordination,
            blobs=Blobs.open(settings.blob_url, settings.data_dir / "blobs"),
            signing_key=signing_key(settings),
            sealer=sealer_of(settings),
            egress=egress,
        )
    finally:
        egress.close()
        await coordination.aclose()
        await database.aclose()


def _coordination(redis_url: SecretStr | None) -> Coordination:
    return InProcess() if redis_url is None else RedisCoordination(redis_url.get_secret_value())
