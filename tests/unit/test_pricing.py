"""Money is integers and Decimals, and rounds half to even, once."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from itertools import pairwise
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.pricing import (
    Price,
    affordable_ms,
    amount_nano,
    cover_nano,
    exact,
    half_even,
    minor_unit_digits,
    most_expensive,
    show_nano,
)

MS = st.integers(0, 10**12)
PRICES = st.integers(0, 10**13)


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**20))
def test_half_even_is_pythons_exact_rounding_of_fractions(numerator: int, denominator: int) -> None:
    assert half_even(numerator, denominator) == round(Fraction(numerator, denominator))


@pytest.mark.parametrize(("numerator", "rounded"), [(1, 0), (3, 2), (5, 2), (7, 4), (-1, 0), (-3, -2), (-5, -2)])
def test_a_half_goes_to_the_even_neighbour(numerator: int, rounded: int) -> None:
    assert half_even(numerator, 2) == rounded


@given(MS, PRICES)
def test_an_amount_is_the_decimal_quotient(ms: int, nano: int) -> None:
    quotient = Decimal(ms * nano) / Decimal(3_600_000)
    if ms * nano < 10**20:  # within Decimal's 28 digits
        assert amount_nano(ms, nano) == quotient.quantize(Decimal(1), rounding=ROUND_HALF_EVEN)
    assert cover_nano(ms, nano) - 1 <= amount_nano(ms, nano) <= cover_nano(ms, nano)


@given(st.lists(st.integers(0, 10**8), min_size=1, max_size=20), PRICES)
def test_holds_of_adjoining_spans_add_up_to_the_hold_of_the_whole(cuts: list[int], nano: int) -> None:
    marks = [0, *sorted(cuts)]
    parts = [cover_nano(end, nano) - cover_nano(start, nano) for start, end in pairwise(marks)]
    assert min(parts) >= 0
    assert sum(parts) == cover_nano(marks[-1], nano)


@given(st.integers(0, 10**15), st.integers(1, 10**13))
def test_what_is_affordable_is_covered_and_one_more_is_not(nano: int, price: int) -> None:
    ms = affordable_ms(nano, price)
    assert ms is not None
    assert cover_nano(ms, price) <= nano < cover_nano(ms + 1, price)


def test_what_is_free_has_no_end_and_what_is_overdrawn_buys_nothing() -> None:
    assert affordable_ms(0, 0) is None
    assert affordable_ms(-5, 7) == 0


def test_an_hour_costs_the_price_of_an_hour() -> None:
    assert amount_nano(3_600_000, 258_000_000) == 258_000_000
    assert amount_nano(60_000, 258_000_000) == 4_300_000
    assert amount_nano(0, 258_000_000) == 0


@pytest.mark.parametrize(
    ("nano", "shown"),
    [
        (4_420_000, "0.004420"),
        (4_420_100, "0.0044201"),
        (1, "0.000000001"),
        (0, "0.000000"),
        (-1_500_000_000, "-1.500000"),
        (12_345_678_901_234_567_890, "12345678901.23456789"),
    ],
)
def test_nano_units_are_shown_exactly(nano: int, shown: str) -> None:
    assert show_nano(nano) == shown


@given(st.integers(-(10**25), 10**25))
def test_every_string_is_worth_its_nano_units(nano: int) -> None:
    assert Decimal(show_nano(nano)) == exact(nano) == Decimal(nano).scaleb(-9)
    assert len(show_nano(nano).partition(".")[2]) >= 6


@pytest.mark.parametrize(
    ("currency", "digits"), [("USD", 2), ("EUR", 2), ("JPY", 0), ("XPF", 0), ("KWD", 3), ("CLF", 4)]
)
def test_minor_units(currency: str, digits: int) -> None:
    assert minor_unit_digits(currency) == digits


def test_the_most_expensive() -> None:
    prices = [Price(UUID(int=n), "b", "m", nano, 0, "USD") for n, nano in enumerate((3, 9, 4))]
    assert most_expensive(prices) is prices[1]
