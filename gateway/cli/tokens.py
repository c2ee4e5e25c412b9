"""Who may call, and from when on no more."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gateway.cli.terminal import fail, out
from gateway.commands import chores, operator
from gateway.commands.duration import seconds
from runtime.settings import Settings

app = typer.Typer()


@app.command()
def token(
    tenant: Annotated[str | None, typer.Option("--tenant", "-t", help="The tenant's slug.")] = None,
    scope: Annotated[
        list[str] | None, typer.Option(help="Repeat for several; default: transcribe, jobs, usage.")
    ] = None,
    ttl: Annotated[str, typer.Option(help="How long it is good for: 30m, 1h, 7d.")] = "1h",
    subject: Annotated[str, typer.Option(help="Who will use it; shown in sessions and audit.")] = "cli",
    for_operator: Annotated[
        bool, typer.Option("--operator", help="For `/v1/admin`, of no tenant and for a day at most.")
    ] = False,
) -> None:
    """Prints a token and nothing else: `TOKEN=$(stenogate token --tenant acme)`."""
    if for_operator == (tenant is not None) or (for_operator and scope):
        fail("say --tenant, or --operator without --scope")
    if tenant is None:
        sys.stdout.write(operator.token(Settings(), ttl_s=seconds(ttl), subject=subject) + "\n")
        return
    scopes = scope or ["transcribe", "jobs", "usage"]
    sys.stdout.write(chores.token(Settings(), tenant, scopes=scopes, ttl_s=seconds(ttl), subject=subject) + "\n")


@app.command()
def revoke(
    token: Annotated[str, typer.Argument(help="The token; - reads stdin, so that it stays out of the history.")],
) -> None:
    """Refuses a token from now on, wherever it is used: `stenogate revoke - < token`."""
    given = sys.stdin.read().strip() if token == "-" else token  # noqa: S105 — the dash
    caller = chores.revoke(Settings(), given)
    out.print(f"token {caller.token_id} of {caller.tenant} is revoked", highlight=False)
