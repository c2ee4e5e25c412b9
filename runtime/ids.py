"""Identifiers. In the database a UUID version 7 (RFC 9562, section 5.7), which sorts by the time of making; outside,
the same with its kind in front: `job_0198c0f3a2b47e0f8a52c1d94b7e6f10`."""

from __future__ import annotations

import os
import re
import time
import uuid
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["sess", "job", "req", "tok", "cred", "hook", "evt", "dlv"]


def uuid7() -> uuid.UUID:
    """48 bits of Unix milliseconds, then random bits."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return uuid.UUID(int=value)


def show(kind: Kind, value: uuid.UUID) -> str:
    """The identifier as callers see it."""
    return f"{kind}_{value.hex}"


def read(kind: Kind, shown: str) -> uuid.UUID | None:
    """The identifier that `show` gave, or None when this is none of that kind."""
    match = re.fullmatch(rf"{kind}_([0-9a-f]{{32}})", shown)
    return uuid.UUID(match[1]) if match else None
