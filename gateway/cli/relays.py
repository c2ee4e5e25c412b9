"""Accounts with managed providers, and their keys."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.table import Column, Table

from gateway.cli.terminal import out
from gateway.commands import relays
from policy.errors import Invalid
from policy.relays import Relay
from runtime.ids import read, show
from runtime.settings import Settings

app = typer.Typer(help="Managed providers, as backends.", no_args_is_help=True)
credential_app = typer.Typer(help="Keys to their accounts; told never again.", no_args_is_help=True)
app.add_typer(credential_app, name="credential")

NameArgument = Annotated[str, typer.Argument(help="What policies, prices and bills call it.")]


@app.command("add")
def add(
    name: NameArgument,
    provider: Annotated[
        str | None, typer.Option(help="Whose wire it speaks, such as deepgram or openai-compatible; default: its name.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Its address; default: the provider's own.")] = None,
    region: Annotated[str | None, typer.Option(help="Where it processes audio, such as eu.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Repeat for several, the default first; default: the provider's own.")
    ] = None,
) -> None:
    """Adds a relay, or puts another in its place. Next: `relay credential add`, and a price.

    Example: `stenogate relay add vllm-eu --provider openai-compatible --url https://vllm.example/v1 --model whisper`
    """
    relay = Relay(name, provider or name, url, region, None if not model else tuple(model))
    added = relays.put(Settings(), relay)
    out.print(f"relay {added.name} ({added.provider}) is {added.status}", highlight=False)


@app.command("list")
def listing() -> None:
    """Every relay."""
    table = Table("name", "provider", "status", "region", "address", "models")
    for relay in relays.listing(Settings()):
        models = ", ".join(relay.models or ()) or "its own"
        where = relay.base_url or "its own"
        table.add_row(relay.name, relay.provider, relay.status, relay.region or "", where, models)
    out.print(table)


@app.command("disable")
def disable(
    name: NameArgument, enable: Annotated[bool, typer.Option("--enable", help="Use it again instead.")] = False
) -> None:
    """Puts a relay out of use, with its credentials, within seconds; nothing is lost."""
    relay = relays.set_status(Settings(), name, "active" if enable else "disabled")
    out.print(f"relay {relay.name} is {relay.status}", highlight=False)


@app.command("remove")
def remove(name: NameArgument) -> None:
    """Forgets a relay whose credentials are all retired."""
    relays.remove(Settings(), name)
    out.print(f"relay {name} is removed", highlight=False)


@app.command("rewrap")
def rewrap() -> None:
    """Puts all keys and webhooks' secrets under the first of STENOGATE_SEALING_KEYS, so that the others can go."""
    count, master_key = relays.rewrap(Settings())
    out.print(f"{count} put under the master key {master_key}; all others were already", highlight=False)


@credential_app.command("add")
def credential_add(
    relay: NameArgument,
    tenant: Annotated[
        str | None, typer.Option("--tenant", "-t", help="Of this tenant alone; else of all who have none of their own.")
    ] = None,
) -> None:
    """Adds a key, read from stdin or asked for, in place of the one before it.

    Example: `stenogate relay credential add deepgram < key`
    """
    key = typer.prompt("key", hide_input=True) if sys.stdin.isatty() else sys.stdin.read()
    added = relays.add_credential(Settings(), relay, key.strip(), tenant)
    out.print(f"credential {added.prefix} ({show('cred', added.id)}) is in use", highlight=False, markup=False)


@credential_app.command("list")
def credential_list(relay: Annotated[str | None, typer.Argument(help="Only this relay's.")] = None) -> None:
    """Every credential by the beginning of its key, retired ones too."""
    whole = (Column(name, no_wrap=True) for name in ("id", "key"))  # however narrow the terminal: one copies them
    folded = (Column(name, overflow="fold") for name in ("relay", "tenant", "status", "last used", "master key"))
    table = Table(*whole, *folded)
    for key in relays.list_credentials(Settings(), relay):
        used = "" if key.last_used_at is None else key.last_used_at.strftime("%Y-%m-%d %H:%M")
        whose = key.tenant or "shared"
        table.add_row(show("cred", key.id), key.prefix, key.relay, whose, key.status, used, key.master_key)
    out.print(table)


@credential_app.command("retire")
def credential_retire(
    credential: Annotated[str, typer.Argument(help="Its id, as `relay credential list` shows it.")],
) -> None:
    """Takes a credential out of use, within seconds and for good."""
    credential_id = read("cred", credential)
    if credential_id is None:
        raise Invalid("That is no credential's id; `stenogate relay credential list` shows them.")
    retired = relays.retire_credential(Settings(), credential_id)
    out.print(f"credential {retired.prefix} of {retired.relay} is retired", highlight=False, markup=False)
