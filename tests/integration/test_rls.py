"""What keeps tenants apart when the code above errs: grants and row-level security, asked of Postgres itself."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from policy.tenants import Tenant
from runtime.database import Database, Transaction, async_url
from runtime.settings import Settings

TENANT_TABLES = """
    select c.oid, c.relname as name, c.relrowsecurity as enabled, c.relforcerowsecurity as forced,
           pg_get_userbyid(c.relowner) as owner
    from pg_class c
    where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p')
      and (c.relname = 'tenants'
           or exists (select 1 from pg_attribute a where a.attrelid = c.oid and a.attname = 'tenant_id'))
"""

# One row of every tenant table, in an order that its foreign keys allow.
ROWS = {
    "issuers": "insert into issuers values (:b, :t, 'iss', :s, 'https://x', array['RS256'], 'org', 'x', 'scope')",
    "revoked_tokens": "insert into revoked_tokens values (:t, 'tok_x', now())",
    "price_book": """
        insert into price_book (id, tenant_id, backend, price_nano_per_hour, currency, effective, created_by)
        values (:a, :t, 'self_hosted', 1, 'USD', tstzrange(now(), null), 'test')""",
    "budgets": "insert into budgets values (:t, :a, 'day', 1)",
    "budget_windows": "insert into budget_windows values (:t, :a, '2026-01-01')",
    "sessions": """insert into sessions (tenant_id, id, kind, subject, policy_version, decision, currency)
                   values (:t, :a, 'job', 'anna', 1, '{}', 'USD')""",
    "budget_holds": "insert into budget_holds values (:t, :a, :a, '2026-01-01', 1)",
    "usage_keys": "insert into usage_keys values (:t, :a, 0, 'usage')",
    "usage_ledger": """
        insert into usage_ledger (tenant_id, ledger_day, source_id, segment_no, kind, backend, model, start_ms, end_ms,
            audio_ms, billed_ms, price_id, price_nano_per_hour, amount_nano, cost_nano, currency)
        values (:t, current_date, :a, 0, 'usage', 'self_hosted', 'micro', 0, 1, 1, 1, :a, 1, 1, 0, 'USD')""",
    "audit_log": "insert into audit_log (tenant_id, actor, action, object) values (:t, 'test', 'test', 'test')",
    "jobs": """insert into jobs (tenant_id, id, options, fingerprint, blob_key, size_bytes)
               values (:t, :a, '{}', 'f', 'k', 1)""",
    "tickets": """insert into tickets (tenant_id, digest, subject, scopes, token_id, token_expires_at, expires_at)
                  values (:t, sha256('x'), 'anna', '{transcribe}', 'tok_x', 1, now())""",
    "legs": """insert into legs (tenant_id, id, session_id, backend, model, outcome, start_ms, audio_ms, charged_ms,
                                 cost_nano, currency, took_ms)
               values (:t, :a, :a, 'deepgram', 'nova-3', 'completed', 0, 1, 1, 1, 'USD', 1)""",
    "webhook_endpoints": """insert into webhook_endpoints (tenant_id, id, url, events)
                            values (:t, :a, 'https://x', '{job.completed}')""",
    "webhook_secrets": """insert into webhook_secrets (tenant_id, id, endpoint_id, sealed, sealed_key, master_key,
                                                       expires_at)
                          values (:t, :a, :a, 'x', 'x', 'k1', now())""",
    "outbox": """insert into outbox (tenant_id, id, topic, object_id, payload)
                 values (:t, :a, 'job.completed', :a, '{}')""",
    "webhook_deliveries": """insert into webhook_deliveries (tenant_id, id, endpoint_id, event_id)
                             values (:t, :a, :a, :a)""",
    "webhook_attempts": """insert into webhook_attempts (tenant_id, delivery_id, number, outcome, took_ms)
                           values (:t, :a, 1, 'delivered', 1)""",
    "recordings": "insert into recordings (tenant_id, session_id, expires_at) values (:t, :a, now())",
    "recording_parts": """insert into recording_parts (tenant_id, session_id, number, start_sample, samples, blob_key)
                          values (:t, :a, 1, 0, 1, 'k')""",
    "job_chunks": """insert into job_chunks (tenant_id, job_id, chunk_no, start_ms, end_ms, language, segments, origin)
                     values (:t, :a, 0, 0, 1, 'en', '[]', '{}')""",
}

# What the app role itself writes; the rest is the system role's to write.
WRITTEN_BY_APP = (
    "revoked_tokens", "budget_windows", "sessions", "budget_holds", "usage_keys", "usage_ledger", "audit_log", "jobs",
    "job_chunks", "tickets", "recordings", "recording_parts", "legs", "webhook_endpoints", "webhook_secrets", "outbox",
    "webhook_deliveries", "webhook_attempts",
)  # fmt: skip

# What is the operator's: no app role may even read it.
OPERATORS_OWN = ("setting_overrides", "relays", "relay_credentials")

APPEND_ONLY = (
    "usage_ledger",
    "usage_keys",
    "audit_log",
    "policies",
    "price_book",
    "revoked_tokens",
    "issuers",
    "tickets",
    "legs",
    "outbox",
    "webhook_attempts",
)


@pytest.fixture
async def furnished(database: Database, tenant: Tenant) -> Tenant:
    """A tenant with a row in every table."""
    a = uuid.uuid4()
    values = {"t": tenant.id, "a": a, "b": uuid.uuid4(), "s": tenant.slug}
    for table, insert in ROWS.items():
        used = {name: value for name, value in values.items() if f":{name}" in insert}
        door = database.tenant(tenant.id) if table in WRITTEN_BY_APP else database.across_tenants("test")
        async with door as tx:
            await tx.execute(text(insert), used)
    return tenant


@pytest.fixture
async def owner(settings: Settings) -> AsyncIterator[Callable[[str], Awaitable[list[Any]]]]:
    """Asks the catalogue as the owner of the tables."""
    assert settings.migration_database_url is not None
    engine = create_async_engine(async_url(settings.migration_database_url.get_secret_value()))

    async def ask(query: str) -> list[Any]:
        async with engine.connect() as connection:
            return list(await connection.execute(text(query)))

    yield ask
    await engine.dispose()


async def count(tx: Transaction, table: str) -> int:
    mine = "where tenant_id is not null" if table == "price_book" else ""  # list prices are everybody's
    return (await tx.execute(text(f"select count(*) from {table} {mine}"))).scalar_one()


async def denied(database: Database, tenant: Tenant | None, statement: str, **values: Any) -> None:
    """Postgres refuses the app role this, for want of a grant or of a policy (42501 is either)."""
    door = database.tenant(tenant.id) if tenant is not None else database._app.begin()
    with pytest.raises(DBAPIError) as refused:
        async with door as tx:
            await tx.execute(text(statement), values)
    assert refused.value.orig is not None
    assert getattr(refused.value.orig, "sqlstate", None) == "42501", str(refused.value)


# --- the catalogue ----------------------------------------------------------------------------------------------------


async def test_every_tenant_table_has_forced_row_security_and_is_tried_here(owner: Any) -> None:
    tables = await owner(TENANT_TABLES)
    assert {table.name for table in tables} == {*ROWS, "tenants", "policies", "relay_credentials"}
    assert [table.name for table in tables if not (table.enabled and table.forced)] == []


async def test_no_table_is_left_out_of_the_rule(owner: Any) -> None:
    """A table without a tenant is outside the rule: there are alembic's, and the operator's, which no app role sees."""
    every = await owner("select tablename as name from pg_tables where schemaname = 'public'")
    tenants_own = {table.name for table in await owner(TENANT_TABLES)}
    assert {table.name for table in every} - tenants_own == {"alembic_version", "setting_overrides", "relays"}
    assert await owner(f"""
        select distinct grantee from information_schema.role_table_grants
        where table_name in {OPERATORS_OWN} and grantee like '%app'
    """) == []  # fmt: skip
    rules = await owner(f"select relrowsecurity and relforcerowsecurity from pg_class where relname in {OPERATORS_OWN}")
    assert [tuple(row) for row in rules] == [(True,)] * len(OPERATORS_OWN)


async def test_app_and_system_own_nothing_and_may_not_pass_by(owner: Any, settings: Settings) -> None:
    roles = {
        make_url(url.get_secret_value()).username
        for url in (settings.database_url, settings.system_database_url)
        if url is not None
    }
    attributes = await owner("select rolname, rolsuper, rolbypassrls, rolcreaterole, rolcreatedb from pg_roles")
    for role in attributes:
        if role.rolname in roles:
            assert not any(role[1:])
    owned = await owner("select distinct pg_get_userbyid(relowner) as owner from pg_class")
    assert roles.isdisjoint({row.owner for row in owned})
    members = await owner("select pg_get_userbyid(member) as member from pg_auth_members")
    assert roles.isdisjoint({row.member for row in members})


async def test_nobody_else_has_any_grant(owner: Any) -> None:
    assert await owner("""
        select grantee, table_name from information_schema.role_table_grants
        where table_schema = 'public' and grantee = 'PUBLIC'
    """) == []  # fmt: skip


# --- reading ----------------------------------------------------------------------------------------------------------


async def test_a_tenant_sees_its_own_rows_and_no_others(
    database: Database, furnished: Tenant, other_tenant: Tenant
) -> None:
    for table in ROWS:
        async with database.tenant(furnished.id) as tx:
            assert await count(tx, table) >= 1, table
        async with database.tenant(other_tenant.id) as tx:
            seen = await count(tx, table)
        assert seen == (2 if table == "audit_log" else 0), table  # its own creation
    async with database.tenant(other_tenant.id) as tx:
        assert (await tx.execute(text("select slug from tenants"))).scalars().all() == [other_tenant.slug]
        assert (await tx.execute(text("select tenant_id from policies"))).scalars().all() == [other_tenant.id]


async def test_with_no_tenant_bound_every_table_is_empty(database: Database, furnished: Tenant) -> None:
    async with database._app.begin() as tx:
        for table in (*ROWS, "tenants", "policies"):
            assert await count(tx, table) == 0, table


async def test_a_connection_back_in_the_pool_remembers_no_tenant(database: Database, furnished: Tenant) -> None:
    async with database.tenant(furnished.id) as tx:
        assert await count(tx, "sessions") == 1
    for _ in range(20):
        async with database._app.begin() as tx:
            assert await count(tx, "sessions") == 0


async def test_the_system_role_sees_all(database: Database, furnished: Tenant, other_tenant: Tenant) -> None:
    async with database.across_tenants("test") as tx:
        for tenant in (furnished, other_tenant):
            found = await tx.execute(text("select slug from tenants where id = :id"), {"id": tenant.id})
            assert found.scalar_one() == tenant.slug


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", WRITTEN_BY_APP)
async def test_a_row_for_another_tenant_is_refused(
    database: Database, tenant: Tenant, other_tenant: Tenant, table: str
) -> None:
    values = {"t": other_tenant.id, "a": uuid.uuid4()}
    used = {name: value for name, value in values.items() if f":{name}" in ROWS[table]}
    await denied(database, tenant, ROWS[table], **used)
    await denied(database, None, ROWS[table], **used)


@pytest.mark.parametrize("table", [table for table in ROWS if table not in WRITTEN_BY_APP])
async def test_what_is_not_the_apps_to_write_is_refused_even_for_its_own_tenant(
    database: Database, tenant: Tenant, table: str
) -> None:
    values = {"t": tenant.id, "a": uuid.uuid4(), "b": uuid.uuid4(), "s": "x"}
    used = {name: value for name, value in values.items() if f":{name}" in ROWS[table]}
    await denied(database, tenant, ROWS[table], **used)


@pytest.mark.parametrize("table", APPEND_ONLY)
async def test_what_is_append_only_is_so_by_grant(database: Database, furnished: Tenant, table: str) -> None:
    await denied(database, furnished, f"update {table} set tenant_id = tenant_id")
    await denied(database, furnished, f"delete from {table}")
    await denied(database, furnished, f"truncate {table}")


@pytest.mark.parametrize("table", ["usage_ledger", "usage_keys", "audit_log", "legs"])
async def test_not_even_the_system_role_changes_the_books(database: Database, furnished: Tenant, table: str) -> None:
    for statement in (f"update {table} set tenant_id = tenant_id", f"delete from {table}", f"truncate {table}"):
        with pytest.raises(DBAPIError) as refused:
            async with database.across_tenants("test") as tx:
                await tx.execute(text(statement))
        assert getattr(refused.value.orig, "sqlstate", None) == "42501"


async def test_another_tenants_rows_cannot_be_changed_taken_or_given(
    database: Database, furnished: Tenant, other_tenant: Tenant
) -> None:
    changeable = (
        *("sessions", "budget_windows", "budget_holds", "jobs", "recordings", "recording_parts"),
        *("webhook_endpoints", "webhook_deliveries"),
    )
    for table in changeable:
        async with database.tenant(other_tenant.id) as tx:
            changed = await tx.execute(text(f"update {table} set tenant_id = tenant_id"))
            assert changed.rowcount == 0, table
        give = f"update {table} set tenant_id = :other"
        await denied(database, furnished, give, other=other_tenant.id)
    async with database.tenant(other_tenant.id) as tx:
        for table in ("jobs", "job_chunks", "recording_parts", "webhook_endpoints"):
            assert (await tx.execute(text(f"delete from {table}"))).rowcount == 0, table
    async with database.tenant(furnished.id) as tx:
        assert await count(tx, "jobs") == 1


async def test_another_tenants_keys_can_be_used_again(
    database: Database, furnished: Tenant, other_tenant: Tenant
) -> None:
    """Unique keys see all rows: one without the tenant in it would tell that another tenant's row exists."""
    async with database.tenant(furnished.id) as tx:
        session = (await tx.execute(text("select id from sessions"))).scalar_one()
    async with database.tenant(other_tenant.id) as tx:
        for table in (
            "sessions",
            "usage_keys",
            "jobs",
            "revoked_tokens",
            "tickets",
            "recordings",
            "recording_parts",
            "legs",
        ):
            values = {"t": other_tenant.id, "a": session}
            await tx.execute(text(ROWS[table]), {name: v for name, v in values.items() if f":{name}" in ROWS[table]})


async def test_the_app_role_cannot_become_another_or_change_tables(database: Database, tenant: Tenant) -> None:
    for statement in (
        "set role stenogate_owner",
        "set role stenogate_system",
        "alter table usage_ledger disable row level security",
        "drop policy tenant on usage_ledger",
        "create table mine (id int)",
    ):
        await denied(database, tenant, statement)


# --- many at once -----------------------------------------------------------------------------------------------------


async def test_two_hundred_interleaved_transactions_on_one_pool_leak_nothing(
    database: Database, furnished: Tenant, other_tenant: Tenant
) -> None:
    turns = asyncio.Semaphore(20)  # twice the pool

    async def ask(number: int) -> None:
        tenant = (furnished, other_tenant)[number % 2]
        async with database.tenant(tenant.id) as tx:
            for _ in range(3):
                assert (await tx.execute(text("select slug from tenants"))).scalars().all() == [tenant.slug]
                assert await count(tx, "sessions") == (1 if tenant == furnished else 0)
                await asyncio.sleep(0)
            if number % 3 == 0:
                await tx.execute(text("select 1 / 0"))  # a rolled-back transaction forgets its tenant, too

    async def take_turn(number: int) -> None:
        async with turns:
            if number % 5 == 4:
                async with database._app.begin() as tx:
                    assert await count(tx, "tenants") == 0
            elif number % 3 == 0:
                with pytest.raises(DBAPIError, match="division by zero"):
                    await ask(number)
            else:
                await ask(number)

    await asyncio.gather(*(take_turn(number) for number in range(200)))


async def test_no_tenants_transaction_reads_a_webhooks_secret(database: Database, furnished: Tenant) -> None:
    for column in ("sealed", "sealed_key", "master_key", "*"):
        await denied(database, furnished, f"select {column} from webhook_secrets")
    async with database.tenant(furnished.id) as tx:
        assert (await tx.execute(text("select id, expires_at from webhook_secrets"))).one()
