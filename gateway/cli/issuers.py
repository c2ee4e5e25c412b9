"""Who, beside the gateway, may sign a tenant's tokens."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

import typer

from gateway.cli.terminal import TenantOption, out
from gateway.commands import chores
from runtime.settings import Settings

app = typer.Typer(help="Who, beside the gateway, may sign a tenant's tokens.", no_args_is_help=True)


@app.command("add")
def add(
    tenant: TenantOption,
    issuer: Annotated[str, typer.Argument(help="The `iss` of its tokens, exactly.")],
    jwks: Annotated[str, typer.Option(help="https address of its key set.")],
    claim: Annotated[str, typer.Option(help="NAME=VALUE: the claim by which its tokens mean this tenant.")],
    audience: Annotated[str, typer.Option(help="The `aud` of its tokens.")] = "stenogate",
    algorithm: Annotated[list[str] | None, typer.Option(help="Repeat for several; default: RS256.")] = None,
    scopes_claim: Annotated[str, typer.Option(help="The claim that holds the scopes.")] = "scope",
) -> None:
    """Lets an identity provider sign for a tenant.

    Example: `stenogate issuer add -t acme https://id.acme.com --jwks https://id.acme.com/jwks.json --claim org=acme`
    """
    added = chores.add_issuer(
        Settings(),
        tenant,
        issuer=issuer,
        audience=audience,
        jwks_uri=jwks,
        algorithms=algorithm or ["RS256"],
        claim=claim,
        scopes_claim=scopes_claim,
    )
    out.print(f"issuer {added.issuer} ({added.id})", highlight=False)


@app.command("disable")
def disable(issuer_id: Annotated[UUID, typer.Argument(help="As `issuer add` printed it.")]) -> None:
    """Stops accepting an issuer's tokens, within half a minute."""
    chores.disable_issuer(Settings(), issuer_id)
    out.print(f"issuer {issuer_id} is disabled", highlight=False)
