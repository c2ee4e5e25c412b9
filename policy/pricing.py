"""Prices, and the only places where audio becomes money.

A price is whole nano-units of its currency per hour: $0.0043 a minute is exactly 258,000,000, while a price per second
would not come out even. Amounts are integers, or `Decimal` on a statement; no float comes near them. The price book is
effective-dated: a new price closes the old one, and a session keeps the price of its start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.exc import IntegrityError

from policy import audit
from policy.errors import Conflict, Invalid, NoPrice
from runtime.database import Transaction
from runtime.ids import uuid7

HOUR_MS = 3_600_000
NANO = 1_000_000_000
ANY_MODEL = "*"

# ISO 4217:2015, amendments to 2025: currencies whose minor unit is not a hundredth.
_MINOR_UNITS = {
    **dict.fromkeys(
        ("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "UYI", "VND", "VUV", "XAF"), 0
    ),
    **dict.fromkeys(("XOF", "XPF"), 0),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
    **dict.fromkeys(("CLF", "UYW"), 4),
}


@dataclass(frozen=True)
class Price:
    """One row of the price book: what the tenant pays, and what it costs us, in nano-units of `currency` per hour."""

    id: UUID
    backend: str
    model: str
    price_nano_per_hour: int
    cost_nano_per_hour: int
    currency: str


@dataclass(frozen=True)
class BookEntry:
    """A price now in force. `tenant_id` None: the list price."""

    tenant_id: UUID | None
    price: Price


@dataclass(frozen=True)
class PriceList:
    """What one tenant pays now, in its currency: its own prices and the list's, by (own, backend, model)."""

    currency: str
    prices: Mapping[tuple[bool, str, str], Price]

    def of(self, backend: str, model: str) -> Price | None:
        """By the rule of `price_for`; None: not for sale."""
        ways = ((own, backend, name) for own in (True, False) for name in (model, ANY_MODEL))
        return next((self.prices[way] for way in ways if way in self.prices), None)


def half_even(numerator: int, denominator: int) -> int:
    """The nearest integer to the quotient, a half to the even one, also below zero. `denominator` > 0."""
    quotient, remainder = divmod(numerator, denominator)
    if 2 * remainder > denominator or (2 * remainder == denominator and quotient % 2):
        quotient += 1
    return quotient


def amount_nano(ms: int, nano_per_hour: int) -> int:
    """What so many milliseconds come to, half to even."""
    return half_even(ms * nano_per_hour, HOUR_MS)


def cover_nano(ms: int, nano_per_hour: int) -> int:
    """The least that covers so many milliseconds: `amount_nano`, rounded up. For holds."""
    return -(-ms * nano_per_hour // HOUR_MS)


def affordable_ms(nano: int, nano_per_hour: int) -> int | None:
    """How much audio so much money buys; None: no end of it, because it is free."""
    return max(0, nano) * HOUR_MS // nano_per_hour if nano_per_hour else None


def most_expensive(prices: Iterable[Price]) -> Price:
    """The one to hold for while the backend is not yet certain. `prices` is not empty."""
    return max(prices, key=lambda price: price.price_nano_per_hour)


def minor_unit_digits(currency: str) -> int:
    """Decimals of the currency's smallest unit."""
    return _MINOR_UNITS.get(currency, 2)


def exact(nano: int) -> Decimal:
    """Nano-units as an exact amount with nine decimals."""
    return Decimal(nano).scaleb(-9)


def show_nano(nano: int) -> str:
    """Nano-units as an exact decimal string with six decimals or, where they matter, more: "0.004420"."""
    sign, whole = ("-" if nano < 0 else ""), abs(nano)
    fraction = f"{whole % NANO:09d}"
    return f"{sign}{whole // NANO}.{fraction[:6]}{fraction[6:].rstrip('0')}"


async def price_for(
    tx: Transaction, tenant_id: UUID, backend: str, model: str, currency: str, *, at: datetime | None = None
) -> Price:
    """The price in force, now or at another moment: the tenant's own before the list's, the very model's before the
    one for any model. Raises `NoPrice`."""
    key = {"tenant": tenant_id, "backend": backend, "model": model, "currency": currency, "at": at}
    row = (await tx.execute(_FIND, key)).one_or_none()
    if row is None:
        raise NoPrice(f"No price in {currency} is set for {backend} with {model}, so it is not for sale.")
    return _price(row)


async def price_list(tx: Transaction, tenant_id: UUID, currency: str) -> PriceList:
    """Every price in force that the tenant may be asked."""
    rows = await tx.execute(_LIST, {"tenant": tenant_id, "currency": currency})
    return PriceList(currency, {(row.own, row.backend, row.model): _price(row) for row in rows})


async def set_price(
    tx_system: Transaction,
    *,
    backend: str,
    model: str = ANY_MODEL,
    price_nano_per_hour: int,
    cost_nano_per_hour: int = 0,
    currency: str,
    tenant_id: UUID | None = None,
    actor: str,
) -> Price:
    """Puts a price in force from now on; sessions under way keep theirs. The same price again changes nothing.

    Raises `Invalid`, or `Conflict` when somebody else set this price at the same moment.
    """
    if price_nano_per_hour < 0 or cost_nano_per_hour < 0:
        raise Invalid("A price is not negative.", param="price_nano_per_hour")
    key = {"tenant": tenant_id, "backend": backend, "model": model, "currency": currency}
    row = (await tx_system.execute(_CURRENT, key)).one_or_none()
    before = None if row is None else _price(row)
    if before and (before.price_nano_per_hour, before.cost_nano_per_hour) == (price_nano_per_hour, cost_nano_per_hour):
        return before
    price = Price(uuid7(), backend, model, price_nano_per_hour, cost_nano_per_hour, currency)
    try:
        await tx_system.execute(_CLOSE, {"id": before and before.id})
        await tx_system.execute(
            _OPEN, {**vars(price), "tenant": tenant_id, "actor": actor, "after": before and before.id}
        )
    except IntegrityError as error:
        raise Conflict("Somebody else set this price at the same moment.") from error
    await audit.record(
        tx_system,
        actor=actor,
        action="price.set",
        object=f"price/{backend}/{model}/{currency}",
        tenant_id=tenant_id,
        before=None if before is None else vars(before),
        after=vars(price),
    )
    return price


async def listing(tx: Transaction, tenant_id: UUID | None = None) -> list[BookEntry]:
    """The prices in force that the transaction may see; where a tenant is named, the list's and its own."""
    return [BookEntry(row.tenant_id, _price(row)) for row in await tx.execute(_LISTING, {"tenant": tenant_id})]


def _price(row: Row[Any]) -> Price:
    return Price(row.id, row.backend, row.model, row.price_nano_per_hour, row.cost_nano_per_hour, row.currency)


_COLUMNS = "id, backend, model, price_nano_per_hour, cost_nano_per_hour, currency"

_FIND = text(f"""
    select {_COLUMNS} from price_book
    where (tenant_id is null or tenant_id = :tenant) and backend = :backend and model in ('*', :model)
      and currency = :currency and effective @> coalesce(cast(:at as timestamptz), now())
    order by tenant_id is null, model = '*' limit 1
""")  # noqa: S608  constants only

_LIST = text(f"""
    select {_COLUMNS}, tenant_id is not null as own from price_book
    where (tenant_id is null or tenant_id = :tenant) and currency = :currency and effective @> statement_timestamp()
""")  # noqa: S608

_CURRENT = text(f"""
    select {_COLUMNS} from price_book
    where tenant_id is not distinct from cast(:tenant as uuid) and backend = :backend and model = :model
      and currency = :currency and upper_inf(effective)
    for update
""")  # noqa: S608

# A session that began under the old price must find it there, so a range never shrinks below what has passed: the
# wall clock, not now(), because a transaction that waited for the lock began before the price it replaces.
_CLOSE = text("""
    update price_book set effective = tstzrange(lower(effective), greatest(lower(effective), clock_timestamp()))
    where id = cast(:id as uuid)
""")
_OPEN = text("""
    insert into price_book (id, tenant_id, backend, model, price_nano_per_hour, cost_nano_per_hour, currency,
                            effective, created_by)
    values (:id, :tenant, :backend, :model, :price_nano_per_hour, :cost_nano_per_hour, :currency,
            tstzrange(coalesce((select upper(effective) from price_book where id = cast(:after as uuid)), now()), null),
            :actor)
""")
_LISTING = text(f"""
    select tenant_id, {_COLUMNS} from price_book
    where (cast(:tenant as uuid) is null or tenant_id is null or tenant_id = cast(:tenant as uuid))
      and upper_inf(effective)
    order by tenant_id nulls first, backend, model, currency
""")  # noqa: S608
