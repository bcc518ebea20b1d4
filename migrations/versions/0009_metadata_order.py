"""Metadata in an order, by which lists are sorted; that of existing resources as well.

Revision ID: 0009
Revises: 0008
Create Date: 2026-11-28 03:40:00+00:00

"""

import re
import struct

import sqlalchemy as sa
from alembic import op

revision: str = "0009"
down_revision: str | None = "0008"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Upgrade schema."""
    type_ = sa.String(110).with_variant(sa.String(110, collation="C"), "postgresql")
    op.add_column("metadata_entries", sa.Column("sort_key", type_, nullable=False, server_default=""))
    entries = sa.table("metadata_entries", sa.column("value", sa.String), sa.column("sort_key", sa.String))
    connection = op.get_bind()
    values = connection.scalars(sa.select(entries.c.value).distinct()).all()
    if values:
        update = sa.update(entries).where(entries.c.value == sa.bindparam("of")).values(sort_key=sa.bindparam("key"))
        connection.execute(update, [{"of": value, "key": _sort_key(value)} for value in values])


def downgrade() -> None:
    """Downgrade schema."""
    with op.batch_alter_table("metadata_entries") as table:
        table.drop_column("sort_key")


def _sort_key(value: str) -> str:
    """Return what app/models.py had as `sort_key` when this revision was made."""
    if not re.fullmatch(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", value, re.ASCII | re.IGNORECASE):
        return "1" + value.casefold()[:100]
    (bits,) = struct.unpack(">Q", struct.pack(">d", float(value) + 0.0))
    bits = bits ^ (2**64 - 1) if bits >> 63 else bits | 2**63
    return f"0{bits:016x}"
