"""Analyses and reports deleted, with all that belongs to them, and what baselines need, which is kept.

A baseline needs its report, the analysis of it, and what that looked at: checkpoints, the bases of adapters, the probe
or the feature set. Candidates are compared with these. Whoever moves a baseline locks the report and its subjects;
whoever deletes locks the row first and looks at the baselines then.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session, aliased

from app import queue
from app.database import write
from app.errors import InUse, NotEnded, NotFound
from app.models import (
    Analysis,
    AnalysisCheckpoint,
    Baseline,
    Checkpoint,
    MetadataEntry,
    Point,
    Report,
    ReportMetric,
    Turn,
)

# Baselines and adapters that a refusal names.
_NAMED = 20


def delete_analysis(engine: sa.Engine, client: queue.LateClient, id_: str) -> None:
    """Delete an analysis that has ended, with its report and the queue's record of its runs.

    Raises:
        NotFound: it does not exist.
        NotEnded: it waits or runs.
        InUse: a baseline points at its report.
    """
    with write(engine) as session:
        row = session.get(Analysis, id_, with_for_update=True)
        if row is None:
            raise NotFound(f"There is no analysis {id_!r}.")
        if row.outcome is None:
            raise NotEnded("The analysis has not ended; cancel it first, and delete it once it has stopped.")
        report_id = session.scalar(sa.select(Report.id).where(Report.analysis_id == id_).with_for_update())
        _require_no_baseline(session, "The analysis has the report of", [] if report_id is None else [report_id])
        runs = remove_analyses(session, [id_])
    queue.forget(client, engine, runs)


def delete_report(engine: sa.Engine, id_: str) -> None:
    """Delete a report. Its analysis stays as a record without one, and its idempotency key is free again.

    Raises:
        NotFound: it does not exist.
        InUse: a baseline points at it.
    """
    with write(engine) as session:
        # The analysis first, as everywhere.
        analysis_id = session.scalar(sa.select(Report.analysis_id).where(Report.id == id_))
        analysis = session.get(Analysis, analysis_id, with_for_update=True) if analysis_id is not None else None
        found = session.scalar(sa.select(Report.id).where(Report.id == id_).with_for_update())
        if analysis is None or found is None:
            raise NotFound(f"There is no report {id_!r}.")
        _require_no_baseline(session, "The report is that of", [id_])
        # The same request must not get an analysis that has nothing to show.
        analysis.idempotency_key = None
        _remove_reports(session, [id_])


def remove_analyses(session: Session, ids: Sequence[str]) -> list[str]:
    """Delete locked analyses that have ended, with their reports; return the ids of their runs in the queue.

    The caller gives these to `queue.forget` once the transaction has committed.
    """
    runs = [*ids, *session.scalars(sa.select(Turn.id).where(Turn.analysis_id.in_(ids)))]
    _remove_reports(session, list(session.scalars(sa.select(Report.id).where(Report.analysis_id.in_(ids)))))
    for model in (Point, Turn, AnalysisCheckpoint):
        session.execute(sa.delete(model).where(model.analysis_id.in_(ids)))
    session.execute(sa.delete(Analysis).where(Analysis.id.in_(ids)), execution_options={"synchronize_session": False})
    return [*runs, *(queue.plan_of(id_) for id_ in ids)]


def _remove_reports(session: Session, ids: Sequence[str]) -> None:
    session.execute(sa.delete(ReportMetric).where(ReportMetric.report_id.in_(ids)))
    session.execute(sa.delete(MetadataEntry).where(MetadataEntry.resource_id.in_(ids)))
    session.execute(sa.delete(Report).where(Report.id.in_(ids)))


def is_of_baseline() -> sa.ColumnElement[bool]:
    """Return SQL that is true for an analysis at whose report a baseline points."""
    report = aliased(Report)
    return sa.exists().where(report.analysis_id == Analysis.id, Baseline.report_id == report.id).correlate(Analysis)


def require_no_baseline_on(session: Session, noun: str, id_: str) -> None:
    """Check that no baseline needs a checkpoint, probe or feature set, whose row the caller has locked.

    Raises:
        InUse: one does.
    """
    adapter = aliased(Checkpoint)
    places = sa.select(AnalysisCheckpoint.analysis_id).where(
        sa.or_(
            AnalysisCheckpoint.checkpoint_id == id_,
            AnalysisCheckpoint.checkpoint_id.in_(sa.select(adapter.id).where(adapter.base_id == id_)),
        )
    )
    about = sa.or_(Report.probe_id == id_, Report.feature_set_id == id_, Report.analysis_id.in_(places))
    reports = session.scalars(sa.select(Report.id).join(Baseline, Baseline.report_id == Report.id).where(about))
    _require_no_baseline(session, f"The {noun} is needed by", list(reports))


def _require_no_baseline(session: Session, what: str, report_ids: Sequence[str]) -> None:
    pointing = sa.select(Baseline.name).where(Baseline.report_id.in_(report_ids)).order_by(Baseline.name)
    if names := session.scalars(pointing.limit(_NAMED)).all():
        listed = ", ".join(map(repr, names))
        which = "the baseline" if len(names) == 1 else "the baselines"
        raise InUse(
            f"{what} {which} {listed}. Move {which} to another report, or delete {which}, first.", baselines=[*names]
        )
