"""Reports and their charts over HTTP."""

from typing import Annotated, Any, TypeVar

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Header, Path, Response
from fastapi.concurrency import run_in_threadpool

from app import deletion, schemas
from app.api import drawing
from app.api.routes import Service, ServiceDep, SubjectDep, problems
from app.database import read
from app.errors import NotFound
from app.listing import Listing, listing_with
from app.models import Report
from app.reports import Ranking, page_of_reports
from app.schemas import reports

router = APIRouter(tags=["reports"])
ReportListing = Annotated[
    Listing,
    Depends(listing_with("kind", "checkpoint_id", "probe_id", "feature_set_id", "sort", "order", "metric", "show")),
]
IfNoneMatch = Annotated[str | None, Header(max_length=1000)]
# Built once: SQLAlchemy takes longer to build a statement than SQLite to execute it.
_ONE = Report.id == sa.bindparam("id")
T = TypeVar("T")
_KIND = sa.select(Report.kind, Report.sha256).where(_ONE)
_CONTENT = sa.select(Report.content, Report.sha256).where(_ONE)

_MEDIA_TYPES: dict[drawing.Format, str] = {
    "svg": "image/svg+xml",
    "png": "image/png",
    "json": "application/vnd.vegalite+json",
}
# Names in a picture are untrusted: a browser that opens it as a page guesses no type, and runs and loads nothing.
_INERT = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",
}


@router.get(
    "/reports/{id}",
    response_model=reports.Report,
    responses={304: {"description": "The report that the client holds is the one asked for"}, **problems(404)},
)
def get_report(id: schemas.Id, service: ServiceDep, if_none_match: IfNoneMatch = None) -> Any:
    """A report, byte for byte as it was written; it never changes."""
    content, sha256 = _content(service, id)
    headers = _unchanging(sha256)
    if _is_held(headers, if_none_match):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type="application/json", headers=headers)


@router.get("/reports", responses=problems(422))
def list_reports(
    service: ServiceDep, listing: ReportListing, subject: SubjectDep, ranking: Annotated[Ranking, Depends()]
) -> schemas.Page[schemas.ReportSummary]:
    """Reports without their content, the newest first or sorted by a metric.

    A report that has no value at the path that they are sorted by is left out.
    """
    with read(service.engine) as session:
        return page_of_reports(session, listing, subject, ranking)


@router.get("/reports/{id}/charts", responses=problems(404))
def list_charts(id: schemas.Id, service: ServiceDep) -> schemas.Charts:
    """The charts of a report; the first is an overview."""
    kind, _ = _kind(service, id)
    return schemas.Charts(names=drawing.names(kind), formats=list(_MEDIA_TYPES))


@router.get(
    "/reports/{id}/charts/{name}.{format}",
    response_class=Response,
    responses={
        200: {"content": {media_type: {} for media_type in _MEDIA_TYPES.values()}},
        304: {"description": "The chart that the client holds is the one asked for"},
        **problems(404, 503),
    },
)
async def get_chart(
    id: schemas.Id,
    name: Annotated[str, Path(max_length=30, pattern=schemas.PLAIN_TEXT)],
    format: drawing.Format,
    service: ServiceDep,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """A chart of a report: SVG, PNG, or its Vega-Lite specification as json, which browsers draw themselves.

    It is drawn once and never changes.
    """
    kind, sha256 = await run_in_threadpool(_kind, service, id)
    if name not in (names := drawing.names(kind)):
        raise NotFound(f"The report has no chart {name!r}; it has {', '.join(names)}.", charts=names)
    chart = drawing.Chart(sha256, name, format)
    headers = _unchanging(chart.key) | _INERT
    if _is_held(headers, if_none_match):
        return Response(status_code=304, headers=headers)
    content = await service.drawings.get(chart, lambda: _content(service, id)[0])
    return Response(content, media_type=_MEDIA_TYPES[format], headers=headers)


@router.delete("/reports/{id}", status_code=204, responses=problems(404, 409))
def delete_report(id: schemas.Id, service: ServiceDep) -> None:
    """Delete a report; its analysis stays, without one."""
    deletion.delete_report(service.engine, id)


def _unchanging(tag: str) -> dict[str, str]:
    """Return the headers of an immutable answer: clients that hold it need not ask again."""
    return {"ETag": f'"{tag}"', "Cache-Control": "private, max-age=31536000, immutable"}


def _is_held(headers: dict[str, str], if_none_match: str | None) -> bool:
    held = {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}
    return headers["ETag"] in held or "*" in held


def _kind(service: Service, id_: str) -> tuple[schemas.Kind, str]:
    """Return a report's kind and its sha256."""
    return _of_report(service, id_, _KIND)


def _content(service: Service, id_: str) -> tuple[str, str]:
    """Return a report's JSON text and its sha256."""
    return _of_report(service, id_, _CONTENT)


def _of_report(service: Service, id_: str, statement: sa.Select[T, str]) -> tuple[T, str]:
    # On the connection itself: a session takes longer than reading the row.
    with service.engine.connect() as connection:
        found = connection.execute(statement, {"id": id_}).one_or_none()
    if found is None:
        raise NotFound(f"There is no report {id_!r}.")
    first, second = found
    return first, second
