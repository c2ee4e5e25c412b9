"""Tickets. Of a ticket only its digest is kept; whoever deletes the row has redeemed it."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TABLE = """
create table tickets (
    tenant_id        uuid not null references tenants,
    digest           bytea not null check (octet_length(digest) = 32),
    subject          text not null,
    scopes           text[] not null,
    token_id         text not null,
    token_expires_at bigint not null, -- Unix seconds, as in the token
    start            text, -- JSON
    expires_at       timestamptz not null,
    primary key (tenant_id, digest)
);
create index tickets_by_digest on tickets (digest);
create index tickets_by_expiry on tickets (expires_at);
"""

MINE = "tenant_id = (select nullif(current_setting('app.tenant_id', true), '')::uuid)"


def _role(setting: str) -> str:
    query = f"select quote_ident(current_setting('stenogate.{setting}'))"
    name: str = op.get_bind().exec_driver_sql(query).scalar_one()
    return name


def upgrade() -> None:
    for statement in TABLE.split(";\n"):
        if statement.strip():
            op.execute(statement)
    app, system = _role("app_role"), _role("system_role")
    op.execute("alter table tickets enable row level security")
    op.execute("alter table tickets force row level security")
    op.execute(f"create policy tenant on tickets to {app} using ({MINE}) with check ({MINE})")
    op.execute(f"create policy system on tickets to {system} using (true) with check (true)")
    op.execute(f"grant select, insert on tickets to {app}")
    op.execute(f"grant select, delete on tickets to {system}")


def downgrade() -> None:
    op.execute("drop table tickets")
