"""The arithmetic of a statement, without a database.

Milliseconds are summed and rounded to money once, on the line: half to even, to the currency's smallest unit. A line is
everything of one backend, model, price and kind. The daily annex is not rounded to that unit but shown to six decimals.
The reconciliation sets the lines beside the ledger's rows and the sessions themselves, and must come out at zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any
from uuid import UUID

from policy.pricing import HOUR_MS, NANO, exact, half_even, minor_unit_digits
from policy.tenants import Tenant

ROUNDING = "half to even, once per line, to the currency's smallest unit"
ANNEX_DIGITS = 6


@dataclass(frozen=True)
class Cell:
    """The ledger's sums for one day, backend, model, price and kind."""

    day: date
    backend: str
    model: str
    kind: str
    price_id: UUID
    price_nano_per_hour: int
    sessions: int
    segments: int
    audio_ms: int
    billed_ms: int


@dataclass(frozen=True)
class Totals:
    """The ledger's sums over the same rows taken at once, and what their sessions say themselves. `usage_ms` are the
    billed milliseconds of usage proper, without adjustments, which no session knows."""

    rows: int
    first_seq: int | None
    last_seq: int | None
    audio_ms: int
    billed_ms: int
    usage_ms: int
    amount_nano: int
    sessions_billed_ms: int


@dataclass(frozen=True)
class Line:
    """One rounded amount."""

    backend: str
    model: str
    kind: str
    price_id: UUID
    price_nano_per_hour: int
    sessions: int
    segments: int
    audio_ms: int
    billed_ms: int
    amount: Decimal


@dataclass(frozen=True)
class AnnexDay:
    """One day's usage of a backend and model, to six decimals."""

    day: date
    backend: str
    model: str
    audio_ms: int
    billed_ms: int
    amount: Decimal


@dataclass(frozen=True)
class Reconciliation:
    """Lines against ledger against sessions. Both differences must be 0; `rounding` is the lines' total less the
    ledger's sum, never more than half a smallest unit for each line and half a nano-unit for each row."""

    ledger: Totals
    lines_billed_ms: int
    difference_ms: int
    ledger_amount: Decimal
    rounding: Decimal

    @property
    def balanced(self) -> bool:
        return self.difference_ms == 0 and self.lines_billed_ms == self.ledger.billed_ms


@dataclass(frozen=True)
class Statement:
    """The days `[start, end)` of a tenant, or of one of its customers."""

    tenant: Tenant
    customer: str | None
    start: date
    end: date
    lines: tuple[Line, ...]
    annex: tuple[AnnexDay, ...]
    total: Decimal
    reconciliation: Reconciliation


def assemble(
    tenant: Tenant, start: date, end: date, *, customer: str | None, cells: Sequence[Cell], totals: Totals
) -> Statement:
    """The statement that these sums come to."""
    digits = minor_unit_digits(tenant.currency)
    by_price = _grouped(cells, lambda cell: (cell.backend, cell.model, cell.price_id, cell.kind))
    by_day = _grouped(cells, lambda cell: (cell.day, cell.backend, cell.model))
    lines = tuple(_line(group, digits) for group in by_price)
    total = sum((line.amount for line in lines), Decimal(0).scaleb(-digits))
    return Statement(
        tenant=tenant,
        customer=customer,
        start=start,
        end=end,
        lines=lines,
        annex=tuple(_annex_day(group) for group in by_day),
        total=total,
        reconciliation=Reconciliation(
            ledger=totals,
            lines_billed_ms=sum(line.billed_ms for line in lines),
            difference_ms=totals.usage_ms - totals.sessions_billed_ms,
            ledger_amount=exact(totals.amount_nano),
            rounding=total - exact(totals.amount_nano),
        ),
    )


def money(milli_nano: int, digits: int) -> Decimal:
    """A sum of (milliseconds × nano-units per hour) as an amount of so many decimals, half to even."""
    return Decimal(half_even(milli_nano * 10**digits, HOUR_MS * NANO)).scaleb(-digits)


def _grouped(cells: Iterable[Cell], key: Callable[[Cell], Any]) -> list[list[Cell]]:
    groups: defaultdict[Any, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[key(cell)].append(cell)
    return [groups[name] for name in sorted(groups)]


def _line(group: Sequence[Cell], digits: int) -> Line:
    first = group[0]
    return Line(
        backend=first.backend,
        model=first.model,
        kind=first.kind,
        price_id=first.price_id,
        price_nano_per_hour=first.price_nano_per_hour,
        sessions=sum(cell.sessions for cell in group),  # a session is of one day, so none is counted twice
        segments=sum(cell.segments for cell in group),
        audio_ms=sum(cell.audio_ms for cell in group),
        billed_ms=sum(cell.billed_ms for cell in group),
        amount=money(sum(cell.billed_ms * cell.price_nano_per_hour for cell in group), digits),
    )


def _annex_day(group: Sequence[Cell]) -> AnnexDay:
    first = group[0]
    return AnnexDay(
        day=first.day,
        backend=first.backend,
        model=first.model,
        audio_ms=sum(cell.audio_ms for cell in group),
        billed_ms=sum(cell.billed_ms for cell in group),
        amount=money(sum(cell.billed_ms * cell.price_nano_per_hour for cell in group), ANNEX_DIGITS),
    )
