"""Settings that running gateways follow."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from gateway.cli.terminal import out
from gateway.commands import operator
from runtime.settings import Settings

app = typer.Typer(help="Settings that running gateways follow.", no_args_is_help=True)


@app.command("show")
def show() -> None:
    """What running gateways can change, and what it is now (where nothing overrides it: in this environment)."""
    table = Table("setting", "value", "from", "changes")
    for row in operator.show_config(Settings()):
        table.add_row(*row)
    out.print(table)


@app.command("set")
def put(
    assignments: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE…", help="NAME= gives a setting back to the environment.")
    ],
) -> None:
    """Changes settings of all gateways on this database, within seconds and without a restart: all of them or none.

    Example: `stenogate config set max_streams=300 log_level=debug`
    """
    operator.set_config(Settings(), assignments)
    out.print("changed; every gateway follows within 5 seconds", highlight=False)
