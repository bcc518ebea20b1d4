"""Lists of reports: by subject, sorted and filtered by metrics, each with the metrics that were asked for."""

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import Query
from pydantic import Field
from sqlalchemy.orm import Session, aliased

from app import analyses, schemas
from app.errors import InvalidRequest
from app.gates.paths import UnknownPath, require_number
from app.listing import Listing, Order, page
from app.models import Report, ReportMetric
from app.schemas import PLAIN_TEXT, Kind
from app.schemas.kinds import KINDS
from app.schemas.metrics import is_metric

_BOUND = re.compile(r"([^\s<>=]+)(>=|<=|>|<)([^\s<>=]+)")
_COMPARISONS: dict[str, Callable[[Any, float], sa.ColumnElement[bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_Path = Annotated[str, Field(max_length=200, pattern=PLAIN_TEXT)]


@dataclass(frozen=True)
class Ranking:
    """Parameters of lists of reports that concern metrics; a path is that of a number in a report."""

    sort: Annotated[
        str | None,
        Query(
            max_length=200,
            pattern=PLAIN_TEXT,
            description="Path of the metric to sort by, such as splits.test.accuracy; reports without it are left out.",
        ),
    ] = None
    order: Annotated[Literal["asc", "desc"], Query(description="Of `sort`: the largest first is desc.")] = "desc"
    metric: Annotated[
        list[_Path] | None,
        Query(max_length=10, description="A bound such as splits.test.accuracy>=0.9; repeat it for several at once."),
    ] = None
    show: Annotated[
        list[_Path] | None,
        Query(max_length=50, description="Path of a metric to return in `metrics`; repeat it for several."),
    ] = None


@dataclass(frozen=True)
class Subject:
    """Filters by kind and subject; None does not filter."""

    kind: Kind | None
    checkpoint_id: str | None
    probe_id: str | None
    feature_set_id: str | None

    def columns(self) -> dict[str, str | None]:
        """Return the filters that compare a column; a checkpoint is found in a table of its own."""
        return {"kind": self.kind, "probe_id": self.probe_id, "feature_set_id": self.feature_set_id}


def page_of_reports(
    session: Session, listing: Listing, subject: Subject, ranking: Ranking
) -> schemas.Page[schemas.ReportSummary]:
    """Return one page of reports.

    Raises:
        InvalidRequest: a path or a bound that there is not, or a cursor of another order.
    """
    bounds = [_bound(text) for text in ranking.metric or []]
    shown = dict.fromkeys([*([ranking.sort] if ranking.sort else []), *(path for path, *_ in bounds)])
    for path in shown:
        _require_metric(subject.kind, path)
    for path in ranking.show or []:
        _require_metric(None, path)  # reports of other kinds have none, which is no reason to refuse the list
    shown |= dict.fromkeys(ranking.show or [])
    query = sa.select(Report).options(sa.orm.defer(Report.content))
    if subject.checkpoint_id is not None:
        query = query.where(analyses.looks_at(Report.analysis_id, [subject.checkpoint_id]))
    for column, value in subject.columns().items():
        if value is not None:
            query = query.where(getattr(Report, column) == value)
    for path, sign, limit in bounds:
        metric = aliased(ReportMetric)
        query = query.join(metric, sa.and_(metric.report_id == Report.id, metric.path == path))
        query = query.where(_COMPARISONS[sign](metric.value, limit))
    order = None
    if ranking.sort is not None:
        metric = aliased(ReportMetric)
        query = query.join(metric, sa.and_(metric.report_id == Report.id, metric.path == ranking.sort))
        order = Order(metric.value, descending=ranking.order == "desc")

    def about(ids: sa.Select[str]) -> sa.ColumnElement[bool]:
        return sa.or_(Report.id.in_(ids), Report.probe_id.in_(ids))

    rows, cursor = page(session, query, Report, listing, about, order)
    reports = [row[0] for row in rows]
    metrics = _metrics(session, reports, list(shown))
    return schemas.Page(items=[_summary(row, metrics[row.id]) for row in reports], next_cursor=cursor)


def _bound(text: str) -> tuple[str, str, float]:
    """Return the path, the sign and the number of a bound such as splits.test.accuracy>=0.9."""
    found = _BOUND.fullmatch(text)
    try:
        limit = float(found[3]) if found else math.nan
    except ValueError:
        limit = math.nan
    if found is None or not math.isfinite(limit):
        raise InvalidRequest(f"The filter metric={text!r} is not of the form PATH>=NUMBER; the signs are >=, <=, >, <.")
    return found[1], found[2], limit


def _require_metric(kind: Kind | None, path: str) -> None:
    """Check that reports of a kind, or of any, have a metric at a path."""
    kinds: Sequence[Kind] = list(KINDS) if kind is None else [kind]
    refusals = []
    for one in kinds:
        try:
            require_number(one, path)
        except UnknownPath as refusal:
            refusals.append(refusal)
        else:
            if is_metric(one, path):
                return
    # The first kind is evaluation, whose paths are what most lists are sorted by.
    detail = refusals[0] if len(refusals) == len(kinds) else f"Lists are not sorted or filtered by {path!r}"
    raise InvalidRequest(f"{detail}. Metrics are numbers of splits and summaries; of a comparison, differences.")


def _metrics(session: Session, rows: Sequence[Report], paths: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Return the values at these paths by report; None where a report has none."""
    found: dict[str, dict[str, float | None]] = {row.id: dict.fromkeys(paths) for row in rows}
    if found and paths:
        where = ReportMetric.report_id.in_(found), ReportMetric.path.in_(paths)
        columns = ReportMetric.report_id, ReportMetric.path, ReportMetric.value
        for report_id, path, value in session.execute(sa.select(*columns).where(*where)):
            found[report_id][path] = value
    return found


def _summary(row: Report, metrics: dict[str, float | None]) -> schemas.ReportSummary:
    ids = [place.checkpoint_id for place in row.checkpoints]
    return schemas.ReportSummary(
        id=row.id,
        analysis_id=row.analysis_id,
        kind=row.kind,
        name=row.name,
        checkpoint_id=ids[0] if len(ids) == 1 else None,
        checkpoint_ids=ids,
        probe_id=row.probe_id,
        feature_set_id=row.feature_set_id,
        created_at=row.created_at,
        metrics=metrics,
    )
