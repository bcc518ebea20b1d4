"""An analysis may have several checkpoints, in order, and may have an axis.

Revision ID: 0002
Revises: 0001
Create Date: 2026-11-24 00:00:00+00:00

"""

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | None = None
depends_on: str | None = None

_ANALYSES = sa.table("analyses", sa.column("id"), sa.column("checkpoint_id"))
_REPORTS = sa.table("reports", sa.column("analysis_id"), sa.column("checkpoint_id"))
_PLACES = sa.table("analysis_checkpoints", sa.column("analysis_id"), sa.column("position"), sa.column("checkpoint_id"))


def upgrade() -> None:
    """Upgrade schema."""
    op.create_table(
        "analysis_checkpoints",
        sa.Column("analysis_id", sa.String(36), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("checkpoint_id", sa.String(36), nullable=False),
        sa.ForeignKeyConstraint(
            ["analysis_id"], ["analyses.id"], name=op.f("fk_analysis_checkpoints_analysis_id_analyses")
        ),
        sa.PrimaryKeyConstraint("analysis_id", "position", name=op.f("pk_analysis_checkpoints")),
    )
    op.create_index(op.f("ix_analysis_checkpoints_checkpoint_id"), "analysis_checkpoints", ["checkpoint_id"])
    placed = sa.select(_ANALYSES.c.id, sa.literal(0), _ANALYSES.c.checkpoint_id)
    op.execute(
        sa.insert(_PLACES).from_select(list(_PLACES.c.keys()), placed.where(_ANALYSES.c.checkpoint_id.is_not(None)))
    )
    for table in ("analyses", "reports"):
        op.drop_index(op.f(f"ix_{table}_checkpoint_id"), table)
        with op.batch_alter_table(table) as batch:
            batch.drop_column("checkpoint_id")
    with op.batch_alter_table("analyses") as batch:
        batch.add_column(sa.Column("axis", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Downgrade schema; drop the checkpoints of analyses with several, as the older tables have room for one."""
    with op.batch_alter_table("analyses") as batch:
        batch.drop_column("axis")
    for table in ("analyses", "reports"):
        with op.batch_alter_table(table) as batch:
            batch.add_column(sa.Column("checkpoint_id", sa.String(36), nullable=True))
        op.create_index(op.f(f"ix_{table}_checkpoint_id"), table, ["checkpoint_id"])
    for held, key in ((_ANALYSES, _ANALYSES.c.id), (_REPORTS, _REPORTS.c.analysis_id)):
        only = sa.select(sa.func.min(_PLACES.c.checkpoint_id)).where(_PLACES.c.analysis_id == key)
        only = only.having(sa.func.count() == 1)
        op.execute(sa.update(held).values(checkpoint_id=only.scalar_subquery()))
    op.drop_table("analysis_checkpoints")
