"""Prints the table of settings that the README carries between its `settings` marks:

python docs/settings_table.py
"""

from __future__ import annotations

import sys
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from runtime.settings import Settings


def table() -> str:
    """A markdown table, one row a setting, in the order of `Settings`."""
    prefix = Settings.model_config.get("env_prefix", "")
    rows = [_row(f"{prefix}{name}".upper(), field) for name, field in Settings.model_fields.items()]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _row(variable: str, field: FieldInfo) -> str:
    default = "unset" if field.default is None else f"`{field.default}`"
    meaning = field.description or ""
    if get_origin(field.annotation) is Literal:
        meaning += " One of " + ", ".join(f"`{choice}`" for choice in get_args(field.annotation)) + "."
    return f"| `{variable}` | {default} | {meaning} |"


if __name__ == "__main__":
    sys.stdout.write(table())
