"""Hashes of the data of probes and feature sets, independent of the file format.

Revision ID: 0005
Revises: 0004
Create Date: 2026-11-27 00:00:00+00:00

"""

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | None = None
depends_on: str | None = None

_TABLES = ("probes", "feature_sets")


def upgrade() -> None:
    """Upgrade schema; existing rows have no hash until they are pushed again."""
    for table in _TABLES:
        with op.batch_alter_table(table) as batch:
            batch.add_column(sa.Column("data_sha256", sa.String(64), nullable=True))
            batch.create_index(op.f(f"ix_{table}_data_sha256"), ["data_sha256"])


def downgrade() -> None:
    """Downgrade schema."""
    for table in _TABLES:
        with op.batch_alter_table(table) as batch:
            batch.drop_index(op.f(f"ix_{table}_data_sha256"))
            batch.drop_column("data_sha256")
