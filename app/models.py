"""The tables. docs/architecture.md says which component owns which state."""

import re
import struct
from datetime import UTC, datetime
from typing import Any, ClassVar
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from app.schemas import Kind, Makes, metadata_text


class UTCDateTime(sa.TypeDecorator[datetime]):
    """An instant in UTC, with its time zone also on SQLite, which does not store one."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a datetime without a time zone is ambiguous")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    return datetime.now(UTC)


class Base(DeclarativeBase):
    # Constraints have explicit names, so that migrations can refer to them on both databases.
    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UTCDateTime,
        # None is SQL's NULL, not the JSON text "null".
        **dict.fromkeys((dict[str, Any], list[int], list[str]), sa.JSON(none_as_null=True)),
    }


class Resource(Base):
    """The base of every resource: an id and a creation time, ordered for keyset pagination."""

    __abstract__ = True

    id: Mapped[str] = mapped_column(sa.String(36), primary_key=True, default=lambda: str(uuid4()))
    created_at: Mapped[datetime] = mapped_column(default=now)


class Blob(Base):
    """A stored file. The row exists exactly while the file may be referred to; its lock orders uploads and removal."""

    __tablename__ = "blobs"

    sha256: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    size_bytes: Mapped[int] = mapped_column(sa.BigInteger)


class Upload(Resource):
    """A resumable upload. Its file lies in the staging folder of `place` until it has become a resource.

    The file is never shorter than `offset_bytes`, whatever happens to the machine; it may be longer.
    """

    __tablename__ = "uploads"
    __table_args__ = (sa.Index(None, "expires_at"),)

    size_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    offset_bytes: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    # Of parts that go straight into the bucket, whose presence there takes the place of the offset; null for others.
    part_bytes: Mapped[int | None] = mapped_column(sa.BigInteger)
    # The header Upload-Metadata, as it came.
    metadata_: Mapped[str | None] = mapped_column("metadata", sa.String(4096))
    place: Mapped[str] = mapped_column(sa.String(36))
    # The run of the machine that wrote last: within it all that the file has is right. Null while bytes are unverified.
    boot: Mapped[str | None] = mapped_column(sa.String(36))
    expires_at: Mapped[datetime]
    # What it became, and by which spec.
    resource_id: Mapped[str | None] = mapped_column(sa.String(36))
    request_sha256: Mapped[str | None] = mapped_column(sa.String(64))


class Checkpoint(Resource):
    __tablename__ = "checkpoints"
    __table_args__ = (sa.Index(None, "created_at", "id"),)

    name: Mapped[str] = mapped_column(sa.String(200), index=True)
    sha256: Mapped[str] = mapped_column(sa.ForeignKey("blobs.sha256"), index=True)
    size_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    n_parameters: Mapped[int] = mapped_column(sa.BigInteger)
    architecture: Mapped[dict[str, Any]]
    # Of an adapter: the checkpoint whose weights it changes, and what of its configuration decides the merged weights.
    base_id: Mapped[str | None] = mapped_column(sa.ForeignKey("checkpoints.id"), index=True)
    base: Mapped["Checkpoint | None"] = relationship(remote_side="Checkpoint.id")
    adapter: Mapped[dict[str, Any] | None]
    head: Mapped[str | None]
    prefix: Mapped[str] = mapped_column(sa.String(200), server_default="")
    ignored: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    asked_prefix: Mapped[str | None] = mapped_column(sa.String(200))
    names_checked: Mapped[bool] = mapped_column(server_default=sa.false())
    preprocess: Mapped[dict[str, Any] | None]
    tokenizer_sha256: Mapped[str | None] = mapped_column(sa.ForeignKey("blobs.sha256"), index=True)
    # Where its file was fetched from; null if it was sent.
    origin: Mapped[dict[str, Any] | None]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata")


class Probe(Resource):
    __tablename__ = "probes"
    __table_args__ = (sa.Index(None, "created_at", "id"),)

    name: Mapped[str] = mapped_column(sa.String(200), index=True)
    sha256: Mapped[str] = mapped_column(sa.ForeignKey("blobs.sha256"), index=True)
    # Of the data, independent of their file (app/files/identity.py); null for uploads from before the column existed.
    data_sha256: Mapped[str | None] = mapped_column(sa.String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    format: Mapped[str] = mapped_column(sa.String(20))
    content: Mapped[str] = mapped_column(sa.String(20), server_default="tensors")
    columns: Mapped[dict[str, Any] | None]
    n_samples: Mapped[int]
    n_classes: Mapped[int]
    class_counts: Mapped[list[int]]
    class_names: Mapped[list[str] | None]
    input_shape: Mapped[list[int] | None]
    splits: Mapped[dict[str, Any]]
    preprocess: Mapped[dict[str, Any] | None]
    tokenizer_sha256: Mapped[str | None] = mapped_column(sa.ForeignKey("blobs.sha256"), index=True)
    max_length: Mapped[int | None]
    origin: Mapped[dict[str, Any] | None]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata")


class FeatureSet(Resource):
    __tablename__ = "feature_sets"
    __table_args__ = (sa.Index(None, "created_at", "id"),)

    name: Mapped[str] = mapped_column(sa.String(200), index=True)
    sha256: Mapped[str] = mapped_column(sa.ForeignKey("blobs.sha256"), index=True)
    data_sha256: Mapped[str | None] = mapped_column(sa.String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    n_samples: Mapped[int]
    n_classes: Mapped[int]
    n_features: Mapped[int]
    class_counts: Mapped[list[int]]
    splits: Mapped[dict[str, Any]]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata")


def sort_key(value: str) -> str:
    """Return text whose order, byte by byte, puts numbers first and by size, then all other values by their letters."""
    if not re.fullmatch(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", value, re.ASCII | re.IGNORECASE):
        return "1" + value.casefold()[:100]
    # The bits of a positive number grow with it; those of a negative one are turned round.
    (bits,) = struct.unpack(">Q", struct.pack(">d", float(value) + 0.0))
    bits = bits ^ (2**64 - 1) if bits >> 63 else bits | 2**63
    return f"0{bits:016x}"


class MetadataEntry(Base):
    """One `key=value` of a checkpoint, probe, feature set or report, as text, so that both databases filter alike.

    A report keeps the metadata of its subjects, so that it is still found once they have been deleted.
    """

    __tablename__ = "metadata_entries"
    __table_args__ = (sa.Index(None, "key", "value"),)

    resource_id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    key: Mapped[str] = mapped_column(sa.String(100), primary_key=True)
    value: Mapped[str] = mapped_column(sa.String(500), primary_key=True)
    sort_key: Mapped[str] = mapped_column(
        sa.String(110).with_variant(sa.String(110, collation="C"), "postgresql"), server_default=""
    )

    @classmethod
    def entries(cls, resource_id: str, metadata: dict[str, Any]) -> list["MetadataEntry"]:
        """Return the entries that filters search: one for each `key=value`, for a list one per value."""
        return [
            cls(resource_id=resource_id, key=key, value=value, sort_key=sort_key(value))
            for key, values in metadata.items()
            for value in {metadata_text(value) for value in (values if isinstance(values, list) else [values])}
        ]


class Run(Resource):
    """The base of what the queue runs: the request and its outcome. The queue owns only which worker runs it now."""

    __abstract__ = True

    request_sha256: Mapped[str] = mapped_column(sa.String(64))
    # Of the HTTP request that asked for it, for logs and for traces.
    request_id: Mapped[str | None] = mapped_column(sa.String(64))
    traceparent: Mapped[str | None] = mapped_column(sa.String(55))
    attempts: Mapped[int] = mapped_column(default=0)
    started_at: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(sa.String(20), index=True)
    problem: Mapped[dict[str, Any] | None]
    progress_done: Mapped[int] = mapped_column(default=0)
    progress_total: Mapped[int] = mapped_column(default=0)
    progress_phase: Mapped[str] = mapped_column(sa.String(30), default="queued")


_GOES_ON = "outcome IS NULL AND cancel_requested_at IS NULL"


class Fetch(Run):
    """A file that a worker fetches from where it lies, to become a checkpoint or a probe. Progress counts bytes."""

    __tablename__ = "fetches"
    __table_args__ = (
        sa.Index(None, "created_at", "id"),
        # One at a time of each request.
        sa.Index(
            None, "request_sha256", unique=True, sqlite_where=sa.text(_GOES_ON), postgresql_where=sa.text(_GOES_ON)
        ),
    )

    makes: Mapped[Makes] = mapped_column(sa.String(20))
    name: Mapped[str] = mapped_column(sa.String(200), index=True)
    # Without its query, which may be a signature; the spec has it whole.
    source: Mapped[str] = mapped_column(sa.Text)
    # With a tokenizer it has megabytes. Emptied at the end, as a source's query may be a signature.
    spec: Mapped[str] = mapped_column(sa.Text, deferred=True)
    # Not a foreign key: a fetch outlives what it has made.
    resource_id: Mapped[str | None] = mapped_column(sa.String(36), index=True)
    progress_done: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    progress_total: Mapped[int] = mapped_column(sa.BigInteger, default=0)


class Analysis(Run):
    __tablename__ = "analyses"
    __table_args__ = (sa.Index(None, "created_at", "id"), sa.Index(None, "finished_at", "id"))

    kind: Mapped[Kind] = mapped_column(sa.String(30), index=True)
    name: Mapped[str] = mapped_column(sa.String(200))
    checkpoints: Mapped[list["AnalysisCheckpoint"]] = relationship(
        lazy="selectin", order_by="AnalysisCheckpoint.position"
    )
    # Not foreign keys: an analysis that has ended outlives its subjects.
    probe_id: Mapped[str | None] = mapped_column(sa.String(36), index=True)
    feature_set_id: Mapped[str | None] = mapped_column(sa.String(36), index=True)
    options: Mapped[dict[str, Any]]
    axis: Mapped[dict[str, Any] | None]
    # Device memory that a worker must have for it; null until one had too little.
    needs_bytes: Mapped[int | None] = mapped_column(sa.BigInteger)
    # Samples of each part into which its pass, and the features kept of it, are cut; null for one piece.
    shard_samples: Mapped[int | None]
    idempotency_key: Mapped[str | None] = mapped_column(sa.String(255), unique=True)


class Point(Base):
    """A step of a planned analysis: a point, a side of a comparison, or, at no place, the report of all."""

    __tablename__ = "points"

    analysis_id: Mapped[str] = mapped_column(sa.ForeignKey("analyses.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    place: Mapped[float | None] = mapped_column(sa.Double)
    # The turn that computes it, or has computed it; null while it waits.
    turn_id: Mapped[str | None] = mapped_column(sa.String(50))
    attempts: Mapped[int] = mapped_column(default=0)
    finished_at: Mapped[datetime | None]
    # Kept until the report is made of it.
    answer: Mapped[str | None] = mapped_column(sa.Text, deferred=True)
    problem: Mapped[dict[str, Any] | None]


class Turn(Base):
    """A turn at a planned analysis: a run of the queue, in which a worker computes points one after the other."""

    __tablename__ = "turns"
    __table_args__ = (sa.Index(None, "ended_at", "began_at", "analysis_id"),)

    analysis_id: Mapped[str] = mapped_column(sa.ForeignKey("analyses.id"), index=True)
    id: Mapped[str] = mapped_column(sa.String(50), primary_key=True)
    created_at: Mapped[datetime]
    began_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]


class AnalysisCheckpoint(Base):
    """A checkpoint that an analysis uses: one, the two ends of a path, or a series in order."""

    __tablename__ = "analysis_checkpoints"

    analysis_id: Mapped[str] = mapped_column(sa.ForeignKey("analyses.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    checkpoint_id: Mapped[str] = mapped_column(sa.String(36), index=True)


class Report(Resource):
    """An immutable report: its JSON text is stored as it is served."""

    __tablename__ = "reports"
    __table_args__ = (sa.Index(None, "created_at", "id"),)

    analysis_id: Mapped[str] = mapped_column(sa.ForeignKey("analyses.id"), unique=True)
    checkpoints: Mapped[list["AnalysisCheckpoint"]] = relationship(
        lazy="selectin",
        viewonly=True,
        order_by="AnalysisCheckpoint.position",
        primaryjoin="foreign(AnalysisCheckpoint.analysis_id) == Report.analysis_id",
    )
    kind: Mapped[Kind] = mapped_column(sa.String(30), index=True)
    name: Mapped[str] = mapped_column(sa.String(200), index=True)
    probe_id: Mapped[str | None] = mapped_column(sa.String(36), index=True)
    feature_set_id: Mapped[str | None] = mapped_column(sa.String(36), index=True)
    sha256: Mapped[str] = mapped_column(sa.String(64))
    content: Mapped[str] = mapped_column(sa.Text)


class ReportMetric(Base):
    """One metric of a report, so that lists of reports are sorted and filtered by it."""

    __tablename__ = "report_metrics"
    __table_args__ = (sa.Index(None, "path", "value", "report_id"), {"sqlite_with_rowid": False})

    report_id: Mapped[str] = mapped_column(sa.ForeignKey("reports.id"), primary_key=True)
    path: Mapped[str] = mapped_column(sa.String(200), primary_key=True)
    value: Mapped[float] = mapped_column(sa.Double)


class Gate(Resource):
    """One version of a gate, immutable; the highest version of a name is the current one."""

    __tablename__ = "gates"
    __table_args__ = (sa.UniqueConstraint("name", "version"), sa.Index(None, "created_at", "id"))

    name: Mapped[str] = mapped_column(sa.String(100), index=True)
    version: Mapped[int]
    kind: Mapped[Kind] = mapped_column(sa.String(30))
    description: Mapped[str | None] = mapped_column(sa.String(2000))
    n_checks: Mapped[int]
    sha256: Mapped[str] = mapped_column(sa.String(64))
    content: Mapped[str] = mapped_column(sa.Text)


class Baseline(Resource):
    """A named pointer to a report; null if every requested move was refused. Its lock orders its moves."""

    __tablename__ = "baselines"
    __table_args__ = (sa.Index(None, "created_at", "id"),)

    name: Mapped[str] = mapped_column(sa.String(100), unique=True)
    report_id: Mapped[str | None] = mapped_column(sa.ForeignKey("reports.id"))
    moved_at: Mapped[datetime | None]


class BaselineMove(Resource):
    """A requested move: done, or refused because the baseline had moved since the caller read it."""

    __tablename__ = "baseline_moves"
    __table_args__ = (sa.Index(None, "created_at", "id"),)

    baseline_id: Mapped[str] = mapped_column(sa.ForeignKey("baselines.id"), index=True)
    # Not foreign keys: the history outlives the reports of earlier moves.
    report_id: Mapped[str] = mapped_column(sa.String(36))
    before_report_id: Mapped[str | None] = mapped_column(sa.String(36))
    done: Mapped[bool]
    note: Mapped[str | None] = mapped_column(sa.String(500))


class Worker(Base):
    """A worker process, alive until `ended_at` is set by itself or by the process that found it dead."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    host: Mapped[str] = mapped_column(sa.String(255))
    pid: Mapped[int]
    device: Mapped[str | None] = mapped_column(sa.String(200))
    torch_version: Mapped[str | None] = mapped_column(sa.String(50))
    # Of its device; on a CPU, of the machine.
    memory_bytes: Mapped[int | None] = mapped_column(sa.BigInteger)
    # Families of networks: those that it can import, those that it has not tried, and why it cannot import the others.
    families: Mapped[list[str] | None]
    untried: Mapped[list[str] | None]
    unavailable: Mapped[dict[str, Any] | None]
    # Names of the networks that it builds, by family: thousands, so read only when names are needed.
    networks: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    started_at: Mapped[datetime]
    heartbeat_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
