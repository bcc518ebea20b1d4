"""Adapters: the base of a checkpoint, and what of its configuration decides the merged weights.

Revision ID: 0010
Revises: 0009
Create Date: 2026-11-28 07:30:00+00:00

"""

import sqlalchemy as sa
from alembic import op

revision: str = "0010"
down_revision: str | None = "0009"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Upgrade schema; existing checkpoints are whole networks."""
    with op.batch_alter_table("checkpoints") as batch:
        batch.add_column(sa.Column("base_id", sa.String(36), nullable=True))
        batch.add_column(sa.Column("adapter", sa.JSON(), nullable=True))
        batch.create_foreign_key(op.f("fk_checkpoints_base_id_checkpoints"), "checkpoints", ["base_id"], ["id"])
        batch.create_index(op.f("ix_checkpoints_base_id"), ["base_id"])


def downgrade() -> None:
    """Downgrade schema; the older code would take an adapter's file for a whole network, so none may be left."""
    checkpoints = sa.table("checkpoints", sa.column("base_id", sa.String))
    left = op.get_bind().scalar(sa.select(sa.func.count()).where(checkpoints.c.base_id.is_not(None)))
    if left:
        raise RuntimeError(f"{left} adapters are left; delete them before the downgrade")
    with op.batch_alter_table("checkpoints") as batch:
        batch.drop_index(op.f("ix_checkpoints_base_id"))
        batch.drop_constraint(op.f("fk_checkpoints_base_id_checkpoints"), type_="foreignkey")
        for column in ("adapter", "base_id"):
            batch.drop_column(column)
