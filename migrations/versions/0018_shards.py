"""Passes over large probes are cut into shards.

Revision ID: 0018
Revises: 0017
Create Date: 2026-11-29 10:10:00+00:00

"""

import sqlalchemy as sa
from alembic import op

revision: str = "0018"
down_revision: str | None = "0017"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Upgrade schema."""
    op.add_column("analyses", sa.Column("shard_samples", sa.Integer(), nullable=True))


def downgrade() -> None:
    """Downgrade schema."""
    op.drop_column("analyses", "shard_samples")
