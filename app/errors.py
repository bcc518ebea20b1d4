"""The errors that the service answers with.

    ServiceError            one RFC 9457 problem: kind, title, HTTP status
    ├── InvalidRequest      422  the request's JSON, form or query
    ├── InvalidFile         422  an uploaded file
    ├── ArchitecturesDiffer 422  checkpoints of one path or series
    ├── LabelsDiffer        422  class names of a probe that are not those of the checkpoint
    ├── NotComparable       422  a gate, a report and a baseline that do not belong together
    ├── ProbeUnsuitable     422  a probe that does not suit networks of the checkpoint's kind
    ├── MalformedRequest    400  no HTTP at all
    ├── RequestTimeout      408  a request did not come in time
    ├── HeadersTooLarge     431
    ├── UploadIncomplete    400  the body ended or stalled before the form did
    ├── TooLarge            413
    ├── UnsupportedMedia    415
    ├── Unauthorized        401
    ├── Forbidden           403
    ├── SourceNotAllowed    403  an address that the operator does not list, or one inside
    ├── NotFound            404
    ├── RangeOutside        416  a part of a file that is not there
    ├── InUse               409  a resource to delete is needed
    ├── NotEnded            409  an analysis to delete waits or runs
    ├── IdempotencyConflict 409
    ├── NotCancellable      409
    ├── TooManyStreams      503  of events
    ├── TooManyConnections  503
    ├── BaselineMoved       409  it has moved since the caller read it
    ├── OffsetDiffers       409  a resumable upload is not where the caller thinks
    ├── UploadUnfinished    409  a resumable upload that should become a resource is not whole
    ├── UploadBusy          423  another request has a resumable upload
    ├── ChecksumMismatch    460  what came is not what was sent
    ├── UnknownTusVersion   412
    ├── UploadElsewhere     503  a resumable upload lies on another machine
    ├── TooManyUploads      503
    ├── InsufficientStorage 507  the disk or the storage is full
    ├── Unavailable         503  the database or the storage does not answer
    ├── SourceUnavailable   502  a source of files; this and the next three come as problems of fetches
    ├── SourceMissing       404  it has no such file
    ├── SourceDenied        403  it wants other credentials
    └── SourceChanged       409  the file is another one each time, or not what its source announces

Each kind is documented in docs/problems.md; a test fails if one is not.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args


def first_line(error: object) -> str:
    """Return the first line of an exception's message, truncated and without a full stop; else its type's name.

    Libraries add pages of their own state.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")


def problem_type(kind: str) -> str:
    """Return the `type` of a problem: an identifier, listed in docs/problems.md."""
    return f"urn:interplay:problem:{kind}"


def problem(kind: str, title: str, detail: str, *, status: int | None = None, **members: Any) -> dict[str, Any]:
    """Return the body of a problem (RFC 9457); give `status` only if it is the status of an HTTP answer."""
    body: dict[str, Any] = {"type": problem_type(kind), "title": title, "detail": detail}
    if status is not None:
        body["status"] = status
    return {**members, **body}


class ServiceError(Exception):
    """An expected failure, raised anywhere below a route and answered as application/problem+json."""

    kind: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Internal error"
    status: ClassVar[int] = 500

    def __init__(self, detail: str, **members: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.members = members

    def problem(self) -> dict[str, Any]:
        """Return the body of the problem, as that of a run that fails."""
        return problem(self.kind, self.title, self.detail, **self.members)


class InvalidRequest(ServiceError):
    kind, title, status = "invalid-request", "The request is not valid", 422


def invalid_request(what: str, errors: Sequence[Mapping[str, Any]], *, prefix: str | None = None) -> InvalidRequest:
    """Return pydantic's errors as one problem: the first five as text, twenty as `errors: [{loc, message}]`."""
    # Imported here: a process that only formats problems loads neither schemas nor tables.
    from app.schemas import Kind

    listed: list[dict[str, Any]] = [
        {"loc": [*([prefix] if prefix else []), *map(str, error["loc"])], "message": _message(error)}
        for error in errors[:20]
    ]
    for entry in listed:
        # Pydantic's name for the union member that `kind` selected is not a location in the body.
        if len(entry["loc"]) > 1 and entry["loc"][0] == "body" and entry["loc"][1] in get_args(Kind):
            del entry["loc"][1]
    words = "; ".join(f"{'.'.join(error['loc']) or what}: {error['message']}" for error in listed[:5])
    return InvalidRequest(f"{what} does not have the right form: {words}.", errors=listed)


def _message(error: Mapping[str, Any]) -> str:
    """Return pydantic's message, without its own terms for the failure."""
    from app.schemas import PLAIN_TEXT

    if error["type"] == "string_pattern_mismatch" and error["ctx"]["pattern"] == PLAIN_TEXT:
        return "must not have control characters"
    return str(error["msg"]).removeprefix("Value error, ")


class InvalidFile(ServiceError):
    kind, title, status = "invalid-file", "The file is not valid", 422


class ArchitecturesDiffer(ServiceError):
    kind, title, status = "architectures-differ", "The checkpoints have different architectures", 422


class LabelsDiffer(ServiceError):
    kind, title, status = "labels-differ", "The probe's classes are not the checkpoint's", 422


class NotComparable(ServiceError):
    kind, title, status = "not-comparable", "The report cannot be judged by this gate or against this baseline", 422


class ProbeUnsuitable(ServiceError):
    kind, title, status = "probe-unsuitable", "The probe does not suit the checkpoint", 422


class MalformedRequest(ServiceError):
    kind, title, status = "malformed-request", "This is not a request", 400


class RequestTimeout(ServiceError):
    kind, title, status = "request-timeout", "The request did not come in time", 408


class HeadersTooLarge(ServiceError):
    kind, title, status = "headers-too-large", "The request's headers are too large", 431


class UploadIncomplete(ServiceError):
    kind, title, status = "upload-incomplete", "The upload ended before it was complete", 400


class TooLarge(ServiceError):
    kind, title, status = "too-large", "The upload is too large", 413


class UnsupportedMedia(ServiceError):
    kind, title, status = "unsupported-media-type", "The body has an unsupported media type", 415


class Unauthorized(ServiceError):
    kind, title, status = "unauthorized", "A valid API key is needed", 401


class Forbidden(ServiceError):
    kind, title, status = "forbidden", "The request comes from elsewhere", 403


class NotFound(ServiceError):
    kind, title, status = "not-found", "There is no such resource", 404


class RangeOutside(ServiceError):
    kind, title, status = "range-outside", "The range is not within the file", 416


class InUse(ServiceError):
    kind, title, status = "in-use", "The resource is in use", 409


class NotEnded(ServiceError):
    kind, title, status = "not-ended", "It has not ended", 409


class IdempotencyConflict(ServiceError):
    kind, title, status = "idempotency-conflict", "The idempotency key was used for another request", 409


class NotCancellable(ServiceError):
    kind, title, status = "not-cancellable", "It has already ended", 409


class TooManyStreams(ServiceError):
    kind, title, status = "too-many-streams", "Too many streams of events are open", 503


class TooManyConnections(ServiceError):
    kind, title, status = "too-many-connections", "Too many connections are open", 503


class BaselineMoved(ServiceError):
    kind, title, status = "baseline-moved", "The baseline has moved", 409


class InsufficientStorage(ServiceError):
    kind, title, status = "insufficient-storage", "No room is left", 507


class Unavailable(ServiceError):
    kind, title, status = "unavailable", "The service cannot answer now", 503


class OffsetDiffers(ServiceError):
    kind, title, status = "upload-offset", "The upload continues elsewhere", 409


class UploadUnfinished(ServiceError):
    kind, title, status = "upload-unfinished", "The upload is not complete", 409


class UploadBusy(ServiceError):
    kind, title, status = "upload-busy", "Another request uses the upload", 423


class ChecksumMismatch(ServiceError):
    kind, title, status = "checksum-mismatch", "The bytes do not have their checksum", 460


class UnknownTusVersion(ServiceError):
    kind, title, status = "tus-version", "The version of the tus protocol is not supported", 412


class UploadElsewhere(ServiceError):
    kind, title, status = "upload-elsewhere", "The upload lies on another machine of the service", 503


class TooManyUploads(ServiceError):
    kind, title, status = "too-many-uploads", "Too many uploads are open", 503


class SourceNotAllowed(ServiceError):
    kind, title, status = "source-not-allowed", "The service does not fetch files from there", 403


class SourceUnavailable(ServiceError):
    kind, title, status = "source-unavailable", "The source does not answer", 502


class SourceMissing(ServiceError):
    kind, title, status = "source-missing", "The source has no such file", 404


class SourceDenied(ServiceError):
    kind, title, status = "source-denied", "The source does not give the file to this service", 403


class SourceChanged(ServiceError):
    kind, title, status = "source-changed", "The source's file changes while it is fetched", 409
