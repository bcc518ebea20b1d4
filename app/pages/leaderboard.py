"""The leaderboard: reports of one probe, sorted by any metric."""

from typing import Annotated

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Request, Response

from app.api.routes import ServiceDep, SubjectDep
from app.database import read
from app.gates.paths import number_paths
from app.listing import Listing
from app.models import Probe
from app.pages import listed, words
from app.pages.rendering import page
from app.pages.visitors import VisitorDep
from app.reports import Ranking, page_of_reports
from app.schemas.metrics import is_metric

router = APIRouter()
_DEFAULT = "splits.test.accuracy"
# Shown beside the metric that sorts.
_BESIDE = ("accuracy", "loss", "interplay.sample.global.mir", "interplay.sample.global.hdr", "collapse.nc1")
_PROBES = 200


@router.get("/leaderboard")
def show(
    request: Request,
    visitor: VisitorDep,
    service: ServiceDep,
    listing: Annotated[Listing, Depends()],
    subject: SubjectDep,
    ranking: Annotated[Ranking, Depends()],
) -> Response:
    """Reports by a metric, the largest or the smallest first."""
    sort = ranking.sort or _DEFAULT
    split = sort.split(".")[1] if sort.startswith("splits.") else "test"
    columns = [sort, *(path for name in _BESIDE if (path := f"splits.{split}.{name}") != sort)]
    asked = Ranking(sort=sort, order=ranking.order, metric=ranking.metric, show=columns)
    with read(service.engine) as session:
        found = page_of_reports(session, listing, subject, asked)
        probes = session.execute(sa.select(Probe.id, Probe.name).order_by(Probe.created_at.desc()).limit(_PROBES)).all()
        metadata = listed.metadata_of_subjects(
            session, {report.id: report.checkpoint_id or report.feature_set_id for report in found.items}
        )
    return page(
        request,
        visitor,
        "leaderboard.html",
        reports=found.items,
        next_cursor=found.next_cursor,
        columns=columns,
        labels={path: words.metric_of(path) for path in columns},
        metadata=metadata,
        keys=sorted({key for values in metadata.values() for key in values}),
        probes=probes,
        paths=[path for path in number_paths("evaluation") if is_metric("evaluation", path)],
        sort=sort,
        ranking=ranking,
        listing=listing,
        subject=subject,
    )
