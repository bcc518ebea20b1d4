"""Metrics of reports, by which lists of them are sorted and filtered; those of existing reports as well.

Revision ID: 0008
Revises: 0007
Create Date: 2026-11-28 00:00:00+00:00

"""

import json
import re
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: str | None = None
depends_on: str | None = None

# As app/schemas/metrics.py had it when this revision was made.
_METRICS = {"comparison": r"splits\.[a-z]+\.(differences(\.[a-z]\w*)+\.difference|predictions\.[a-z]\w*)"}
_OF_OTHERS = r"(splits|summary)(\.[a-z]\w*)+"
# Reports read at a time.
_BATCH = 100


def upgrade() -> None:
    """Upgrade schema."""
    metrics = op.create_table(
        "report_metrics",
        sa.Column("report_id", sa.String(36), sa.ForeignKey("reports.id"), nullable=False),
        sa.Column("path", sa.String(200), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("report_id", "path"),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_report_metrics_path_value_report_id"), "report_metrics", ["path", "value", "report_id"])
    connection, last = op.get_bind(), ""
    columns = sa.column("id", sa.String), sa.column("kind", sa.String), sa.column("content", sa.Text)
    reports = sa.select(*columns).select_from(sa.table("reports")).order_by(columns[0]).limit(_BATCH)
    while found := connection.execute(reports.where(columns[0] > last)).all():
        rows = [
            {"report_id": id_, "path": path, "value": value}
            for id_, kind, content in found
            for path, value in _metrics(kind, json.loads(content))
        ]
        if rows:
            connection.execute(sa.insert(metrics), rows)
        last = found[-1][0]


def downgrade() -> None:
    """Downgrade schema."""
    op.drop_table("report_metrics")


def _metrics(kind: str, report: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for section in ("splits", "summary"):
        for path, value in _numbers(report.get(section), section):
            if re.fullmatch(_METRICS.get(kind, _OF_OTHERS), path):
                yield path, value


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, member in value.items():
            yield from _numbers(member, f"{path}.{name}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)
