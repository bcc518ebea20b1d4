"""Gates and baselines: kept, listed, moved, and the verdict of one on a report."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import models, verdicts
from app.database import read, write
from app.errors import BaselineMoved, InvalidRequest, NotFound
from app.gatefile import Gate, GateSpec, GateSummary, require_sound
from app.listing import Listing, page
from app.schemas import Baseline, BaselineMove, BaselinePut, GateRequest, Page

Row = TypeVar("Row", models.Gate, models.Report)


def create(engine: sa.Engine, spec: GateSpec) -> tuple[Gate, bool]:
    """Keep a gate as the next version of its name; what equals the current version is that version, and not new.

    Raises:
        InvalidRequest: a check names no number of a report.
    """
    require_sound(spec)
    # Without defaults: what a later version of the service adds does not make an old file a new gate.
    content = json.dumps(spec.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    while True:
        try:
            with write(engine) as session:
                current = _current(session, spec.name)
                if current is not None and current.sha256 == sha256:
                    return _gate(current), False
                row = models.Gate(
                    name=spec.name,
                    version=1 if current is None else current.version + 1,
                    kind=spec.kind,
                    description=spec.description,
                    n_checks=len(spec.checks),
                    sha256=sha256,
                    content=content,
                )
                session.add(row)
                session.flush()
                return _gate(row), True
        except sa.exc.IntegrityError:
            # Somebody else has made this version at the same moment, so the next look finds it.
            continue


def get(engine: sa.Engine, id_: str) -> Gate:
    with read(engine) as session:
        return _gate(_row(session, models.Gate, id_, "gate"))


def list_page(engine: sa.Engine, listing: Listing) -> Page[GateSummary]:
    """Every version is an item of its own."""
    query = sa.select(models.Gate).options(sa.orm.defer(models.Gate.content))
    with read(engine) as session:
        rows, cursor = page(session, query, models.Gate, listing, models.Gate.id.in_)
        members = [*GateSummary.model_fields]
        items = [GateSummary(**{name: getattr(row, name) for name in members}) for (row,) in rows]
    return Page(items=items, next_cursor=cursor)


def judge(engine: sa.Engine, report_id: str, request: GateRequest) -> verdicts.Verdict:
    """What a gate says of a report, against a baseline where one is named.

    Raises:
        NotFound: there is no such report or gate, or no report under `baseline_report_id`.
        NotComparable: report, gate and baseline do not belong together.
    """
    with read(engine) as session:
        gate = _gate(_row(session, models.Gate, request.gate_id, "gate"))
        report = json.loads(_row(session, models.Report, report_id, "report").content)
        baseline = _baseline_of(session, request)
    sides = verdicts.sides(gate, report, baseline.report, baseline.missing)
    checks = verdicts.judge(gate, sides)
    counts = {status: sum(check.status == status for check in checks) for status in verdicts.STATUSES}
    return verdicts.Verdict(
        status=verdicts.overall(checks),
        report_id=report_id,
        report_kind=report["kind"],
        subject=verdicts.subject_name(report),
        probe=report["probe"]["name"],
        gate=verdicts.GateReference(id=gate.id, name=gate.name, version=gate.version),
        baseline=_reference(baseline, sides),
        counts=counts,
        checks=checks,
        judged_at=models.now(),
    )


@dataclass(frozen=True)
class _BaselineReport:
    """The report that a request compares with, if there is one, and otherwise why there is none."""

    name: str | None
    report: Mapping[str, Any] | None = None
    missing: str | None = None


def _baseline_of(session: Session, request: GateRequest) -> _BaselineReport:
    id_ = request.baseline_report_id
    if id_ is None and request.baseline is not None:
        row = _baseline_row(session, request.baseline)
        id_ = None if row is None else row.report_id
        if id_ is None:
            # Not an error: the first run of a pipeline has none, and its gate says what that means.
            return _BaselineReport(request.baseline, missing=f"there is no baseline {request.baseline!r} yet")
    if id_ is None:
        return _BaselineReport(None)
    return _BaselineReport(request.baseline, json.loads(_row(session, models.Report, id_, "report").content))


def _reference(baseline: _BaselineReport, sides: verdicts.Sides) -> verdicts.BaselineReference | None:
    if sides.baseline is None:
        if baseline.name is None:
            return None
        return verdicts.BaselineReference(name=baseline.name, report_id=None, subject=None)
    # Of a comparison that is judged alone, its A is the baseline and has no report of its own.
    id_ = None if baseline.report is None else baseline.report["id"]
    subject = verdicts.subject_name(sides.baseline)
    return verdicts.BaselineReference(name=baseline.name, report_id=id_, subject=subject)


# --- baselines ------------------------------------------------------------------------------------------------------


def set_baseline(engine: sa.Engine, name: str, request: BaselinePut) -> Baseline:
    """Let a baseline point at a report. With `expected_report_id` only if it still points there: of two that saw the
    same, one wins. Both are in the history.

    Raises:
        NotFound: there is no such report.
        BaselineMoved: it points elsewhere by now.
    """
    with write(engine) as session:
        report = _row(session, models.Report, request.report_id, "report")
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
    # Outside of the transaction: that the move was refused is part of the history.
    if view is None:
        raise BaselineMoved(
            f"The baseline {name!r} is at {held or 'no report'}, not at {request.expected_report_id or 'none'}: "
            "somebody moved it meanwhile. Judge again, against where it is now.",
            report_id=held,
            expected_report_id=request.expected_report_id,
        )
    return view


def get_baseline(engine: sa.Engine, name: str) -> Baseline:
    with read(engine) as session:
        row = _baseline_row(session, name)
        if row is None or row.report_id is None:
            raise NotFound(f"There is no baseline {name!r}.")
        return _baseline(row, _row(session, models.Report, row.report_id, "report"))


def list_baselines(engine: sa.Engine, listing: Listing) -> Page[Baseline]:
    query = sa.select(models.Baseline, models.Report).join(models.Report)
    with read(engine) as session:
        rows, cursor = page(session, query, models.Baseline, listing, models.Baseline.id.in_)
        return Page(items=[_baseline(*row) for row in rows], next_cursor=cursor)


def list_moves(engine: sa.Engine, name: str, listing: Listing) -> Page[BaselineMove]:
    """What was asked of a baseline, newest first."""
    if listing.name is not None:
        raise InvalidRequest("The moves of a baseline have no names to filter by.")
    with read(engine) as session:
        row = _baseline_row(session, name)
        if row is None:
            raise NotFound(f"There is no baseline {name!r}.")
        query = sa.select(models.BaselineMove).where(models.BaselineMove.baseline_id == row.id)
        rows, cursor = page(session, query, models.BaselineMove, listing, models.BaselineMove.id.in_)
        members = [*BaselineMove.model_fields]
        items = [BaselineMove(**{member: getattr(move, member) for member in members}) for (move,) in rows]
    return Page(items=items, next_cursor=cursor)


def _locked(session: Session, name: str) -> models.Baseline:
    """The baseline's row, new or not, which nobody else changes before the transaction ends."""
    new = {"id": str(uuid4()), "created_at": models.now(), "name": name}
    session.execute(_INSERT_BASELINE, new)
    return session.scalars(sa.select(models.Baseline).where(models.Baseline.name == name).with_for_update()).one()


_INSERT_BASELINE = sa.text(
    "INSERT INTO baselines (id, created_at, name) VALUES (:id, :created_at, :name) ON CONFLICT (name) DO NOTHING"
).bindparams(sa.bindparam("created_at", type_=models.UTCDateTime))


def _baseline_row(session: Session, name: str) -> models.Baseline | None:
    return session.scalars(sa.select(models.Baseline).where(models.Baseline.name == name)).one_or_none()


def _baseline(row: models.Baseline, report: models.Report) -> Baseline:
    assert row.report_id is not None, "who calls has seen to it"
    assert row.moved_at is not None, "it is set with the report"
    ids = [place.checkpoint_id for place in report.checkpoints]
    return Baseline(
        name=row.name,
        report_id=row.report_id,
        report_kind=report.kind,
        # Of a comparison B, which is the candidate that was promoted.
        checkpoint_id=ids[-1] if report.kind in ("evaluation", "comparison") and ids else None,
        probe_id=report.probe_id,
        created_at=row.created_at,
        moved_at=row.moved_at,
    )


def _current(session: Session, name: str) -> models.Gate | None:
    query = sa.select(models.Gate).where(models.Gate.name == name).order_by(models.Gate.version.desc()).limit(1)
    return session.scalars(query).one_or_none()


def _gate(row: models.Gate) -> Gate:
    return Gate(**json.loads(row.content), id=row.id, version=row.version, sha256=row.sha256, created_at=row.created_at)


def _row(session: Session, model: type[Row], id_: str, noun: str) -> Row:
    row = session.get(model, id_)
    if row is None:
        raise NotFound(f"There is no {noun} {id_!r}.")
    return row
