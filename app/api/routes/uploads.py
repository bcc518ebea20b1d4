"""Resumable uploads: tus 1.0.0 with creation, creation-with-upload, checksum, expiration and termination."""

from dataclasses import asdict
from email.utils import format_datetime
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from app import models, schemas, uploads
from app.api.routes import ServiceDep, problems
from app.api.tus import VERSION
from app.api.uploads import append
from app.errors import UnknownTusVersion, UnsupportedMedia

_EXTENSIONS = ("creation", "creation-with-upload", "checksum", "expiration", "termination")
_MEDIA_TYPE = "application/offset+octet-stream"
_BODY: dict[str, Any] = {
    "requestBody": {"content": {_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}},
}


async def _known_version(
    version: Annotated[str, Header(alias="Tus-Resumable", description="The protocol's version.")] = VERSION,
) -> None:
    if version != VERSION:
        raise UnknownTusVersion(f"Tus-Resumable is {version[:20]!r}; this service speaks {VERSION}.", version=VERSION)


async def _checksum(
    text: Annotated[
        str | None, Header(alias="Upload-Checksum", description="sha256 or sha1, and the digest in base64.")
    ] = None,
) -> uploads.Checksum | None:
    return None if text is None else uploads.Checksum.parse(text)


_Size = Annotated[str, Header(pattern="^[0-9]{1,15}$")]
_ChecksumDep = Annotated[uploads.Checksum | None, Depends(_checksum)]
# OPTIONS tells which version there is, whatever the caller's; the list of parts is not of tus.
_VERSIONED = [Depends(_known_version)]
router = APIRouter(tags=["uploads"])


@router.options("/uploads", status_code=204)
async def tell_tus(service: ServiceDep, response: Response) -> None:
    """What of tus the service speaks."""
    response.headers["Tus-Version"] = VERSION
    response.headers["Tus-Extension"] = ",".join(_EXTENSIONS)
    response.headers["Tus-Max-Size"] = str(service.settings.max_upload_bytes)
    response.headers["Tus-Checksum-Algorithm"] = ",".join(uploads.ALGORITHMS)


@router.post(
    "/uploads",
    status_code=201,
    dependencies=_VERSIONED,
    openapi_extra=_BODY,
    responses=problems(400, 404, 412, 413, 415, 423, 460, 507),
)
async def create_upload(
    request: Request,
    response: Response,
    service: ServiceDep,
    checksum: _ChecksumDep,
    size: Annotated[_Size, Header(alias="Upload-Length", description="Bytes of the whole file.")],
    metadata: Annotated[
        str | None, Header(alias="Upload-Metadata", description="Pairs of a key and a value in base64, with commas.")
    ] = None,
    parts: Annotated[
        Literal["presigned"] | None,
        Header(alias="Upload-Parts", description="Parts straight into the bucket, if the storage is one of S3."),
    ] = None,
) -> schemas.Upload:
    """Begin an upload; a body of the media type of PATCH is its first bytes."""
    has_bytes = _require_media_type(request, required=False)
    create = partial(uploads.create, service.engine, service.storage, service.settings, int(size), metadata)
    row = await run_in_threadpool(partial(create, in_parts=parts is not None and not has_bytes))
    response.headers["Location"] = f"{request.url.path}/{row.id}"
    if has_bytes:
        row = await _append(request, service, row.id, 0, checksum)
    _tell(response, row)
    return _upload(row)


@router.get("/uploads/{id}", dependencies=_VERSIONED, responses=problems(404, 412))
def get_upload(id: schemas.Id, response: Response, service: ServiceDep) -> schemas.Upload:
    """Where an upload is; HEAD gives the same as headers alone."""
    row = uploads.get(service.engine, service.storage, id)
    _tell(response, row)
    response.headers["Upload-Length"] = str(row.size_bytes)
    if row.metadata_:
        response.headers["Upload-Metadata"] = row.metadata_
    return _upload(row)


@router.get("/uploads/{id}/parts", responses=problems(404))
def list_missing_parts(
    id: schemas.Id, service: ServiceDep, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> schemas.UploadParts:
    """Parts that the bucket lacks, each with a URL that takes it."""
    missing_bytes, found = uploads.missing_parts(service.engine, service.storage, service.settings, id, limit)
    return schemas.UploadParts(
        missing_bytes=missing_bytes, missing=[schemas.UploadPart(**asdict(part)) for part in found]
    )


@router.patch(
    "/uploads/{id}",
    status_code=204,
    dependencies=_VERSIONED,
    openapi_extra=_BODY,
    responses=problems(400, 404, 409, 412, 413, 415, 423, 460, 507),
)
async def append_to_upload(
    id: schemas.Id,
    request: Request,
    response: Response,
    service: ServiceDep,
    checksum: _ChecksumDep,
    offset: Annotated[_Size, Header(alias="Upload-Offset", description="Where the bytes of the body begin.")],
) -> None:
    """Bring further bytes."""
    _require_media_type(request, required=True)
    _tell(response, await _append(request, service, id, int(offset), checksum))


@router.delete("/uploads/{id}", status_code=204, dependencies=_VERSIONED, responses=problems(404, 412))
def cancel_upload(id: schemas.Id, service: ServiceDep) -> None:
    """Cancel an upload; what has come is removed. A resource that it has become stays."""
    uploads.remove(service.engine, service.storage, id)


async def _append(
    request: Request, service: ServiceDep, id_: str, offset_bytes: int, checksum: uploads.Checksum | None
) -> models.Upload:
    begin = partial(uploads.Append, service.engine, service.storage, service.settings, id_, offset_bytes, checksum)
    with await run_in_threadpool(begin) as addition:
        return await append(request, addition, service.settings)


def _require_media_type(request: Request, *, required: bool) -> bool:
    """Check the media type of a body, and return whether there is one."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    if given != _MEDIA_TYPE and (required or has_body):
        raise UnsupportedMedia(f"Send the bytes of an upload as {_MEDIA_TYPE}.")
    return given == _MEDIA_TYPE


def _tell(response: Response, row: models.Upload) -> None:
    response.headers["Upload-Offset"] = str(row.offset_bytes)
    response.headers["Upload-Expires"] = format_datetime(row.expires_at, usegmt=True)


def _upload(row: models.Upload) -> schemas.Upload:
    return schemas.Upload(
        id=row.id,
        size_bytes=row.size_bytes,
        offset_bytes=row.offset_bytes,
        part_bytes=row.part_bytes,
        metadata=uploads.metadata_of(row.metadata_),
        resource_id=row.resource_id,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )
