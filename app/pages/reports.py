"""Pages of reports: the list, and one page for each kind."""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Request, Response

from app import deletion, schemas
from app.api import drawing
from app.api.routes import Service, ServiceDep, SubjectDep
from app.database import read
from app.errors import NotFound
from app.listing import Listing
from app.models import Report
from app.pages import listed, words
from app.pages.rendering import page, see_other
from app.pages.visitors import AuthorDep, VisitorDep
from app.reports import Ranking, page_of_reports
from app.schemas import Kind
from app.schemas.kinds import KINDS
from app.schemas.metrics import metrics_of

router = APIRouter()
_OF_SPLIT = ("accuracy", "loss", "calibration_error", "effective_rank")
_OF_COLLAPSE = tuple(name for name in words.METRICS if name.startswith("nc"))
_LEVELS = (("sample", "none"), ("sample", "global"), ("class_mean", "none"), ("class_mean", "global"))
# Charts that a page shows at once beside the measures of the overview; the further ones wait behind a click.
_AT_ONCE = ("classes", "confusion", "reliability")
# Up to so many classes the confusion matrix is shown whole, beyond only the largest confusions.
_MATRIX_CLASSES, _LARGEST = 20, 20
# Classes that the table lists; of a language model there may be many thousands.
_MOST_CLASSES = 1000


@router.get("/reports")
def list_reports(
    request: Request,
    visitor: VisitorDep,
    service: ServiceDep,
    listing: Annotated[Listing, Depends()],
    subject: SubjectDep,
) -> Response:
    """Reports, the newest first."""
    with read(service.engine) as session:
        found = page_of_reports(session, listing, subject, Ranking(show=list(listed.SHOWN)))
        rows = listed.rows(session, found.items)
    return page(
        request,
        visitor,
        "reports.html",
        reports=rows,
        next_cursor=found.next_cursor,
        listing=listing,
        subject=subject,
        kinds=list(KINDS),
    )


@router.get("/reports/{id}.csv")
def download_table(id: schemas.Id, _: VisitorDep, service: ServiceDep) -> Response:
    """Every number of a report as a table, the one that `interplay export --csv` writes."""
    from interplay.export import to_csv

    file = io.StringIO(newline="")
    to_csv(_report(service, id), file)
    return Response(
        file.getvalue(), media_type="text/csv; charset=utf-8", headers={"X-Content-Type-Options": "nosniff"}
    )


@router.get("/reports/{id}")
def show_report(request: Request, id: schemas.Id, visitor: VisitorDep, service: ServiceDep) -> Response:
    """What a report says: in sentences, then in charts, then every number."""
    report = _report(service, id)
    kind: Kind = report["kind"]
    charts = drawing.names(kind)
    return page(
        request,
        visitor,
        f"report_{kind if kind in _VIEWS else 'any'}.html",
        report=report,
        subjects=report.get("subjects") or [report["subject"]],
        charts=[_chart(name) for name in charts if name in (*KINDS[kind].measures, *_AT_ONCE)],
        further=[_chart(name) for name in charts if name not in ("overview", *KINDS[kind].measures, *_AT_ONCE)],
        metric_of=words.metric_of,
        **_VIEWS.get(kind, _any)(report),
    )


@router.post("/reports/{id}/delete")
def delete_report(request: Request, id: schemas.Id, _: AuthorDep, service: ServiceDep) -> Response:
    """Delete a report, and show the others."""
    deletion.delete_report(service.engine, id)
    return see_other(request, "/reports")


def _chart(name: str) -> tuple[str, str]:
    """Return a chart's name and what a page calls it."""
    metric = words.metric_of(name)
    return name, metric.label if metric else name.capitalize()


def _report(service: Service, id_: str) -> dict[str, Any]:
    with read(service.engine) as session:
        content = session.scalar(sa.select(Report.content).where(Report.id == id_))
    if content is None:
        raise NotFound(f"There is no report {id_!r}.")
    return dict(json.loads(content))


@dataclass(frozen=True)
class _Row:
    """A metric by split."""

    metric: words.Metric
    values: list[float | None]
    reasons: list[str | None]


@dataclass(frozen=True)
class _Confusions:
    """The confusion matrix of a split, or its largest entries.

    Attributes:
        split: name of the split.
        names: of the classes, if the matrix is shown.
        matrix: samples by class and prediction, if it is shown.
        largest: the largest confusions: class, predicted class, samples, share of the class's samples.
        n_otherwise: wrongly predicted samples that are not shown.
    """

    split: str
    names: list[str]
    matrix: list[list[int]]
    largest: list[tuple[str, str, int, float]]
    n_otherwise: int


def _evaluation(report: Mapping[str, Any]) -> dict[str, Any]:
    splits: Mapping[str, Any] = report["splits"]
    names = words.class_names(report)
    return {
        "sentences": words.evaluation_in_sentences(report),
        "measures_of": [_row(splits, name, ()) for name in _OF_SPLIT],
        "collapse": [_row(splits, name, ("collapse",)) for name in _OF_COLLAPSE],
        "levels": _LEVELS,
        "by_class": _by_class(splits, names),
        "most_classes": _MOST_CLASSES,
        "confusions": [_confusions(name, split, names) for name, split in splits.items() if split.get("by_class")],
    }


def _row(splits: Mapping[str, Any], name: str, within: tuple[str, ...]) -> _Row:
    holders = [split[within[0]] if within else split for split in splits.values()]
    return _Row(
        words.METRICS[name],
        [holder[name] for holder in holders],
        [holder["reasons"].get(name) for holder in holders],
    )


def _by_class(
    splits: Mapping[str, Any], names: list[str] | None
) -> list[tuple[str, list[tuple[int, float | None, int]]]]:
    """Return by class its name and, for each split, its samples, its accuracy, and how often it is predicted."""
    if not all(split.get("by_class") for split in splits.values()):
        return []
    found = []
    for label in range(min(len(next(iter(splits.values()))["class_counts"]), _MOST_CLASSES)):
        cells = [
            (
                split["class_counts"][label],
                split["by_class"]["accuracy"][label],
                split["by_class"]["predicted_counts"][label],
            )
            for split in splits.values()
        ]
        found.append((words.class_name(label, names), cells))
    return found


def _confusions(name: str, split: Mapping[str, Any], names: list[str] | None) -> _Confusions:
    found, counts = split["by_class"], split["class_counts"]
    n_classes = len(counts)
    largest: list[tuple[str, str, int, float]] = []
    matrix: list[list[int]] = []
    shown_whole = n_classes <= _MATRIX_CLASSES and not found["n_confused_otherwise"]
    if shown_whole:
        matrix = [[0] * n_classes for _ in range(n_classes)]
        for label, (accuracy, count) in enumerate(zip(found["accuracy"], counts, strict=True)):
            matrix[label][label] = round((accuracy or 0) * count)
    for entry in found["confusions"]:
        label, other, n = entry["label"], entry["predicted"], entry["n_samples"]
        if shown_whole and other is not None:
            matrix[label][other] = n
        if len(largest) < _LARGEST:
            predicted = "no class" if other is None else words.class_name(other, names)
            largest.append((words.class_name(label, names), predicted, n, n / counts[label]))
    n_wrong = sum(entry["n_samples"] for entry in found["confusions"]) + found["n_confused_otherwise"]
    return _Confusions(
        split=name,
        names=[words.class_name(label, names) for label in range(n_classes)] if shown_whole else [],
        matrix=matrix,
        largest=largest,
        n_otherwise=n_wrong - sum(n for _, _, n, _ in largest),
    )


def _comparison(report: Mapping[str, Any]) -> dict[str, Any]:
    confidence = report["provenance"]["options"]["confidence"]
    return {
        "sentences": words.comparison_in_sentences(report),
        "confidence": f"{100 * confidence:g} %",
        "interval": {"delta": "influence functions (delta method)", "bootstrap": "a paired bootstrap"}[
            report["provenance"]["options"]["interval"]
        ],
        "first_paths": words.COMPARED,
    }


def _of_points(report: Mapping[str, Any]) -> dict[str, Any]:
    kind = KINDS[report["kind"]]
    axis = report["axis"]["name"] if kind.axis is None else kind.axis
    return {
        "sentences": words.points_in_sentences(report),
        "place": kind.place,
        "axis": axis,
        "splits": list(report["points"][0]["splits"]),
        "of_points": ("loss", "accuracy", "mir", "hdr"),
    }


def _any(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page of a kind without a view of its own shows: every metric by its path."""
    return {"sentences": [], "metrics": metrics_of(report["kind"], report)}


_VIEWS: Mapping[Kind, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "evaluation": _evaluation,
    "comparison": _comparison,
    "path": _of_points,
    "pruning": _of_points,
    "series": _of_points,
}
