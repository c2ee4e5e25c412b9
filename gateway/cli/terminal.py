"""What the commands share: where they print, and how they end."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)

TenantOption = Annotated[str, typer.Option("--tenant", "-t", help="The tenant's slug.")]


def fail(reason: str) -> NoReturn:
    """Ends the process with one line."""
    err.print(f"stenogate: {reason}", style="red", highlight=False, markup=False)
    sys.exit(1)
