"""Analyses over HTTP."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response

from app import analyses, deletion, schemas
from app.api.openapi import reference
from app.api.routes import ServiceDep, SubjectDep, problems
from app.listing import Listing, listing_with

router = APIRouter(tags=["analyses"])
AnalysisListing = Annotated[
    Listing, Depends(listing_with("status", "kind", "checkpoint_id", "probe_id", "feature_set_id"))
]
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255, pattern=schemas.PLAIN_TEXT)]
LastEventId = Annotated[str | None, Header(max_length=100, pattern=schemas.PLAIN_TEXT)]
# The OpenAPI schema of one event in a stream.
_ANALYSIS = {"type": "string", "contentMediaType": "application/json", "contentSchema": reference(schemas.Analysis)}
_EVENT = {
    "type": "object",
    "required": ["event", "id", "data"],
    "properties": {
        "event": {"type": "string", "enum": ["status", "progress", "final"]},
        "id": {"type": "string"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": reference(schemas.Analysis),
        },
    },
}


@router.post("/analyses", status_code=202, responses=problems(404, 409, 413, 422, 503))
def create_analysis(
    body: schemas.AnalysisRequest,
    request: Request,
    response: Response,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,
) -> schemas.Analysis:
    """Queue an analysis. The same `Idempotency-Key` and body return the same analysis again."""
    analysis = analyses.create(
        service.engine, service.queue, body, idempotency_key, shard_work=service.settings.shard_work
    )
    response.headers["Location"] = f"{request.url.path}/{analysis.id}"
    return analysis


@router.get("/analyses", responses=problems(422))
def list_analyses(
    service: ServiceDep,
    listing: AnalysisListing,
    subject: SubjectDep,
    status: schemas.Status | None = None,
) -> schemas.Page[schemas.Analysis]:
    return analyses.list_page(
        service.engine, listing, status=status, checkpoint_id=subject.checkpoint_id, **subject.columns()
    )


@router.get("/analyses/{id}", responses=problems(404))
def get_analysis(id: schemas.Id, service: ServiceDep) -> schemas.Analysis:
    return analyses.get(service.engine, id)


@router.get(
    "/analyses/{id}/events",
    status_code=200,
    response_class=Response,
    responses={
        200: {"content": {"text/event-stream": {"itemSchema": _EVENT}}, "description": "Server-sent events"},
        **problems(404, 503),
    },
)
async def listen_to_analysis(id: schemas.Id, service: ServiceDep, last_event_id: LastEventId = None) -> Response:
    """An analysis as a stream of events `status`, `progress` and, last, `final`; `data` is the analysis each time.

    A reconnecting client gets the current state, unless `Last-Event-ID` names it. Comments come every few seconds.
    """
    return await service.events.listen(id, last_event_id)


@router.post("/analyses/{id}/cancel", responses=problems(404, 409))
def cancel_analysis(id: schemas.Id, service: ServiceDep) -> schemas.Analysis:
    """Cancel an analysis: at once if it is queued, at its worker's next poll if it runs."""
    return analyses.cancel(service.engine, id)


@router.delete("/analyses/{id}", status_code=204, responses=problems(404, 409))
def delete_analysis(id: schemas.Id, service: ServiceDep) -> None:
    """Delete an analysis that has ended, with its report."""
    deletion.delete_analysis(service.engine, service.queue, id)
