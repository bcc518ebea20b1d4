"""The memory of workers' devices, and what an analysis needs of it.

Revision ID: 0015
Revises: 0014
Create Date: 2026-11-28 22:00:00+00:00

"""

import sqlalchemy as sa
from alembic import op

revision: str = "0015"
down_revision: str | None = "0014"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Upgrade schema."""
    op.add_column("analyses", sa.Column("needs_bytes", sa.BigInteger(), nullable=True))
    op.add_column("workers", sa.Column("memory_bytes", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    """Downgrade schema."""
    op.drop_column("workers", "memory_bytes")
    op.drop_column("analyses", "needs_bytes")
