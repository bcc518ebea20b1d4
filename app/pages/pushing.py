"""The page that uploads or has fetched: a checkpoint, a probe dataset or a feature set, by a form of its own each."""

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from app import fetches, resources, schemas
from app.api.routes import Service, ServiceDep
from app.api.sessions import TOKEN_FIELD
from app.api.uploads import receive
from app.errors import InvalidRequest
from app.pages.rendering import page, see_other
from app.pages.visitors import VisitorDep, require_token
from app.storage import Upload

router = APIRouter()
Collection = Literal["checkpoints", "probes", "feature-sets"]
_KEEP: Mapping[Collection, Callable[..., resources.Owner]] = {
    "checkpoints": resources.create_checkpoint,
    "probes": resources.create_probe,
    "feature-sets": resources.create_feature_set,
}
_FETCHED: Mapping[Collection, schemas.Makes] = {"checkpoints": "checkpoint", "probes": "probe"}
# Fields whose text is JSON, and those that have one entry a line.
_JSON, _LINES = ("architecture", "adapter", "preprocess"), ("class_names",)


@router.get("/push")
def show_forms(request: Request, visitor: VisitorDep, base: schemas.Id | None = None) -> Response:
    """The three forms; that of a checkpoint with a base, if an adapter of it is to be pushed."""
    return page(request, visitor, "push.html", base=base)


@router.post("/push/{collection}")
async def push(request: Request, collection: Collection, visitor: VisitorDep, service: ServiceDep) -> Response:
    """Take what a form sends, as the API takes its call, and show what came of it."""

    def spec_of(fields: Mapping[str, str]) -> bytes:
        require_token(request, visitor, fields.get(TOKEN_FIELD, ""))
        return json.dumps(_spec(fields)).encode()

    async with receive(request, service.storage, service.settings, spec_of) as upload:
        made = await run_in_threadpool(_keep, service, collection, upload)
    return see_other(request, f"/{made}")


def _keep(service: Service, collection: Collection, upload: Upload) -> str:
    """Make the resource, or begin the fetch if the form names a source; return the path of its page."""
    if (makes := _FETCHED.get(collection)) is not None:
        fetch = fetches.create_if_asked(service.engine, service.queue, service.settings, makes, upload)
        if fetch is not None:
            return f"fetches/{fetch.id}"
    return f"{collection}/{_KEEP[collection](service.engine, service.storage, service.settings, upload).id}"


def _spec(fields: Mapping[str, str]) -> dict[str, Any]:
    """Return the spec of an upload; fields that were left empty are left out."""
    spec: dict[str, Any] = {}
    for name, text in fields.items():
        text = text.strip()
        if not text or name == TOKEN_FIELD:
            continue
        if name in _JSON:
            spec[name] = _parsed(name, text)
        elif name in _LINES:
            spec[name] = [line.strip() for line in text.splitlines() if line.strip()]
        elif name == "metadata":
            spec[name] = _metadata(text)
        elif name == "further":
            further = _parsed("further members", text)
            if not isinstance(further, dict):
                raise InvalidRequest("Further members of the spec must be a JSON object.")
            spec |= further
        else:
            spec[name] = text
    return spec


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"The field {name} is not valid JSON: {error}.") from None


def _metadata(text: str) -> dict[str, Any]:
    """Return lines of the form key=value; values that are JSON keep their type."""
    found: dict[str, Any] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        key, separator, value = line.partition("=")
        if not separator or not key.strip():
            raise InvalidRequest(f"The line {line[:80]!r} of the metadata is not of the form key=value.")
        try:
            found[key.strip()] = json.loads(value)
        except ValueError:
            found[key.strip()] = value.strip()
    return found
