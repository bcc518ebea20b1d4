"""Pages of checkpoints, probes and feature sets: tables with their metadata as columns, and a page each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy.orm import Session

from app import models, resources, schemas
from app.api.routes import ServiceDep
from app.database import read
from app.listing import Listing
from app.pages import courses, listed, samples
from app.pages.rendering import page, see_other
from app.pages.visitors import AuthorDep, VisitorDep
from app.reports import Ranking, Subject, page_of_reports
from app.sorting import Sorting, list_page

router = APIRouter()
# Metadata that so many columns show; further keys stand on the page of each resource.
_MOST_KEYS = 12
_NEWEST = 50


@dataclass(frozen=True)
class _Collection:
    """A collection as pages show it.

    Attributes:
        path: its address, and that of its calls.
        noun: one of it, in words.
        model: its rows.
        columns: attributes that its table has beside name and metadata, and their titles.
    """

    path: str
    noun: str
    model: Any
    columns: Mapping[str, str]


_COLLECTIONS: Mapping[str, _Collection] = {
    "checkpoints": _Collection(
        "checkpoints",
        "checkpoint",
        models.Checkpoint,
        {"architecture": "Architecture", "n_parameters": "Parameters", "size_bytes": "Size"},
    ),
    "probes": _Collection(
        "probes",
        "probe",
        models.Probe,
        {"content": "Content", "n_samples": "Samples", "n_classes": "Classes", "size_bytes": "Size"},
    ),
    "feature-sets": _Collection(
        "feature-sets",
        "feature set",
        models.FeatureSet,
        {"n_samples": "Samples", "n_classes": "Classes", "n_features": "Features", "size_bytes": "Size"},
    ),
}


def _list(
    request: Request,
    visitor: VisitorDep,
    service: ServiceDep,
    listing: Annotated[Listing, Depends()],
    sorting: Annotated[Sorting, Depends()],
) -> Response:
    collection = _of(request)
    with read(service.engine) as session:
        found, cursor = list_page(session, collection.model, listing, sorting)
    return page(
        request,
        visitor,
        "resources.html",
        collection=collection,
        rows=found,
        keys=_keys([row.metadata_ for row in found]),
        next_cursor=cursor,
        listing=listing,
        sorting=sorting,
    )


def _show(request: Request, id: schemas.Id, visitor: VisitorDep, service: ServiceDep) -> Response:
    collection = _of(request)
    with read(service.engine) as session:
        row = resources.get(session, collection.model, id)
        base = row.base if isinstance(row, models.Checkpoint) else None
        adapters = _adapters(session, id)
        used = _subject(collection, id)
        found = page_of_reports(session, Listing(limit=_NEWEST), used, Ranking(show=list(listed.SHOWN)))
        reports = listed.rows(session, found.items)
        charts = courses.courses(session, collection.path, row)
    return page(
        request,
        visitor,
        "resource.html",
        collection=collection,
        row=row,
        base=base,
        adapters=adapters,
        charts=charts,
        run=courses.run_and_axis(row) if isinstance(row, models.Checkpoint) else None,
        has_samples=isinstance(row, models.Probe) and samples.shows_samples(row),
        facts=_facts(row),
        reports=reports,
        more=found.next_cursor is not None,
        used=used,
    )


def _adapters(session: Session, id_: str) -> Sequence[sa.Row[str, str]]:
    """Return id and name of the newest adapters of a checkpoint."""
    columns = models.Checkpoint.id, models.Checkpoint.name
    newest = models.Checkpoint.created_at.desc(), models.Checkpoint.id.desc()
    query = sa.select(*columns).where(models.Checkpoint.base_id == id_).order_by(*newest).limit(_NEWEST)
    return session.execute(query).all()


def _delete(request: Request, id: schemas.Id, _: AuthorDep, service: ServiceDep) -> Response:
    collection = _of(request)
    resources.delete(service.engine, service.storage, collection.model, id)
    return see_other(request, f"/{collection.path}")


for _name in _COLLECTIONS:
    router.get(f"/{_name}")(_list)
    router.get(f"/{_name}/{{id}}")(_show)
    router.post(f"/{_name}/{{id}}/delete")(_delete)


def _of(request: Request) -> _Collection:
    return _COLLECTIONS[request.url.path.removeprefix(request.scope.get("root_path", "")).split("/")[1]]


def _subject(collection: _Collection, id_: str) -> Subject:
    ids: dict[str, str | None] = dict.fromkeys(("checkpoint_id", "probe_id", "feature_set_id"))
    ids[f"{collection.noun.replace(' ', '_')}_id"] = id_
    return Subject(kind=None, **ids)


def _keys(metadata: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys of metadata that the rows of a page have, the most frequent first."""
    counts: dict[str, int] = {}
    for entry in metadata:
        for key in entry:
            counts[key] = counts.get(key, 0) + 1
    return sorted(counts, key=lambda key: (-counts[key], key))[:_MOST_KEYS]


def _facts(row: Any) -> list[tuple[str, Any, str]]:
    """Return what a page says of a resource: title, value, and how it is shown."""
    facts = [
        ("Id", row.id, "code"),
        ("Parameters", getattr(row, "n_parameters", None), "number"),
        ("Adapter", _adapter(getattr(row, "adapter", None)), "text"),
        ("Head", getattr(row, "head", None), "code"),
        ("Prefix of names", getattr(row, "prefix", None) or None, "code"),
        ("Content", getattr(row, "content", None), "text"),
        ("Format", getattr(row, "format", None), "text"),
        ("Samples", getattr(row, "n_samples", None), "number"),
        ("Classes", getattr(row, "n_classes", None), "number"),
        ("Features", getattr(row, "n_features", None), "number"),
        ("Input shape", _shape(getattr(row, "input_shape", None)), "text"),
        ("Splits", _pairs(getattr(row, "splits", None)), "text"),
        ("Preprocessing", getattr(row, "preprocess", None), "json"),
        ("Tokens at most", getattr(row, "max_length", None), "number"),
        ("Size", row.size_bytes, "size"),
        ("sha256", row.sha256, "code"),
        ("Hash of the data", getattr(row, "data_sha256", None), "code"),
        ("Pushed", row.created_at, "moment"),
    ]
    return [fact for fact in facts if fact[1] is not None]


def _adapter(adapter: Mapping[str, Any] | None) -> str | None:
    return None if adapter is None else f"{adapter['kind']}, rank {adapter['rank']}, alpha {adapter['lora_alpha']:g}"


def _shape(shape: Sequence[int] | None) -> str | None:
    return None if shape is None else " × ".join(map(str, shape))


def _pairs(values: Mapping[str, Any] | None) -> str | None:
    return None if not values else ", ".join(f"{name} {value:,}" for name, value in values.items())
