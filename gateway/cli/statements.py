"""Bills."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Annotated

import typer

from gateway.cli.terminal import TenantOption
from gateway.commands import chores
from runtime.settings import Settings

app = typer.Typer()


@app.command()
def statement(
    tenant: TenantOption,
    month: Annotated[
        str | None, typer.Option(help="YYYY-MM (UTC days of the sessions' start); default: this month.")
    ] = None,
    customer: Annotated[str | None, typer.Option(help="Only this customer of the tenant's.")] = None,
    format: Annotated[str, typer.Option(help="csv or json.")] = "csv",  # noqa: A002 — the option's name
) -> None:
    """What a tenant owes for a month, reconciled with the ledger to the millisecond."""
    period = month or datetime.now(UTC).strftime("%Y-%m")
    sys.stdout.write(chores.statement(Settings(), tenant, period, customer=customer, fmt=format))
