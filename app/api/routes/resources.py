"""Checkpoints, probes and feature sets over HTTP."""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

from app import models, resources, schemas
from app.api.openapi import reference
from app.api.routes import ServiceDep, problems
from app.api.uploads import receive
from app.database import read
from app.listing import Listing, listing_with, page
from app.storage import Upload

router = APIRouter(tags=["resources"])
Resource = TypeVar("Resource", schemas.Checkpoint, schemas.Probe, schemas.FeatureSet)
ListingDep = Annotated[Listing, Depends(listing_with())]


def _upload_body(spec: type[BaseModel], file: str) -> dict[str, Any]:
    properties = {
        "spec": reference(spec),
        "file": {"type": "string", "contentMediaType": "application/octet-stream", "description": file},
    }
    form = {"schema": {"type": "object", "required": ["spec"], "properties": properties}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": form}}}


@router.post(
    "/checkpoints",
    status_code=201,
    response_model=schemas.Checkpoint,
    openapi_extra=_upload_body(schemas.CheckpointSpec, "safetensors; left out where spec.sha256 names a blob"),
    responses=problems(400, 404, 413, 415, 422, 503),
)
async def create_checkpoint(request: Request, response: Response, service: ServiceDep) -> schemas.Checkpoint:
    """Upload a checkpoint."""

    def keep(upload: Upload) -> models.Checkpoint:
        return resources.create_checkpoint(service.engine, service.storage, service.settings, upload)

    return await _create(request, response, service, schemas.Checkpoint, keep)


@router.post(
    "/probes",
    status_code=201,
    response_model=schemas.Probe,
    openapi_extra=_upload_body(
        schemas.ProbeSpec,
        "safetensors or npz: inputs (N, ...), labels (N,), split (N,); or Parquet, a zip of class folders with images, "
        "CSV or JSON lines with texts and labels",
    ),
    responses=problems(400, 404, 413, 415, 422, 503),
)
async def create_probe(request: Request, response: Response, service: ServiceDep) -> schemas.Probe:
    """Upload a probe dataset."""

    def keep(upload: Upload) -> models.Probe:
        return resources.create_probe(service.engine, service.storage, service.settings, upload)

    return await _create(request, response, service, schemas.Probe, keep)


@router.post(
    "/feature-sets",
    status_code=201,
    response_model=schemas.FeatureSet,
    openapi_extra=_upload_body(
        schemas.FeatureSetSpec,
        "safetensors: features (N, d), labels (N,), head (C, d); optional head_bias (C,), logits (N, C), split (N,)",
    ),
    responses=problems(400, 404, 413, 415, 422, 503),
)
async def create_feature_set(request: Request, response: Response, service: ServiceDep) -> schemas.FeatureSet:
    """Upload features, labels and head of a network that the service cannot build."""

    def keep(upload: Upload) -> models.FeatureSet:
        return resources.create_feature_set(service.engine, service.storage, service.settings, upload)

    return await _create(request, response, service, schemas.FeatureSet, keep)


@router.get("/checkpoints", responses=problems(422))
def list_checkpoints(service: ServiceDep, listing: ListingDep) -> schemas.Page[schemas.Checkpoint]:
    return _list(service.engine, models.Checkpoint, schemas.Checkpoint, listing)


@router.get("/probes", responses=problems(422))
def list_probes(service: ServiceDep, listing: ListingDep) -> schemas.Page[schemas.Probe]:
    return _list(service.engine, models.Probe, schemas.Probe, listing)


@router.get("/feature-sets", responses=problems(422))
def list_feature_sets(service: ServiceDep, listing: ListingDep) -> schemas.Page[schemas.FeatureSet]:
    return _list(service.engine, models.FeatureSet, schemas.FeatureSet, listing)


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
) -> Resource:
    async with receive(request, service.storage, service.settings) as upload:
        row = await run_in_threadpool(keep, upload)
    response.headers["Location"] = f"{request.url.path}/{row.id}"
    return _resource(schema, row)


def _list(
    engine: sa.Engine, model: type[resources.Owner], schema: type[Resource], listing: Listing
) -> schemas.Page[Resource]:
    with read(engine) as session:
        rows, cursor = page(session, sa.select(model), model, listing, model.id.in_)
        return schemas.Page(items=[_resource(schema, row) for (row,) in rows], next_cursor=cursor)


def _resource(schema: type[Resource], row: resources.Owner) -> Resource:
    values = {name: getattr(row, name) for name in schema.model_fields if name != "metadata"}
    return schema.model_validate({**values, "metadata": row.metadata_})
