"""Tokens against a real Postgres and a real key-set server: what is accepted, and every known way to cheat."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from sqlalchemy import text

from policy import identity, issuers, tenants
from policy.errors import (
    Conflict,
    IdentityError,
    Invalid,
    LedgerUnavailable,
    ScopeMissing,
    TenantSuspended,
    TokenExpired,
    TokenInvalid,
    TokenMissing,
    TokenRevoked,
)
from policy.identity import Authenticator, Caller, mint
from policy.issuers import Issuer
from policy.jwks import KeySets
from policy.tenants import Tenant
from runtime.database import Database

KEY = b"0123456789abcdef0123456789abcdef"
OURS = {"issuer": "stenogate", "audience": "stenogate-api"}
THEIRS = "https://login.example/realm"

RSA = rsa.generate_private_key(65537, 2048)
WEAK = rsa.generate_private_key(65537, 1024)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
PEM = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
KEY_SET = {
    "keys": [
        {**RSAAlgorithm.to_jwk(RSA.public_key(), as_dict=True), "kid": "rsa", "alg": "RS256"},
        {**ECAlgorithm.to_jwk(EC.public_key(), as_dict=True), "kid": "ec"},
        {**OKPAlgorithm.to_jwk(ED.public_key(), as_dict=True), "kid": "ed"},
        {**RSAAlgorithm.to_jwk(WEAK.public_key(), as_dict=True), "kid": "weak"},
    ]
}


@pytest.fixture(scope="module")
async def key_server() -> AsyncIterator[str]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = json.dumps(KEY_SET).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks"


@pytest.fixture
async def authenticator(database: Database) -> AsyncIterator[Authenticator]:
    opened = Authenticator(database, signing_key=KEY, jwks=KeySets(allow_http=True), **OURS)
    yield opened
    await opened.aclose()


@pytest.fixture
async def issuer(database: Database, tenant: Tenant, key_server: str) -> Issuer:
    return await trusted(database, tenant, key_server)


async def trusted(database: Database, tenant: Tenant, key_server: str, **fields: Any) -> Issuer:
    async with database.across_tenants("test") as tx:
        return await issuers.add(
            tx,
            tenant.id,
            **{
                "issuer": THEIRS,
                "audience": "stenogate-api",
                "jwks_uri": key_server,
                "algorithms": ["RS256", "ES256", "EdDSA"],
                "tenant_claim": "org",
                "tenant_claim_value": tenant.slug,
                "actor": "test",
            }
            | fields,
        )


def minted(
    tenant: Tenant, *, subject: str = "anna", scopes: tuple[str, ...] = ("transcribe",), ttl_s: int = 600
) -> str:
    return mint(KEY, **OURS, tenant=tenant, subject=subject, scopes=scopes, ttl_s=ttl_s)


def own_claims(tenant: Tenant, /, **changes: Any) -> dict[str, Any]:
    claims = jwt.decode(minted(tenant), options={"verify_signature": False}) | changes
    return {name: value for name, value in claims.items() if value is not None}


def own(claims: dict[str, Any], *, key: bytes = KEY, algorithm: str = "HS256", **header: Any) -> str:
    return jwt.encode(claims, key, algorithm=algorithm, headers={"typ": "at+jwt"} | header)


def their_claims(tenant: Tenant, /, **changes: Any) -> dict[str, Any]:
    now = int(time.time())
    claims = {"iss": THEIRS, "aud": "stenogate-api", "sub": "bob", "org": tenant.slug, "iat": now, "exp": now + 600}
    return {name: value for name, value in (claims | {"scope": "transcribe"} | changes).items() if value is not None}


def theirs(claims: dict[str, Any], *, key: Any = RSA, algorithm: str = "RS256", kid: Any = "rsa") -> str:
    return jwt.encode(claims, key, algorithm=algorithm, headers={} if kid is None else {"kid": kid})


def by_hand(header: dict[str, Any], claims: bytes, key: bytes | None = None) -> str:
    """A token as no library would make it; signed with HMAC-SHA256, or not at all."""
    signed = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in (json.dumps(header).encode(), claims))
    signature = b"" if key is None else hmac.new(key, signed, hashlib.sha256).digest()
    return (signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


@contextmanager
def refused(error: type[IdentityError] = TokenInvalid) -> Iterator[None]:
    """Exactly this error, with its class's own words: nothing about the token."""
    with pytest.raises(error) as raised:
        yield
    assert type(raised.value) is error
    assert raised.value.message == error().message
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


# --- gateway-issued ---------------------------------------------------------------------------------------------------


async def test_a_minted_token_is_its_caller(authenticator: Authenticator, tenant: Tenant) -> None:
    before = int(time.time())
    caller = await authenticator.authenticate(minted(tenant, scopes=("jobs", "transcribe"), ttl_s=60))
    assert (caller.tenant_id, caller.tenant, caller.subject) == (tenant.id, tenant.slug, "anna")
    assert caller.scopes == {"jobs", "transcribe"}
    assert caller.token_id.startswith("tok_")
    assert before + 60 <= caller.expires_at <= int(time.time()) + 60
    await authenticator.recheck(caller)


async def test_a_scope_is_required_by_name(authenticator: Authenticator, tenant: Tenant) -> None:
    caller = await authenticator.authenticate(minted(tenant))
    caller.require("transcribe")
    with pytest.raises(ScopeMissing, match="`admin`"):
        caller.require("admin")


async def test_unknown_scopes_are_ignored(authenticator: Authenticator, tenant: Tenant) -> None:
    caller = await authenticator.authenticate(own(own_claims(tenant, scope="transcribe root usage")))
    assert caller.scopes == {"transcribe", "usage"}


@pytest.mark.parametrize("wrong", [{"scopes": ("root",)}, {"ttl_s": 0}, {"subject": ""}, {"subject": "a\nb"}])
def test_a_senseless_token_is_not_minted(wrong: dict[str, Any]) -> None:
    nobody = Tenant(uuid.uuid4(), "nobody", "Nobody", "active", "USD", "UTC")
    with pytest.raises(Invalid):
        minted(nobody, **wrong)


@pytest.mark.parametrize("token", [None, ""])
async def test_no_token(authenticator: Authenticator, token: str | None) -> None:
    with refused(TokenMissing):
        await authenticator.authenticate(token)


async def test_an_expired_token(authenticator: Authenticator, tenant: Tenant) -> None:
    with refused(TokenExpired):
        await authenticator.authenticate(own(own_claims(tenant, exp=int(time.time()) - 31)))
    await authenticator.authenticate(own(own_claims(tenant, exp=int(time.time()) - 20)))  # within the leeway


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": None},
        {"iat": None},
        {"aud": None},
        {"sub": None},
        {"jti": None},
        {"tenant": None},
        {"iss": None},
        {"exp": "soon"},
        {"exp": float("inf")},
        {"iat": 9_999_999_999},
        {"nbf": 9_999_999_999},
        {"aud": "another-api"},
        {"aud": ["another-api"]},
        {"iss": "stenogate2"},
        {"iss": ["stenogate"]},
        {"sub": 7},
        {"sub": ""},
        {"sub": "nul\x00"},
        {"sub": "\ud800"},
        {"jti": 7},
        {"jti": "x" * 300},
        {"tenant": "demo"},
        {"tenant": 7},
        {"tenant": str(uuid.uuid4())},
    ],
    ids=str,
)
async def test_wrong_claims(authenticator: Authenticator, tenant: Tenant, changes: dict[str, Any]) -> None:
    claims = json.dumps(own_claims(tenant, **changes)).encode()
    with refused():
        await authenticator.authenticate(by_hand({"alg": "HS256", "typ": "at+jwt"}, claims, KEY))


async def test_a_wrong_signature(authenticator: Authenticator, tenant: Tenant) -> None:
    token = minted(tenant)
    head, claims, signature = token.split(".")
    forged = base64.urlsafe_b64encode(json.dumps(own_claims(tenant, scope="admin")).encode()).rstrip(b"=").decode()
    await authenticator.authenticate(token)  # what was accepted lends nothing to its likes
    for bad in (f"{head}.{forged}.{signature}", f"{head}.{claims}.", f"{head}.{claims}.{signature[::-1]}"):
        with refused():
            await authenticator.authenticate(bad)
    with refused():
        await authenticator.authenticate(own(own_claims(tenant), key=KEY[::-1]))


@pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
async def test_the_gateways_own_tokens_are_hs256_alone(
    authenticator: Authenticator, tenant: Tenant, algorithm: str
) -> None:
    with refused():
        await authenticator.authenticate(own(own_claims(tenant), key=KEY * 2, algorithm=algorithm))


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", ""])
async def test_no_algorithm(authenticator: Authenticator, tenant: Tenant, issuer: Issuer, algorithm: str) -> None:
    for claims in (own_claims(tenant), their_claims(tenant)):
        header = {"alg": algorithm, "typ": "at+jwt", "kid": "rsa"}
        for key in (None, KEY, PEM):
            with refused():
                await authenticator.authenticate(by_hand(header, json.dumps(claims).encode(), key))


@pytest.mark.parametrize(
    "header",
    [
        {"crit": ["exp"]},
        {"crit": []},
        {"crit": ["b64"], "b64": True},
        {"typ": "JWT"},
        {"typ": "ticket+jwt"},
        {"kid": 7},
    ],
    ids=str,
)
async def test_a_header_that_asks_for_something_else(
    authenticator: Authenticator, tenant: Tenant, header: dict[str, Any]
) -> None:
    claims = json.dumps(own_claims(tenant)).encode()
    with refused():
        await authenticator.authenticate(by_hand({"alg": "HS256", "typ": "at+jwt"} | header, claims, KEY))


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "..",
        "a.b.c",
        "\x00",
        "ü" * 20,
        "Bearer x",
        "eyJhbGciOiJIUzI1NiJ9..",
        by_hand({"alg": "HS256"}, b"[" * 5000, KEY),
        by_hand({"alg": "HS256"}, b"[]", KEY),
        by_hand({"alg": "HS256"}, b'{"iss": 1e999}', KEY),
        by_hand({"alg": "HS256"}, b'{"iss": "\\u0000", "aud": "\\ud800"}', KEY),
        by_hand({"alg": "HS256"}, b'{"exp": ' + b"9" * 5000 + b"}", KEY),
    ],
)
async def test_garbage(authenticator: Authenticator, token: str) -> None:
    with refused():
        await authenticator.authenticate(token)


async def test_an_oversized_token_is_refused_though_it_is_valid(authenticator: Authenticator, tenant: Tenant) -> None:
    await authenticator.authenticate(own(own_claims(tenant, padding="x" * 4000)))
    with refused():
        await authenticator.authenticate(own(own_claims(tenant, padding="x" * 8000)))


# --- standing ---------------------------------------------------------------------------------------------------------


async def test_suspension_stops_new_calls_and_live_sessions_at_once(
    database: Database, authenticator: Authenticator, tenant: Tenant
) -> None:
    token = minted(tenant)
    caller = await authenticator.authenticate(token)
    for status in ("suspended", "closed"):
        async with database.across_tenants("test") as tx:
            await tenants.set_status(tx, tenant.id, status, actor="test")  # type: ignore[arg-type]
        with pytest.raises(TenantSuspended):
            await authenticator.authenticate(token)
        with pytest.raises(TenantSuspended):
            await authenticator.recheck(caller)
    async with database.across_tenants("test") as tx:
        await tenants.set_status(tx, tenant.id, "active", actor="test")
    assert await authenticator.authenticate(token) == caller


async def test_revocation_stops_one_token_at_once_and_is_audited(
    database: Database, authenticator: Authenticator, tenant: Tenant
) -> None:
    token, another = minted(tenant), minted(tenant)
    caller = await authenticator.authenticate(token)
    for _ in range(2):  # twice is once
        async with database.across_tenants("test") as tx:
            await identity.revoke(
                tx, tenant_id=tenant.id, token_id=caller.token_id, expires_at=caller.expires_at, actor="ops"
            )
    with refused(TokenRevoked):
        await authenticator.authenticate(token)
    with refused(TokenRevoked):
        await authenticator.recheck(caller)
    await authenticator.authenticate(another)
    async with database.tenant(tenant.id) as tx:
        rows = await tx.execute(text("select object from audit_log where action = 'token.revoke'"))
        assert set(rows.scalars()) == {f"token/{caller.token_id}"}


async def test_lately_is_a_second_ago(
    database: Database, authenticator: Authenticator, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = minted(tenant)
    caller = await authenticator.authenticate(token, lately=True)
    async with database.across_tenants("test") as tx:
        await tenants.set_status(tx, tenant.id, "suspended", actor="test")
    assert await authenticator.authenticate(token, lately=True) == caller
    with pytest.raises(TenantSuspended):
        await authenticator.authenticate(token)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + identity.LATELY_S + 0.1)
    with pytest.raises(TenantSuspended):
        await authenticator.authenticate(token, lately=True)


async def test_a_live_session_ends_with_its_token(authenticator: Authenticator, tenant: Tenant) -> None:
    now = int(time.time())
    with refused(TokenExpired):
        await authenticator.recheck(Caller(tenant.id, tenant.slug, "anna", frozenset(), "tok_x", now - 31))
    await authenticator.recheck(Caller(tenant.id, tenant.slug, "anna", frozenset(), "tok_x", now - 20))


async def test_without_the_database_nobody_gets_in_and_nobody_is_accused(tenant: Tenant) -> None:
    nowhere = "postgresql://nobody:nothing@127.0.0.1:1/none"
    away = Database(nowhere, nowhere)
    async with (
        aclosing(away),
        aclosing(Authenticator(away, signing_key=KEY, jwks=KeySets(), **OURS)) as authenticator,
    ):
        for token in (minted(tenant), theirs(their_claims(tenant))):
            with pytest.raises(LedgerUnavailable):
                await authenticator.authenticate(token)
        with pytest.raises(LedgerUnavailable):
            await authenticator.recheck(Caller(tenant.id, tenant.slug, "a", frozenset(), "tok_x", 4_000_000_000))


# --- external issuers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "signer",
    [
        {"key": RSA, "algorithm": "RS256", "kid": "rsa"},
        {"key": EC, "algorithm": "ES256", "kid": "ec"},
        {"key": ED, "algorithm": "EdDSA", "kid": "ed"},
    ],
    ids=lambda signer: signer["kid"],
)
async def test_an_issuers_token_speaks_for_its_tenant(
    authenticator: Authenticator, tenant: Tenant, issuer: Issuer, signer: dict[str, Any]
) -> None:
    token = theirs(their_claims(tenant, scope="transcribe openid"), **signer)
    caller = await authenticator.authenticate(token)
    assert (caller.tenant_id, caller.subject, caller.scopes) == (tenant.id, "bob", {"transcribe"})


async def test_a_token_without_an_id_has_its_digest_and_can_be_revoked(
    database: Database, authenticator: Authenticator, tenant: Tenant, issuer: Issuer
) -> None:
    token = theirs(their_claims(tenant))
    caller = await authenticator.authenticate(token)
    assert caller.token_id == f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"
    async with database.across_tenants("test") as tx:
        await identity.revoke(
            tx, tenant_id=tenant.id, token_id=caller.token_id, expires_at=caller.expires_at, actor="x"
        )
    with refused(TokenRevoked):
        await authenticator.authenticate(token)


@pytest.mark.parametrize("scopes", ["usage jobs", ["jobs", "usage"]])
async def test_scopes_come_as_text_or_list_from_the_claim_that_the_row_names(
    database: Database, authenticator: Authenticator, tenant: Tenant, key_server: str, scopes: Any
) -> None:
    await trusted(database, tenant, key_server, scopes_claim="permissions")
    caller = await authenticator.authenticate(theirs(their_claims(tenant, permissions=scopes)))
    assert caller.scopes == {"jobs", "usage"}


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": None},
        {"iat": None},
        {"aud": None},
        {"sub": None},
        {"org": None},
        {"org": "another"},
        {"org": 7},
        {"aud": "another-api"},
        {"aud": 7},
        {"iss": THEIRS + "/"},
        {"iss": "https://login.example"},
        {"iss": None},
    ],
    ids=str,
)
async def test_wrong_claims_of_an_issuer(
    authenticator: Authenticator, tenant: Tenant, issuer: Issuer, changes: dict[str, Any]
) -> None:
    claims = json.dumps(their_claims(tenant, **changes)).encode()
    token = jwt.PyJWS().encode(claims, RSA, algorithm="RS256", headers={"kid": "rsa"})
    with refused():
        await authenticator.authenticate(token)


async def test_an_expired_token_of_an_issuer(authenticator: Authenticator, tenant: Tenant, issuer: Issuer) -> None:
    with refused(TokenExpired):
        await authenticator.authenticate(theirs(their_claims(tenant, exp=int(time.time()) - 31)))


@pytest.mark.parametrize("kid", [None, "unknown", "", "../rsa", "ec"])
async def test_a_missing_unknown_or_wrong_key_id(
    authenticator: Authenticator, tenant: Tenant, issuer: Issuer, kid: str | None
) -> None:
    with refused():
        await authenticator.authenticate(theirs(their_claims(tenant), kid=kid))


async def test_a_public_key_is_no_shared_secret(authenticator: Authenticator, tenant: Tenant, issuer: Issuer) -> None:
    claims = json.dumps(their_claims(tenant)).encode()
    for secret in (PEM, PEM.strip(), json.dumps(KEY_SET["keys"][0]).encode(), b""):
        with refused():
            await authenticator.authenticate(by_hand({"alg": "HS256", "kid": "rsa"}, claims, secret))


async def test_the_signing_key_signs_for_no_issuer_and_no_issuer_for_the_gateway(
    authenticator: Authenticator, tenant: Tenant, issuer: Issuer
) -> None:
    with refused():
        await authenticator.authenticate(own(their_claims(tenant), kid="rsa"))
    with refused():
        await authenticator.authenticate(
            jwt.encode(own_claims(tenant), RSA, algorithm="RS256", headers={"typ": "at+jwt", "kid": "rsa"})
        )


async def test_keys_in_the_header_are_not_looked_at(
    authenticator: Authenticator, tenant: Tenant, issuer: Issuer, key_server: str
) -> None:
    mine = rsa.generate_private_key(65537, 2048)
    embedded = RSAAlgorithm.to_jwk(mine.public_key(), as_dict=True)
    for header in ({"jwk": embedded}, {"jku": key_server}, {"jwk": embedded, "kid": "rsa"}):
        with refused():
            await authenticator.authenticate(jwt.encode(their_claims(tenant), mine, algorithm="RS256", headers=header))


async def test_only_the_rows_algorithms_count(
    database: Database, authenticator: Authenticator, tenant: Tenant, key_server: str
) -> None:
    await trusted(database, tenant, key_server, algorithms=["ES256"])
    await authenticator.authenticate(theirs(their_claims(tenant), key=EC, algorithm="ES256", kid="ec"))
    with refused():
        await authenticator.authenticate(theirs(their_claims(tenant)))


async def test_a_short_key_is_refused_even_if_published(
    authenticator: Authenticator, tenant: Tenant, issuer: Issuer
) -> None:
    signed = by_hand({"alg": "RS256", "kid": "weak"}, json.dumps(their_claims(tenant)).encode()).rstrip(".")
    signature = WEAK.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    with refused():
        await authenticator.authenticate(f"{signed}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}")


async def test_one_issuer_serves_two_tenants_apart(
    database: Database, authenticator: Authenticator, tenant: Tenant, other_tenant: Tenant, key_server: str
) -> None:
    for each in (tenant, other_tenant):
        await trusted(database, each, key_server)
    for each in (tenant, other_tenant):
        assert (await authenticator.authenticate(theirs(their_claims(each)))).tenant_id == each.id


async def test_a_token_that_two_tenants_claim_is_refused(
    database: Database, authenticator: Authenticator, tenant: Tenant, other_tenant: Tenant, key_server: str
) -> None:
    await trusted(database, tenant, key_server)
    await trusted(database, other_tenant, key_server, tenant_claim="team", tenant_claim_value=other_tenant.slug)
    with refused():
        await authenticator.authenticate(theirs(their_claims(tenant, team=other_tenant.slug)))


async def test_a_disabled_issuer_is_no_longer_trusted(
    database: Database, authenticator: Authenticator, tenant: Tenant, issuer: Issuer
) -> None:
    await authenticator.authenticate(theirs(their_claims(tenant)))
    async with database.across_tenants("test") as tx:
        await issuers.disable(tx, issuer.id, actor="ops")
    with refused():
        await authenticator.authenticate(theirs(their_claims(tenant, jti="not seen before")))
    async with database.tenant(tenant.id) as tx:
        rows = await tx.execute(text("select action from audit_log where action like 'issuer.%' order by seq"))
        assert list(rows.scalars()) == ["issuer.add", "issuer.disable"]


async def test_an_issuer_is_trusted_once_and_never_with_a_shared_secret(
    database: Database, tenant: Tenant, issuer: Issuer, key_server: str
) -> None:
    with pytest.raises(Conflict):
        await trusted(database, tenant, key_server)
    for algorithms in ([], ["HS256"], ["RS256", "none"]):
        with pytest.raises(Invalid):
            await trusted(database, tenant, key_server, audience="second", algorithms=algorithms)


async def test_plain_http_key_sets_need_the_operators_word(database: Database, tenant: Tenant, issuer: Issuer) -> None:
    async with aclosing(Authenticator(database, signing_key=KEY, jwks=KeySets(), **OURS)) as strict:
        with refused():
            await strict.authenticate(theirs(their_claims(tenant)))
