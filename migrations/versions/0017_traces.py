"""The trace of the request that asked for an analysis or a fetch.

Revision ID: 0017
Revises: 0016
Create Date: 2026-11-29 06:30:00+00:00

"""

import sqlalchemy as sa
from alembic import op

revision: str = "0017"
down_revision: str | None = "0016"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Upgrade schema."""
    for table in ("analyses", "fetches"):
        op.add_column(table, sa.Column("traceparent", sa.String(55), nullable=True))


def downgrade() -> None:
    """Downgrade schema."""
    for table in ("fetches", "analyses"):
        op.drop_column(table, "traceparent")
