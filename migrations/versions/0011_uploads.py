"""Resumable uploads.

Revision ID: 0011
Revises: 0010
Create Date: 2026-11-28 08:00:00+00:00

"""

import sqlalchemy as sa
from alembic import op

revision: str = "0011"
down_revision: str | None = "0010"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Upgrade schema."""
    instant = sa.DateTime(timezone=True)
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("created_at", instant, nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("offset_bytes", sa.BigInteger(), nullable=False),
        sa.Column("part_bytes", sa.BigInteger(), nullable=True),
        sa.Column("metadata", sa.String(4096), nullable=True),
        sa.Column("place", sa.String(36), nullable=False),
        sa.Column("boot", sa.String(36), nullable=True),
        sa.Column("expires_at", instant, nullable=False),
        sa.Column("resource_id", sa.String(36), nullable=True),
        sa.Column("request_sha256", sa.String(64), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_uploads"),
    )
    op.create_index("ix_uploads_expires_at", "uploads", ["expires_at"])


def downgrade() -> None:
    """Downgrade schema."""
    op.drop_index("ix_uploads_expires_at", table_name="uploads")
    op.drop_table("uploads")
