"""Collections: one page at a time, newest first by the key (created_at, id) of the last row seen.

A row added while a client pages is newer than every page to come, so no row is seen twice or missed. Some collections
can be sorted otherwise, by the key (value, id): a row added meanwhile is seen if its place is on a page to come.
"""

import base64
import binascii
import json
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
    cursor: Annotated[str | None, Query(max_length=3000, description="`next_cursor` of the page before.")] = None
    id: Annotated[
        str | None, Query(pattern=r"^[0-9a-f-]{4,36}$", description="The id, or its first four characters or more.")
    ] = None
    name: Annotated[str | None, Query(max_length=200, pattern=PLAIN_TEXT, description="Exactly this name.")] = None
    search: Annotated[
        str | None, Query(max_length=200, pattern=PLAIN_TEXT, description="A part of the name, in any case of letters.")
    ] = None
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
class Order:
    """An order of rows by a value of theirs, and by id where it is equal.

    Attributes:
        column: the value, never null.
        descending: whether the largest comes first.
        type_: `float` for numbers, `str` for text that the database compares byte by byte, or `datetime`.
    """

    column: sa.SQLColumnExpression[Any]
    descending: bool
    type_: type[float] | type[str] | type[datetime] = float


def page(
    session: Session,
    query: sa.Select[*tuple[Any, ...]],
    model: type[Resource],
    listing: Listing,
    about: Callable[[sa.Select[str]], sa.ColumnElement[bool]],
    order: Order | None = None,
) -> tuple[Sequence[Any], str | None]:
    """Return the rows of one page of `query`, and the cursor of the next.

    Args:
        session: of the database.
        query: selects the model first.
        model: the resource that is listed.
        listing: page and filters.
        about: gives SQL that is true where a row is about one of the given resources: those whose metadata match
            `listing.metadata`.
        order: default: newest first. Each row then ends with the value that it is sorted by.
    """
    for entry in listing.metadata or []:
        key, separator, value = entry.partition("=")
        if not key or not separator:
            raise InvalidRequest(f"The filter metadata={entry!r} is not of the form key=value.")
        matching = sa.select(MetadataEntry.resource_id).where(MetadataEntry.key == key, MetadataEntry.value == value)
        query = query.where(about(matching))
    columns = model.__table__.c
    if listing.id is not None:
        query = query.where(columns.id.startswith(listing.id))
    if listing.name is not None:
        query = query.where(columns.name == listing.name)
    if listing.search is not None:
        query = query.where(columns.name.icontains(listing.search, autoescape=True))
    if listing.created_after is not None:
        query = query.where(model.created_at >= _instant(listing.created_after))
    if listing.created_before is not None:
        query = query.where(model.created_at < _instant(listing.created_before))
    newest = order is None
    order = order or Order(columns.created_at, descending=True, type_=datetime)
    if listing.cursor is not None:
        place, id_ = _decode(listing.cursor, order)
        last = sa.tuple_(sa.literal(place, _TYPES[order.type_]), sa.literal(id_))
        seen = sa.tuple_(order.column, model.id)
        query = query.where(seen < last if order.descending else seen > last)
    keys = [column.desc() if order.descending else column.asc() for column in (order.column, columns.id)]
    if not newest:
        query = query.add_columns(order.column.label("place"))
    rows = session.execute(query.order_by(*keys).limit(listing.limit + 1)).all()
    if len(rows) <= listing.limit:
        return rows, None
    rows = rows[: listing.limit]
    row = rows[-1][0]
    return rows, _encode(row.created_at if newest else rows[-1][-1], row.id)


def _encode(place: datetime | float | str, id_: str) -> str:
    match place:
        case datetime():
            text = place.isoformat()
        case str():
            text = place
        case _:
            text = float(place).hex()
    return base64.urlsafe_b64encode(json.dumps([text, id_], ensure_ascii=False).encode()).decode()


def _decode(cursor: str, order: Order) -> tuple[datetime | float | str, str]:
    try:
        text, id_ = json.loads(base64.urlsafe_b64decode(cursor.encode()).decode())
        if not (isinstance(text, str) and isinstance(id_, str)) or not id_.isascii() or not id_.isprintable():
            raise ValueError
        if order.type_ is str:
            # A surrogate alone, or a zero, which a JSON escape may hold, is text that no database takes.
            text.encode()
            if "\0" in text:
                raise ValueError
            return text, id_
        if order.type_ is float:
            if not math.isfinite(number := float.fromhex(text)):
                raise ValueError
            return number, id_
        instant = datetime.fromisoformat(text)
        if instant.tzinfo is None:
            raise ValueError
    except (ValueError, TypeError, OverflowError, RecursionError, binascii.Error):
        raise InvalidRequest("The cursor is not one that this service gave out for this order.") from None
    return _instant(instant), id_


_TYPES: dict[type, Any] = {float: sa.Double, str: sa.Text, datetime: UTCDateTime}


def _instant(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise InvalidRequest("An instant lies outside of the years 1 to 9999.") from None
