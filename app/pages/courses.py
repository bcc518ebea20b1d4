"""How the numbers of evaluations went: over the epochs of a run, or over the time at which they were made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from app import resources, schemas
from app.api import drawing
from app.api.routes import Service, ServiceDep
from app.database import read
from app.errors import NotFound
from app.models import AnalysisCheckpoint, Checkpoint, FeatureSet, MetadataEntry, Probe, Report, ReportMetric
from app.pages.charts import drawn
from app.pages.visitors import VisitorDep
from app.schemas import PLAIN_TEXT, metadata_text

router = APIRouter()
#: Charts of one page: those of the probes that were used last.
MOST = 3
# Reports that a chart is made of: the newest.
_MOST_REPORTS = 1000
# Metadata that say which training a checkpoint is of, and when in it.
_RUN, _WHEN = "run", ("epoch", "step")
_SPLITS = ("test", "all")
_MEASURES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "mir": "interplay.sample.global.mir",
    "hdr": "interplay.sample.global.hdr",
}
_MODELS: Mapping[str, Any] = {"checkpoints": Checkpoint, "probes": Probe, "feature-sets": FeatureSet}

Name = Literal["run", "time"]


@dataclass(frozen=True)
class _Evaluation:
    """A report of an evaluation."""

    id: str
    name: str
    created_at: datetime
    probe_id: str | None
    checkpoint_id: str | None


@dataclass(frozen=True)
class _Run:
    """The checkpoints of one training.

    Attributes:
        name: of the run, in words.
        axis: the key of metadata that says when in the run a checkpoint was saved.
        places: by checkpoint the value of that key.
    """

    name: str
    axis: str
    places: Mapping[str, float]


@dataclass(frozen=True)
class Course:
    """Evaluations on one probe in an order.

    Attributes:
        name: of the chart.
        probe_id: of the probe; None for a feature set.
        about: what the chart shows, in words.
        axis: title of the axis.
        joined: whether lines join the points: not where they are of networks that have nothing in common.
        here: the place of the page's own checkpoint in its run.
        points: by place, the evaluation there.
    """

    name: Name
    probe_id: str | None
    about: str
    axis: str
    joined: bool
    here: float | None
    points: Sequence[tuple[float, _Evaluation]]


def courses(session: Session, collection: str, row: Any) -> list[Course]:
    """Return what a resource's page shows of its evaluations over time: those with two or more on one probe.

    A checkpoint of a run stands among the others of the run, at their epochs or steps; its own numbers hardly change.
    """
    if collection == "probes":
        found = _evaluations(session, Report.probe_id == row.id)
        return [_over_time(row.id, found, f"on {row.name}", joined=False)] if len(found) > 1 else []
    if collection == "feature-sets":
        found = _evaluations(session, Report.feature_set_id == row.id)
        return [_over_time(None, found, f"of {row.name}", joined=True)] if len(found) > 1 else []
    own: dict[str, list[_Evaluation]] = {}
    for one in _evaluations(session, AnalysisCheckpoint.checkpoint_id == row.id):
        if one.probe_id is not None:
            own.setdefault(one.probe_id, []).append(one)
    names = {one.id: one.name for one in session.execute(sa.select(Probe.id, Probe.name).where(Probe.id.in_(own)))}
    run = _run_of(session, row) if own else None
    charts = []
    for probe_id, evaluations in own.items():
        on = f"on {names.get(probe_id, 'a probe that was deleted')}"
        course = None if run is None else _over_run(session, run, probe_id, row.id, on)
        if course is None and len(evaluations) > 1:
            course = _over_time(probe_id, evaluations, f"of {row.name} {on}", joined=True)
        if course is not None:
            charts.append(course)
        if len(charts) == MOST:
            break
    return charts


def _evaluations(session: Session, where: sa.ColumnElement[bool]) -> list[_Evaluation]:
    """Return the newest evaluations, the newest first."""
    columns = Report.id, Report.name, Report.created_at, Report.probe_id, AnalysisCheckpoint.checkpoint_id
    query = (
        sa.select(*columns)
        .outerjoin(AnalysisCheckpoint, AnalysisCheckpoint.analysis_id == Report.analysis_id)
        .where(Report.kind == "evaluation", where)
        .order_by(Report.created_at.desc(), Report.id.desc())
        .limit(_MOST_REPORTS)
    )
    return [_Evaluation(*found) for found in session.execute(query)]


def _over_time(probe_id: str | None, found: Sequence[_Evaluation], about: str, *, joined: bool) -> Course:
    points = [(one.created_at.timestamp(), one) for one in reversed(found)]
    return Course("time", probe_id, f"{about}, over the time of the report", "created (UTC)", joined, None, points)


def run_and_axis(row: Checkpoint) -> tuple[str, str] | None:
    """Return the metadata that name a checkpoint's run, as key=value, and the key of its place; None without both."""
    run = row.metadata_.get(_RUN)
    axis = next((key for key in _WHEN if _is_number(row.metadata_.get(key))), None)
    return None if run is None or isinstance(run, list) or axis is None else (f"{_RUN}={metadata_text(run)}", axis)


def _run_of(session: Session, row: Checkpoint) -> _Run | None:
    """Return the run that a checkpoint's metadata name, with the checkpoints of the same network; None without one."""
    found_in = run_and_axis(row)
    if found_in is None:
        return None
    run, axis = metadata_text(row.metadata_[_RUN]), found_in[1]
    matching = sa.select(MetadataEntry.resource_id).where(MetadataEntry.key == _RUN, MetadataEntry.value == run)
    # Another network's run may have the same name.
    query = (
        sa.select(Checkpoint.id, Checkpoint.metadata_)
        .where(Checkpoint.id.in_(matching), Checkpoint.n_parameters == row.n_parameters)
        .order_by(Checkpoint.created_at.desc(), Checkpoint.id.desc())
        .limit(_MOST_REPORTS)
    )
    found = session.execute(query).all()
    places = {id_: float(metadata[axis]) for id_, metadata in found if _is_number(metadata.get(axis))}
    return _Run(run, axis, {**places, row.id: float(row.metadata_[axis])})


def _over_run(session: Session, run: _Run, probe_id: str, own_id: str, on: str) -> Course | None:
    """Return a run's evaluations on a probe; None if they lie at fewer than two places."""
    where = sa.and_(Report.probe_id == probe_id, AnalysisCheckpoint.checkpoint_id.in_(run.places))
    found = _evaluations(session, where)
    by_place: dict[float, _Evaluation] = {}
    # Of several at a place the newest one stays, and before all others the page's own.
    for one in sorted(found, key=lambda one: (one.checkpoint_id == own_id, one.created_at)):
        assert one.checkpoint_id is not None
        by_place[run.places[one.checkpoint_id]] = one
    if len(by_place) < 2:
        return None
    points = sorted(by_place.items(), key=lambda point: point[0])
    return Course(
        "run", probe_id, f"of run {run.name} {on}, over {run.axis}", run.axis, True, run.places[own_id], points
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class _Wanted:
    """Which chart of which resource, as an address says it."""

    id: schemas.Id
    name: Name
    probe_id: Annotated[str | None, Query(max_length=36, pattern=PLAIN_TEXT)] = None


async def _draw(
    request: Request,
    wanted: Annotated[_Wanted, Depends()],
    format: drawing.Format,
    _: VisitorDep,
    service: ServiceDep,
) -> Response:
    """A chart of evaluations: accuracy, MIR and HDR of one split."""
    collection = request.url.path.removeprefix(request.scope.get("root_path", "")).split("/")[1]
    text = await run_in_threadpool(_chart_data, service, collection, wanted)
    return await drawn(service, "course", text, format)


for _collection in _MODELS:
    router.get(f"/{_collection}/{{id}}/charts/{{name}}.{{format}}")(_draw)


def _chart_data(service: Service, collection: str, wanted: _Wanted) -> str:
    """Return what a chart is drawn from, as JSON."""
    with read(service.engine) as session:
        row = resources.get(session, _MODELS[collection], wanted.id)
        key = wanted.name, wanted.probe_id
        found = [one for one in courses(session, collection, row) if (one.name, one.probe_id) == key]
        if not found:
            raise NotFound("There is no such chart: it takes two evaluations or more on one probe.")
        return json.dumps(_data(session, found[0]))


def _data(session: Session, course: Course) -> dict[str, Any]:
    ids = [one.id for _, one in course.points]
    paths = {f"splits.{split}.{path}": (split, measure) for split in _SPLITS for measure, path in _MEASURES.items()}
    query = sa.select(ReportMetric.report_id, ReportMetric.path, ReportMetric.value).where(
        ReportMetric.report_id.in_(ids), ReportMetric.path.in_(paths)
    )
    values: dict[str, dict[tuple[str, str], float]] = {}
    for report_id, path, value in session.execute(query):
        values.setdefault(report_id, {})[paths[path]] = value
    present = {split for own in values.values() for split, _ in own}
    split = next((split for split in _SPLITS if split in present), _SPLITS[0])
    return {
        "about": course.about,
        "axis": course.axis,
        "is_time": course.name == "time",
        "joined": course.joined,
        "here": course.here,
        "split": split,
        "points": [
            {
                "place": place,
                "report": one.name,
                "created": f"{one.created_at:%Y-%m-%d %H:%M:%S}",
                **{measure: values.get(one.id, {}).get((split, measure)) for measure in _MEASURES},
            }
            for place, one in course.points
        ],
    }
