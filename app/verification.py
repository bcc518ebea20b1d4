"""`interplay verify`: read and hash every blob; list the resources and reports of damaged or missing ones."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app.database import read
from app.models import AnalysisCheckpoint, Blob, Checkpoint, FeatureSet, Probe, Report
from app.storage import Storage

# Rows read at a time.
_PAGE = 500


@dataclass(frozen=True)
class Finding:
    """A blob that is missing or damaged.

    Attributes:
        sha256: its name.
        what: the problem as text: missing, or damaged with the sha256 of the stored bytes.
        resources: `checkpoint NAME (ID)` and the like, of all resources that refer to it.
        report_ids: the ids of every report on one of these, the oldest first.
    """

    sha256: str
    what: str
    resources: list[str]
    report_ids: list[str]


def verify(engine: sa.Engine, storage: Storage, *, set_aside: bool) -> int:
    """Read and hash every blob; write problems to standard output and progress to standard error.

    Args:
        engine: the engine of the service's database.
        storage: where the blobs live.
        set_aside: move damaged blobs to `damaged/` in the storage, so that the same files can be sent again.

    Returns:
        The number of damaged or missing blobs.

    Raises:
        StorageUnavailable: the storage does not answer.
    """
    n_bytes = n_blobs = n_wrong = 0
    for sha256, size_bytes in _blobs(engine):
        found = _hash(storage, sha256)
        n_blobs, n_bytes = n_blobs + 1, n_bytes + size_bytes
        if found != sha256 and _exists(engine, sha256):
            n_wrong += 1
            what = "missing" if found is None else f"damaged: its bytes have the sha256 {found}"
            if found is not None and set_aside:
                what += f"; moved to {storage.set_aside(sha256)}"
            _write(_finding(engine, sha256, what))
        sys.stderr.write(f"\r{n_blobs} blobs, {n_bytes / 2**30:.2f} GiB read")
        sys.stderr.flush()
    sys.stderr.write("\n")
    sys.stdout.write(f"{n_blobs} blobs, {n_bytes} bytes: {n_wrong} damaged or missing.\n")
    return n_wrong


def _blobs(engine: sa.Engine) -> Iterator[tuple[str, int]]:
    last = ""
    while True:
        with read(engine) as session:
            page = sa.select(Blob.sha256, Blob.size_bytes).where(Blob.sha256 > last).order_by(Blob.sha256).limit(_PAGE)
            rows = session.execute(page).all()
        if not rows:
            return
        yield from ((row.sha256, row.size_bytes) for row in rows)
        last = rows[-1].sha256


def _hash(storage: Storage, sha256: str) -> str | None:
    try:
        return storage.sha256_of(sha256)
    except FileNotFoundError:
        return None


def _exists(engine: sa.Engine, sha256: str) -> bool:
    """Return whether the blob still exists: it may have been deleted while it was read."""
    with read(engine) as session:
        return session.get(Blob, sha256) is not None


def _finding(engine: sa.Engine, sha256: str, what: str) -> Finding:
    resources: list[str] = []
    reports: set[tuple[str, str]] = set()
    with read(engine) as session:
        for noun, model, uses in (
            ("checkpoint", Checkpoint, (Checkpoint.sha256 == sha256) | (Checkpoint.tokenizer_sha256 == sha256)),
            ("probe", Probe, (Probe.sha256 == sha256) | (Probe.tokenizer_sha256 == sha256)),
            ("feature set", FeatureSet, FeatureSet.sha256 == sha256),
        ):
            if model is Checkpoint:
                # Reports on adapters rest on their base's file too.
                uses |= Checkpoint.base_id.in_(sa.select(Checkpoint.id).where(Checkpoint.sha256 == sha256))
            for resource_id, name in session.execute(sa.select(model.id, model.name).where(uses)):
                resources.append(f"{noun} {name} ({resource_id})")
                reports |= set(_reports_on(session, resource_id))
    return Finding(sha256, what, resources, [report_id for _, report_id in sorted(reports)])


def _reports_on(session: Session, owner_id: str) -> list[tuple[str, str]]:
    of_checkpoint = sa.select(AnalysisCheckpoint.analysis_id).where(AnalysisCheckpoint.checkpoint_id == owner_id)
    on = sa.or_(Report.probe_id == owner_id, Report.feature_set_id == owner_id, Report.analysis_id.in_(of_checkpoint))
    rows = session.execute(sa.select(Report.created_at, Report.id).where(on))
    return [(created_at.isoformat(), report_id) for created_at, report_id in rows]


def _write(finding: Finding) -> None:
    lines = [f"{finding.sha256}: {finding.what}"]
    lines += [f"  of {resource}" for resource in finding.resources] or ["  nothing refers to it"]
    lines += [f"  report {report_id} rests on it" for report_id in finding.report_ids]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
