"""`stenogate`: every role of the product and every chore of its operator.

A file here is a noun with its commands. What a command does stands in `gateway.commands`; here is how it is asked for
and told. A new noun is a file with `app = typer.Typer(help=…)` and a line in `GROUPS`.
"""

from __future__ import annotations

from collections.abc import Mapping

import typer
from pydantic import ValidationError

from gateway.cli import (
    budgets,
    config,
    installation,
    issuers,
    policies,
    prices,
    relays,
    roles,
    statements,
    tenants,
    tokens,
    transcribe,
)
from gateway.cli.terminal import fail
from runtime.errors import StenogateError

GROUPS: Mapping[str, typer.Typer] = {
    "tenant": tenants.app,
    "issuer": issuers.app,
    "policy": policies.app,
    "price": prices.app,
    "budget": budgets.app,
    "relay": relays.app,
    "config": config.app,
}
"""`stenogate NOUN VERB`."""

PLAIN = (roles.app, installation.app, tokens.app, statements.app, transcribe.app)
"""`stenogate VERB`."""

app = typer.Typer(
    help="Stenogate turns speech into text for many tenants, and accounts for every millisecond of it.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for verbs in PLAIN:
    app.add_typer(verbs)
for noun, group in GROUPS.items():
    app.add_typer(group, name=noun)


def main() -> None:
    """The console script: errors become one line that names the remedy."""
    try:
        app()
    except StenogateError as error:
        fail(error.message)
    except ValidationError as error:
        fail("; ".join(f"STENOGATE_{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()))
    except OSError as error:
        fail(f"{error.strerror or error}; is the port or data dir in use? `stenogate doctor` looks")
