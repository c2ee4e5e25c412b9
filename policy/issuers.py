"""Who, besides the gateway, may sign tokens for a tenant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text

from policy import audit
from policy.errors import Conflict, Invalid, NotFound
from runtime.database import Transaction
from runtime.ids import uuid7

ALGORITHMS = ("RS256", "RS384", "RS512", "ES256", "ES384", "EdDSA")


@dataclass(frozen=True)
class Issuer:
    """Tokens of `issuer` for `audience`, whose claim `tenant_claim` is `tenant_claim_value`, speak for the tenant.

    `algorithms` are the only ones accepted, whatever a token's header says (RFC 8725, section 3.1).
    """

    id: UUID
    tenant_id: UUID
    issuer: str
    audience: str
    jwks_uri: str
    algorithms: tuple[str, ...]
    tenant_claim: str
    tenant_claim_value: str
    scopes_claim: str = "scope"

    def speaks_for_tenant(self, claims: Mapping[str, Any]) -> bool:
        """Whether these (verified) claims name the tenant."""
        return claims.get(self.tenant_claim) == self.tenant_claim_value


async def add(
    tx_system: Transaction,
    tenant_id: UUID,
    *,
    issuer: str,
    audience: str,
    jwks_uri: str,
    algorithms: Sequence[str],
    tenant_claim: str,
    tenant_claim_value: str,
    scopes_claim: str = "scope",
    actor: str,
) -> Issuer:
    """Trusts an issuer from now on. Raises `Invalid`; `Conflict` if these claims speak for a tenant already."""
    if not algorithms or not set(algorithms) <= set(ALGORITHMS):
        raise Invalid(f"Algorithms are some of {', '.join(ALGORITHMS)}.", param="algorithms")
    row = Issuer(
        uuid7(),
        tenant_id,
        issuer,
        audience,
        jwks_uri,
        tuple(algorithms),
        tenant_claim,
        tenant_claim_value,
        scopes_claim,
    )
    added = await tx_system.execute(_INSERT, {**vars(row), "algorithms": list(algorithms)})
    if added.one_or_none() is None:
        raise Conflict("An issuer with this audience and claim exists already.", param="issuer")
    await audit.record(
        tx_system,
        actor=actor,
        action="issuer.add",
        object=f"issuer/{row.id}",
        tenant_id=tenant_id,
        after=vars(row),
    )
    return row


async def disable(tx_system: Transaction, issuer_id: UUID, *, actor: str) -> None:
    """Stops trusting an issuer. Raises `NotFound`."""
    disabled = (await tx_system.execute(_DISABLE, {"id": issuer_id})).one_or_none()
    if disabled is None:
        raise NotFound("There is no such issuer, or it is disabled.")
    await audit.record(
        tx_system,
        actor=actor,
        action="issuer.disable",
        object=f"issuer/{issuer_id}",
        tenant_id=disabled.tenant_id,
        before={"status": "active"},
        after={"status": "disabled"},
    )


async def matching(
    tx_system: Transaction, *, issuer: str, audiences: Sequence[str], claims: Mapping[str, str]
) -> list[Issuer]:
    """The active rows of this issuer for one of these audiences, whose tenant claim is among these claims."""
    found = await tx_system.execute(
        _MATCHING,
        {"issuer": issuer, "audiences": list(audiences), "names": list(claims), "values": list(claims.values())},
    )
    return [_issuer(row) for row in found]


def _issuer(row: Row[Any]) -> Issuer:
    return Issuer(
        row.id,
        row.tenant_id,
        row.issuer,
        row.audience,
        row.jwks_uri,
        tuple(row.algorithms),
        row.tenant_claim,
        row.tenant_claim_value,
        row.scopes_claim,
    )


_COLUMNS = "id, tenant_id, issuer, audience, jwks_uri, algorithms, tenant_claim, tenant_claim_value, scopes_claim"
_INSERT = text(f"""
    insert into issuers ({_COLUMNS})
    values (:id, :tenant_id, :issuer, :audience, :jwks_uri, cast(:algorithms as text[]), :tenant_claim,
            :tenant_claim_value, :scopes_claim)
    on conflict (issuer, audience, tenant_claim, tenant_claim_value) do nothing returning id
""")  # noqa: S608  constants only
_DISABLE = text("update issuers set status = 'disabled' where id = :id and status = 'active' returning tenant_id")
_MATCHING = text(f"""
    select {_COLUMNS} from issuers
    where issuer = :issuer and audience = any(cast(:audiences as text[])) and status = 'active'
      and (tenant_claim, tenant_claim_value) in (
          select name, value from unnest(cast(:names as text[]), cast(:values as text[])) as claim(name, value))
    order by id
""")  # noqa: S608
