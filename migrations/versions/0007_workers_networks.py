"""The libraries that a worker has tried to import, the reasons for failures, and the names of its networks.

Revision ID: 0007
Revises: 0006
Create Date: 2026-11-27 00:00:00+00:00

"""

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: str | None = None
depends_on: str | None = None

_COLUMNS = ("untried", "unavailable", "networks")


def upgrade() -> None:
    """Upgrade schema."""
    with op.batch_alter_table("workers") as table:
        for name in _COLUMNS:
            table.add_column(sa.Column(name, sa.JSON(), nullable=True))


def downgrade() -> None:
    """Downgrade schema."""
    with op.batch_alter_table("workers") as table:
        for name in reversed(_COLUMNS):
            table.drop_column(name)
