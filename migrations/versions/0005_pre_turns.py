"""A session that is resumed in another process changes hands: `turn` counts how often, and a holder of an earlier turn
can neither bill nor end it."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("alter table sessions add column turn int not null default 0")


def downgrade() -> None:
    op.execute("alter table sessions drop column turn")
