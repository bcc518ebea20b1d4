"""Reports may go while a baseline's history names them; analyses are found by their end.

Revision ID: 0016
Revises: 0015
Create Date: 2026-11-29 06:00:00+00:00

"""

import sqlalchemy as sa
from alembic import op

revision: str = "0016"
down_revision: str | None = "0015"
branch_labels: str | None = None
depends_on: str | None = None

_KEY = "fk_baseline_moves_report_id_reports"


def upgrade() -> None:
    """Upgrade schema."""
    with op.batch_alter_table("baseline_moves") as batch:
        batch.drop_constraint(op.f(_KEY), type_="foreignkey")
    op.create_index(op.f("ix_analyses_finished_at_id"), "analyses", ["finished_at", "id"])


def downgrade() -> None:
    """Downgrade schema; drop the moves to reports that are gone, as the older table cannot name them."""
    op.drop_index(op.f("ix_analyses_finished_at_id"), "analyses")
    moves, reports = (sa.table(name, sa.column("id"), sa.column("report_id")) for name in ("baseline_moves", "reports"))
    op.execute(sa.delete(moves).where(moves.c.report_id.not_in(sa.select(reports.c.id))))
    with op.batch_alter_table("baseline_moves") as batch:
        batch.create_foreign_key(op.f(_KEY), "reports", ["report_id"], ["id"])
