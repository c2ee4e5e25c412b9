"""The two steps that every session takes, its opening and its settling, each as one statement.

Both do what `policy.sessions`, `policy.budget` and `policy.metering` do one after the other, for the usual case: what
is known of the tenant and of the session still holds, the budget's windows are there, and they have room. Each checks
that itself, and where anything is otherwise writes nothing and says so; whoever asked then goes the long way, which
finds out what it is. The locks are taken in the same order: the session's row, its holds, the windows by budget id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias
from uuid import UUID

from policy import legs
from policy.budget import WINDOW_START
from policy.identity import Caller
from policy.metering import Segment
from policy.pricing import Price, amount_nano, cover_nano, most_expensive
from policy.resolve import Candidate, Decision, Demand
from policy.sessions import Outcome, Progress, Session
from runtime.database import Step

Prices: TypeAlias = Mapping[tuple[str, str], Price]
"""By backend and model."""


class Unusual(Exception):
    """Raised inside of a step to take back what it has written."""


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


async def open_session(step: Step, opening: Opening) -> Session:
    """Writes the row and the hold. Raises `Unusual`; leave the step then."""
    caller, demand = opening.caller, opening.demand
    prices = [opening.prices.get((candidate.backend, candidate.model)) for candidate in opening.candidates]
    row = await step.fetchrow(
        _OPEN,
        caller.tenant_id,
        opening.session_id,
        caller.token_id,
        opening.currency,
        [candidate.backend for candidate in opening.candidates],
        [candidate.model for candidate in opening.candidates],
        [None if price is None else price.id for price in prices],
        demand.kind,
        caller.subject,
        demand.customer,
        json.dumps(dict(demand.metadata)),
        demand.request_id or None,
        opening.policy_version,
        _as_json(opening.decision),
        demand.channels,
        opening.held_ms,
        cover_nano(opening.held_ms, opening.nano_per_hour),
    )
    if row is None or row["started_at"] is None or row["budgets"] != row["held"]:
        raise Unusual
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
    step: Step,
    tenant_id: UUID,
    segment: Segment,
    *,
    turn: int,
    progress: Progress | None,
    outcome: Outcome | None,
    attempts: Sequence[legs.Priced] = (),
) -> Settled:
    """Bills a segment of a session that stands at its start, notes what it came to so far and which attempts there
    were, and with an outcome ends it and gives back what is still held. Raises `Unusual`; leave the step then."""
    ms = segment.end_ms - segment.start_ms
    billed_ms = ms * segment.channels
    price = segment.price
    amount = amount_nano(billed_ms, price.price_nano_per_hour)
    row = await step.fetchrow(
        _SETTLE,
        tenant_id,
        segment.source_id,
        turn,
        segment.segment_no,
        segment.start_ms,
        segment.end_ms,
        ms,
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
        *legs.columns(attempts),
    )
    if row is None or not row["billed"]:
        raise Unusual
    return Settled(row["billed_ms"], row["held_ms"], row["free_nano"], row["active"])


def _came_to(progress: Progress | None, outcome: Outcome | None) -> tuple[object, ...]:
    """Code, engine, language, utterances, words and text: the outcome's, else as far as it had come."""
    both = (outcome, progress)
    names = ("code", "engine", "language", "utterances", "words", "text")
    return tuple(next((v for each in both if (v := getattr(each, name, None)) is not None), None) for name in names)


@lru_cache(256)
def _as_json(decision: Decision) -> str:
    return json.dumps(decision.as_json())


# Nothing is inserted unless all that the caller knew is so. A window that is not there yet, or has no room, shows in
# the counts. `fits` is of the row as it is once locked.
_OPEN = f"""
    with tenant as (
        select t.id, t.billing_tz from tenants t
        where t.id = $1 and t.status = 'active' and t.currency = $4
          and not exists (select from revoked_tokens r where r.tenant_id = $1 and r.token_id = $3)
          and not exists (
              select from unnest($5::text[], $6::text[], $7::uuid[]) as candidate (backend, model, price)
              where candidate.price is distinct from (
                  select id from price_book
                  where (tenant_id is null or tenant_id = $1) and backend = candidate.backend
                    and model in ('*', candidate.model) and currency = $4 and effective @> now()
                  order by tenant_id is null, model = '*' limit 1
              )
          )
    ), session as (
        insert into sessions (tenant_id, id, kind, subject, customer, metadata, request_id, policy_version, decision,
                              currency, channels, held_ms)
        select $1, $2::uuid, $8, $9, $10, $11::jsonb, $12, $13, $14::jsonb, $4, $15, $16 from tenant
        returning started_at
    ), mine as (
        select b.id, b.hard, b.limit_nano, {WINDOW_START.format(moment="session.started_at")} as window_start
        from session cross join tenant t join budgets b on b.tenant_id = $1 and b.active
    ), fitting as (
        select w.budget_id, w.window_start,
               not mine.hard or w.settled_nano + w.held_nano + $17::bigint <= mine.limit_nano as fits
        from mine join budget_windows w
             on w.tenant_id = $1 and w.budget_id = mine.id and w.window_start = mine.window_start
        order by w.budget_id for update of w
    ), noted as (
        insert into budget_holds (tenant_id, session_id, budget_id, window_start, amount_nano)
        select $1, $2::uuid, budget_id, window_start, $17::bigint from fitting where fits
    ), held as (
        update budget_windows w set held_nano = w.held_nano + $17 from fitting
        where w.tenant_id = $1 and w.budget_id = fitting.budget_id and w.window_start = fitting.window_start and fits
        returning w.budget_id
    )
    select (select started_at from session), (select count(*) from mine) as budgets, (select count(*) from held) as held
"""  # noqa: S608  constants only

# As `policy.metering` settles and `policy.budget` releases; $19::text is null while the session goes on.
_SETTLE = f"""
    with session as (
        select s.id, s.started_at from sessions s
        where s.tenant_id = $1 and s.id = $2 and s.status = 'open' and s.turn = $3 and s.segments = $4
          and s.accepted_ms = $5
        for no key update
    ), key as (
        insert into usage_keys (tenant_id, source_id, segment_no, kind) select $1, id, $4, 'usage' from session
        on conflict do nothing
        returning source_id
    ), written as (
        update sessions s
        set accepted_ms = $6, billed_ms = s.billed_ms + $8, segments = s.segments + 1,
            held_ms = greatest(s.held_ms, $6), seen_at = now(), backend = $10, model = $11,
            status = coalesce($19::text, s.status), ended_at = case when $19::text is not null then now() end,
            code = coalesce($20, s.code), engine = coalesce($21, s.engine), language = coalesce($22, s.language),
            utterances = coalesce($23, s.utterances), words = coalesce($24, s.words), text = coalesce($25, s.text)
        from key where s.tenant_id = $1 and s.id = key.source_id
        returning s.id, s.started_at, s.billed_ms, s.held_ms
    ), entry as (
        insert into usage_ledger (tenant_id, ledger_day, source_id, segment_no, kind, customer, backend, model,
                                  start_ms, end_ms, audio_ms, billed_ms, price_id, price_nano_per_hour,
                                  amount_nano, cost_nano, currency, channels)
        select $1, cast(started_at at time zone 'UTC' as date), id, $4, 'usage', $12, $10, $11,
               $5, $6, $7, $8, $13, $14, $15, $16, $17, $9
        from written
        returning source_id
    ), held as (
        select h.budget_id, h.window_start, h.amount_nano,
               case when $19::text is null then least(h.amount_nano, $18) else h.amount_nano end as freed
        from entry
        join budget_holds h on h.tenant_id = $1 and h.session_id = entry.source_id and h.state = 'open'
        join budget_windows w on w.tenant_id = $1 and w.budget_id = h.budget_id and w.window_start = h.window_start
        order by h.budget_id for update of h, w
    ), lowered as (
        update budget_holds h
        set amount_nano = h.amount_nano - held.freed,
            state = case when $19::text is null then h.state else 'released' end
        from held where h.tenant_id = $1 and h.session_id = $2 and h.budget_id = held.budget_id
    ), moved as (
        update budget_windows w set held_nano = w.held_nano - held.freed, settled_nano = w.settled_nano + $15
        from held
        where w.tenant_id = $1 and w.budget_id = held.budget_id and w.window_start = held.window_start
        returning w.budget_id, w.settled_nano + w.held_nano as spent_nano
    ), attempts as (
        insert into legs (tenant_id, session_id, {legs.NAMES})
        select $1, written.id, leg.* from written cross join unnest(
            $26::uuid[], $27::text[], $28::text[], $29::uuid[], $30::text[], $31::bigint[], $32::bigint[],
            $33::bigint[], $34::bigint[], $35::bigint[], $36::text[]
        ) as leg
        on conflict do nothing
    )
    select written.billed_ms, written.held_ms, t.status = 'active' as active, exists (select from entry) as billed,
           (select min(b.limit_nano - coalesce(moved.spent_nano, w.settled_nano + w.held_nano, 0))
            from budgets b left join moved on moved.budget_id = b.id
            left join budget_windows w on w.tenant_id = $1 and w.budget_id = b.id
                 and w.window_start = {WINDOW_START.format(moment="written.started_at")}
            where b.tenant_id = $1 and b.active and b.hard) as free_nano
    from written join tenants t on t.id = $1
"""  # noqa: S608
