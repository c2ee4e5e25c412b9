"""Managed providers that the operator has an account with, and the sealed credentials for them. A credential belongs to
one tenant, or to all who have none of their own. Only the system role reads either: a tenant's transaction never holds
a sealed key."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TABLES = """
create table relays (
    name       text primary key check (name ~ '^[a-z][a-z0-9-]{0,62}$' and name not in ('relay', 'local', 'scripted')),
    provider   text not null,
    base_url   text, -- null: the provider's own
    region     text,
    models     text[], -- null: the provider's own; the first is the default
    status     text not null default 'active' check (status in ('active', 'disabled')),
    created_by text not null,
    created_at timestamptz not null default now(),
    changed_at timestamptz not null default now()
);

-- The key is sealed with a data key of its own, which is sealed with the master key `master_key` names.
create table relay_credentials (
    id           uuid primary key,
    relay        text not null references relays (name),
    tenant_id    uuid references tenants,
    prefix       text not null, -- all of it that people see
    sealed       bytea not null,
    sealed_key   bytea not null,
    master_key   text not null,
    status       text not null default 'active' check (status in ('active', 'retired')),
    created_by   text not null,
    created_at   timestamptz not null default now(),
    retired_at   timestamptz,
    last_used_at timestamptz
);
create unique index relay_credentials_one_active on relay_credentials
    (relay, coalesce(tenant_id, '00000000-0000-0000-0000-000000000000'::uuid)) where status = 'active';
"""

# table: the system role's grants
GRANTS = {
    "relays": "select, insert, update (provider, base_url, region, models, status, changed_at), delete",
    "relay_credentials": "select, insert, update (sealed_key, master_key, status, retired_at, last_used_at), delete",
}


def _role(setting: str) -> str:
    query = f"select quote_ident(current_setting('stenogate.{setting}'))"
    name: str = op.get_bind().exec_driver_sql(query).scalar_one()
    return name


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)
    system = _role("system_role")
    for table, grants in GRANTS.items():
        op.execute(f"alter table {table} enable row level security")
        op.execute(f"alter table {table} force row level security")
        op.execute(f"create policy system on {table} to {system} using (true) with check (true)")
        op.execute(f"grant {grants} on {table} to {system}")


def downgrade() -> None:
    for table in reversed(GRANTS):
        op.execute(f"drop table {table}")
