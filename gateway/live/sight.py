"""What an operator may see of a live session: where it stands, never what is said in it."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from dispatchers.interface import Origin


@dataclass(frozen=True, slots=True)
class Sight:
    """One session. `connected`: its client is, rather than awaited; `heard_ms`: audio accepted and taken; `lag_ms`:
    received and not yet taken."""

    session_id: UUID
    tenant: str
    origin: Origin
    connected: bool
    heard_ms: int
    lag_ms: int
