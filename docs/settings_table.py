"""Prints the table of settings that the README carries between its `settings` marks:

python docs/settings_table.py
"""

from __future__ import annotations

import sys
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from runtime.settings import Change, Settings, change_of

CHANGES: dict[Change, str] = {"live": "live", "new_sessions": "new sessions", "start": ""}


def table() -> str:
    """A markdown table, one row a setting, in the order of `Settings`."""
    prefix = Settings.model_config.get("env_prefix", "")
    rows = [_row(f"{prefix}{name}".upper(), field, change_of(name)) for name, field in Settings.model_fields.items()]
    return "\n".join(["| variable | default | changes | meaning |", "|---|---|---|---|", *rows]) + "\n"


def _row(variable: str, field: FieldInfo, change: Change) -> str:
    default = "unset" if field.default is None else f"`{field.default}`"
    meaning = field.description or ""
    if get_origin(field.annotation) is Literal:
        meaning += " One of " + ", ".join(f"`{choice}`" for choice in get_args(field.annotation)) + "."
    return f"| `{variable}` | {default} | {CHANGES[change]} | {meaning} |".replace("|  |", "| |")


if __name__ == "__main__":
    sys.stdout.write(table())
