"""What live sessions keep of their audio. A part's row is there before its blob is, and until its blob is gone."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TABLES = """
create table recordings (
    tenant_id   uuid not null,
    session_id  uuid not null,
    started_at  timestamptz not null default now(),
    finished_at timestamptz, -- null: under way, or its process died
    expires_at  timestamptz not null,
    deleted_at  timestamptz, -- null: kept
    primary key (tenant_id, session_id),
    foreign key (tenant_id, session_id) references sessions (tenant_id, id)
);
create index recordings_by_expiry on recordings (expires_at) where deleted_at is null;

create table recording_parts (
    tenant_id    uuid not null,
    session_id   uuid not null,
    number       int not null check (number > 0),
    start_sample bigint not null check (start_sample >= 0),
    samples      bigint not null check (samples > 0),
    blob_key     text not null,
    stored_at    timestamptz, -- null: on its way, or lost
    primary key (tenant_id, session_id, number),
    foreign key (tenant_id, session_id) references recordings
);
"""

MINE = "tenant_id = (select nullif(current_setting('app.tenant_id', true), '')::uuid)"

# table: (app's grants, system's grants)
GRANTS = {
    "recordings": ("select, insert, update", "select, update"),
    "recording_parts": ("select, insert, update, delete", "select, delete"),
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
    for table in reversed(GRANTS):
        op.execute(f"drop table {table}")
