"""Who is calling: JSON Web Tokens, verified by the rules of RFC 8725.

A token whose `iss` is the gateway's own is checked with the signing key and HS256 alone. Any other `iss` chooses a row
of `issuers`, which fixes algorithms and key set and names the tenant. Nothing in a token chooses how it is verified.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard, TypeVar
from uuid import UUID

import jwt
from jwt import PyJWK
from sqlalchemy import text

from policy import audit, issuers
from policy.errors import (
    Invalid,
    ScopeMissing,
    TenantSuspended,
    TokenExpired,
    TokenInvalid,
    TokenMissing,
    TokenRevoked,
)
from policy.jwks import KeySets
from policy.outage import ledger_reachable
from policy.tenants import Tenant
from runtime.beats import spread
from runtime.database import Database, Transaction
from runtime.ids import show, uuid7

SCOPES = ("transcribe", "jobs", "usage", "speakers", "admin")

LEEWAY_S = 30
MAX_TOKEN_LENGTH = 8 * 1024
CACHE_S = 30.0
LATELY_S = 1.0
CACHE_SIZE = 4096

TOKEN_TYPE = "at+jwt"  # noqa: S105  RFC 9068: nothing else that is ever signed with the key passes for an access token

Claims: TypeAlias = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Caller:
    """A verified token. `expires_at` is in Unix seconds; `token_id` is its `jti`, or its digest where it has none."""

    tenant_id: UUID
    tenant: str
    subject: str
    scopes: frozenset[str]
    token_id: str
    expires_at: int

    def require(self, scope: str) -> None:
        """Raises `ScopeMissing`."""
        if scope not in self.scopes:
            raise ScopeMissing(f"The token lacks the scope `{scope}` that this call needs.")


@dataclass(frozen=True)
class _Verified:
    """What a token says, once its signature holds; the tenant's standing is not part of it."""

    tenant_id: UUID
    subject: str
    scopes: frozenset[str]
    token_id: str
    expires_at: int


class Authenticator:
    """Turns tokens into callers.

    A signature is checked once and remembered for up to 30 s under the digest of the whole token; suspension and
    revocation are looked up every time, by primary key, unless an admission will look again.
    """

    def __init__(self, database: Database, *, signing_key: bytes, issuer: str, audience: str, jwks: KeySets):
        self._database = database
        self._signing_key = signing_key
        self._issuer = issuer
        self._audience = audience
        self._jwks = jwks
        self._cache: OrderedDict[bytes, tuple[float, _Verified]] = OrderedDict()
        self._lately: OrderedDict[bytes, tuple[float, Caller]] = OrderedDict()

    async def authenticate(self, token: str | None, *, lately: bool = False) -> Caller:
        """Raises `TokenMissing`, `TokenInvalid`, `TokenExpired`, `TokenRevoked`, `TenantSuspended`, and
        `LedgerUnavailable` while the database is away: nobody is let in unlooked at.

        `lately`: it will do if this process looked within the last second; for what an admission follows on.
        """
        if not token:
            raise TokenMissing
        if len(token) > MAX_TOKEN_LENGTH or not token.isascii():
            raise TokenInvalid
        digest = hashlib.sha256(token.encode()).digest()
        if lately and (caller := _remembered(self._lately, digest)) is not None:
            return caller
        verified = _remembered(self._cache, digest)
        if verified is None:
            verified = await self._verify(token, digest)
            _remember(self._cache, digest, verified, min(time.time() + CACHE_S, verified.expires_at))
        until = min(time.time() + LATELY_S * spread(), verified.expires_at)
        slug = await self._standing(verified.tenant_id, verified.token_id)
        caller = Caller(
            verified.tenant_id, slug, verified.subject, verified.scopes, verified.token_id, verified.expires_at
        )
        _remember(self._lately, digest, caller, until)
        return caller

    async def recheck(self, caller: Caller) -> None:
        """For a live session: raises what `authenticate` would raise for this caller now."""
        if time.time() >= caller.expires_at + LEEWAY_S:
            raise TokenExpired
        await self._standing(caller.tenant_id, caller.token_id)

    async def aclose(self) -> None:
        """Closes the key sets."""
        await self._jwks.aclose()

    async def _standing(self, tenant_id: UUID, token_id: str) -> str:
        """The tenant's slug, if it is active and the token not revoked."""
        with ledger_reachable():
            async with self._database.across_tenants("authenticate") as tx:
                row = (await tx.execute(_STANDING, {"tenant_id": tenant_id, "token_id": token_id})).one_or_none()
        if row is None:
            raise TokenInvalid
        if row.revoked:
            raise TokenRevoked
        if row.status != "active":
            raise TenantSuspended
        slug: str = row.slug
        return slug

    # --- signatures ---------------------------------------------------------------------------------------------------

    async def _verify(self, token: str, digest: bytes) -> _Verified:
        header, unverified = _unverified(token)
        if unverified.get("iss") == self._issuer:
            claims = self._verify_own(token, header)
            tenant_id, scopes = _uuid(claims.get("tenant")), _scopes(claims.get("scope"))
            if "jti" not in claims:
                raise TokenInvalid
        else:
            claims, row = await self._verify_external(token, header, unverified)
            tenant_id, scopes = row.tenant_id, _scopes(claims.get(row.scopes_claim))
        subject, token_id = claims["sub"], claims.get("jti", f"sha256:{digest.hex()}")
        if not (_is_plain(subject) and _is_plain(token_id)):
            raise TokenInvalid
        return _Verified(tenant_id, subject, scopes, token_id, int(claims["exp"]))

    def _verify_own(self, token: str, header: Claims) -> Claims:
        if header.get("typ") != TOKEN_TYPE:
            raise TokenInvalid
        return _verified(token, self._signing_key, ("HS256",), issuer=self._issuer, audience=self._audience)

    async def _verify_external(self, token: str, header: Claims, unverified: Claims) -> tuple[Claims, issuers.Issuer]:
        row = await self._issuer_row(unverified)
        key_id = header.get("kid")
        key = await self._jwks.key(row.jwks_uri, key_id) if isinstance(key_id, str) else None
        if key is None:
            raise TokenInvalid
        claims = _verified(token, key, row.algorithms, issuer=row.issuer, audience=row.audience)
        if not row.speaks_for_tenant(claims):
            raise TokenInvalid
        return claims, row

    async def _issuer_row(self, unverified: Claims) -> issuers.Issuer:
        """The one row that these claims, if they prove true, would fall under. Two would be two tenants: refused."""
        issuer, audience = unverified.get("iss"), unverified.get("aud")
        audiences = [value for value in (audience if isinstance(audience, list) else [audience]) if _is_plain(value)]
        if not _is_plain(issuer) or not audiences:
            raise TokenInvalid
        claims = {name: value for name, value in unverified.items() if _is_plain(name) and _is_plain(value)}
        with ledger_reachable():
            async with self._database.across_tenants("find a token's issuer") as tx:
                rows = await issuers.matching(tx, issuer=issuer, audiences=audiences, claims=claims)
        if len(rows) != 1:
            raise TokenInvalid
        return rows[0]


def _remembered(cache: Mapping[bytes, tuple[float, T]], digest: bytes) -> T | None:
    until, found = cache.get(digest, (0.0, None))
    return found if time.time() < until else None


def _remember(cache: OrderedDict[bytes, tuple[float, T]], digest: bytes, found: T, until: float) -> None:
    cache[digest] = until, found
    cache.move_to_end(digest)
    if len(cache) > CACHE_SIZE:
        cache.popitem(last=False)


def mint(
    signing_key: bytes,
    *,
    issuer: str,
    audience: str,
    tenant: Tenant,
    subject: str,
    scopes: Iterable[str],
    ttl_s: int,
) -> str:
    """A gateway-issued token. Raises `Invalid` for an unknown scope or a lifetime that is not positive."""
    scopes = sorted(set(scopes))
    if unknown := set(scopes) - set(SCOPES):
        raise Invalid(f"Unknown scopes: {', '.join(sorted(unknown))}. Known: {', '.join(SCOPES)}.", param="scope")
    if ttl_s <= 0:
        raise Invalid("A token lives for at least a second.", param="ttl")
    if not _is_plain(subject):
        raise Invalid("A subject is 1 to 255 printable characters.", param="subject")
    now = int(time.time())
    claims = {
        "iss": issuer,
        "aud": audience,
        "sub": subject,
        "tenant": str(tenant.id),
        "scope": " ".join(scopes),
        "jti": show("tok", uuid7()),
        "iat": now,
        "exp": now + ttl_s,
    }
    return jwt.encode(claims, signing_key, algorithm="HS256", headers={"typ": TOKEN_TYPE})


async def revoke(tx_system: Transaction, *, tenant_id: UUID, token_id: str, expires_at: int, actor: str) -> None:
    """Refuses the token from now on; the row may go once `expires_at` (Unix seconds) is past."""
    await tx_system.execute(_REVOKE, {"tenant_id": tenant_id, "token_id": token_id, "expires_at": expires_at})
    await audit.record(tx_system, actor=actor, action="token.revoke", object=f"token/{token_id}", tenant_id=tenant_id)


async def is_revoked(tx: Transaction, tenant_id: UUID, token_id: str) -> bool:
    """Whether the tenant's token is refused."""
    found = await tx.execute(_IS_REVOKED, {"tenant_id": tenant_id, "token_id": token_id})
    return bool(found.scalar_one())


def _unverified(token: str) -> tuple[Claims, Claims]:
    """Header and claims of a token that nobody has vouched for: good for choosing, never for believing."""
    try:
        parts = jwt.decode_complete(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
        raise TokenInvalid from None
    header: Claims = parts["header"]
    claims: Claims = parts["payload"]
    if "crit" in header:  # no extension is understood here (RFC 7515, section 4.1.11)
        raise TokenInvalid
    return header, claims


def _verified(token: str, key: bytes | PyJWK, algorithms: Iterable[str], *, issuer: str, audience: str) -> Claims:
    try:
        return jwt.decode(
            token,
            key,
            algorithms=list(algorithms),
            issuer=issuer,
            audience=audience,
            leeway=LEEWAY_S,
            options={"require": ["exp", "iat", "iss", "aud", "sub"], "enforce_minimum_key_length": True},
        )
    except jwt.ExpiredSignatureError:
        raise TokenExpired from None
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
        raise TokenInvalid from None


def _scopes(claim: object) -> frozenset[str]:
    """The known ones of a space-separated text (RFC 8693, section 4.2) or of a list; others are ignored."""
    named = claim.split() if isinstance(claim, str) else claim if isinstance(claim, list) else []
    return frozenset(scope for scope in SCOPES if scope in named)


def _uuid(claim: object) -> UUID:
    try:
        return UUID(claim if isinstance(claim, str) else None)
    except (TypeError, ValueError):
        raise TokenInvalid from None


def _is_plain(value: object) -> TypeGuard[str]:
    """Text that any database and any log can hold."""
    return isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable()


_STANDING = text("""
    select slug, status, exists(
        select 1 from revoked_tokens r where r.tenant_id = t.id and r.token_id = :token_id
    ) as revoked
    from tenants t where t.id = :tenant_id
""")
_IS_REVOKED = text("""
    select exists(select from revoked_tokens where tenant_id = :tenant_id and token_id = :token_id)
""")
_REVOKE = text("""
    insert into revoked_tokens (tenant_id, token_id, expires_at)
    values (:tenant_id, :token_id, to_timestamp(:expires_at))
    on conflict (tenant_id, token_id) do nothing
""")
