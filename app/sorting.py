"""Lists of checkpoints, probes and feature sets: newest first, or sorted by a column or a key of their metadata."""

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import Query
from sqlalchemy.orm import Session

from app import models, schemas
from app.errors import InvalidRequest
from app.listing import Listing, Order, page
from app.resources import OwnerType, noun_of

_SORTABLE = ("name", "created_at", "size_bytes", "n_parameters", "n_samples", "n_classes", "n_features", "content")
# Text that PostgreSQL compares as SQLite does.
_BYTEWISE = sa.String().with_variant(sa.String(collation="C"), "postgresql")


@dataclass(frozen=True)
class Sorting:
    """Parameters of lists of checkpoints, probes and feature sets that concern their order."""

    sort: Annotated[
        str | None,
        Query(
            max_length=200,
            pattern=schemas.PLAIN_TEXT,
            description="What to sort by, such as name, size_bytes or metadata.epoch; resources without it come last. "
            "Default: newest first.",
        ),
    ] = None
    order: Annotated[Literal["asc", "desc"], Query(description="Of `sort`: the largest first is desc.")] = "desc"


def list_page(
    session: Session, model: type[OwnerType], listing: Listing, sorting: Sorting
) -> tuple[list[OwnerType], str | None]:
    """Return the rows of one page, and the cursor of the next.

    Raises:
        InvalidRequest: there is nothing of that name to sort by, or a cursor of another order.
    """
    query = sa.select(model)
    order = None
    if sorting.sort is not None and sorting.sort.startswith("metadata."):
        keys = _keys_of_metadata(sorting.sort.removeprefix("metadata."))
        query = query.outerjoin(keys, keys.c.resource_id == model.id)
        # After all keys of one order, and before all of the other.
        order = Order(sa.func.coalesce(keys.c.key, "~" if sorting.order == "asc" else ""), sorting.order == "desc", str)
    elif sorting.sort is not None:
        order = _order(model, sorting.sort, sorting.order == "desc")
    rows, cursor = page(session, query, model, listing, model.id.in_, order)
    return [row[0] for row in rows], cursor


def _keys_of_metadata(key: str) -> sa.Subquery:
    """Return SQL with the value of each resource's metadata at a key, of several the first, in a form that sorts."""
    entries = models.MetadataEntry
    first = sa.func.min(entries.sort_key).label("key")
    return sa.select(entries.resource_id, first).where(entries.key == key).group_by(entries.resource_id).subquery()


def _order(model: type[OwnerType], name: str, descending: bool) -> Order:
    columns: dict[str, sa.ColumnElement[Any]] = {
        column.name: column for column in model.__table__.c if column.name in _SORTABLE
    }
    if model is models.Checkpoint:
        columns["architecture"] = _architecture_name()
    if name not in columns:
        known = ", ".join([*sorted(columns), "metadata.KEY"])
        raise InvalidRequest(f"Lists of {noun_of(model)}s are not sorted by {name!r}; they are by {known}.")
    column = columns[name]
    if name == "created_at":
        return Order(column, descending, datetime)
    if isinstance(column.type, sa.String):
        return Order(sa.cast(sa.func.lower(column), _BYTEWISE), descending, str)
    return Order(sa.cast(column, sa.Double), descending)


def _architecture_name() -> sa.ColumnElement[str]:
    """Return SQL for what tables show of an architecture: its name, or the class of a configuration."""
    told = models.Checkpoint.architecture
    whole = [told[path].as_string() for path in (("name",), ("config", "architectures", 0), ("family",))]
    return sa.func.coalesce(*whole, "", type_=sa.String)
