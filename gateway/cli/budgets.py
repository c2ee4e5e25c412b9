"""How much a tenant may spend."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from gateway.cli.terminal import TenantOption, out
from gateway.commands import chores
from runtime.settings import Settings

app = typer.Typer(help="How much a tenant may spend.", no_args_is_help=True)


@app.command("set")
def put(
    tenant: TenantOption,
    limit: Annotated[str, typer.Argument(help="Limit in the tenant's currency, such as 250.00.")],
    period: Annotated[Literal["day", "month", "lifetime"], typer.Option(help="How often it begins anew.")] = "month",
    soft: Annotated[bool, typer.Option("--soft", help="Count, but refuse nothing.")] = False,
) -> None:
    """Limits what a tenant may spend."""
    chores.set_budget(Settings(), tenant, limit, period=period, hard=not soft)
    out.print(f"{tenant}: {limit} per {period}", highlight=False)
