"""Collections: one page at a time, newest first by the key (created_at, id) of the last row seen.

A row added while a client pages is newer than every page to come, so no row is seen twice or missed. Reports can also
be sorted by a metric, by the key (value, id): a row added meanwhile is seen if its place is on a page to come.
"""

import base64
import binascii
import math
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


@dataclass(frozen=True)
class ByNumber:
    """An order of rows by a number of theirs, and by id where it is equal.

    Attributes:
        column: the number, never null.
        descending: whether the largest comes first.
    """

    column: sa.SQLColumnExpression[float]
    descending: bool


def page(
    session: Session,
    query: sa.Select[*tuple[Any, ...]],
    model: type[Resource],
    listing: Listing,
    about: Callable[[sa.Select[str]], sa.ColumnElement[bool]],
    order: ByNumber | None = None,
) -> tuple[Sequence[Any], str | None]:
    """Return the rows of one page of `query`, and the cursor of the next.

    Args:
        session: of the database.
        query: selects the model first.
        model: the resource that is listed.
        listing: page and filters.
        about: gives SQL that is true where a row is about one of the given resources: those whose metadata match
            `listing.metadata`.
        order: default: newest first. Each row then ends with the number that it is sorted by.
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
    first: sa.SQLColumnExpression[Any] = model.__table__.c.created_at if order is None else order.column
    falls = order is None or order.descending
    if listing.cursor is not None:
        place, id_ = _decode(listing.cursor, order)
        last = sa.tuple_(sa.literal(place, UTCDateTime if order is None else sa.Double), sa.literal(id_))
        seen = sa.tuple_(first, model.id)
        query = query.where(seen < last if falls else seen > last)
    keys = [column.desc() if falls else column.asc() for column in (first, model.__table__.c.id)]
    if order is not None:
        query = query.add_columns(first)
    rows = session.execute(query.order_by(*keys).limit(listing.limit + 1)).all()
    if len(rows) <= listing.limit:
        return rows, None
    rows = rows[: listing.limit]
    row = rows[-1][0]
    return rows, _encode(row.created_at if order is None else rows[-1][-1], row.id)


def _encode(place: datetime | float, id_: str) -> str:
    text = place.isoformat() if isinstance(place, datetime) else float(place).hex()
    return base64.urlsafe_b64encode(f"{text} {id_}".encode()).decode()


def _decode(cursor: str, order: ByNumber | None) -> tuple[datetime | float, str]:
    try:
        text, id_ = base64.urlsafe_b64decode(cursor.encode()).decode().split(" ")
        if not id_.isascii() or not id_.isprintable():
            raise ValueError
        if order is not None:
            if not math.isfinite(number := float.fromhex(text)):
                raise ValueError
            return number, id_
        instant = datetime.fromisoformat(text)
        if instant.tzinfo is None:
            raise ValueError
    except (ValueError, OverflowError, binascii.Error):
        raise InvalidRequest("The cursor is not one that this service gave out for this order.") from None
    return _instant(instant), id_


def _instant(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise InvalidRequest("An instant lies outside of the years 1 to 9999.") from None
