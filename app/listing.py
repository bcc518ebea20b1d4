"""Collections: newest first, one page at a time, by the key (created_at, id) of the last row seen.

A row added while a client pages is newer than every page to come, so no row is seen twice or missed.
"""

import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import Depends, Query, Request
from pydantic import AwareDatetime, BeforeValidator, Field
from sqlalchemy.orm import Session

from app.errors import InvalidRequest
from app.models import MetadataEntry, Resource, UTCDateTime
from app.schemas import PLAIN_TEXT


def _as_document_says(text: Any) -> Any:
    """Check that text is a date and a time with its zone (RFC 3339); pydantic also takes seconds since 1970."""
    if isinstance(text, str) and not _RFC3339.fullmatch(text):
        raise ValueError("must be a date and a time with its zone, such as 2026-01-31T12:00:00Z")
    return text


_RFC3339 = re.compile(r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(\.\d+)?([Zz]|[+-]\d{2}:\d{2})", re.ASCII)
Instant = Annotated[AwareDatetime, BeforeValidator(_as_document_says)]


@dataclass(frozen=True)
class Listing:
    """Parameters of every collection: the page, and the filters that all collections share."""

    limit: Annotated[int, Query(ge=1, le=200, description="Items in a page.")] = 50
    cursor: Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before.")] = None
    name: Annotated[str | None, Query(max_length=200, pattern=PLAIN_TEXT, description="Exactly this name.")] = None
    metadata: Annotated[
        list[Annotated[str, Field(pattern=r"^[^\x00]*$")]] | None,
        Query(description="`key=value`; repeat it to ask for several at once.", max_length=20),
    ] = None
    created_after: Annotated[Instant | None, Query(description="Not before this instant.")] = None
    created_before: Annotated[Instant | None, Query(description="Before this instant.")] = None


def listing_with(*filters: str) -> Callable[..., Awaitable[Listing]]:
    """Return a dependency: the listing of a collection that has these filters of its own, and no others.

    A mistyped filter must not return everything.
    """
    known = {field.name for field in fields(Listing)} | set(filters)

    async def parse(request: Request, listing: Annotated[Listing, Depends()]) -> Listing:
        if unknown := sorted(set(request.query_params) - known):
            raise InvalidRequest(f"{', '.join(map(repr, unknown))} is no filter here; {', '.join(sorted(known))} are.")
        return listing

    return parse


def page(
    session: Session,
    query: sa.Select[*tuple[Any, ...]],
    model: type[Resource],
    listing: Listing,
    about: Callable[[sa.Select[str]], sa.ColumnElement[bool]],
) -> tuple[Sequence[Any], str | None]:
    """Return the rows of one page of `query`, and the cursor of the next.

    `about` gives SQL that is true where a row is about one of the given resources: those whose metadata match
    `listing.metadata`.
    """
    for entry in listing.metadata or []:
        key, separator, value = entry.partition("=")
        if not key or not separator:
            raise InvalidRequest(f"The filter metadata={entry!r} is not of the form key=value.")
        matching = sa.select(MetadataEntry.resource_id).where(MetadataEntry.key == key, MetadataEntry.value == value)
        query = query.where(about(matching))
    if listing.name is not None:
        query = query.where(model.__table__.c.name == listing.name)
    if listing.created_after is not None:
        query = query.where(model.created_at >= _instant(listing.created_after))
    if listing.created_before is not None:
        query = query.where(model.created_at < _instant(listing.created_before))
    if listing.cursor is not None:
        created_at, id_ = _decode(listing.cursor)
        last = sa.tuple_(sa.literal(created_at, UTCDateTime), sa.literal(id_))
        query = query.where(sa.tuple_(model.created_at, model.id) < last)
    query = query.order_by(model.created_at.desc(), model.id.desc()).limit(listing.limit + 1)
    rows = session.execute(query).all()
    if len(rows) <= listing.limit:
        return rows, None
    rows = rows[: listing.limit]
    return rows, _encode(rows[-1][0])


def _encode(row: Resource) -> str:
    return base64.urlsafe_b64encode(f"{row.created_at.isoformat()} {row.id}".encode()).decode()


def _decode(cursor: str) -> tuple[datetime, str]:
    try:
        created_at, id_ = base64.urlsafe_b64decode(cursor.encode()).decode().split(" ")
        instant = datetime.fromisoformat(created_at)
        if instant.tzinfo is None or not id_.isascii() or not id_.isprintable():
            raise ValueError
    except (ValueError, binascii.Error):
        raise InvalidRequest("The cursor is not one that this service gave out.") from None
    return _instant(instant), id_


def _instant(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise InvalidRequest("An instant lies outside of the years 1 to 9999.") from None
