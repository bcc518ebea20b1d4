"""Reports as tables show them: with the names of their probes and the metrics that people look for first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import schemas
from app.models import Checkpoint, FeatureSet, Probe

# The split that is read first: what the network was not trained on, if the probe says.
_SPLITS = ("test", "all")
_ACCURACY, _INTERPLAY = "accuracy", "interplay.sample.global"
_METRICS = (_ACCURACY, f"{_INTERPLAY}.mir", f"{_INTERPLAY}.hdr", f"{_INTERPLAY}.distance_to_optimum.mir")
#: Paths of metrics that a list of reports must show for `rows`.
SHOWN = tuple(f"splits.{split}.{metric}" for split in _SPLITS for metric in _METRICS)


@dataclass(frozen=True)
class ReportRow:
    """A row of a table of reports; metrics are None for kinds that have none of their own."""

    id: str
    kind: str
    name: str
    probe_id: str | None
    probe: str | None
    created_at: datetime
    split: str | None
    accuracy: float | None
    mir: float | None
    hdr: float | None
    distance: float | None


def rows(session: Session, reports: Sequence[schemas.ReportSummary]) -> list[ReportRow]:
    """Return the rows of reports that were listed with `SHOWN`."""
    ids = {report.probe_id for report in reports if report.probe_id is not None}
    found = session.execute(sa.select(Probe.id, Probe.name).where(Probe.id.in_(ids))) if ids else ()
    names = {row.id: row.name for row in found}
    return [_row(report, names.get(report.probe_id or "")) for report in reports]


def _row(report: schemas.ReportSummary, probe: str | None) -> ReportRow:
    split = next((split for split in _SPLITS if report.metrics.get(f"splits.{split}.{_ACCURACY}") is not None), None)
    accuracy, mir, hdr, distance = (report.metrics.get(f"splits.{split}.{metric}") for metric in _METRICS)
    return ReportRow(
        id=report.id,
        kind=report.kind,
        name=report.name,
        probe_id=report.probe_id,
        probe=probe,
        created_at=report.created_at,
        split=split,
        accuracy=accuracy,
        mir=mir,
        hdr=hdr,
        distance=distance,
    )


def metadata_of_subjects(session: Session, subjects: Mapping[str, str | None]) -> dict[str, dict[str, Any]]:
    """Return the metadata of reports' subjects, by report; of those that have one subject that still exists.

    Args:
        session: reads the database.
        subjects: by a report's id, that of its checkpoint or feature set; None if it has several.
    """
    found: dict[str, dict[str, Any]] = {}
    for model in (Checkpoint, FeatureSet):
        ids = [id_ for id_ in subjects.values() if id_ is not None]
        wanted = sa.select(model.id, model.metadata_).where(model.id.in_(ids))
        by_id = {row[0]: row[1] for row in session.execute(wanted)}
        found |= {report_id: by_id[id_] for report_id, id_ in subjects.items() if id_ in by_id}
    return found
