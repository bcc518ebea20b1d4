"""The requested prefix of a checkpoint, and whether a worker has compared its names with the network's.

Revision ID: 0006
Revises: 0005
Create Date: 2026-11-27 00:00:00+00:00

"""

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Upgrade schema; names of existing checkpoints are compared at their next analysis."""
    with op.batch_alter_table("checkpoints") as batch:
        batch.add_column(sa.Column("asked_prefix", sa.String(200), nullable=True))
        batch.add_column(sa.Column("names_checked", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    """Downgrade schema."""
    with op.batch_alter_table("checkpoints") as batch:
        for column in ("names_checked", "asked_prefix"):
            batch.drop_column(column)
