"""What an hour costs."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from gateway.cli.terminal import out
from gateway.commands import chores
from runtime.settings import Settings

app = typer.Typer(help="What an hour costs; nothing without a price is sold.", no_args_is_help=True)


@app.command("set")
def put(
    per_hour: Annotated[str, typer.Argument(help="Price of an hour of audio, such as 0.258 (up to nine decimals).")],
    backend: Annotated[str, typer.Option(help="self_hosted, or a relay's name.")] = "self_hosted",
    model: Annotated[str, typer.Option(help="A model's name, or * for all.")] = "*",
    cost: Annotated[str, typer.Option(help="What an hour costs us.")] = "0",
    currency: Annotated[str, typer.Option(help="ISO 4217 code.")] = "USD",
    tenant: Annotated[
        str | None, typer.Option("--tenant", "-t", help="One tenant's own price; else the list price.")
    ] = None,
) -> None:
    """Sets a price from now on; the old one is closed and kept."""
    chores.set_price(Settings(), per_hour, cost, backend=backend, model=model, currency=currency, slug=tenant)
    out.print(f"{backend} {model}: {per_hour} {currency} an hour from now on", highlight=False)


@app.command("list")
def listing() -> None:
    """Prices in force."""
    table = Table("tenant", "backend", "model", "price/h", "cost/h", "currency")
    for row in chores.list_prices(Settings()):
        table.add_row(*row)
    out.print(table)
