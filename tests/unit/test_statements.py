"""A statement's arithmetic and its two written forms."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from datetime import date
from decimal import Decimal
from fractions import Fraction
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.reckoning import Cell, Statement, Totals, assemble
from policy.statements import to_csv, to_json
from policy.tenants import Tenant

TENANT = Tenant(UUID(int=1), "acme", "Acme", "active", "USD", "UTC")
START, END = date(2026, 11, 1), date(2026, 12, 1)
CELL = Cell(
    day=date(2026, 11, 20),
    backend="self_hosted",
    model="micro",
    kind="usage",
    price_id=UUID(int=7),
    price_nano_per_hour=258_000_000,
    sessions=3,
    segments=5,
    audio_ms=61_230,
    billed_ms=61_230,
)


def statement(*cells: Cell, tenant: Tenant = TENANT, customer: str | None = None, lost_ms: int = 0) -> Statement:
    """As the ledger would give it, had it one row for each cell."""
    billed = sum(cell.billed_ms for cell in cells)
    totals = Totals(
        rows=len(cells),
        first_seq=1 if cells else None,
        last_seq=len(cells) or None,
        audio_ms=sum(cell.audio_ms for cell in cells),
        billed_ms=billed,
        usage_ms=billed,
        amount_nano=sum(round(Fraction(cell.billed_ms * cell.price_nano_per_hour, 3_600_000)) for cell in cells),
        sessions_billed_ms=billed - lost_ms,
    )
    return assemble(tenant, START, END, customer=customer, cells=cells, totals=totals)


def test_rounding_happens_once_on_the_line() -> None:
    """100,000 segments of 1.234 s at $0.0043 a minute are $8.84; rounded one by one to cents they would be nothing."""
    days = [replace(CELL, day=date(2026, 11, 1 + n % 30), audio_ms=12_340, billed_ms=12_340) for n in range(10_000)]
    result = statement(*days)
    [line] = result.lines
    assert line.billed_ms == 123_400_000
    assert (str(line.amount), str(result.total)) == ("8.84", "8.84")
    assert result.reconciliation.balanced
    assert abs(sum(day.amount for day in result.annex) - Decimal("8.843667")) <= 30 * Decimal("0.0000005")


@pytest.mark.parametrize(
    ("currency", "amount"), [("USD", "0.02"), ("JPY", "0"), ("KWD", "0.015"), ("CLF", "0.0150"), ("EUR", "0.02")]
)
def test_a_line_is_rounded_to_the_currencys_smallest_unit(currency: str, amount: str) -> None:
    cell = replace(CELL, billed_ms=3_600_000, price_nano_per_hour=15_000_000)  # 0.015: the half goes to the even
    result = statement(cell, tenant=replace(TENANT, currency=currency))
    assert str(result.lines[0].amount) == str(result.total) == amount


def test_one_line_for_each_backend_model_price_and_kind() -> None:
    cells = [
        CELL,
        replace(CELL, day=date(2026, 11, 21)),
        replace(CELL, model="small"),
        replace(CELL, price_id=UUID(int=8)),
        replace(CELL, backend="relay"),
        replace(CELL, kind="adjustment", billed_ms=-1_000, audio_ms=-1_000),
    ]
    result = statement(*cells)
    assert [(line.backend, line.model, line.price_id.int, line.kind, line.billed_ms) for line in result.lines] == [
        ("relay", "micro", 7, "usage", 61_230),
        ("self_hosted", "micro", 7, "adjustment", -1_000),
        ("self_hosted", "micro", 7, "usage", 122_460),
        ("self_hosted", "micro", 8, "usage", 61_230),
        ("self_hosted", "small", 7, "usage", 61_230),
    ]
    assert [(str(day.day), day.backend, day.model, day.billed_ms) for day in result.annex] == [
        ("2026-11-20", "relay", "micro", 61_230),
        ("2026-11-20", "self_hosted", "micro", 121_460),
        ("2026-11-20", "self_hosted", "small", 61_230),
        ("2026-11-21", "self_hosted", "micro", 61_230),
    ]


CELLS = st.lists(
    st.builds(
        replace,
        st.just(CELL),
        day=st.dates(START, date(2026, 11, 30)),
        model=st.sampled_from(["a", "b"]),
        backend=st.sampled_from(["self_hosted", "relay"]),
        billed_ms=st.integers(0, 10**10),
    ),
    max_size=12,
)


@given(CELLS)
def test_no_millisecond_is_lost_and_no_line_is_off_by_more_than_half_a_cent(cells: list[Cell]) -> None:
    result = statement(*cells)
    billed = sum(cell.billed_ms for cell in cells)
    true = sum(Fraction(cell.billed_ms * cell.price_nano_per_hour, 3_600_000 * 10**9) for cell in cells)
    assert sum(line.billed_ms for line in result.lines) == sum(day.billed_ms for day in result.annex) == billed
    assert result.total == sum((line.amount for line in result.lines), Decimal(0))
    assert abs(Fraction(result.total) - true) <= Fraction(len(result.lines), 200)
    assert abs(Fraction(sum((day.amount for day in result.annex), Decimal(0))) - true) <= Fraction(
        len(result.annex), 2 * 10**6
    )
    assert result.total - result.reconciliation.rounding == result.reconciliation.ledger_amount


def test_a_difference_to_the_sessions_is_said() -> None:
    check = statement(CELL, lost_ms=1).reconciliation
    assert (check.difference_ms, check.balanced) == (1, False)


def test_nothing_used_is_a_statement_too() -> None:
    result = statement()
    assert (result.lines, result.annex, str(result.total), result.reconciliation.balanced) == ((), (), "0.00", True)
    assert json.loads(to_json(result))["lines"] == []


def test_json_has_money_as_strings_and_no_fractional_number() -> None:
    def refuse(number: str) -> None:
        pytest.fail(f"{number} is a float")

    document = json.loads(to_json(statement(CELL, customer="Zoë")), parse_float=refuse)
    assert {name: document[name] for name in ("tenant", "customer", "from", "to", "currency", "total")} == {
        "tenant": "acme",
        "customer": "Zoë",
        "from": "2026-11-01",
        "to": "2026-12-01",
        "currency": "USD",
        "total": "0.00",
    }
    assert document["lines"] == [
        {
            "backend": "self_hosted",
            "model": "micro",
            "kind": "usage",
            "price_id": str(UUID(int=7)),
            "sessions": 3,
            "segments": 5,
            "audio_ms": 61_230,
            "billed_ms": 61_230,
            "amount": "0.00",
            "price_per_hour": "0.258000",
            "duration": "0:01:01.230",
        }
    ]
    assert document["daily"] == [
        {
            "day": "2026-11-20",
            "backend": "self_hosted",
            "model": "micro",
            "audio_ms": 61_230,
            "billed_ms": 61_230,
            "amount": "0.004388",
        }
    ]
    assert document["reconciliation"] == {
        "ledger_rows": 1,
        "first_seq": 1,
        "last_seq": 1,
        "audio_ms": 61_230,
        "billed_ms": 61_230,
        "lines_billed_ms": 61_230,
        "sessions_billed_ms": 61_230,
        "difference_ms": 0,
        "ledger_amount": "0.004388150",
        "rounding_difference": "-0.004388150",
        "balanced": True,
    }


def test_csv_is_rfc_4180_with_the_same_columns_in_every_row() -> None:
    written = to_csv(statement(replace(CELL, billed_ms=3_600_000, model='odd,"name"\r\n'), customer="Zoë"))
    assert written.endswith("\r\n")
    rows = list(csv.reader(io.StringIO(written, newline="")))
    assert {len(row) for row in rows} == {len(rows[0])}
    records = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert [record["record"] for record in records] == [
        *("line", "total", "day", "ledger", "sessions", "difference", "rounding")
    ]
    assert {record["customer"] for record in records} == {"Zoë"}
    assert (records[0]["model"], records[0]["amount"], records[0]["duration"]) == (
        'odd,"name"\r\n',
        "0.26",
        "1:00:00.000",
    )
    assert (records[1]["amount"], records[2]["amount"], records[5]["billed_ms"]) == ("0.26", "0.258000", "0")


@pytest.mark.parametrize("evil", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_csv_text_is_no_formula_and_a_negative_number_stays_one(evil: str) -> None:
    written = to_csv(statement(replace(CELL, billed_ms=-1_000, kind="adjustment"), customer=evil))
    line = next(csv.DictReader(io.StringIO(written, newline="")))
    assert line["customer"] == f"'{evil}"
    assert line["billed_ms"] == "-1000"
