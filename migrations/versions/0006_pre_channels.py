"""How many channels of a session are recognised each for itself. Each is billed: in the ledger, `audio_ms` is time on
the sample clock, which all channels share, and `billed_ms` counts it for each of them."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("sessions", "usage_ledger"):
        op.execute(f"alter table {table} add column channels smallint not null default 1 check (channels > 0)")


def downgrade() -> None:
    for table in ("usage_ledger", "sessions"):
        op.execute(f"alter table {table} drop column channels")
