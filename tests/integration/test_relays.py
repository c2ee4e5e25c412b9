"""Relays and their credentials in Postgres: what is put there, what comes out, and what nobody finds."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from policy import credentials, relays
from policy.errors import Conflict, Invalid, NotFound
from policy.relays import Credential, Relay
from policy.tenants import Tenant
from runtime.database import Database, Transaction
from runtime.errors import Misconfigured, Unsealable
from runtime.sealing import LocalSealer

PROVIDERS = {"deepgram": "https://api.deepgram.com", "openai-compatible": None}
ANOTHER = {"provider": "openai-compatible", "base_url": "https://x", "models": ("m",)}
SEALER = LocalSealer({"m1": b"1" * 32})
KEY, NEXT_KEY, TENANTS_KEY = (f"sk-canary-{name}-{uuid.uuid4().hex}" for name in ("first", "second", "tenants"))


@pytest.fixture
async def tx(database: Database) -> AsyncIterator[Transaction]:
    """The system role's transaction without any relay, undone afterwards: they are the installation's."""
    async with database._system.connect() as connection, connection.begin() as transaction:
        for table in ("relay_credentials", "relays"):
            await connection.execute(text(f"delete from {table}"))
        yield connection
        await transaction.rollback()


async def put(tx: Transaction, name: str = "deepgram", provider: str = "deepgram", **fields: Any) -> relays.Record:
    return await relays.put(
        tx, Relay(name, provider, **fields), providers=PROVIDERS, allow_http=False, actor="operator/anna"
    )


async def add(tx: Transaction, key: str = KEY, relay: str = "deepgram", **more: Any) -> credentials.Record:
    return await credentials.add(tx, SEALER, relay, key, actor="operator/anna", **more)


async def loaded(tx: Transaction, sealer: LocalSealer = SEALER) -> list[tuple[Any, str]]:
    return [(found.tenant_id, found.key) for found in (await relays.load(tx, sealer))[1]]


async def audited(tx: Transaction) -> list[Any]:
    query = "select * from audit_log where actor = 'operator/anna' and at = now() order by seq"
    return list(await tx.execute(text(query)))


# --- relays -------------------------------------------------------------------------------------------------------


async def test_a_relay_is_put_changed_disabled_and_removed(tx: Transaction) -> None:
    await put(tx, models=("nova-3",), region="eu")
    assert (await relays.load(tx, SEALER))[0] == (Relay("deepgram", "deepgram", None, "eu", ("nova-3",)),)
    await put(tx, base_url="https://api.eu.deepgram.com/v1")
    changed = await relays.set_status(tx, "deepgram", "disabled", actor="operator/anna")
    assert [record.relay for record in await relays.listing(tx)] == [changed.relay]
    assert (await relays.load(tx, SEALER))[0] == ()
    await relays.remove(tx, "deepgram", actor="operator/anna")
    with pytest.raises(NotFound):
        await relays.by_name(tx, "deepgram")
    with pytest.raises(NotFound):
        await relays.remove(tx, "deepgram", actor="operator/anna")
    assert [row.action for row in await audited(tx)] == [*["relay.put"] * 3, "relay.remove"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *(({"name": name}, "name") for name in ("relay", "local", "Deepgram", "1st", "self_hosted", "a" * 64, "", "é")),
        ({"provider": "whispernet"}, "provider"),
        ({"provider": "openai-compatible", "models": ("m",)}, "base_url"),
        ({"provider": "openai-compatible", "base_url": "https://x"}, "models"),
        *(
            ({"base_url": url}, "base_url")
            for url in (
                "http://db.example",
                "http://127.evil.example",
                "http://localhost.evil.example",
                "https://u:p@api.example",
                "https://api.example/v1?key=x",
                "https://api.example/#x",
                "ftp://api.example",
                "https://",
                "api.example",
                "https://api.example:99999",
                "https://api.example\\@evil.example",
                "https://api .example",
                "https://api.example/\r\nx: y",
                "https://[::1",
                "https://[v1.x]/",
                "https://1.2.3.999",
                "https://api.example/" + "a" * 500,
            )
        ),
        *(({"region": region}, "region") for region in ("EU", "", "-eu", "eu/west")),
        *(({"models": models}, "models") for models in ((), ("a", "a"), ("",), ("a b",), ("x\n",), ("m" * 201,))),
    ],
)
async def test_what_is_no_relay_is_refused_by_field(tx: Transaction, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Invalid) as refusal:
        await put(tx, **fields)
    assert refusal.value.param == param


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000/v1", "http://[::1]:8000", "http://localhost/v1", "https://10.0.0.7/v1"]
)
async def test_the_operators_own_machines_are_allowed(tx: Transaction, url: str) -> None:
    assert (await put(tx, base_url=url)).relay.base_url == url


async def test_where_keys_go_is_fixed_while_there_are_any(tx: Transaction) -> None:
    await put(tx)
    record = await add(tx)
    for change in ({"base_url": "https://evil.example"}, ANOTHER):
        with pytest.raises(Conflict, match="retire them"):
            await put(tx, **change)
    with pytest.raises(Conflict, match="retire them"):
        await relays.remove(tx, "deepgram", actor="test")
    await put(tx, models=("nova-3",), status="disabled")
    await credentials.retire(tx, record.id, actor="test")
    await put(tx, base_url="https://elsewhere.example")
    await relays.remove(tx, "deepgram", actor="test")
    assert await credentials.listing(tx) == []


# --- credentials --------------------------------------------------------------------------------------------------


async def test_a_key_is_sealed_told_by_its_beginning_and_used(tx: Transaction, tenant: Tenant) -> None:
    await put(tx)
    shared = await add(tx)
    own = await add(tx, TENANTS_KEY, tenant_id=tenant.id)
    assert (shared.prefix, shared.tenant, own.tenant) == ("sk-cana…", None, tenant.slug)
    assert (await relays.load(tx, SEALER))[1] == (
        Credential(shared.id, "deepgram", None, "sk-cana…", KEY),
        Credential(own.id, "deepgram", tenant.id, "sk-cana…", TENANTS_KEY),
    )
    await relays.used(tx, [own.id])
    seen = {record.id: record.last_used_at for record in await credentials.listing(tx, "deepgram")}
    assert seen[shared.id] is None
    assert seen[own.id] is not None


async def test_a_new_key_takes_the_place_of_the_old_and_the_old_is_gone_for_good(
    tx: Transaction, tenant: Tenant
) -> None:
    await put(tx)
    first = await add(tx)
    await add(tx, TENANTS_KEY, tenant_id=tenant.id)
    second = await add(tx, NEXT_KEY)
    assert await loaded(tx) == [(tenant.id, TENANTS_KEY), (None, NEXT_KEY)]
    status = {record.id: record.status for record in await credentials.listing(tx, "deepgram")}
    assert (status[first.id], status[second.id]) == ("retired", "active")
    left = await tx.execute(text("select sealed_key from relay_credentials where id = :id"), {"id": first.id})
    assert bytes(left.scalar_one()) == b""
    with pytest.raises(NotFound):
        await credentials.retire(tx, first.id, actor="test")
    with pytest.raises(NotFound):
        await credentials.retire(tx, second.id, relay="another", actor="test")


async def test_a_disabled_relays_keys_are_not_opened(tx: Transaction) -> None:
    await put(tx)
    await add(tx)
    await put(tx, status="disabled")
    assert await relays.load(tx, SEALER) == ((), ())


@pytest.mark.parametrize("key", ["", "short", "k" * 1025, "sk-with space", "sk-line\nfeed", "sk-ümlaut-key"])
async def test_what_is_no_key_is_refused_and_not_quoted(tx: Transaction, key: str) -> None:
    await put(tx)
    with pytest.raises(Invalid) as refusal:
        await add(tx, key)
    assert refusal.value.param == "key"
    assert not key or key not in refusal.value.message


async def test_there_is_no_key_to_no_relay(tx: Transaction) -> None:
    with pytest.raises(NotFound):
        await add(tx, relay="nowhere")


@pytest.mark.parametrize(("length", "shown"), [(8, 2), (16, 4), (28, 7), (200, 7)])
def test_no_more_than_a_quarter_of_a_key_is_shown(length: int, shown: int) -> None:
    assert credentials.prefix_of("k" * length) == "k" * shown + "…"


# --- at rest ------------------------------------------------------------------------------------------------------


async def test_no_row_anywhere_holds_a_key(tx: Transaction, tenant: Tenant) -> None:
    await put(tx)
    await credentials.retire(tx, (await add(tx)).id, actor="operator/anna")
    await add(tx, NEXT_KEY)
    await add(tx, TENANTS_KEY, tenant_id=tenant.id)
    for table in ("relays", "relay_credentials", "audit_log"):
        rows = await tx.execute(text(f"select t::text as row, encode(t::text::bytea, 'escape') from {table} t"))
        said = "\n".join(row.row for row in rows)
        for key in (KEY, NEXT_KEY, TENANTS_KEY):
            assert key not in said
            assert key[8:] not in said
            assert key.encode().hex() not in said
    assert [row.action for row in await audited(tx)] == [
        *("relay.put", "relay_credential.add", "relay_credential.retire", "relay_credential.add"),
        "relay_credential.add",
    ]


async def test_a_sealed_key_opens_only_in_its_own_row(tx: Transaction, tenant: Tenant) -> None:
    """Who can write to the table still cannot make one tenant pay with another's key."""
    await put(tx)
    await add(tx, TENANTS_KEY, tenant_id=tenant.id)
    await tx.execute(
        text("""
            insert into relay_credentials (id, relay, prefix, sealed, sealed_key, master_key, created_by)
            select gen_random_uuid(), relay, prefix, sealed, sealed_key, master_key, 'thief' from relay_credentials
        """)
    )
    assert await loaded(tx) == [(tenant.id, TENANTS_KEY)]


async def test_what_does_not_open_is_left_out_and_said(
    tx: Transaction, tenant: Tenant, capsys: pytest.CaptureFixture[str]
) -> None:
    await put(tx)
    record = await add(tx)
    other = LocalSealer({"m2": b"2" * 32, "m1": b"1" * 32})
    await credentials.add(tx, other, "deepgram", TENANTS_KEY, tenant_id=tenant.id, actor="test")
    capsys.readouterr()
    assert await loaded(tx) == [(None, KEY)]
    assert await loaded(tx, LocalSealer({})) == []
    said = "".join(capsys.readouterr())
    assert record.id.hex in said
    assert "STENOGATE_SEALING_KEYS" in said
    assert "canary-" not in said


async def test_a_new_master_key_takes_over(tx: Transaction, tenant: Tenant) -> None:
    await put(tx)
    await credentials.retire(tx, (await add(tx)).id, actor="test")
    await add(tx)
    await add(tx, TENANTS_KEY, tenant_id=tenant.id)
    both, only_new = LocalSealer({"m2": b"2" * 32, "m1": b"1" * 32}), LocalSealer({"m2": b"2" * 32})
    with pytest.raises(Unsealable, match="`m1`"):
        await credentials.rewrap(tx, only_new, actor="test")
    with pytest.raises(Misconfigured):
        await credentials.rewrap(tx, LocalSealer({}), actor="test")
    assert await credentials.rewrap(tx, both, actor="operator/anna") == 2
    assert await credentials.rewrap(tx, both, actor="operator/anna") == 0
    assert await loaded(tx, only_new) == [(None, KEY), (tenant.id, TENANTS_KEY)]
    rewraps = [row for row in await audited(tx) if row.action == "relay_credential.rewrap"]
    assert [(row.before, row.after) for row in rewraps] == [({"master_key": "m1"}, {"master_key": "m2"})] * 2


async def test_a_tenants_transaction_reads_neither(database: Database, tenant: Tenant) -> None:
    for table in ("relays", "relay_credentials"):
        with pytest.raises(DBAPIError, match="permission denied"):
            async with database.tenant(tenant.id) as tx:
                await tx.execute(text(f"select * from {table}"))
