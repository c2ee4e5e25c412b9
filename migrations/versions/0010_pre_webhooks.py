"""What happened, written where it happened (`outbox`), and the endpoints that are told of it. A secret is sealed, and
only the system role reads it."""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

TABLES = """
create table webhook_endpoints (
    tenant_id     uuid not null references tenants,
    id            uuid not null,
    url           text not null,
    events        text[] not null check (cardinality(events) > 0),
    description   text not null default '',
    status        text not null default 'active' check (status in ('active', 'disabled')),
    disabled_why  text check (disabled_why in ('asked', 'gone', 'failing')),
    failures      int not null default 0, -- in a row
    failing_since timestamptz, -- null: it took the last delivery
    quiet_until   timestamptz, -- no delivery before
    created_at    timestamptz not null default now(),
    changed_at    timestamptz not null default now(),
    primary key (tenant_id, id),
    check ((status = 'disabled') = (disabled_why is not null))
);

-- A secret is sealed with a data key of its own, which is sealed with the master key `master_key` names.
create table webhook_secrets (
    tenant_id   uuid not null,
    id          uuid not null,
    endpoint_id uuid not null,
    sealed      bytea not null,
    sealed_key  bytea not null,
    master_key  text not null,
    created_at  timestamptz not null default now(),
    expires_at  timestamptz, -- null: the current one
    primary key (tenant_id, id),
    foreign key (tenant_id, endpoint_id) references webhook_endpoints on delete cascade
);
create unique index webhook_secrets_one_current on webhook_secrets (tenant_id, endpoint_id) where expires_at is null;

create table outbox (
    tenant_id     uuid not null references tenants,
    id            uuid not null, -- derived from what happened to what, so that it is written once
    topic         text not null,
    object_id     uuid not null,
    payload       text not null, -- JSON; text, so that it is the same to the byte whenever it is sent
    endpoint_id   uuid, -- null: for every endpoint that asked for the topic
    created_at    timestamptz not null default now(),
    dispatched_at timestamptz,
    primary key (tenant_id, id)
);
create index outbox_waiting on outbox (created_at) where dispatched_at is null;
create index outbox_by_age on outbox (created_at);

create table webhook_deliveries (
    tenant_id     uuid not null,
    id            uuid not null,
    endpoint_id   uuid not null,
    event_id      uuid not null,
    status        text not null default 'pending' check (status in ('pending', 'delivered', 'failed')),
    attempts      int not null default 0, -- since it was last asked for
    next_at       timestamptz not null default now(),
    claim         uuid,
    claimed_until timestamptz,
    asked_at      timestamptz not null default now(), -- by the event, or by a replay
    created_at    timestamptz not null default now(),
    ended_at      timestamptz,
    primary key (tenant_id, id),
    unique (tenant_id, endpoint_id, event_id),
    foreign key (tenant_id, endpoint_id) references webhook_endpoints on delete cascade,
    foreign key (tenant_id, event_id) references outbox on delete cascade
);
create index webhook_deliveries_due on webhook_deliveries (tenant_id, endpoint_id, next_at) where status = 'pending';
create index webhook_deliveries_claimed on webhook_deliveries (tenant_id, endpoint_id) where claimed_until is not null;
create index webhook_deliveries_by_event on webhook_deliveries (tenant_id, event_id);
create index webhook_deliveries_log on webhook_deliveries (tenant_id, endpoint_id, created_at, id);

create table webhook_attempts (
    tenant_id   uuid not null,
    delivery_id uuid not null,
    number      int not null check (number > 0),
    outcome     text not null, -- 'delivered', 'refused', or the code of what went wrong
    status      int, -- HTTP's; null: there was no answer
    detail      text, -- in our words, never in the receiver's
    took_ms     int not null check (took_ms >= 0),
    at          timestamptz not null default now(),
    primary key (tenant_id, delivery_id, number),
    foreign key (tenant_id, delivery_id) references webhook_deliveries on delete cascade
);

alter table jobs add column webhook_id uuid; -- the endpoint that is told of its end; null: every one that asked for it
"""

MINE = "tenant_id = (select nullif(current_setting('app.tenant_id', true), '')::uuid)"

# table: (app's grants, system's grants)
GRANTS = {
    "webhook_endpoints": ("select, insert, update, delete", "select, update"),
    "webhook_secrets": (
        "select (tenant_id, id, endpoint_id, created_at, expires_at), insert, update (expires_at)",
        "select, update (sealed_key, master_key), delete",
    ),
    "outbox": ("select, insert", "select, insert, update (dispatched_at), delete"),
    "webhook_deliveries": ("select, insert, update", "select, insert, update"),
    "webhook_attempts": ("select, insert", "select"),
}


def _role(setting: str) -> str:
    query = f"select quote_ident(current_setting('stenogate.{setting}'))"
    name: str = op.get_bind().exec_driver_sql(query).scalar_one()
    return name


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)
    app, system = _role("app_role"), _role("system_role")
    for table, (app_grants, system_grants) in GRANTS.items():
        op.execute(f"alter table {table} enable row level security")
        op.execute(f"alter table {table} force row level security")
        op.execute(f"create policy tenant on {table} to {app} using ({MINE}) with check ({MINE})")
        op.execute(f"create policy system on {table} to {system} using (true) with check (true)")
        op.execute(f"grant {app_grants} on {table} to {app}")
        op.execute(f"grant {system_grants} on {table} to {system}")


def downgrade() -> None:
    op.execute("alter table jobs drop column webhook_id")
    for table in ("webhook_attempts", "webhook_deliveries", "outbox", "webhook_secrets", "webhook_endpoints"):
        op.execute(f"drop table {table}")
