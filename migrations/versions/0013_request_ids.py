"""The request that asked for an analysis or a fetch, for logs.

Revision ID: 0013
Revises: 0012
Create Date: 2026-11-28 12:40:00+00:00

"""

import sqlalchemy as sa
from alembic import op

revision: str = "0013"
down_revision: str | None = "0012"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Upgrade schema."""
    for table in ("analyses", "fetches"):
        op.add_column(table, sa.Column("request_id", sa.String(64), nullable=True))


def downgrade() -> None:
    """Downgrade schema."""
    for table in ("fetches", "analyses"):
        op.drop_column(table, "request_id")
