"""Statements: what a tenant owes for a period, read from the ledger and written for an accountant.

Days are UTC, and everything of a session belongs to the day of its start.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, fields
from datetime import date
from typing import Any

from sqlalchemy import Row, text

from policy.errors import Conflict, Invalid
from policy.pricing import show_nano
from policy.reckoning import ROUNDING, Cell, Line, Reconciliation, Statement, Totals, assemble
from policy.tenants import Tenant
from runtime.database import Transaction

__all__ = ["Statement", "build", "to_csv", "to_json"]

COLUMNS = (
    *("record", "tenant", "customer", "from", "to", "currency", "day", "backend", "model", "kind", "price_id"),
    *("price_per_hour", "sessions", "segments", "audio_ms", "billed_ms", "duration", "amount"),
)


async def build(tx: Transaction, tenant: Tenant, start: date, end: date, customer: str | None = None) -> Statement:
    """The statement of the UTC days `[start, end)`. One query, so that it is of one moment. Raises `Invalid`, and
    `Conflict` when the period has usage in another currency than the tenant's."""
    if end <= start:
        raise Invalid("A statement's period ends after it starts.", param="to")
    values = {"tenant": tenant.id, "start": start, "end": end, "customer": customer}
    rows = (await tx.execute(_QUERY, values)).all()
    first = rows[0]
    if set(first.currencies or ()) - {tenant.currency}:
        raise Conflict(f"The period has usage in {', '.join(first.currencies)}; the tenant's currency is not alone.")
    totals = Totals(**{field.name: getattr(first, f"all_{field.name}") for field in fields(Totals)})
    cells = [_cell(row) for row in rows if row.day is not None]
    return assemble(tenant, start, end, customer=customer, cells=cells, totals=totals)


def to_json(statement: Statement) -> str:
    """JSON with money, and prices, as strings."""
    document = {
        **_header(statement),
        "rounding_rule": ROUNDING,
        "lines": [_line_fields(line) for line in statement.lines],
        "total": str(statement.total),
        "daily": [_shown(asdict(day)) for day in statement.annex],
        "reconciliation": _reconciliation_fields(statement.reconciliation),
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def to_csv(statement: Statement) -> str:
    """RFC 4180, every row with the same columns. `record` says what it is: `line`, `total`, `day`, or a part of the
    reconciliation (`ledger`, `sessions`, `difference`, `rounding`). Text is written so that no spreadsheet takes it
    for a formula."""
    check = statement.reconciliation
    records: list[dict[str, Any]] = [
        *({"record": "line", **_line_fields(line)} for line in statement.lines),
        {"record": "total", "billed_ms": check.lines_billed_ms, "amount": str(statement.total)},
        *({"record": "day", **_shown(asdict(day))} for day in statement.annex),
        {
            "record": "ledger",
            "segments": check.ledger.rows,
            "audio_ms": check.ledger.audio_ms,
            "billed_ms": check.ledger.billed_ms,
            "amount": str(check.ledger_amount),
        },
        {"record": "sessions", "billed_ms": check.ledger.sessions_billed_ms},
        {"record": "difference", "billed_ms": check.difference_ms},
        {"record": "rounding", "amount": str(check.rounding)},
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\r\n")
    writer.writeheader()
    for record in records:
        text_fields = {**_header(statement), **record}
        writer.writerow({name: _cell_text(name, text_fields.get(name)) for name in COLUMNS})
    return out.getvalue()


def _header(statement: Statement) -> dict[str, Any]:
    return {
        "tenant": statement.tenant.slug,
        "customer": statement.customer,
        "from": statement.start.isoformat(),
        "to": statement.end.isoformat(),
        "currency": statement.tenant.currency,
    }


def _line_fields(line: Line) -> dict[str, Any]:
    shown = _shown(asdict(line))
    return {
        **{name: value for name, value in shown.items() if name != "price_nano_per_hour"},
        "price_per_hour": show_nano(line.price_nano_per_hour),
        "duration": _duration(line.billed_ms),
    }


def _reconciliation_fields(check: Reconciliation) -> dict[str, Any]:
    return {
        "ledger_rows": check.ledger.rows,
        "first_seq": check.ledger.first_seq,
        "last_seq": check.ledger.last_seq,
        "audio_ms": check.ledger.audio_ms,
        "billed_ms": check.ledger.billed_ms,
        "lines_billed_ms": check.lines_billed_ms,
        "sessions_billed_ms": check.ledger.sessions_billed_ms,
        "difference_ms": check.difference_ms,
        "ledger_amount": str(check.ledger_amount),
        "rounding_difference": str(check.rounding),
        "balanced": check.balanced,
    }


def _shown(values: dict[str, Any]) -> dict[str, Any]:
    """Everything that JSON has no exact word for, as a string."""
    return {name: value if isinstance(value, int | None) else str(value) for name, value in values.items()}


def _duration(ms: int) -> str:
    """h:mm:ss.mmm"""
    seconds, rest = divmod(abs(ms), 1000)
    return f"{'-' if ms < 0 else ''}{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{rest:03d}"


def _cell_text(name: str, value: Any) -> Any:
    """Only what others named can carry a formula; a negative amount must stay a number."""
    risky = name in ("customer", "backend", "model", "kind") and isinstance(value, str)
    return f"'{value}" if risky and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value


def _cell(row: Row[Any]) -> Cell:
    return Cell(**{field.name: getattr(row, field.name) for field in fields(Cell)})


_QUERY = text("""
    with entries as (
        select * from usage_ledger
        where tenant_id = :tenant and ledger_day >= :start and ledger_day < :end
          and (cast(:customer as text) is null or customer = :customer)
    ), totals as (
        select count(*) as all_rows, min(seq) as all_first_seq, max(seq) as all_last_seq,
               cast(coalesce(sum(audio_ms), 0) as bigint) as all_audio_ms,
               cast(coalesce(sum(billed_ms), 0) as bigint) as all_billed_ms,
               cast(coalesce(sum(billed_ms) filter (where kind = 'usage'), 0) as bigint) as all_usage_ms,
               cast(coalesce(sum(amount_nano), 0) as bigint) as all_amount_nano,
               array_agg(distinct currency) as currencies
        from entries
    ), own as (
        select cast(coalesce(sum(billed_ms), 0) as bigint) as all_sessions_billed_ms
        from sessions
        where tenant_id = :tenant and (cast(:customer as text) is null or customer = :customer)
          and started_at >= cast(:start as timestamp) at time zone 'UTC'
          and started_at < cast(:end as timestamp) at time zone 'UTC'
    ), cells as (
        select ledger_day as day, backend, model, kind, price_id, price_nano_per_hour,
               count(distinct source_id) as sessions, count(*) as segments,
               cast(sum(audio_ms) as bigint) as audio_ms, cast(sum(billed_ms) as bigint) as billed_ms
        from entries group by ledger_day, backend, model, kind, price_id, price_nano_per_hour
    )
    select * from totals cross join own left join cells on true
""")
