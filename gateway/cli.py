"""`stenogate`: every role of the product and every chore of its operator."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, NoReturn
from uuid import UUID

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from gateway.commands import chores, operator
from gateway.commands.duration import seconds
from runtime.errors import StenogateError
from runtime.settings import Settings

app = typer.Typer(
    help="Stenogate turns speech into text for many tenants, and accounts for every millisecond of it.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
tenant_app = typer.Typer(help="The customers.", no_args_is_help=True)
policy_app = typer.Typer(help="What a tenant may do: a versioned JSON body.", no_args_is_help=True)
price_app = typer.Typer(help="What an hour costs; nothing without a price is sold.", no_args_is_help=True)
config_app = typer.Typer(help="Settings that running gateways follow.", no_args_is_help=True)
budget_app = typer.Typer(help="How much a tenant may spend.", no_args_is_help=True)
issuer_app = typer.Typer(help="Who, beside the gateway, may sign a tenant's tokens.", no_args_is_help=True)
for name, group in (
    ("tenant", tenant_app),
    ("issuer", issuer_app),
    ("policy", policy_app),
    ("price", price_app),
    ("budget", budget_app),
    ("config", config_app),
):
    app.add_typer(group, name=name)

out = Console()
err = Console(stderr=True)

TenantOption = Annotated[str, typer.Option("--tenant", "-t", help="The tenant's slug.")]


def main() -> None:
    """The console script: errors become one line that names the remedy."""
    try:
        app()
    except StenogateError as error:
        _fail(error.message)
    except ValidationError as error:
        _fail("; ".join(f"STENOGATE_{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()))
    except OSError as error:
        _fail(f"{error.strerror or error}; is the port or data dir in use? `stenogate doctor` looks")


def _fail(reason: str) -> NoReturn:
    err.print(f"stenogate: {reason}", style="red", highlight=False, markup=False)
    sys.exit(1)


# --- roles --------------------------------------------------------------------------------------------------------


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks a free one.")] = None,
) -> None:
    """The gateway. With no settings it is everything at once: embedded Postgres, workers, a tenant to try it with.

    Example: `STENOGATE_MODEL=micro stenogate serve --port 9000`
    """
    from gateway.serve import serve as run

    given = {"host": host, "port": port}
    run(Settings().model_copy(update={key: value for key, value in given.items() if value is not None}), _announce)


def _announce(announcement: object) -> None:
    from gateway.commands.welcome import welcome
    from gateway.serve import Announcement

    if isinstance(announcement, Announcement):
        welcome(out, announcement)


@app.command()
def work() -> None:
    """A worker: takes queued jobs. Needs STENOGATE_DATABASE_URL, STENOGATE_SYSTEM_DATABASE_URL, STENOGATE_REDIS_URL."""
    from workers.main import run

    run(Settings())


@app.command()
def engine(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8090,
) -> None:
    """The recogniser alone, over HTTP in OpenAI's shape, for callers who hold STENOGATE_ENGINE_TOKEN."""
    from dispatchers.engine.serve import run
    from dispatchers.local import choose_model, local_backend
    from runtime.telemetry import configure_logging

    settings = Settings()
    configure_logging(settings.log_level, settings.log_format)
    run(
        lambda: local_backend(settings, choose_model(settings)),
        host=host,
        port=port,
        token=settings.engine_token.get_secret_value() if settings.engine_token else None,
        max_upload_bytes=settings.max_upload_bytes,
    )


@app.command()
def demo(
    model: Annotated[
        str, typer.Option(help="`micro` (offline), or any Whisper model's name, such as `small`.")
    ] = "micro",
) -> None:
    """Speech becomes text through the real gateway, by file, by live stream and by job; then the bill for it."""
    from gateway.commands.demo import run

    sys.exit(run(model, out))


# --- chores -------------------------------------------------------------------------------------------------------


@app.command()
def migrate(
    bootstrap: Annotated[
        str | None, typer.Option(metavar="ADMIN_URL", help="Create roles and database first, as this administrator.")
    ] = None,
) -> None:
    """Brings the database to this release's schema. Needs STENOGATE_MIGRATION_DATABASE_URL beside the other two."""
    out.print(chores.migrate(Settings(), bootstrap))


@tenant_app.command("create")
def tenant_create(
    slug: Annotated[str, typer.Argument(help="Short name: lower-case letters, digits and dashes.")],
    name: Annotated[str | None, typer.Option(help="Full name.")] = None,
    currency: Annotated[str, typer.Option(help="ISO 4217 code the tenant is billed in.")] = "USD",
    tz: Annotated[str, typer.Option(help="IANA time zone of its billing periods.")] = "UTC",
) -> None:
    """Creates a tenant with the default policy. Next: `price set` (or a list price), then `token`."""
    tenant = chores.create_tenant(Settings(), slug, name=name, currency=currency, tz=tz)
    out.print(f"tenant {tenant.slug} ({tenant.id})", highlight=False)


@tenant_app.command("list")
def tenant_list() -> None:
    """Every tenant."""
    table = Table("slug", "name", "status", "currency", "time zone")
    for tenant in chores.list_tenants(Settings()):
        table.add_row(tenant.slug, tenant.name, tenant.status, tenant.currency, tenant.billing_tz)
    out.print(table)


@tenant_app.command("suspend")
def tenant_suspend(
    slug: Annotated[str, typer.Argument(help="The tenant's slug.")],
    resume: Annotated[bool, typer.Option("--resume", help="Let it in again instead.")] = False,
) -> None:
    """Shuts a tenant out: new requests at once, live streams at their next block."""
    tenant = chores.set_status(Settings(), slug, "active" if resume else "suspended")
    out.print(f"tenant {tenant.slug} is {tenant.status}", highlight=False)


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
        _fail("say --tenant, or --operator without --scope")
    if tenant is None:
        sys.stdout.write(operator.token(Settings(), ttl_s=seconds(ttl), subject=subject) + "\n")
        return
    scopes = scope or ["transcribe", "jobs", "usage"]
    sys.stdout.write(chores.token(Settings(), tenant, scopes=scopes, ttl_s=seconds(ttl), subject=subject) + "\n")


@issuer_app.command("add")
def issuer_add(
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


@issuer_app.command("disable")
def issuer_disable(issuer_id: Annotated[UUID, typer.Argument(help="As `issuer add` printed it.")]) -> None:
    """Stops accepting an issuer's tokens, within half a minute."""
    chores.disable_issuer(Settings(), issuer_id)
    out.print(f"issuer {issuer_id} is disabled", highlight=False)


@app.command()
def revoke(
    token: Annotated[str, typer.Argument(help="The token; - reads stdin, so that it stays out of the history.")],
) -> None:
    """Refuses a token from now on, wherever it is used: `stenogate revoke - < token`."""
    given = sys.stdin.read().strip() if token == "-" else token  # noqa: S105 — the dash
    caller = chores.revoke(Settings(), given)
    out.print(f"token {caller.token_id} of {caller.tenant} is revoked", highlight=False)


@policy_app.command("show")
def policy_show(tenant: TenantOption) -> None:
    """The policy in force, as JSON."""
    policy = chores.show_policy(Settings(), tenant)
    out.print_json(json.dumps({"version": policy.version, "body": policy.body.model_dump(mode="json")}))


@policy_app.command("set")
def policy_set(
    tenant: TenantOption,
    file: Annotated[
        typer.FileText, typer.Argument(help="JSON body (as `policy show` prints under `body`); - reads stdin.")
    ],
) -> None:
    """Puts a new version of the policy in force now; the old one is kept."""
    policy = chores.set_policy(Settings(), tenant, file.read())
    out.print(f"policy version {policy.version} is in force")


@price_app.command("set")
def price_set(
    per_hour: Annotated[str, typer.Argument(help="Price of an hour of audio, such as 0.258 (up to nine decimals).")],
    backend: Annotated[str, typer.Option(help="self_hosted or relay.")] = "self_hosted",
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


@price_app.command("list")
def price_list() -> None:
    """Prices in force."""
    table = Table("tenant", "backend", "model", "price/h", "cost/h", "currency")
    for row in chores.list_prices(Settings()):
        table.add_row(*row)
    out.print(table)


@budget_app.command("set")
def budget_set(
    tenant: TenantOption,
    limit: Annotated[str, typer.Argument(help="Limit in the tenant's currency, such as 250.00.")],
    period: Annotated[Literal["day", "month", "lifetime"], typer.Option(help="How often it begins anew.")] = "month",
    soft: Annotated[bool, typer.Option("--soft", help="Count, but refuse nothing.")] = False,
) -> None:
    """Limits what a tenant may spend."""
    chores.set_budget(Settings(), tenant, limit, period=period, hard=not soft)
    out.print(f"{tenant}: {limit} per {period}", highlight=False)


@config_app.command("show")
def config_show() -> None:
    """What running gateways can change, and what it is now (where nothing overrides it: in this environment)."""
    table = Table("setting", "value", "from", "changes")
    for row in operator.show_config(Settings()):
        table.add_row(*row)
    out.print(table)


@config_app.command("set")
def config_set(
    assignments: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE…", help="NAME= gives a setting back to the environment.")
    ],
) -> None:
    """Changes settings of all gateways on this database, within seconds and without a restart: all of them or none.

    Example: `stenogate config set max_streams=300 log_level=debug`
    """
    operator.set_config(Settings(), assignments)
    out.print("changed; every gateway follows within 5 seconds", highlight=False)


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


@app.command()
def transcribe(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Any audio file.")],
    stream: Annotated[bool, typer.Option("--stream", help="Send it live, at the pace it was spoken.")] = False,
    model: Annotated[str | None, typer.Option(help="A model's name; default: the tenant's.")] = None,
    format: Annotated[str, typer.Option(help="text, json, verbose_json, srt or vtt.")] = "text",  # noqa: A002
    url: Annotated[
        str | None, typer.Option(envvar="STENOGATE_URL", help="The gateway; default: the local one.")
    ] = None,
    token: Annotated[str | None, typer.Option(envvar="STENOGATE_TOKEN", help="Default: the demo tenant's.")] = None,
) -> None:
    """Transcribes a file through a running gateway; a long one shows its progress.

    Example: `stenogate transcribe meeting.mp3 --format srt > meeting.srt`
    """
    from gateway.commands.transcribe import live, whole

    client = chores.local_client(Settings(), url, token)
    asyncio.run(live(client, file, model, err) if stream else whole(client, file, model, format, err))


@app.command()
def doctor() -> None:
    """Looks at each part a gateway needs and names the remedy for what is missing."""
    from gateway.commands.doctor import examine

    sys.exit(examine(Settings(), out))
