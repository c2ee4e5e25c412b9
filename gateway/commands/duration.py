"""Durations as people write them."""

from __future__ import annotations

import re

import typer

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds(text: str) -> int:
    """`90s`, `30m`, `1h`, `7d` → seconds. Raises `typer.BadParameter`."""
    match = re.fullmatch(r"([1-9]\d{0,5})([smhd])", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no duration; write 30m, 1h or 7d")
    return int(match[1]) * UNITS[match[2]]
