"""Points of planned analyses, and the turns in which workers compute them.

Revision ID: 0014
Revises: 0013
Create Date: 2026-11-28 16:00:00+00:00

"""

import sqlalchemy as sa
from alembic import op

from app.models import UTCDateTime

revision: str = "0014"
down_revision: str | None = "0013"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Upgrade schema."""
    op.create_table(
        "points",
        sa.Column("analysis_id", sa.String(36), sa.ForeignKey("analyses.id"), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True),
        sa.Column("place", sa.Double(), nullable=True),
        sa.Column("turn_id", sa.String(50), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("finished_at", UTCDateTime(), nullable=True),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("problem", sa.JSON(none_as_null=True), nullable=True),
    )
    op.create_table(
        "turns",
        sa.Column("id", sa.String(50), primary_key=True),
        sa.Column("analysis_id", sa.String(36), sa.ForeignKey("analyses.id"), nullable=False),
        sa.Column("created_at", UTCDateTime(), nullable=False),
        sa.Column("began_at", UTCDateTime(), nullable=True),
        sa.Column("ended_at", UTCDateTime(), nullable=True),
    )
    op.create_index(op.f("ix_turns_analysis_id"), "turns", ["analysis_id"])
    op.create_index(op.f("ix_turns_ended_at_began_at_analysis_id"), "turns", ["ended_at", "began_at", "analysis_id"])


def downgrade() -> None:
    """Downgrade schema."""
    op.drop_table("turns")
    op.drop_table("points")
