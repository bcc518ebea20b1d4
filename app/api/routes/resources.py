"""Checkpoints, probes and feature sets over HTTP."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from starlette.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from app import fetches, models, resources, schemas
from app.api.openapi import reference
from app.api.routes import Service, ServiceDep, problems
from app.api.uploads import receive
from app.database import read
from app.errors import InvalidRequest, NotFound, RangeOutside
from app.listing import Listing, listing_with
from app.resources import OwnerType, noun_of
from app.sorting import Sorting, list_page
from app.storage import BlobDamaged, Upload

router = APIRouter(tags=["resources"])
Resource = TypeVar("Resource", schemas.Checkpoint, schemas.Probe, schemas.FeatureSet)
ListingDep = Annotated[Listing, Depends(listing_with("sort", "order"))]
SortingDep = Annotated[Sorting, Depends()]
_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": _BYTES, "description": "The file, with its sha256 as ETag"},
    206: {"content": _BYTES, "description": "The part that Range asks for"},
    **problems(404, 416, 503),
}
_FETCHING: dict[int | str, dict[str, Any]] = {
    202: {"model": schemas.Fetch, "description": "The fetch of `spec.source`; `resource_id` is there at its end."}
}
_SUFFIXES = {"npz": "npz", "parquet": "parquet", "imagefolder": "zip", "csv": "csv", "jsonl": "jsonl"}


def _upload_body(spec: type[BaseModel], file: str) -> dict[str, Any]:
    properties = {
        "spec": reference(spec),
        "file": {"type": "string", "contentMediaType": "application/octet-stream", "description": file},
    }
    form = {"schema": {"type": "object", "required": ["spec"], "properties": properties}}
    content = {"multipart/form-data": form, "application/json": {"schema": reference(spec)}}
    return {"requestBody": {"required": True, "content": content}}


@router.post(
    "/checkpoints",
    status_code=201,
    response_model=None,
    openapi_extra=_upload_body(
        schemas.CheckpointSpec, "safetensors; left out where the spec names a blob, an upload or a source"
    ),
    responses={
        201: {"model": schemas.Checkpoint},
        **_FETCHING,
        **problems(400, 403, 404, 409, 413, 415, 422, 423, 503),
    },
)
async def create_checkpoint(request: Request, response: Response, service: ServiceDep) -> Any:
    """Upload a checkpoint, or have it fetched from `spec.source`. Without a file the spec may be the whole body."""

    def keep(upload: Upload) -> models.Checkpoint:
        return resources.create_checkpoint(service.engine, service.storage, service.settings, upload)

    return await _create(request, response, service, schemas.Checkpoint, keep, "checkpoint")


@router.post(
    "/probes",
    status_code=201,
    response_model=None,
    openapi_extra=_upload_body(
        schemas.ProbeSpec,
        "safetensors or npz: inputs (N, ...), labels (N,), split (N,); or Parquet, a zip of class folders with images, "
        "CSV or JSON lines with texts and labels",
    ),
    responses={
        201: {"model": schemas.Probe},
        **_FETCHING,
        **problems(400, 403, 404, 409, 413, 415, 422, 423, 503),
    },
)
async def create_probe(request: Request, response: Response, service: ServiceDep) -> Any:
    """Upload a probe dataset, or have it fetched from `spec.source`."""

    def keep(upload: Upload) -> models.Probe:
        return resources.create_probe(service.engine, service.storage, service.settings, upload)

    return await _create(request, response, service, schemas.Probe, keep, "probe")


@router.post(
    "/feature-sets",
    status_code=201,
    response_model=schemas.FeatureSet,
    openapi_extra=_upload_body(
        schemas.FeatureSetSpec,
        "safetensors: features (N, d), labels (N,), head (C, d); optional head_bias (C,), logits (N, C), split (N,)",
    ),
    responses=problems(400, 404, 409, 413, 415, 422, 423, 503),
)
async def create_feature_set(request: Request, response: Response, service: ServiceDep) -> Any:
    """Upload features, labels and head of a network that the service cannot build."""

    def keep(upload: Upload) -> models.FeatureSet:
        return resources.create_feature_set(service.engine, service.storage, service.settings, upload)

    return await _create(request, response, service, schemas.FeatureSet, keep)


@router.get("/checkpoints", responses=problems(422))
def list_checkpoints(service: ServiceDep, listing: ListingDep, sorting: SortingDep) -> schemas.Page[schemas.Checkpoint]:
    return _list(service.engine, models.Checkpoint, schemas.Checkpoint, listing, sorting)


@router.get("/probes", responses=problems(422))
def list_probes(service: ServiceDep, listing: ListingDep, sorting: SortingDep) -> schemas.Page[schemas.Probe]:
    return _list(service.engine, models.Probe, schemas.Probe, listing, sorting)


@router.get("/feature-sets", responses=problems(422))
def list_feature_sets(
    service: ServiceDep, listing: ListingDep, sorting: SortingDep
) -> schemas.Page[schemas.FeatureSet]:
    return _list(service.engine, models.FeatureSet, schemas.FeatureSet, listing, sorting)


@router.get("/checkpoints/{id}", responses=problems(404))
def get_checkpoint(id: schemas.Id, service: ServiceDep) -> schemas.Checkpoint:
    with read(service.engine) as session:
        return _resource(schemas.Checkpoint, resources.get(session, models.Checkpoint, id))


@router.get("/probes/{id}", responses=problems(404))
def get_probe(id: schemas.Id, service: ServiceDep) -> schemas.Probe:
    with read(service.engine) as session:
        return _resource(schemas.Probe, resources.get(session, models.Probe, id))


@router.get("/feature-sets/{id}", responses=problems(404))
def get_feature_set(id: schemas.Id, service: ServiceDep) -> schemas.FeatureSet:
    with read(service.engine) as session:
        return _resource(schemas.FeatureSet, resources.get(session, models.FeatureSet, id))


@router.get("/checkpoints/{id}/file", response_class=Response, responses=_FILE)
def download_checkpoint(id: schemas.Id, service: ServiceDep) -> Response:
    """The stored file: the weights as safetensors."""
    return _file(service, models.Checkpoint, id)


@router.get("/probes/{id}/file", response_class=Response, responses=_FILE)
def download_probe(id: schemas.Id, service: ServiceDep) -> Response:
    """The stored file, as it was pushed."""
    return _file(service, models.Probe, id)


@router.get("/feature-sets/{id}/file", response_class=Response, responses=_FILE)
def download_feature_set(id: schemas.Id, service: ServiceDep) -> Response:
    """The stored file, as it was pushed."""
    return _file(service, models.FeatureSet, id)


@router.delete("/checkpoints/{id}", status_code=204, responses=problems(404, 409))
def delete_checkpoint(id: schemas.Id, service: ServiceDep) -> None:
    resources.delete(service.engine, service.storage, models.Checkpoint, id)


@router.delete("/probes/{id}", status_code=204, responses=problems(404, 409))
def delete_probe(id: schemas.Id, service: ServiceDep) -> None:
    resources.delete(service.engine, service.storage, models.Probe, id)


@router.delete("/feature-sets/{id}", status_code=204, responses=problems(404, 409))
def delete_feature_set(id: schemas.Id, service: ServiceDep) -> None:
    resources.delete(service.engine, service.storage, models.FeatureSet, id)


async def _create(
    request: Request,
    response: Response,
    service: ServiceDep,
    schema: type[Resource],
    keep: Callable[[Upload], resources.Owner],
    makes: schemas.Makes | None = None,
) -> Resource | schemas.Fetch:
    async with receive(request, service.storage, service.settings) as upload:
        if makes is not None:
            ask = partial(fetches.create_if_asked, service.engine, service.queue, service.settings, makes, upload)
            if (fetch := await run_in_threadpool(ask)) is not None:
                response.status_code = 202
                response.headers["Location"] = f"{request.url.path.rpartition('/')[0]}/fetches/{fetch.id}"
                return fetch
        row = await run_in_threadpool(keep, upload)
    response.headers["Location"] = f"{request.url.path}/{row.id}"
    return _resource(schema, row)


def _list(
    engine: sa.Engine, model: type[OwnerType], schema: type[Resource], listing: Listing, sorting: Sorting
) -> schemas.Page[Resource]:
    with read(engine) as session:
        rows, cursor = list_page(session, model, listing, sorting)
        return schemas.Page(items=[_resource(schema, row) for row in rows], next_cursor=cursor)


def _resource(schema: type[Resource], row: resources.Owner) -> Resource:
    values = {name: getattr(row, name) for name in schema.model_fields if name != "metadata"}
    return schema.model_validate({**values, "metadata": row.metadata_})


def _file(service: Service, model: type[OwnerType], id_: str) -> Response:
    with read(service.engine) as session:
        row = resources.get(session, model, id_)
    held = ExitStack()
    try:
        path = held.enter_context(service.storage.local_copy(row.sha256))
    except (FileNotFoundError, BlobDamaged):
        raise NotFound(f"The file of {noun_of(model)} {id_!r} is not in the storage, or damaged.") from None
    suffix = _SUFFIXES.get(getattr(row, "format", ""), "safetensors")
    name = re.sub(r"[/\\]", "_", row.name).removesuffix(f".{suffix}")
    headers = {"ETag": f'"{row.sha256}"', "X-Content-Type-Options": "nosniff"}
    return _HeldFile(path, held, media_type="application/octet-stream", filename=f"{name}.{suffix}", headers=headers)


class _HeldFile(FileResponse):
    """A file that the cache keeps until all of it has been sent, or its reader has gone."""

    def __init__(self, path: Path, held: ExitStack, **options: Any) -> None:
        super().__init__(path, **options)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unless_refused(message: Message) -> None:
            """Send a message, but a problem in place of the plain text that a wrong range gets."""
            match message:
                case {"type": "http.response.start", "status": 416}:
                    size = Path(self.path).stat().st_size
                    raise RangeOutside(f"The file has {size:,} bytes.", size_bytes=size)
                case {"type": "http.response.start", "status": 400}:
                    raise InvalidRequest("The header Range is not of the form bytes=FIRST-LAST.")
            await send(message)

        try:
            await super().__call__(scope, receive, send_unless_refused)
        finally:
            self._held.close()
