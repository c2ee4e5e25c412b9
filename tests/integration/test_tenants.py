"""Tenants and their policies in a real Postgres, each change with its audit row."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pytest
from sqlalchemy import text

from policy import policies, tenants
from policy.errors import Conflict, Invalid, NotFound
from policy.policies import PolicyBody
from policy.tenants import Tenant
from runtime.database import Database


async def audit_rows(database: Database, tenant: Tenant) -> list[Any]:
    async with database.across_tenants("test") as tx:
        rows = await tx.execute(
            text("""
                select actor, action, object, cast(before as text) as before, cast(after as text) as after
                from audit_log where tenant_id = :id order by seq
            """),
            {"id": tenant.id},
        )
        return list(rows)


async def test_a_new_tenant_is_active_and_has_the_default_policy(database: Database, tenant: Tenant) -> None:
    async with database.tenant(tenant.id) as tx:
        assert await tenants.by_id(tx, tenant.id) == tenant
        policy = await policies.current(tx, tenant.id)
    assert (tenant.status, tenant.currency, tenant.billing_tz) == ("active", "USD", "UTC")
    assert (policy.version, policy.body) == (1, PolicyBody())
    assert [row.action for row in await audit_rows(database, tenant)] == ["tenant.create", "policy.put"]


async def test_a_slug_is_taken_once_and_the_loser_changes_nothing(database: Database, tenant: Tenant) -> None:
    before = await audit_rows(database, tenant)
    with pytest.raises(Conflict):
        async with database.across_tenants("test") as tx:
            await tenants.create(tx, slug=tenant.slug, actor="test")
    async with database.across_tenants("test") as tx:
        assert await tenants.by_slug(tx, tenant.slug) == tenant
    assert await audit_rows(database, tenant) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [("slug", "Not A Slug"), ("slug", "a\n"), ("slug", ""), ("currency", "euro"), ("billing_tz", "Mars/Olympus")],
)
async def test_a_tenant_with_a_bad_field_is_refused_by_name(database: Database, field: str, value: str) -> None:
    fields = {"slug": f"t-{uuid.uuid4().hex[:12]}"} | {field: value}
    with pytest.raises(Invalid) as refused:
        async with database.across_tenants("test") as tx:
            await tenants.create(tx, actor="test", **fields)
    assert refused.value.param == field


async def test_a_tenant_may_be_billed_in_its_own_time_zone(database: Database) -> None:
    slug = f"t-{uuid.uuid4().hex[:12]}"
    async with database.across_tenants("test") as tx:
        created = await tenants.create(tx, slug=slug, currency="EUR", billing_tz="Europe/Vienna", actor="test")
        assert created in await tenants.listing(tx)
    assert created.billing_tz == "Europe/Vienna"


async def test_a_status_change_is_audited_with_before_and_after(database: Database, tenant: Tenant) -> None:
    async with database.across_tenants("test") as tx:
        suspended = await tenants.set_status(tx, tenant.id, "suspended", actor="ops")
    assert suspended.status == "suspended"
    row = (await audit_rows(database, tenant))[-1]
    assert (row.actor, row.action, row.object) == ("ops", "tenant.set_status", f"tenant/{tenant.slug}")
    assert json.loads(row.before)["status"] == "active"
    assert json.loads(row.after)["status"] == "suspended"


async def test_an_unknown_tenant_or_status_is_refused(database: Database, tenant: Tenant) -> None:
    async with database.across_tenants("test") as tx:
        with pytest.raises(NotFound):
            await tenants.set_status(tx, uuid.uuid4(), "suspended", actor="test")
        with pytest.raises(NotFound):
            await tenants.by_slug(tx, "no-such-tenant")
        with pytest.raises(NotFound):
            await policies.put(tx, uuid.uuid4(), PolicyBody(), actor="test")
        with pytest.raises(Invalid):
            await tenants.set_status(tx, tenant.id, "asleep", actor="test")  # type: ignore[arg-type]


async def test_a_rolled_back_change_leaves_no_audit_row(database: Database, tenant: Tenant) -> None:
    before = await audit_rows(database, tenant)
    with pytest.raises(ZeroDivisionError):
        async with database.across_tenants("test") as tx:
            await tenants.set_status(tx, tenant.id, "closed", actor="test")
            raise ZeroDivisionError
    assert await audit_rows(database, tenant) == before


async def test_a_policy_put_is_the_next_version_and_keeps_the_old_one(database: Database, tenant: Tenant) -> None:
    body = PolicyBody(backends=("relay", "self_hosted"), features=frozenset({"words", "translate"}), max_streams=2)
    async with database.across_tenants("test") as tx:
        put = await policies.put(tx, tenant.id, body, actor="ops")
        assert await policies.current(tx, tenant.id) == put
    async with database.tenant(tenant.id) as tx:
        assert await policies.current(tx, tenant.id) == put
        ranges = await tx.execute(
            text("""
                select version, upper_inf(effective) as open, lower(effective) = lag(upper(effective))
                    over (order by version) as adjoins
                from policies order by version
            """)
        )
        assert [tuple(row) for row in ranges] == [(1, False, None), (2, True, True)]
    row = (await audit_rows(database, tenant))[-1]
    assert (row.action, row.object) == ("policy.put", f"policy/{tenant.slug}/2")
    assert json.loads(row.before) == PolicyBody().model_dump(mode="json")
    assert PolicyBody.model_validate_json(row.after) == body


async def test_policies_put_at_once_follow_one_another(database: Database, tenant: Tenant) -> None:
    async def put(streams: int) -> int:
        async with database.across_tenants("test") as tx:
            return (await policies.put(tx, tenant.id, PolicyBody(max_streams=streams), actor="test")).version

    versions = await asyncio.gather(*(put(streams) for streams in range(1, 9)))
    assert sorted(versions) == list(range(2, 10))
    async with database.tenant(tenant.id) as tx:
        current = await policies.current(tx, tenant.id)
    assert current.version == 9
    assert current.body.max_streams == versions.index(9) + 1


async def test_another_tenants_policy_is_not_found(database: Database, tenant: Tenant, other_tenant: Tenant) -> None:
    async with database.tenant(other_tenant.id) as tx:
        with pytest.raises(NotFound):
            await policies.current(tx, tenant.id)
        with pytest.raises(NotFound):
            await tenants.by_id(tx, tenant.id)
