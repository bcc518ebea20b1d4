"""Pages of fetches: the list, and one fetch with its progress, what it has made or its problem."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from app import fetches, schemas
from app.api.routes import ServiceDep
from app.listing import Listing
from app.pages.rendering import further_members, page, see_other
from app.pages.visitors import AuthorDep, VisitorDep

router = APIRouter()


@router.get("/fetches")
def list_fetches(
    request: Request,
    visitor: VisitorDep,
    service: ServiceDep,
    listing: Annotated[Listing, Depends()],
    status: schemas.Status | None = None,
) -> Response:
    """Fetches, the newest first, with their states."""
    found = fetches.list_page(service.engine, listing, status=status)
    return page(
        request,
        visitor,
        "fetches.html",
        fetches=found.items,
        next_cursor=found.next_cursor,
        listing=listing,
        chosen=status,
    )


@router.get("/fetches/{id}")
def show_fetch(request: Request, id: schemas.Id, visitor: VisitorDep, service: ServiceDep) -> Response:
    """One fetch: what was asked, how far it is, its resource or its problem."""
    fetch = fetches.get(service.engine, id)
    return page(request, visitor, "fetch.html", fetch=fetch, further=further_members(fetch.problem))


@router.post("/fetches/{id}/cancel")
def cancel_fetch(request: Request, id: schemas.Id, _: AuthorDep, service: ServiceDep) -> Response:
    """Cancel a fetch and show it."""
    fetches.cancel(service.engine, id)
    return see_other(request, f"/fetches/{id}")
