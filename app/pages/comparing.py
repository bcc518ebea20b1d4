"""Reports side by side: what they measured, where they differ, and charts of all of them together."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from string import ascii_uppercase
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session, aliased

from app.api import drawing
from app.api.charts.measures import read as read_measure
from app.api.routes import Service, ServiceDep
from app.database import read
from app.errors import InvalidRequest, NotFound
from app.listing import Listing
from app.models import AnalysisCheckpoint, Report, ReportMetric
from app.pages import listed, words
from app.pages.charts import drawn
from app.pages.rendering import metadata_words, number, page
from app.pages.visitors import VisitorDep
from app.reports import Ranking, Subject, page_of_reports
from app.schemas import PLAIN_TEXT, Kind
from app.schemas.kinds import KINDS

router = APIRouter()
_MOST = 20
_ID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")
# Reports to choose from, where fewer than two are given.
_OFFERED = 50
# Of metadata, keys that the parallel axes show, and values of one that is no number.
_MOST_KEYS, _MOST_WORDS = 8, 10
# Metrics of the parallel axes; the last one colours the lines.
_ACROSS = ("loss", "collapse.nc1", "interplay.sample.global.hdr", "interplay.sample.global.mir", "accuracy")
# A report's number is that of a comparison if the difference agrees to this share of the interval's width.
_SAME = 0.01

Asked = Annotated[list[Annotated[str, Query(max_length=300, pattern=PLAIN_TEXT)]] | None, Query(max_length=100)]


@dataclass(frozen=True)
class _Compared:
    """A report beside others; `letter` names it on the page."""

    letter: str
    id: str
    kind: Kind
    name: str
    created_at: datetime
    content: Mapping[str, Any]
    metrics: Mapping[str, float]
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class _Cell:
    """A metric of a report.

    Attributes:
        value: of the metric; of a comparison its difference.
        difference: from the first report, if a comparison of the two is there.
        low: of the interval of the difference.
        high: of the interval of the difference.
        differs: whether the interval excludes 0; None if there is none.
        reason: why a difference has no interval.
    """

    value: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    differs: bool | None = None
    reason: str | None = None


@dataclass(frozen=True)
class _Row:
    """A metric of all reports; `path` is within a split, the summary, or the point that `where` names."""

    path: str
    metric: words.Metric | None
    cells: Sequence[_Cell]
    where: str = ""


@dataclass(frozen=True)
class _Group:
    """Reports of one kind.

    Attributes:
        kind: of the reports.
        members: the reports.
        splits: their splits.
        split: the one that is shown.
        first: rows that a reader looks at first.
        others: all further rows.
        compared: by id of a report, the comparison of it with the first one.
        charts: names of charts of all of them, and what they are called.
        apart: reports that the charts leave out, as their axis is another.
    """

    kind: Kind
    members: Sequence[_Compared]
    splits: Sequence[str]
    split: str
    first: Sequence[_Row]
    others: Sequence[_Row]
    compared: Mapping[str, str]
    charts: Sequence[tuple[str, str]]
    apart: Sequence[_Compared]


@router.get("/compare")
def compare(
    request: Request,
    visitor: VisitorDep,
    service: ServiceDep,
    report: Asked = None,
    split: Annotated[str | None, Query(max_length=100, pattern=PLAIN_TEXT)] = None,
) -> Response:
    """Two to twenty reports side by side; with fewer, those that can be chosen."""
    ids = _ids(report or [])
    with read(service.engine) as session:
        if len(ids) < 2:
            newest = page_of_reports(
                session, Listing(limit=_OFFERED), Subject(None, None, None, None), Ranking(show=list(listed.SHOWN))
            )
            offered = listed.rows(session, newest.items)
            return page(request, visitor, "compare.html", chosen=ids, reports=offered, groups=[])
        members = _compared(session, ids)
        kinds = dict.fromkeys(member.kind for member in members)
        groups = [_group(session, kind, [one for one in members if one.kind == kind], split) for kind in kinds]
    differing, common = _facts(members)
    return page(
        request,
        visitor,
        "compare.html",
        chosen=ids,
        members=members,
        groups=groups,
        differing=differing,
        common=common,
        most=_MOST,
    )


@router.get("/compare/charts/{name}.{format}")
async def draw_chart(
    name: str,
    format: drawing.Format,
    _: VisitorDep,
    service: ServiceDep,
    report: Asked = None,
    split: Annotated[str | None, Query(max_length=100, pattern=PLAIN_TEXT)] = None,
) -> Response:
    """A chart of several reports of one kind: a measure over their points, or `parallel` for evaluations."""
    text = await run_in_threadpool(_chart_data, service, _ids(report or []), name, split)
    return await drawn(service, "parallel" if name == "parallel" else "overlay", text, format)


def _ids(given: Sequence[str]) -> list[str]:
    """Return the ids of reports that were given as ids or as addresses of their pages, each once."""
    found = dict.fromkeys(match[0] for text in given if (match := _ID.search(text.strip().lower())))
    if len(found) > _MOST:
        raise InvalidRequest(f"At most {_MOST} reports are shown side by side; {len(found)} were chosen.")
    return list(found)


def _compared(session: Session, ids: Sequence[str]) -> list[_Compared]:
    rows = {row.id: row for row in session.scalars(sa.select(Report).where(Report.id.in_(ids)))}
    if missing := [id_ for id_ in ids if id_ not in rows]:
        raise NotFound(f"There is no report {', '.join(missing)}.")
    metadata = listed.metadata_of_subjects(session, {id_: _one_subject(row) for id_, row in rows.items()})
    # As a table they are read faster than out of the reports.
    metrics: dict[str, dict[str, float]] = {id_: {} for id_ in ids}
    columns = ReportMetric.report_id, ReportMetric.path, ReportMetric.value
    wanted = sa.select(*columns).where(ReportMetric.report_id.in_(ids)).order_by(ReportMetric.path)
    for report_id, path, value in session.execute(wanted):
        metrics[report_id][path] = value
    found = []
    for letter, id_ in zip(ascii_uppercase, ids, strict=False):
        row, content = rows[id_], json.loads(rows[id_].content)
        found.append(
            _Compared(letter, id_, row.kind, row.name, row.created_at, content, metrics[id_], metadata.get(id_, {}))
        )
    return found


def _one_subject(row: Report) -> str | None:
    """Return the id of a report's checkpoint or feature set; None if it has several."""
    ids = [place.checkpoint_id for place in row.checkpoints]
    return ids[0] if len(ids) == 1 else row.feature_set_id


def _group(session: Session, kind: Kind, members: Sequence[_Compared], asked: str | None) -> _Group:
    splits = list(dict.fromkeys(name for member in members for name in _splits(member)))
    split = asked if asked in splits else words.first_split(dict.fromkeys(splits))
    rows = _differences(members, split) if kind == "comparison" else _measures(members, split)
    compared: dict[str, str] = {}
    if kind == "evaluation":
        intervals = _intervals(session, members[0], members[1:])
        compared = {id_: report_id for id_, (report_id, _) in intervals.items()}
        rows = [_with_intervals(row, members, intervals, split) for row in rows]
    first = [row for path in words.COMPARED for row in rows if row.path == path]
    if KINDS[kind].place is not None:
        first = rows = [*rows, *_ends(members, split)]  # a summary is short
    axes = [_axis(member) for member in members]
    along = [member for member, axis in zip(members, axes, strict=True) if axis == axes[0]]
    return _Group(
        kind=kind,
        members=members,
        splits=splits,
        split=split,
        first=first,
        others=[row for row in rows if row not in first],
        compared=compared,
        charts=_charts(kind, along),
        apart=[member for member in members if member not in along],
    )


def _splits(member: _Compared) -> list[str]:
    content = member.content
    return list(content["splits"] if "splits" in content else content["points"][0]["splits"])


def _measures(members: Sequence[_Compared], split: str) -> list[_Row]:
    """Return the metrics of one split, and those of no split."""
    found: dict[str, list[_Cell]] = {}
    for index, member in enumerate(members):
        for path, value in member.metrics.items():
            if (name := _within(path, split)) is not None:
                found.setdefault(name, [_Cell(None)] * len(members))[index] = _Cell(value)
    return [_Row(path, words.metric_of(path), cells) for path, cells in found.items()]


def _ends(members: Sequence[_Compared], split: str) -> list[_Row]:
    """Return the measures of the first and of the last point."""
    found = []
    for measure in KINDS[members[0].kind].measures:
        for index, where in ((0, "at the first point"), (-1, "at the last point")):
            splits = [member.content["points"][index]["splits"] for member in members]
            values = [read_measure(of[split], measure)[0] if split in of else None for of in splits]
            found.append(_Row(measure, words.metric_of(measure), [_Cell(value) for value in values], where))
    return found


def _within(path: str, split: str) -> str | None:
    """Return a metric's path in a split, or in the summary; None if it is that of another split."""
    section, name, rest = (*path.split(".", 2), "")[:3]
    if section == "splits":
        return rest if name == split else None
    if name == "splits":
        of, _, rest = rest.partition(".")
        return rest if of == split else None
    return path.removeprefix("summary.")


def _differences(members: Sequence[_Compared], split: str) -> list[_Row]:
    """Return the differences of comparisons with their intervals."""
    found = [member.content["splits"].get(split, {}).get("differences", {}) for member in members]
    return [
        _Row(
            path,
            words.metric_of(path),
            [
                _Cell(one["difference"], None, one["low"], one["high"], one["significant"], one["reason"])
                if one
                else _Cell(None)
                for one in (of.get(path) for of in found)
            ],
        )
        for path in dict.fromkeys(path for of in found for path in of)
    ]


def _intervals(
    session: Session, first: _Compared, others: Sequence[_Compared]
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Return by id of a report the newest comparison of its checkpoint with the first's: its id and its splits.

    Differences are other - first.
    """
    reference, probe_id = _checkpoint(first), first.content["probe"].get("id")
    # One checkpoint may have several reports.
    by_checkpoint: dict[str, list[str]] = {}
    for member in others:
        own = _checkpoint(member)
        if own is not None and own != reference and member.content["probe"].get("id") == probe_id:
            by_checkpoint.setdefault(own, []).append(member.id)
    if reference is None or probe_id is None or not by_checkpoint:
        return {}
    a, b = aliased(AnalysisCheckpoint), aliased(AnalysisCheckpoint)
    pair = sa.or_(
        sa.and_(a.checkpoint_id == reference, b.checkpoint_id.in_(by_checkpoint)),
        sa.and_(b.checkpoint_id == reference, a.checkpoint_id.in_(by_checkpoint)),
    )
    query = (
        sa.select(Report.id, a.checkpoint_id, b.checkpoint_id)
        .join(a, sa.and_(a.analysis_id == Report.analysis_id, a.position == 0))
        .join(b, sa.and_(b.analysis_id == Report.analysis_id, b.position == 1))
        .where(Report.kind == "comparison", Report.probe_id == probe_id, pair)
        .order_by(Report.created_at)
    )
    # The newest one stays.
    chosen = {
        member_id: (id_, x == reference)
        for id_, x, y in session.execute(query)
        for member_id in by_checkpoint[y if x == reference else x]
    }
    wanted = sa.select(Report.id, Report.content).where(Report.id.in_([id_ for id_, _ in chosen.values()]))
    contents = {row.id: row.content for row in session.execute(wanted)}
    return {
        id_: (report_id, _turned(json.loads(contents[report_id])["splits"], straight))
        for id_, (report_id, straight) in chosen.items()
    }


def _checkpoint(member: _Compared) -> str | None:
    subject = member.content["subject"]
    return subject["id"] if subject["kind"] == "checkpoint" else None


def _turned(splits: Mapping[str, Any], straight: bool) -> Mapping[str, Any]:
    """Return the differences by split, the second less the first; of a comparison the other way round, negated."""
    if straight:
        return {name: split["differences"] for name, split in splits.items()}
    return {
        name: {
            path: {
                "difference": _negated(one["difference"]),
                "low": _negated(one["high"]),
                "high": _negated(one["low"]),
                "significant": one["significant"],
                "reason": one["reason"],
            }
            for path, one in split["differences"].items()
        }
        for name, split in splits.items()
    }


def _negated(value: float | None) -> float | None:
    return None if value is None else 0.0 - value


def _with_intervals(
    row: _Row, members: Sequence[_Compared], intervals: Mapping[str, tuple[str, Mapping[str, Any]]], split: str
) -> _Row:
    reference = row.cells[0].value
    cells = list(row.cells)
    for index, member in enumerate(members):
        found = intervals[member.id][1].get(split, {}).get(row.path) if member.id in intervals else None
        value = row.cells[index].value
        if found is None or value is None or reference is None or found["difference"] is None:
            continue
        # A comparison with other options measured something else.
        width = 0 if found["low"] is None else found["high"] - found["low"]
        if abs((value - reference) - found["difference"]) <= max(_SAME * width, 1e-9):
            cells[index] = _Cell(
                value, found["difference"], found["low"], found["high"], found["significant"], found["reason"]
            )
    return _Row(row.path, row.metric, cells)


def _charts(kind: Kind, members: Sequence[_Compared]) -> list[tuple[str, str]]:
    if len(members) < 2:
        return []
    if KINDS[kind].place is not None:
        return [
            (name, metric.label if (metric := words.metric_of(name)) else name.capitalize())
            for name in KINDS[kind].measures
        ]
    return [("parallel", "Metadata and metrics")] if kind == "evaluation" else []


def _axis(member: _Compared) -> str | None:
    """Return the title of the axis that a report's points lie on; None for a kind without points."""
    kind = KINDS[member.kind]
    if kind.place is None:
        return None
    return kind.axis or str(member.content["axis"]["name"])


def _facts(
    members: Sequence[_Compared],
) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """Return what was measured and how, as words: what differs between reports, for each, and what does not."""
    found: dict[str, list[str]] = {}
    for index, member in enumerate(members):
        for title, text in _facts_of(member):
            found.setdefault(title, ["–"] * len(members))[index] = text
    differing = [(title, texts) for title, texts in found.items() if len(set(texts)) > 1]
    return differing, [(title, texts[0]) for title, texts in found.items() if len(set(texts)) == 1]


def _facts_of(member: _Compared) -> list[tuple[str, str]]:
    content = member.content
    provenance = content["provenance"]
    return [
        *((f"Metadata: {key}", metadata_words(value)) for key, value in member.metadata.items()),
        ("Probe", str(content["probe"]["name"])),
        ("Samples", number(content["probe"]["n_samples"])),
        *((f"Option: {key}", _option(value)) for key, value in provenance["options"].items()),
        ("Device", str(provenance["device"])),
        ("torch", str(provenance["torch_version"])),
        ("Interplay", str(provenance["interplay_version"])),
    ]


def _option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _chart_data(service: Service, ids: Sequence[str], name: str, split: str | None) -> str:
    """Return what a chart of several reports is drawn from, as JSON."""
    with read(service.engine) as session:
        members = _compared(session, ids)
    kinds = {member.kind for member in members}
    kind = members[0].kind if len(kinds) == 1 else None
    if kind is None or name not in dict(_charts(kind, members)):
        raise NotFound(f"These reports have no chart {name!r} together.")
    split = split if split is not None else words.first_split(dict.fromkeys(_splits(members[0])))
    data = _parallel(members, split) if name == "parallel" else _overlay(members, name, split)
    return json.dumps(data)


def _overlay(members: Sequence[_Compared], measure: str, split: str) -> dict[str, Any]:
    place = KINDS[members[0].kind].place
    lines = [
        {
            "label": f"{member.letter}: {member.name}",
            "points": [
                [point[place], read_measure(point["splits"][split], measure)[0]]
                for point in member.content["points"]
                if split in point["splits"]
            ],
        }
        for member in members
    ]
    return {"measure": measure, "split": split, "axis": _axis(members[0]), "lines": lines}


def _parallel(members: Sequence[_Compared], split: str) -> dict[str, Any]:
    """Return axes of the metadata that vary and of the first metrics, and each report's height on them."""
    axes, heights, texts = [], [], []
    for title, values in [*_varying(members), *_across(members, split)]:
        labels, own = _placed(values)
        axes.append({"title": title, "labels": labels})
        heights.append(own)
        texts.append([_told(value) for value in values])
    lines = [
        {
            "label": f"{member.letter}: {member.name}",
            "heights": [own[index] for own in heights],
            "words": [own[index] for own in texts],
        }
        for index, member in enumerate(members)
    ]
    return {"split": split, "axes": axes, "lines": lines}


def _varying(members: Sequence[_Compared]) -> list[tuple[str, list[Any]]]:
    """Return the metadata that differ between reports, and of words those with few values."""
    keys = dict.fromkeys(key for member in members for key in member.metadata)
    found = []
    for key in keys:
        values = [member.metadata.get(key) for member in members]
        values = [metadata_words(value) if value is not None and not _is_number(value) else value for value in values]
        distinct = {value for value in values if value is not None}
        if len(distinct) > 1 and (all(map(_is_number, distinct)) or len(distinct) <= _MOST_WORDS):
            found.append((key, values))
    return found[:_MOST_KEYS]


def _across(members: Sequence[_Compared], split: str) -> list[tuple[str, list[Any]]]:
    found = []
    for name in _ACROSS:
        metric = words.metric_of(name)
        assert metric is not None
        found.append((metric.label, [member.metrics.get(f"splits.{split}.{name}") for member in members]))
    return found


def _placed(values: Sequence[Any]) -> tuple[list[tuple[float, str]], list[float | None]]:
    """Return the labels of an axis, by height from 0 to 1, and the heights of values on it."""
    known = [value for value in values if value is not None]
    if known and all(map(_is_number, known)):
        low, high = min(known), max(known)
        if low == high:
            return [(0.5, _told(low))], [None if value is None else 0.5 for value in values]
        heights = [None if value is None else (value - low) / (high - low) for value in values]
        return [(0.0, _told(low)), (1.0, _told(high))], heights
    names = sorted({str(value) for value in known})
    at = {name: (index + 0.5) / len(names) for index, name in enumerate(names)}
    return [(at[name], name) for name in names], [None if value is None else at[str(value)] for value in values]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _told(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if _is_number(value) else str(value)
