"""Who runs the installation. An operator belongs to no tenant, and its token is of a type of its own: only the
gateway's signing key makes one, so no identity provider that a tenant trusts can; and none passes for a tenant's."""

from __future__ import annotations

import time
from dataclasses import dataclass

import jwt

from policy.errors import Invalid, TokenExpired
from policy.identity import LEEWAY_S, MAX_TOKEN_LENGTH
from runtime.ids import show, uuid7

SCOPE = "operator"
TOKEN_TYPE = "operator+jwt"  # noqa: S105  a media type (RFC 8725, section 3.11), no secret
LONGEST_S = 24 * 3600


@dataclass(frozen=True)
class Operator:
    """A verified operator's token."""

    subject: str
    token_id: str

    @property
    def actor(self) -> str:
        """How the audit log names it."""
        return f"operator/{self.subject}"


def mint(signing_key: bytes, *, issuer: str, audience: str, subject: str, ttl_s: int) -> str:
    """An operator's token. It cannot be revoked by itself, so it is short-lived. Raises `Invalid`."""
    if not 0 < ttl_s <= LONGEST_S:
        raise Invalid("An operator's token lives from a second to a day.", param="ttl")
    if not (0 < len(subject) <= 255 and subject.isprintable()):
        raise Invalid("A subject is 1 to 255 printable characters.", param="subject")
    now = int(time.time())
    claims = {
        "iss": issuer,
        "aud": audience,
        "sub": subject,
        "scope": SCOPE,
        "jti": show("tok", uuid7()),
        "iat": now,
        "exp": now + ttl_s,
    }
    return jwt.encode(claims, signing_key, algorithm="HS256", headers={"typ": TOKEN_TYPE})


def recognised(token: str, signing_key: bytes, *, issuer: str, audience: str) -> Operator | None:
    """The operator whose token it is; None for any other token, good or bad. Raises `TokenExpired`."""
    if len(token) > MAX_TOKEN_LENGTH:
        return None
    try:
        claims = jwt.decode_complete(
            token,
            signing_key,
            algorithms=["HS256"],
            issuer=issuer,
            audience=audience,
            leeway=LEEWAY_S,
            options={"require": ["exp", "iat", "iss", "aud", "sub", "jti"], "enforce_minimum_key_length": True},
        )
    except jwt.ExpiredSignatureError:
        raise TokenExpired from None
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
        return None
    header, payload = claims["header"], claims["payload"]
    if header.get("typ") != TOKEN_TYPE or "crit" in header or payload.get("scope") != SCOPE or "tenant" in payload:
        return None
    return Operator(payload["sub"], payload["jti"])
