"""Files that workers fetch from where they lie.

Revision ID: 0012
Revises: 0011
Create Date: 2026-11-28 12:00:00+00:00

"""

import sqlalchemy as sa
from alembic import op

revision: str = "0012"
down_revision: str | None = "0011"
branch_labels: str | None = None
depends_on: str | None = None

_INDEXES = (("name",), ("outcome",), ("resource_id",), ("created_at", "id"))
_GOES_ON = sa.text("outcome IS NULL AND cancel_requested_at IS NULL")


def upgrade() -> None:
    """Upgrade schema."""
    instant = sa.DateTime(timezone=True)
    op.create_table(
        "fetches",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("created_at", instant, nullable=False),
        sa.Column("makes", sa.String(20), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("spec", sa.Text(), nullable=False),
        sa.Column("resource_id", sa.String(36), nullable=True),
        sa.Column("progress_done", sa.BigInteger(), nullable=False),
        sa.Column("progress_total", sa.BigInteger(), nullable=False),
        sa.Column("request_sha256", sa.String(64), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("started_at", instant, nullable=True),
        sa.Column("cancel_requested_at", instant, nullable=True),
        sa.Column("finished_at", instant, nullable=True),
        sa.Column("outcome", sa.String(20), nullable=True),
        sa.Column("problem", sa.JSON(), nullable=True),
        sa.Column("progress_phase", sa.String(30), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_fetches"),
    )
    op.create_index(
        "ix_fetches_request_sha256",
        "fetches",
        ["request_sha256"],
        unique=True,
        sqlite_where=_GOES_ON,
        postgresql_where=_GOES_ON,
    )
    for columns in _INDEXES:
        op.create_index(f"ix_fetches_{'_'.join(columns)}", "fetches", [*columns])
    for table in ("checkpoints", "probes"):
        op.add_column(table, sa.Column("origin", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Downgrade schema."""
    for table in ("probes", "checkpoints"):
        op.drop_column(table, "origin")
    for columns in reversed(_INDEXES):
        op.drop_index(f"ix_fetches_{'_'.join(columns)}", table_name="fetches")
    op.drop_index("ix_fetches_request_sha256", table_name="fetches")
    op.drop_table("fetches")
