"""What a tenant may do."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from gateway.cli.terminal import TenantOption, out
from gateway.commands import policies
from runtime.settings import Settings

app = typer.Typer(help="What a tenant may do: a versioned JSON body.", no_args_is_help=True)

MOST = 2_147_483_647

FileArgument = Annotated[
    typer.FileText, typer.Argument(help="JSON body (as `policy show` prints under `body`); - reads stdin.")
]
SinceOption = Annotated[
    str | None,
    typer.Option("--from", metavar="MOMENT", help="In force from then on, such as 2026-12-01T08:00Z; default: now."),
]


@app.command("show")
def show(
    tenant: TenantOption,
    version: Annotated[int | None, typer.Option(min=1, max=MOST, help="Another version than the one in force.")] = None,
) -> None:
    """The policy in force, as JSON."""
    shown = policies.show(Settings(), tenant, version)
    out.print_json(json.dumps({"version": shown.version, "body": shown.body.model_dump(mode="json")}))


@app.command("list")
def listing(tenant: TenantOption) -> None:
    """The versions, newest first, and when each is in force."""
    table = Table("version", "status", "from", "until", "by", "put")
    for version in policies.listing(Settings(), tenant):
        times = _minute(version.effective_from), _minute(version.effective_until)
        status = version.standing.replace("_", " ")
        table.add_row(str(version.version), status, *times, version.created_by, _minute(version.created_at))
    out.print(table)


@app.command("set")
def put(
    tenant: TenantOption,
    file: FileArgument,
    since: SinceOption = None,
    newest: Annotated[
        int | None,
        typer.Option(min=0, max=MOST, help="The newest version you have seen; refused if there is a newer one."),
    ] = None,
) -> None:
    """Puts a new version of the policy in force, now or later; the old one is kept."""
    policy = policies.put(Settings(), tenant, file.read(), since=since, newest=newest)
    _in_force(policy.version, since)


@app.command("check")
def check(tenant: TenantOption, file: FileArgument) -> None:
    """Tells what is wrong with a policy, or what it would change, and puts nothing in force."""
    problems, changes = policies.check(Settings(), tenant, file.read())
    for problem in problems:
        out.print(f"{problem.field}: {problem.reason}", style="red", highlight=False, markup=False)
    _changes(changes)
    sys.exit(1 if problems else 0)


@app.command("diff")
def diff(
    tenant: TenantOption,
    before: Annotated[int | None, typer.Argument(min=1, max=MOST, help="A version; default: the one in force.")] = None,
    after: Annotated[int | None, typer.Argument(min=1, max=MOST, help="Another; default: the one in force.")] = None,
) -> None:
    """The fields in which two versions differ: `stenogate policy diff -t acme 3 4`."""
    _changes(policies.diff(Settings(), tenant, before, after))


@app.command("rollback")
def rollback(
    tenant: TenantOption,
    version: Annotated[int, typer.Argument(min=1, max=MOST, help="The version whose content is to come back.")],
    since: SinceOption = None,
) -> None:
    """Puts the content of an earlier version in force again, as a new version."""
    _in_force(policies.rollback(Settings(), tenant, version, since=since).version, since)


@app.command("withdraw")
def withdraw(
    tenant: TenantOption,
    version: Annotated[int, typer.Argument(min=1, max=MOST, help="A version that is not yet in force.")],
) -> None:
    """Takes a scheduled version back."""
    policies.withdraw(Settings(), tenant, version)
    out.print(f"policy version {version} is withdrawn", highlight=False)


def _in_force(version: int, since: str | None) -> None:
    when = "is in force" if since is None else f"will be in force from {since}"
    out.print(f"policy version {version} {when}", highlight=False, markup=False)


def _changes(changes: dict[str, tuple[Any, Any]]) -> None:
    for field, (before, after) in changes.items():
        out.print(f"{field}: {json.dumps(before)} → {json.dumps(after)}", highlight=False, markup=False, soft_wrap=True)


def _minute(at: datetime | None) -> str:
    return "" if at is None else at.strftime("%Y-%m-%d %H:%M")
