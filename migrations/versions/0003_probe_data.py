"""Probes of images and texts; preprocessing, tokenizer and stored names of a checkpoint.

Revision ID: 0003
Revises: 0002
Create Date: 2026-11-24 00:00:00+00:00

"""

import sqlalchemy as sa
from alembic import op
from alembic.operations import BatchOperations

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | None = None
depends_on: str | None = None

_PROBES = sa.table("probes", sa.column("content"), sa.column("input_shape", sa.JSON))


def upgrade() -> None:
    """Upgrade schema; existing probes hold tensors."""
    with op.batch_alter_table("checkpoints") as batch:
        batch.add_column(sa.Column("prefix", sa.String(200), nullable=False, server_default=""))
        batch.add_column(sa.Column("ignored", sa.JSON(), nullable=False, server_default="{}"))
        batch.add_column(sa.Column("preprocess", sa.JSON(), nullable=True))
        _add_tokenizer(batch, "checkpoints")
    with op.batch_alter_table("probes") as batch:
        batch.add_column(sa.Column("content", sa.String(20), nullable=False, server_default="tensors"))
        batch.add_column(sa.Column("columns", sa.JSON(), nullable=True))
        batch.add_column(sa.Column("max_length", sa.Integer(), nullable=True))
        batch.alter_column("input_shape", existing_type=sa.JSON(), nullable=True)
        _add_tokenizer(batch, "probes")


def downgrade() -> None:
    """Downgrade schema; images and texts, which the older code cannot read, are left without a shape."""
    op.execute(sa.update(_PROBES).where(_PROBES.c.content != "tensors").values(input_shape=[]))
    with op.batch_alter_table("probes") as batch:
        _drop_tokenizer(batch, "probes")
        batch.alter_column("input_shape", existing_type=sa.JSON(), nullable=False)
        for column in ("max_length", "columns", "content"):
            batch.drop_column(column)
    with op.batch_alter_table("checkpoints") as batch:
        _drop_tokenizer(batch, "checkpoints")
        for column in ("preprocess", "ignored", "prefix"):
            batch.drop_column(column)


def _add_tokenizer(batch: BatchOperations, table: str) -> None:
    batch.add_column(sa.Column("tokenizer_sha256", sa.String(64), nullable=True))
    batch.create_foreign_key(op.f(f"fk_{table}_tokenizer_sha256_blobs"), "blobs", ["tokenizer_sha256"], ["sha256"])
    batch.create_index(op.f(f"ix_{table}_tokenizer_sha256"), ["tokenizer_sha256"])


def _drop_tokenizer(batch: BatchOperations, table: str) -> None:
    batch.drop_index(op.f(f"ix_{table}_tokenizer_sha256"))
    batch.drop_constraint(op.f(f"fk_{table}_tokenizer_sha256_blobs"), type_="foreignkey")
    batch.drop_column("tokenizer_sha256")
