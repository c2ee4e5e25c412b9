"""The installation itself: its schema, and what it lacks."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gateway.cli.terminal import out
from gateway.commands import chores
from runtime.settings import Settings

app = typer.Typer()


@app.command()
def migrate(
    bootstrap: Annotated[
        str | None, typer.Option(metavar="ADMIN_URL", help="Create roles and database first, as this administrator.")
    ] = None,
) -> None:
    """Brings the database to this release's schema. Needs STENOGATE_MIGRATION_DATABASE_URL beside the other two."""
    out.print(chores.migrate(Settings(), bootstrap))


@app.command()
def doctor() -> None:
    """Looks at each part a gateway needs and names the remedy for what is missing."""
    from gateway.commands.doctor import examine

    sys.exit(examine(Settings(), out))
