"""Query parameters, read and checked; and times, shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date, datetime

from starlette.requests import Request

from policy.errors import Invalid


def integer(request: Request, name: str, default: int, *, least: int, most: int) -> int:
    """A whole number within bounds. Raises `Invalid`."""
    given = request.query_params.get(name, "")
    if not given:
        return default
    if not (given.isascii() and given.isdigit() and len(given) < 20 and least <= int(given) <= most):
        raise Invalid(f"`{name}` must be a whole number from {least} to {most}.", param=name)
    return int(given)


def seconds(request: Request, name: str, *, most: float) -> float:
    """A duration, 0 where none is given. Raises `Invalid`."""
    try:
        given = float(request.query_params.get(name) or 0)
    except ValueError:
        given = math.nan
    if not 0 <= given <= most:
        raise Invalid(f"`{name}` must be from 0 to {most:g} seconds.", param=name)
    return given


def choice(request: Request, name: str, choices: Sequence[str]) -> str | None:
    """One of a few words. Raises `Invalid`."""
    given = request.query_params.get(name) or None
    if given is not None and given not in choices:
        raise Invalid(f"`{name}` must be one of: {', '.join(choices)}.", param=name)
    return given


def day(request: Request, name: str) -> date | None:
    """A calendar day, `2026-11-20`. Raises `Invalid`."""
    given = request.query_params.get(name)
    try:
        return date.fromisoformat(given) if given else None
    except ValueError:
        raise Invalid(f"`{name}` must be a day such as 2026-11-20.", param=name) from None


def moment(at: datetime | None) -> int | None:
    """Unix seconds."""
    return None if at is None else int(at.timestamp())
