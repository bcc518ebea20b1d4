"""Fetches over HTTP: files that workers bring from where they lie. Checkpoints and probes begin them."""

from typing import Annotated

from fastapi import APIRouter, Depends

from app import fetches, schemas
from app.api.routes import ServiceDep, problems
from app.listing import Listing, listing_with

router = APIRouter(tags=["fetches"])
FetchListing = Annotated[Listing, Depends(listing_with("status"))]


@router.get("/fetches", responses=problems(422))
def list_fetches(
    service: ServiceDep, listing: FetchListing, status: schemas.Status | None = None
) -> schemas.Page[schemas.Fetch]:
    """Fetches, newest first; `metadata` filters by what they have made."""
    return fetches.list_page(service.engine, listing, status=status)


@router.get("/fetches/{id}", responses=problems(404))
def get_fetch(id: schemas.Id, service: ServiceDep) -> schemas.Fetch:
    return fetches.get(service.engine, id)


@router.post("/fetches/{id}/cancel", responses=problems(404, 409))
def cancel_fetch(id: schemas.Id, service: ServiceDep) -> schemas.Fetch:
    """Cancel a fetch: at once if it is queued, within seconds if it runs, unless its file goes to the storage now."""
    return fetches.cancel(service.engine, id)
