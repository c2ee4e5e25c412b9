"""Settings that the operator changed while gateways run. They belong to no tenant: only the system role sees them."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TABLE = """
create table setting_overrides (
    name       text primary key,
    value      jsonb not null,
    changed_by text not null,
    changed_at timestamptz not null default now()
)
"""


def _role(setting: str) -> str:
    query = f"select quote_ident(current_setting('stenogate.{setting}'))"
    name: str = op.get_bind().exec_driver_sql(query).scalar_one()
    return name


def upgrade() -> None:
    op.execute(TABLE)
    system = _role("system_role")
    op.execute("alter table setting_overrides enable row level security")
    op.execute("alter table setting_overrides force row level security")
    op.execute(f"create policy system on setting_overrides to {system} using (true) with check (true)")
    op.execute(f"grant select, insert, update, delete on setting_overrides to {system}")


def downgrade() -> None:
    op.execute("drop table setting_overrides")
