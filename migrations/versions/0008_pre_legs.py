"""What each attempt at a session cost us, the failed ones too: a tenant pays for audio once, whoever finished it."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

TABLE = """
create table legs (
    tenant_id     uuid not null,
    id            uuid not null,
    session_id    uuid not null,
    backend       text not null,
    model         text not null,
    credential_id uuid, -- null: none was needed
    outcome       text not null, -- 'completed', or the code of what went wrong
    start_ms      bigint not null check (start_ms >= 0), -- on the session's sample clock
    audio_ms      bigint not null check (audio_ms >= 0),
    charged_ms    bigint not null check (charged_ms >= 0), -- what the provider charges for, minimum included
    cost_nano     bigint not null check (cost_nano >= 0),
    currency      char(3) not null,
    took_ms       bigint not null check (took_ms >= 0),
    recorded_at   timestamptz not null default now(),
    primary key (tenant_id, id),
    foreign key (tenant_id, session_id) references sessions (tenant_id, id)
);
create index legs_by_session on legs (tenant_id, session_id)
"""

MINE = "tenant_id = (select nullif(current_setting('app.tenant_id', true), '')::uuid)"


def _role(setting: str) -> str:
    query = f"select quote_ident(current_setting('stenogate.{setting}'))"
    name: str = op.get_bind().exec_driver_sql(query).scalar_one()
    return name


def upgrade() -> None:
    for statement in TABLE.split(";\n"):
        op.execute(statement)
    app, system = _role("app_role"), _role("system_role")
    op.execute("alter table legs enable row level security")
    op.execute("alter table legs force row level security")
    op.execute(f"create policy tenant on legs to {app} using ({MINE}) with check ({MINE})")
    op.execute(f"create policy system on legs to {system} using (true) with check (true)")
    op.execute(f"grant select, insert on legs to {app}")
    op.execute(f"grant select on legs to {system}")


def downgrade() -> None:
    op.execute("drop table legs")
