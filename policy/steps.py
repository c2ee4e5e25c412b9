"""The two steps that every session takes, its opening and its settling, each as one statement.

They are functions of the database (`migrations/versions/…_steps.py`), so that a request waits for it but once a step.
Both do what `policy.sessions`, `policy.budget` and `policy.metering` do one after the other, for the usual case: what
is known of the tenant and of the session still holds, the budget's windows are there, and they have room. Each checks
that itself, and where anything is otherwise writes nothing and says so; whoever asked then goes the long way, which
finds out what it is. Locks are taken in the same order: the session's row, its holds, the windows by budget id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias
from uuid import UUID

import asyncpg

from policy import legs
from policy.identity import Caller
from policy.metering import Segment
from policy.pricing import Price, amount_nano, cover_nano, most_expensive
from policy.resolve import Candidate, Decision, Demand
from policy.sessions import Outcome, Progress, Session
from runtime.database import Database

Prices: TypeAlias = Mapping[tuple[str, str], Price]
"""By backend and model."""


UNUSUAL = "SG001"  # an SQLSTATE of our own


class Unusual(Exception):
    """Nothing was written."""


@dataclass(frozen=True, slots=True)
class Opening:
    """A session to be opened. `candidates` are all that may serve by the tenant's policy, `prices` those of them that
    are for sale in `currency`, and the decision names no other; `held_ms` is how much audio money is to be held for."""

    session_id: UUID
    caller: Caller
    demand: Demand
    policy_version: int
    candidates: tuple[Candidate, ...]
    decision: Decision
    currency: str
    prices: Prices
    held_ms: int

    @property
    def nano_per_hour(self) -> int:
        """What is held for an hour, of all channels: the dearest candidate may serve."""
        return most_expensive(self.prices.values()).price_nano_per_hour * self.demand.channels


async def open_session(database: Database, opening: Opening) -> Session:
    """Writes the row and the hold. Raises `Unusual`."""
    caller, demand = opening.caller, opening.demand
    prices = [opening.prices.get((candidate.backend, candidate.model)) for candidate in opening.candidates]
    row = await _once(
        database,
        _OPEN,
        caller.tenant_id,
        caller.token_id,
        opening.session_id,
        demand.kind,
        caller.subject,
        demand.customer,
        json.dumps(dict(demand.metadata)),
        demand.request_id or None,
        opening.policy_version,
        _as_json(opening.decision),
        [candidate.backend for candidate in opening.candidates],
        [candidate.model for candidate in opening.candidates],
        [None if price is None else price.id for price in prices],
        opening.currency,
        demand.channels,
        opening.held_ms,
        cover_nano(opening.held_ms, opening.nano_per_hour),
    )
    return Session(
        id=opening.session_id,
        tenant_id=caller.tenant_id,
        kind=demand.kind,
        status="open",
        code=None,
        subject=caller.subject,
        customer=demand.customer,
        metadata=demand.metadata,
        request_id=demand.request_id or None,
        policy_version=opening.policy_version,
        decision=opening.decision,
        backend=None,
        engine=None,
        model=None,
        language=None,
        currency=opening.currency,
        channels=demand.channels,
        started_at=row["started_at"],
        seen_at=row["started_at"],
        ended_at=None,
        accepted_ms=0,
        billed_ms=0,
        held_ms=opening.held_ms,
        segments=0,
        utterances=0,
        words=0,
        turn=0,
        text=None,
    )


@dataclass(frozen=True, slots=True)
class Settled:
    """Where the session stands now. `free_nano`: what the tightest hard budget has left; None: there is none."""

    billed_ms: int
    held_ms: int
    free_nano: int | None
    tenant_active: bool


async def settle(
    database: Database,
    tenant_id: UUID,
    segment: Segment,
    *,
    turn: int,
    progress: Progress | None,
    outcome: Outcome | None,
    attempts: Sequence[legs.Priced] = (),
) -> Settled:
    """Bills a segment of a session that stands at its start, notes what it came to so far and which attempts there
    were, and with an outcome ends it and gives back what is still held. Raises `Unusual`."""
    billed_ms = (segment.end_ms - segment.start_ms) * segment.channels
    price = segment.price
    amount = amount_nano(billed_ms, price.price_nano_per_hour)
    row = await _once(
        database,
        _SETTLE,
        tenant_id,
        segment.source_id,
        turn,
        segment.segment_no,
        segment.start_ms,
        segment.end_ms,
        billed_ms,
        segment.channels,
        segment.backend,
        segment.model,
        segment.customer,
        price.id,
        price.price_nano_per_hour,
        amount,
        amount_nano(billed_ms, price.cost_nano_per_hour),
        price.currency,
        amount if segment.held_nano is None else segment.held_nano,
        None if outcome is None else outcome.status,
        *_came_to(progress, outcome),
        legs.as_json(attempts),
    )
    return Settled(row["all_billed_ms"], row["all_held_ms"], row["free_nano"], row["active"])


def _came_to(progress: Progress | None, outcome: Outcome | None) -> tuple[object, ...]:
    """Code, engine, language, utterances, words and text: the outcome's, else as far as it had come."""
    both = (outcome, progress)
    names = ("code", "engine", "language", "utterances", "words", "text")
    return tuple(next((v for each in both if (v := getattr(each, name, None)) is not None), None) for name in names)


async def _once(database: Database, call: str, *values: object) -> asyncpg.Record:
    try:
        row = await database.once(call, *values)
    except asyncpg.PostgresError as error:
        if error.sqlstate == UNUSUAL:
            raise Unusual from None
        raise
    if row is None:
        raise Unusual
    return row


def _parameters(count: int) -> str:
    return ", ".join(f"${number}" for number in range(1, count + 1))


@lru_cache(256)
def _as_json(decision: Decision) -> str:
    return json.dumps(decision.as_json())


_OPEN = f"select open_session_1({_parameters(17)}) as started_at"
_SETTLE = f"select * from settle_session_1({_parameters(25)})"  # noqa: S608  constants only
