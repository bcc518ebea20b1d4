"""The first tables.

Revision ID: 0001
Revises:
Create Date: 2026-01-01 00:00:00+00:00

"""

import sqlalchemy as sa
from alembic import op

revision: str = "0001"
down_revision: str | None = None
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Upgrade schema."""
    op.create_table(
        "blobs",
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_blobs")),
    )
    _create_checkpoints()
    _create_probes()
    _create_feature_sets()
    op.create_table(
        "metadata_entries",
        sa.Column("resource_id", sa.String(36), nullable=False),
        sa.Column("key", sa.String(100), nullable=False),
        sa.Column("value", sa.String(500), nullable=False),
        sa.PrimaryKeyConstraint("resource_id", "key", "value", name=op.f("pk_metadata_entries")),
    )
    op.create_index(op.f("ix_metadata_entries_key_value"), "metadata_entries", ["key", "value"])
    _create_analyses()
    _create_reports()
    op.create_table(
        "workers",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("device", sa.String(200), nullable=True),
        sa.Column("torch_version", sa.String(50), nullable=True),
        sa.Column("families", sa.JSON(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )


def downgrade() -> None:
    """Downgrade schema."""
    for table in (
        "workers", "reports", "analyses", "metadata_entries", "feature_sets", "probes", "checkpoints", "blobs",
    ):  # fmt: skip
        op.drop_table(table)


def _create_checkpoints() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("n_parameters", sa.BigInteger(), nullable=False),
        sa.Column("architecture", sa.JSON(), nullable=False),
        sa.Column("head", sa.String(), nullable=True),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["sha256"], ["blobs.sha256"], name=op.f("fk_checkpoints_sha256_blobs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoints")),
    )
    _create_indexes("checkpoints", ("created_at", "id"), ("name",), ("sha256",))


def _create_probes() -> None:
    op.create_table(
        "probes",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("format", sa.String(20), nullable=False),
        sa.Column("n_samples", sa.Integer(), nullable=False),
        sa.Column("n_classes", sa.Integer(), nullable=False),
        sa.Column("class_counts", sa.JSON(), nullable=False),
        sa.Column("class_names", sa.JSON(), nullable=True),
        sa.Column("input_shape", sa.JSON(), nullable=False),
        sa.Column("splits", sa.JSON(), nullable=False),
        sa.Column("preprocess", sa.JSON(), nullable=True),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["sha256"], ["blobs.sha256"], name=op.f("fk_probes_sha256_blobs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_probes")),
    )
    _create_indexes("probes", ("created_at", "id"), ("name",), ("sha256",))


def _create_feature_sets() -> None:
    op.create_table(
        "feature_sets",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("n_samples", sa.Integer(), nullable=False),
        sa.Column("n_classes", sa.Integer(), nullable=False),
        sa.Column("n_features", sa.Integer(), nullable=False),
        sa.Column("class_counts", sa.JSON(), nullable=False),
        sa.Column("splits", sa.JSON(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["sha256"], ["blobs.sha256"], name=op.f("fk_feature_sets_sha256_blobs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_feature_sets")),
    )
    _create_indexes("feature_sets", ("created_at", "id"), ("name",), ("sha256",))


def _create_analyses() -> None:
    op.create_table(
        "analyses",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(30), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("checkpoint_id", sa.String(36), nullable=True),
        sa.Column("probe_id", sa.String(36), nullable=True),
        sa.Column("feature_set_id", sa.String(36), nullable=True),
        sa.Column("options", sa.JSON(), nullable=False),
        sa.Column("idempotency_key", sa.String(255), nullable=True),
        sa.Column("request_sha256", sa.String(64), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("outcome", sa.String(20), nullable=True),
        sa.Column("problem", sa.JSON(), nullable=True),
        sa.Column("progress_done", sa.Integer(), nullable=False),
        sa.Column("progress_total", sa.Integer(), nullable=False),
        sa.Column("progress_phase", sa.String(30), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_analyses")),
        sa.UniqueConstraint("idempotency_key", name=op.f("uq_analyses_idempotency_key")),
    )
    _create_indexes("analyses", ("created_at", "id"), ("kind",), ("outcome",))
    _create_indexes("analyses", ("checkpoint_id",), ("probe_id",), ("feature_set_id",))


def _create_reports() -> None:
    op.create_table(
        "reports",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("analysis_id", sa.String(36), nullable=False),
        sa.Column("kind", sa.String(30), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("checkpoint_id", sa.String(36), nullable=True),
        sa.Column("probe_id", sa.String(36), nullable=True),
        sa.Column("feature_set_id", sa.String(36), nullable=True),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["analysis_id"], ["analyses.id"], name=op.f("fk_reports_analysis_id_analyses")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reports")),
        sa.UniqueConstraint("analysis_id", name=op.f("uq_reports_analysis_id")),
    )
    _create_indexes(
        "reports", ("created_at", "id"), ("kind",), ("name",), ("checkpoint_id",), ("probe_id",), ("feature_set_id",)
    )


def _create_indexes(table: str, *keys: tuple[str, ...]) -> None:
    for columns in keys:
        op.create_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table, list(columns))
