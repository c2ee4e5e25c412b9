"""What a tenant may do and what it pays, as this process knows it: read anew after `KEPT_S`, and at the moment when a
scheduled version of the policy takes effect."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import UUID

from policy import policies, pricing, tenants
from policy.errors import Invalid, ModelNotFound, NoPrice, NotAllowed
from policy.outage import ledger_reachable
from policy.policies import Policy
from policy.pricing import PriceList
from policy.resolve import Decision, Demand, Offer, resolve
from runtime.beats import spread
from runtime.database import Database

KEPT_S = 2.0
KEPT_MOST = 10_000


@dataclass(frozen=True)
class Terms:
    """A policy, and the prices in force beside it."""

    policy: Policy
    prices: PriceList

    def decide(self, demand: Demand, offers: Sequence[Offer]) -> Decision:
        """Where the demand may run. Raises what `resolve` raises."""
        return resolve(self.policy.body, demand, offers, self.prices)


@dataclass(frozen=True, slots=True)
class _Kept:
    terms: Terms
    until: float


class TermsBook:
    """The terms in force, of the tenants that ask."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.monotonic):
        self._database = database
        self._clock = clock
        self._kept: dict[UUID, _Kept] = {}

    async def of(self, tenant_id: UUID, *, anew: bool = False) -> Terms:
        """The tenant's terms now, `anew`: from Postgres. Raises `NotFound`, `LedgerUnavailable`."""
        kept = self._kept
        known = kept.get(tenant_id)
        if known is not None and not anew and self._clock() < known.until:
            return known.terms
        asked_at = self._clock()
        terms, ends_in_s = await self._read(tenant_id)
        kept.pop(tenant_id, None)
        while len(kept) >= KEPT_MOST:
            del kept[next(iter(kept))]
        kept[tenant_id] = _Kept(terms, asked_at + min(KEPT_S * spread(), KEPT_S if ends_in_s is None else ends_in_s))
        return terms

    async def decide(self, tenant_id: UUID, demand: Demand, offers: Sequence[Offer]) -> tuple[Terms, Decision]:
        """Where the demand may run, and under which terms. What was kept refuses nothing: terms that do are read anew.

        Raises what `resolve` raises, `NotFound`, `LedgerUnavailable`.
        """
        terms = await self.of(tenant_id)
        try:
            return terms, terms.decide(demand, offers)
        except (Invalid, NotAllowed, ModelNotFound, NoPrice):
            terms = await self.of(tenant_id, anew=True)
            return terms, terms.decide(demand, offers)

    def forget(self) -> None:
        """Reads everything anew: somebody changed terms here. What is being read meanwhile is not kept."""
        self._kept = {}

    async def _read(self, tenant_id: UUID) -> tuple[Terms, float | None]:
        with ledger_reachable():
            async with self._database.tenant(tenant_id) as tx:
                policy, ends_in_s = await policies.in_force(tx, tenant_id)
                tenant = await tenants.by_id(tx, tenant_id)
                return Terms(policy, await pricing.price_list(tx, tenant_id, tenant.currency)), ends_in_s
