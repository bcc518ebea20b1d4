"""Gates, each version a row, and baselines with their requested moves.

Revision ID: 0004
Revises: 0003
Create Date: 2026-11-24 00:00:00+00:00

"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Upgrade schema."""
    _create(
        "gates",
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(30), nullable=False),
        sa.Column("description", sa.String(2000), nullable=True),
        sa.Column("n_checks", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.UniqueConstraint("name", "version", name=op.f("uq_gates_name_version")),
    )
    op.create_index(op.f("ix_gates_name"), "gates", ["name"])
    _create(
        "baselines",
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("report_id", sa.String(36), nullable=True),
        sa.Column("moved_at", sa.DateTime(timezone=True), nullable=True),
        sa.UniqueConstraint("name", name=op.f("uq_baselines_name")),
        sa.ForeignKeyConstraint(["report_id"], ["reports.id"], name=op.f("fk_baselines_report_id_reports")),
    )
    _create(
        "baseline_moves",
        sa.Column("baseline_id", sa.String(36), nullable=False),
        sa.Column("report_id", sa.String(36), nullable=False),
        sa.Column("before_report_id", sa.String(36), nullable=True),
        sa.Column("done", sa.Boolean(), nullable=False),
        sa.Column("note", sa.String(500), nullable=True),
        sa.ForeignKeyConstraint(
            ["baseline_id"], ["baselines.id"], name=op.f("fk_baseline_moves_baseline_id_baselines")
        ),
        sa.ForeignKeyConstraint(["report_id"], ["reports.id"], name=op.f("fk_baseline_moves_report_id_reports")),
    )
    op.create_index(op.f("ix_baseline_moves_baseline_id"), "baseline_moves", ["baseline_id"])


def downgrade() -> None:
    """Downgrade schema."""
    for table in ("baseline_moves", "baselines", "gates"):
        op.drop_table(table)


def _create(table: str, *parts: Any) -> None:
    """Create a table of resources: with an id, a time, and an index of their order for pages."""
    op.create_table(
        table,
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        *parts,
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{table}")),
    )
    op.create_index(op.f(f"ix_{table}_created_at_id"), table, ["created_at", "id"])
