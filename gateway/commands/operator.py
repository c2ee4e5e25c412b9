"""The operator's own token, and the settings that gateways change while they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.commands.database import with_doors
from policy import operators, overrides
from policy.errors import Invalid
from runtime.database import Database
from runtime.settings import CHANGEABLE, Settings, change_of
from runtime.signing import signing_key

ACTOR = "cli"


def token(settings: Settings, *, ttl_s: int, subject: str) -> str:
    """An operator's token. Raises `Invalid`."""
    return operators.mint(
        signing_key(settings), issuer=settings.issuer, audience=settings.audience, subject=subject, ttl_s=ttl_s
    )


def show_config(settings: Settings) -> list[tuple[str, str, str, str]]:
    """What running gateways can change, as text: setting, value with the overrides, where it comes from, when a change
    takes effect. A gateway with another environment has other values where nothing overrides them."""

    async def work(database: Database) -> dict[str, Any]:
        async with database.across_tenants("show changed settings") as tx:
            return await overrides.read(tx)

    current, overridden = overrides.applied(settings, with_doors(settings, work))
    return [
        (
            name,
            _shown(getattr(current, name)),
            "override" if name in overridden else "environment" if name in settings.model_fields_set else "default",
            change_of(name).replace("_", " "),
        )
        for name in CHANGEABLE
    ]


def set_config(settings: Settings, assignments: Sequence[str]) -> None:
    """`NAME=VALUE` as it would stand in the environment; `NAME=` takes the override back. All or none.

    Raises `Invalid`, `SettingFixed`.
    """
    changes = dict(_assigned(assignment) for assignment in assignments)

    async def work(database: Database) -> None:
        async with database.across_tenants("change settings") as tx:
            await overrides.put(tx, changes, actor=ACTOR)

    with_doors(settings, work)


def _assigned(assignment: str) -> tuple[str, Any]:
    name, equals, value = assignment.partition("=")
    if not (name and equals):
        raise Invalid(f"{assignment!r} is no NAME=VALUE, such as max_streams=300")
    name = name.lower().removeprefix("stenogate_")
    return name, overrides.from_text(name, value) if value else None


def _shown(value: Any) -> str:
    value = overrides.as_json(value)
    return "unset" if value is None else ",".join(value) if isinstance(value, list) else str(value)
