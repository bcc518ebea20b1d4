"""Baselines: names for the reports that candidates are compared with, and the history of their moves."""

from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import models
from app.database import read, write
from app.errors import BaselineMoved, InvalidRequest, NotFound
from app.gates.versions import find
from app.listing import Listing, page
from app.schemas import Baseline, BaselineMove, BaselinePut, Page
from app.schemas.kinds import KINDS


def put(engine: sa.Engine, name: str, request: BaselinePut) -> Baseline:
    """Point a baseline at a report. With `expected_report_id`, move it only if it still points there: of two clients
    that saw the same report, one wins. The history records both.

    Raises:
        NotFound: the report does not exist.
        BaselineMoved: it points elsewhere by now.
    """
    with write(engine) as session:
        report = _locked_report(session, request.report_id)
        row = _locked(session, name)
        held = row.report_id
        done = "expected_report_id" not in request.model_fields_set or held == request.expected_report_id
        move = models.BaselineMove(
            baseline_id=row.id, report_id=report.id, before_report_id=held, done=done, note=request.note
        )
        session.add(move)
        if done:
            row.report_id, row.moved_at = report.id, models.now()
        session.flush()
        view = _baseline(row, report) if done else None
    # Outside of the transaction, so that the history keeps the refused move.
    if view is None:
        raise BaselineMoved(
            f"The baseline {name!r} is at {held or 'no report'}, not at {request.expected_report_id or 'none'}: "
            "somebody moved it meanwhile. Judge again, against where it is now.",
            report_id=held,
            expected_report_id=request.expected_report_id,
        )
    return view


def get(engine: sa.Engine, name: str) -> Baseline:
    """Return a baseline by its name; raise NotFound if it points at no report."""
    with read(engine) as session:
        row = find_baseline(session, name)
        if row is None or row.report_id is None:
            raise NotFound(f"There is no baseline {name!r}.")
        return _baseline(row, find(session, models.Report, row.report_id, "report"))


def delete(engine: sa.Engine, name: str) -> None:
    """Delete a baseline with its history. Nothing else goes; its report may be deleted from now on.

    Raises:
        NotFound: it does not exist.
    """
    with write(engine) as session:
        held = sa.select(models.Baseline).where(models.Baseline.name == name).with_for_update()
        row = session.scalars(held).one_or_none()
        if row is None:
            raise NotFound(f"There is no baseline {name!r}.")
        session.execute(sa.delete(models.BaselineMove).where(models.BaselineMove.baseline_id == row.id))
        session.delete(row)


def list_page(engine: sa.Engine, listing: Listing) -> Page[Baseline]:
    """List the baselines that point at a report."""
    query = sa.select(models.Baseline, models.Report).join(models.Report)
    with read(engine) as session:
        rows, cursor = page(session, query, models.Baseline, listing, models.Baseline.id.in_)
        return Page(items=[_baseline(*row) for row in rows], next_cursor=cursor)


def list_moves(engine: sa.Engine, name: str, listing: Listing) -> Page[BaselineMove]:
    """Return the requested moves of a baseline, newest first."""
    if listing.name is not None or listing.search is not None:
        raise InvalidRequest("The moves of a baseline have no names to filter by.")
    with read(engine) as session:
        row = find_baseline(session, name)
        if row is None:
            raise NotFound(f"There is no baseline {name!r}.")
        query = sa.select(models.BaselineMove).where(models.BaselineMove.baseline_id == row.id)
        rows, cursor = page(session, query, models.BaselineMove, listing, models.BaselineMove.id.in_)
        members = [*BaselineMove.model_fields]
        items = [BaselineMove(**{member: getattr(move, member) for member in members}) for (move,) in rows]
    return Page(items=items, next_cursor=cursor)


def _locked(session: Session, name: str) -> models.Baseline:
    """Return the baseline's row, created if missing, locked until the transaction ends."""
    held = sa.select(models.Baseline).where(models.Baseline.name == name).with_for_update()
    while True:
        session.execute(_INSERT_BASELINE, {"id": str(uuid4()), "created_at": models.now(), "name": name})
        # It may have been deleted while its lock was waited for.
        if (row := session.scalars(held).one_or_none()) is not None:
            return row


def _locked_report(session: Session, id_: str) -> models.Report:
    """Return a report, locked with what it is of, so that none of it is deleted while a baseline moves there."""
    report = session.get(models.Report, id_, with_for_update={"read": True})
    if report is None:
        raise NotFound(f"There is no report {id_!r}.")
    places = sa.select(models.AnalysisCheckpoint.checkpoint_id)
    places = places.where(models.AnalysisCheckpoint.analysis_id == report.analysis_id)
    for model, found in (
        (models.Checkpoint, models.Checkpoint.id.in_(places)),
        (models.Probe, models.Probe.id == report.probe_id),
        (models.FeatureSet, models.FeatureSet.id == report.feature_set_id),
    ):
        # Subjects that were deleted earlier are no reason to refuse: values are compared all the same.
        session.execute(sa.select(model.id).where(found).order_by(model.id).with_for_update(read=True))
    return report


_INSERT_BASELINE = sa.text(
    "INSERT INTO baselines (id, created_at, name) VALUES (:id, :created_at, :name) ON CONFLICT (name) DO NOTHING"
).bindparams(sa.bindparam("created_at", type_=models.UTCDateTime))


def find_baseline(session: Session, name: str) -> models.Baseline | None:
    """Return the row of a baseline, or None."""
    return session.scalars(sa.select(models.Baseline).where(models.Baseline.name == name)).one_or_none()


def _baseline(row: models.Baseline, report: models.Report) -> Baseline:
    assert row.report_id is not None, "who calls has seen to it"
    assert row.moved_at is not None, "it is set with the report"
    ids = [place.checkpoint_id for place in report.checkpoints]
    return Baseline(
        name=row.name,
        report_id=row.report_id,
        report_kind=report.kind,
        # For a comparison B, the candidate that was promoted.
        checkpoint_id=ids[-1] if KINDS[report.kind].place is None and ids else None,
        probe_id=report.probe_id,
        created_at=row.created_at,
        moved_at=row.moved_at,
    )
