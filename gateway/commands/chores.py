"""The operator's chores, each a blocking function on its own database connection.

They join the embedded Postgres of a `serve` on the same data dir, or start it and stop it.
"""

from __future__ import annotations

import json
from datetime import date, timedelta
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING
from uuid import UUID

from gateway.commands.database import with_doors as _with_database
from policy import budget, identity, issuers, pricing, statements, tenants
from policy.budget import Period
from policy.errors import Invalid
from policy.identity import SCOPES, Authenticator, Caller, mint
from policy.issuers import Issuer
from policy.jwks import KeySets
from policy.tenants import Status, Tenant
from runtime.database import Database
from runtime.embedded import prepare, with_database
from runtime.errors import Misconfigured
from runtime.settings import Settings
from runtime.signing import signing_key

if TYPE_CHECKING:
    from gateway.commands.client import Client

ACTOR = "cli"
NANO = 1_000_000_000


def migrate(settings: Settings, admin_url: str | None) -> str:
    """Migrates to the head; with an admin URL, creates roles and database first. Returns what to tell the operator."""
    if settings.database_url is None:
        with with_database(settings):
            return "the embedded database is at this release's schema"
    if settings.migration_database_url is None or settings.system_database_url is None:
        raise Misconfigured("set STENOGATE_MIGRATION_DATABASE_URL and STENOGATE_SYSTEM_DATABASE_URL")
    prepare(admin_url, settings)
    return "the database is at this release's schema"


def create_tenant(settings: Settings, slug: str, *, name: str | None, currency: str, tz: str) -> Tenant:
    """A new tenant with the default policy."""

    async def work(database: Database) -> Tenant:
        async with database.across_tenants("create a tenant") as tx:
            return await tenants.create(tx, slug=slug, name=name, currency=currency, billing_tz=tz, actor=ACTOR)

    return _with_database(settings, work)


def list_tenants(settings: Settings) -> list[Tenant]:
    """Every tenant, by slug."""

    async def work(database: Database) -> list[Tenant]:
        async with database.across_tenants("list tenants") as tx:
            return await tenants.listing(tx)

    return _with_database(settings, work)


def set_status(settings: Settings, slug: str, status: Status) -> Tenant:
    """Suspends a tenant or lets it in again."""

    async def work(database: Database) -> Tenant:
        async with database.across_tenants("change a tenant's status") as tx:
            tenant = await tenants.by_slug(tx, slug)
            return await tenants.set_status(tx, tenant.id, status, actor=ACTOR)

    return _with_database(settings, work)


def token(settings: Settings, slug: str, *, scopes: list[str], ttl_s: int, subject: str) -> str:
    """A gateway-issued token. Raises `Invalid` for a scope that does not exist."""
    if unknown := set(scopes) - set(SCOPES):
        raise Invalid(f"no such scope: {', '.join(sorted(unknown))}; there are {', '.join(SCOPES)}")

    async def work(database: Database) -> str:
        async with database.across_tenants("mint a token") as tx:
            tenant = await tenants.by_slug(tx, slug)
        return mint(
            signing_key(settings),
            issuer=settings.issuer,
            audience=settings.audience,
            tenant=tenant,
            subject=subject,
            scopes=scopes,
            ttl_s=ttl_s,
        )

    return _with_database(settings, work)


def add_issuer(
    settings: Settings,
    slug: str,
    *,
    issuer: str,
    audience: str,
    jwks_uri: str,
    algorithms: list[str],
    claim: str,
    scopes_claim: str,
) -> Issuer:
    """An external signer of the tenant's tokens; `claim` is NAME=VALUE. Raises `Invalid`."""
    name, equals, value = claim.partition("=")
    if not (name and equals and value):
        raise Invalid("--claim is NAME=VALUE, such as org=acme")

    async def work(database: Database) -> Issuer:
        async with database.across_tenants("add an issuer") as tx:
            tenant = await tenants.by_slug(tx, slug)
            return await issuers.add(
                tx,
                tenant.id,
                issuer=issuer,
                audience=audience,
                jwks_uri=jwks_uri,
                algorithms=algorithms,
                tenant_claim=name,
                tenant_claim_value=value,
                scopes_claim=scopes_claim,
                actor=ACTOR,
            )

    return _with_database(settings, work)


def disable_issuer(settings: Settings, issuer_id: UUID) -> None:
    """Stops accepting what an issuer signs."""

    async def work(database: Database) -> None:
        async with database.across_tenants("disable an issuer") as tx:
            await issuers.disable(tx, issuer_id, actor=ACTOR)

    _with_database(settings, work)


def revoke(settings: Settings, token: str) -> Caller:
    """Refuses a token that was good until now. Raises `IdentityError` for one that was not."""

    async def work(database: Database) -> Caller:
        authenticator = Authenticator(
            database,
            signing_key=signing_key(settings),
            issuer=settings.issuer,
            audience=settings.audience,
            jwks=KeySets(allow_http=settings.jwks_allow_http),
        )
        try:
            caller = await authenticator.authenticate(token)
        finally:
            await authenticator.aclose()
        async with database.across_tenants("revoke a token") as tx:
            await identity.revoke(
                tx, tenant_id=caller.tenant_id, token_id=caller.token_id, expires_at=caller.expires_at, actor=ACTOR
            )
        return caller

    return _with_database(settings, work)


def set_price(
    settings: Settings, per_hour: str, cost: str, *, backend: str, model: str, currency: str, slug: str | None
) -> None:
    """A price from now on, for one tenant or for all."""
    price_nano, cost_nano = nano(per_hour), nano(cost)

    async def work(database: Database) -> None:
        async with database.across_tenants("set a price") as tx:
            tenant_id = None if slug is None else (await tenants.by_slug(tx, slug)).id
            await pricing.set_price(
                tx,
                backend=backend,
                model=model,
                price_nano_per_hour=price_nano,
                cost_nano_per_hour=cost_nano,
                currency=currency,
                tenant_id=tenant_id,
                actor=ACTOR,
            )

    _with_database(settings, work)


def list_prices(settings: Settings) -> list[tuple[str, str, str, str, str, str]]:
    """Prices in force, as text: tenant (or `list`), backend, model, price and cost of an hour, currency."""

    async def work(database: Database) -> list[tuple[str, str, str, str, str, str]]:
        async with database.across_tenants("list prices") as tx:
            slugs = {tenant.id: tenant.slug for tenant in await tenants.listing(tx)}
            return [
                (
                    "list" if row.tenant_id is None else slugs[row.tenant_id],
                    row.price.backend,
                    row.price.model,
                    amount(row.price.price_nano_per_hour),
                    amount(row.price.cost_nano_per_hour),
                    row.price.currency,
                )
                for row in await pricing.listing(tx)
            ]

    return _with_database(settings, work)


def set_budget(settings: Settings, slug: str, limit: str, *, period: Period, hard: bool) -> None:
    """A limit in the tenant's currency."""
    limit_nano = nano(limit)

    async def work(database: Database) -> None:
        async with database.across_tenants("set a budget") as tx:
            tenant = await tenants.by_slug(tx, slug)
            await budget.set_budget(tx, tenant.id, period=period, limit_nano=limit_nano, hard=hard, actor=ACTOR)

    _with_database(settings, work)


def statement(settings: Settings, slug: str, month: str, *, customer: str | None, fmt: str) -> str:
    """A month's statement as `csv` or `json`."""
    first, after = _month(month)
    renderers = {"csv": statements.to_csv, "json": statements.to_json}
    if fmt not in renderers:
        raise Invalid("the format is csv or json")

    async def work(database: Database) -> str:
        async with database.across_tenants("a statement") as tx:
            tenant = await tenants.by_slug(tx, slug)
        async with database.tenant(tenant.id) as tx:
            return renderers[fmt](await statements.build(tx, tenant, first, after, customer=customer))

    return _with_database(settings, work)


def _month(shown: str) -> tuple[date, date]:
    """`2026-11` → its first day and the next month's. Raises `Invalid`."""
    try:
        first = date.fromisoformat(f"{shown}-01")
    except ValueError as error:
        raise Invalid(f"{shown!r} is no month; write 2026-11") from error
    return first, (first + timedelta(days=31)).replace(day=1)


def local_client(settings: Settings, url: str | None, token: str | None) -> Client:
    """A client of the given gateway, or of the one that serves on this data dir. Raises `ClientError`."""
    from gateway.commands.client import Client, ClientError

    if url is not None and token is not None:
        return Client(url.rstrip("/"), token)
    found = settings.data_dir / "serve.json"
    if not found.exists():
        raise ClientError(
            f"no gateway serves on {settings.data_dir}; start `stenogate serve`, or give --url and --token"
        )
    announced = json.loads(found.read_text())
    token = token or announced["token"]
    if token is None:
        raise ClientError("this gateway has no demo tenant; give --token (see `stenogate token --help`)")
    return Client((url or announced["url"]).rstrip("/"), token)


def nano(text: str) -> int:
    """`0.258` → 258000000. Raises `Invalid`."""
    try:
        value = Decimal(text) * NANO
    except InvalidOperation as error:
        raise Invalid(f"{text!r} is no amount") from error
    if not value.is_finite() or value < 0 or value != value.to_integral_value():
        raise Invalid(f"{text!r}: an amount is positive, with at most nine decimals")
    return int(value)


def amount(nano_units: int) -> str:
    """258000000 → `0.258`."""
    return format(Decimal(nano_units) / NANO, "f")
