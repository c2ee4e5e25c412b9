"""What a tenant may do."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gateway.cli.terminal import TenantOption, out
from gateway.commands import chores
from runtime.settings import Settings

app = typer.Typer(help="What a tenant may do: a versioned JSON body.", no_args_is_help=True)


@app.command("show")
def show(tenant: TenantOption) -> None:
    """The policy in force, as JSON."""
    policy = chores.show_policy(Settings(), tenant)
    out.print_json(json.dumps({"version": policy.version, "body": policy.body.model_dump(mode="json")}))


@app.command("set")
def put(
    tenant: TenantOption,
    file: Annotated[
        typer.FileText, typer.Argument(help="JSON body (as `policy show` prints under `body`); - reads stdin.")
    ],
) -> None:
    """Puts a new version of the policy in force now; the old one is kept."""
    policy = chores.set_policy(Settings(), tenant, file.read())
    out.print(f"policy version {policy.version} is in force")
