"""Judge a stored report by a gate, against a baseline if one is named."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import models
from app.database import read
from app.gates import verdicts
from app.gates.baselines import find_baseline
from app.gates.versions import find, gate_of
from app.schemas import GateRequest


def judge(engine: sa.Engine, report_id: str, request: GateRequest) -> verdicts.Verdict:
    """Return the verdict of a gate on a report, against a baseline if one is named.

    Raises:
        NotFound: the report, the gate, or the report of `baseline_report_id` does not exist.
        NotComparable: report, gate and baseline do not belong together.
    """
    with read(engine) as session:
        gate = gate_of(find(session, models.Gate, request.gate_id, "gate"))
        report = json.loads(find(session, models.Report, report_id, "report").content)
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
    """The report that a request compares with; if a named baseline has no report, `missing` gives the reason."""

    name: str | None
    report: Mapping[str, Any] | None = None
    missing: str | None = None


def _baseline_of(session: Session, request: GateRequest) -> _BaselineReport:
    id_ = request.baseline_report_id
    if id_ is None and request.baseline is not None:
        row = find_baseline(session, request.baseline)
        id_ = None if row is None else row.report_id
        if id_ is None:
            # Not an error: the first run of a pipeline has no baseline, and its gate decides the outcome.
            return _BaselineReport(request.baseline, missing=f"there is no baseline {request.baseline!r} yet")
    if id_ is None:
        return _BaselineReport(None)
    return _BaselineReport(request.baseline, json.loads(find(session, models.Report, id_, "report").content))


def _reference(baseline: _BaselineReport, sides: verdicts.Sides) -> verdicts.BaselineReference | None:
    if sides.baseline is None:
        if baseline.name is None:
            return None
        return verdicts.BaselineReference(name=baseline.name, report_id=None, subject=None)
    # If a comparison is judged alone, its A is the baseline and has no report of its own.
    id_ = None if baseline.report is None else baseline.report["id"]
    subject = verdicts.subject_name(sides.baseline)
    return verdicts.BaselineReference(name=baseline.name, report_id=id_, subject=subject)
