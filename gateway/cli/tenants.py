"""The customers."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from gateway.cli.terminal import out
from gateway.commands import chores
from runtime.settings import Settings

app = typer.Typer(help="The customers.", no_args_is_help=True)


@app.command("create")
def create(
    slug: Annotated[str, typer.Argument(help="Short name: lower-case letters, digits and dashes.")],
    name: Annotated[str | None, typer.Option(help="Full name.")] = None,
    currency: Annotated[str, typer.Option(help="ISO 4217 code the tenant is billed in.")] = "USD",
    tz: Annotated[str, typer.Option(help="IANA time zone of its billing periods.")] = "UTC",
) -> None:
    """Creates a tenant with the default policy. Next: `price set` (or a list price), then `token`."""
    tenant = chores.create_tenant(Settings(), slug, name=name, currency=currency, tz=tz)
    out.print(f"tenant {tenant.slug} ({tenant.id})", highlight=False)


@app.command("list")
def listing() -> None:
    """Every tenant."""
    table = Table("slug", "name", "status", "currency", "time zone")
    for tenant in chores.list_tenants(Settings()):
        table.add_row(tenant.slug, tenant.name, tenant.status, tenant.currency, tenant.billing_tz)
    out.print(table)


@app.command("suspend")
def suspend(
    slug: Annotated[str, typer.Argument(help="The tenant's slug.")],
    resume: Annotated[bool, typer.Option("--resume", help="Let it in again instead.")] = False,
) -> None:
    """Shuts a tenant out: new requests at once, live streams at their next block."""
    tenant = chores.set_status(Settings(), slug, "active" if resume else "suspended")
    out.print(f"tenant {tenant.slug} is {tenant.status}", highlight=False)
