"""Pages of analyses: the list, and one analysis with its progress, its problem, and what can be done about it."""

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy.orm import Session

from app import analyses, deletion, schemas
from app.api.routes import ServiceDep, SubjectDep
from app.database import read
from app.listing import Listing
from app.models import Checkpoint, FeatureSet, Probe
from app.pages.rendering import further_members, page, see_other
from app.pages.visitors import AuthorDep, VisitorDep
from app.schemas.kinds import KINDS

router = APIRouter()


@router.get("/analyses")
def list_analyses(
    request: Request,
    visitor: VisitorDep,
    service: ServiceDep,
    listing: Annotated[Listing, Depends()],
    subject: SubjectDep,
    status: schemas.Status | None = None,
) -> Response:
    """Analyses, the newest first, with their states."""
    found = analyses.list_page(
        service.engine, listing, status=status, checkpoint_id=subject.checkpoint_id, **subject.columns()
    )
    return page(
        request,
        visitor,
        "analyses.html",
        analyses=found.items,
        next_cursor=found.next_cursor,
        listing=listing,
        subject=subject,
        chosen=status,
        kinds=list(KINDS),
    )


@router.get("/analyses/{id}")
def show_analysis(request: Request, id: schemas.Id, visitor: VisitorDep, service: ServiceDep) -> Response:
    """One analysis: what was asked, how far it is, its report or its problem."""
    analysis = analyses.get(service.engine, id)
    with read(service.engine) as session:
        subjects = _subjects(session, analysis)
    return page(
        request,
        visitor,
        "analysis.html",
        analysis=analysis,
        subjects=subjects,
        further=further_members(analysis.problem),
    )


@router.post("/analyses/{id}/cancel")
def cancel_analysis(request: Request, id: schemas.Id, _: AuthorDep, service: ServiceDep) -> Response:
    """Cancel an analysis and show it."""
    analyses.cancel(service.engine, id)
    return see_other(request, f"/analyses/{id}")


@router.post("/analyses/{id}/delete")
def delete_analysis(request: Request, id: schemas.Id, _: AuthorDep, service: ServiceDep) -> Response:
    """Delete an analysis that has ended, and show the others."""
    deletion.delete_analysis(service.engine, service.queue, id)
    return see_other(request, "/analyses")


def _subjects(session: Session, analysis: schemas.Analysis) -> list[tuple[str, str, str, str | None]]:
    """Return what an analysis looks at: noun, collection, id, and the name, None once it has been deleted."""
    asked: list[tuple[str, str, Any, str]] = [
        ("Checkpoint", "checkpoints", Checkpoint, id_) for id_ in analysis.checkpoint_ids
    ]
    if analysis.probe_id is not None:
        asked.append(("Probe", "probes", Probe, analysis.probe_id))
    if analysis.feature_set_id is not None:
        asked.append(("Feature set", "feature-sets", FeatureSet, analysis.feature_set_id))
    return [
        (noun, collection, id_, session.scalar(sa.select(model.name).where(model.id == id_)))
        for noun, collection, model, id_ in asked
    ]
