"""Settings that the operator changed while gateways run. They stand in Postgres, above what the environment says, so
that every gateway on this database has them and they outlive it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import structlog
from pydantic import ConfigDict, TypeAdapter, ValidationError
from sqlalchemy import text

from policy import audit
from policy.errors import Invalid, SettingFixed
from runtime.database import Transaction
from runtime.settings import CHANGEABLE, Settings

log = structlog.get_logger()

Overrides: TypeAlias = Mapping[str, Any]
"""JSON values by the setting's name."""


async def read(tx_system: Transaction) -> dict[str, Any]:
    """All that were changed, whoever changed them."""
    return {row.name: row.value for row in await tx_system.execute(_READ)}


async def put(
    tx_system: Transaction, changes: Overrides, *, actor: str, request_id: str | None = None
) -> dict[str, Any]:
    """Makes these changes, all or none; None takes one back. Returns all overrides as they are then.

    Raises `Invalid` and `SettingFixed`, which name the setting.
    """
    check(changes)
    await tx_system.execute(_LOCK)
    before = await read(tx_system)
    after = {name: value for name, value in {**before, **changes}.items() if value is not None}
    changed = sorted(name for name in changes if before.get(name) != after.get(name))
    for name in changed:
        if name in after:
            value = json.dumps(after[name], ensure_ascii=False)
            await tx_system.execute(_PUT, {"name": name, "value": value, "actor": actor})
        else:
            await tx_system.execute(_DROP, {"name": name})
    if changed:
        await audit.record(
            tx_system,
            actor=actor,
            action="settings.change",
            object="settings",
            before={name: before.get(name) for name in changed},
            after={name: after.get(name) for name in changed},
            request_id=request_id,
        )
    return after


def check(changes: Overrides) -> None:
    """Raises `Invalid` for what is no setting or no value of it, `SettingFixed` for what no running gateway changes."""
    for name, value in changes.items():
        _require_changeable(name)
        if value is None:
            continue
        try:
            kind: Any = Settings.model_fields[name].annotation
            TypeAdapter(kind, config=_AS_SENT).validate_json(json.dumps(value))
            Settings.model_validate({name: value})
        except (ValidationError, ValueError) as error:
            raise _refusal(name, error) from None


def from_text(name: str, written: str) -> Any:
    """The JSON value of what would stand in the environment. Raises `Invalid`, `SettingFixed`."""
    _require_changeable(name)
    try:
        value = getattr(Settings.model_validate({name: written}), name)
    except ValidationError as error:
        raise _refusal(name, error) from None
    return as_json(value)


def as_json(value: Any) -> Any:
    """A setting's value as a JSON value."""
    return sorted(value) if isinstance(value, frozenset) else value


def applied(own: Settings, overrides: Overrides) -> tuple[Settings, frozenset[str]]:
    """The settings with the overrides over them, and which. What this release does not take (another release may have
    written it) is left out, and logged."""
    taken = {}
    for name, value in overrides.items():
        try:
            check({name: value})
        except (Invalid, SettingFixed) as error:
            log.warning("settings.override_ignored", setting=name, reason=error.message)
        else:
            taken[name] = value
    return own.changed(taken), frozenset(taken)


def _require_changeable(name: str) -> None:
    if name not in Settings.model_fields:
        raise Invalid(f"There is no setting `{name[:64]}`.", param=name[:64])
    if name not in CHANGEABLE:
        raise SettingFixed(
            f"`{name}` is read once, when a process starts: set STENOGATE_{name.upper()} and restart.", param=name
        )


def _refusal(name: str, error: ValueError) -> Invalid:
    why = error.errors(include_url=False, include_input=False)[0]["msg"] if isinstance(error, ValidationError) else ""
    return Invalid(f"`{name}`: {why.removeprefix('Value error, ') or 'This is no value of it'}.", param=name)


_AS_SENT = ConfigDict(strict=True, allow_inf_nan=False)
_READ = text("select name, value from setting_overrides order by name")
_LOCK = text("lock table setting_overrides in share row exclusive mode")  # one change after the other
_PUT = text("""
    insert into setting_overrides (name, value, changed_by) values (:name, cast(:value as jsonb), :actor)
    on conflict (name) do update set value = excluded.value, changed_by = excluded.changed_by, changed_at = now()
""")
_DROP = text("delete from setting_overrides where name = :name")
