"""The form that queues an analysis: for each kind its subjects and its options, as their models describe them."""

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from sqlalchemy.orm import Session
from starlette.datastructures import FormData

from app import analyses, models, schemas
from app.api.routes import ServiceDep
from app.api.sessions import TOKEN_FIELD
from app.database import read
from app.errors import InvalidRequest, invalid_request
from app.listing import Listing
from app.pages.rendering import page, place, see_other
from app.pages.visitors import VisitorDep, require_token
from app.schemas import Kind
from app.sorting import Sorting, list_page

router = APIRouter()
# Subjects that a form offers, the newest first; others are given by their ids.
_OFFERED = 300
_REQUESTS: Mapping[str, type[BaseModel]] = {
    get_args(model.model_fields["kind"].annotation)[0]: model
    for model in get_args(get_args(schemas.AnalysisRequest)[0])
}
_REQUEST: TypeAdapter[Any] = TypeAdapter(schemas.AnalysisRequest)


@dataclass(frozen=True)
class _Field:
    """A field of the form.

    Attributes:
        name: as the request has it.
        about: what it is for.
        value: text that it has at first.
        choices: values and what they are called, where it is one of some.
        lines: whether its text has several lines.
    """

    name: str
    about: str
    value: str
    choices: Sequence[tuple[str, str]] | None = None
    lines: bool = False


@router.get("/analyses/new")
def show_form(
    request: Request,
    visitor: VisitorDep,
    service: ServiceDep,
    kind: Kind = "evaluation",
    like: schemas.Id | None = None,
    of: Annotated[str | None, Query(max_length=600)] = None,
) -> Response:
    """The form of a kind: with the defaults, with subjects of the address, or as the analysis `like` was asked for.

    Of a series, the checkpoints with the metadata `of`, such as run=a, stand in it at the numbers of their axis.
    """
    given_in_address = request.query_params.items()
    before: dict[str, Any] = {
        name: value for name, value in given_in_address if name not in ("kind", "like", "of", "options")
    }
    if like is not None:
        before = _asked(analyses.get(service.engine, like))
    elif kind == "series" and of is not None:
        before["checkpoint_ids"] = _run(service.engine, of, before.get("axis") or "epoch")
    chosen: str = before.get("kind", kind)
    model = _REQUESTS[chosen]
    with read(service.engine) as session:
        subjects = [
            _subject(session, name, field, before.get(name))
            for name, field in model.model_fields.items()
            if name not in ("kind", "options")
        ]
    options = model.model_fields["options"].annotation
    assert isinstance(options, type)
    assert issubclass(options, BaseModel)
    given = before.get("options") or {}
    return page(
        request,
        visitor,
        "ask.html",
        kind=chosen,
        kinds=list(_REQUESTS),
        about=(model.__doc__ or "").strip(),
        of=of,
        subjects=subjects,
        options=[_option(name, field, given) for name, field in options.model_fields.items()],
    )


@router.post("/analyses/new")
async def ask(request: Request, visitor: VisitorDep, service: ServiceDep) -> Response:
    """Queue what a form asks for, and show it."""
    form = await request.form(max_files=0, max_fields=100)
    require_token(request, visitor, str(form.get(TOKEN_FIELD, "")))
    kind = str(form.get("kind", ""))
    if kind not in _REQUESTS:
        raise InvalidRequest(f"There is no kind of analysis {kind!r}; there are {', '.join(_REQUESTS)}.")
    try:
        body = _REQUEST.validate_python(_body(kind, form))
    except ValidationError as error:
        raise invalid_request("The form", error.errors()) from None
    analysis = await run_in_threadpool(analyses.create, service.engine, service.queue, body, None)
    return see_other(request, f"/analyses/{analysis.id}")


def _run(engine: sa.Engine, metadata: str, axis: str) -> str:
    """Return the lines of a series: the checkpoints with some metadata, at their number of the axis the newest."""
    with read(engine) as session:
        rows, _ = list_page(session, models.Checkpoint, Listing(limit=_OFFERED, metadata=[metadata]), Sorting())
    places: dict[float, str] = {}
    for row in rows:
        x = row.metadata_.get(axis)
        if isinstance(x, int | float) and not isinstance(x, bool):
            places.setdefault(float(x), row.id)
    return "\n".join(f"{place(x)} = {places[x]}" for x in sorted(places))


def _asked(analysis: schemas.Analysis) -> dict[str, Any]:
    """Return what an analysis was asked with, by the names of its request's fields."""
    ids = analysis.checkpoint_ids
    asked: dict[str, Any] = {
        "kind": analysis.kind,
        "probe_id": analysis.probe_id,
        "feature_set_id": analysis.feature_set_id,
        "checkpoint_id": analysis.checkpoint_id,
        "options": analysis.options,
    }
    if analysis.axis is not None:
        pairs = zip(analysis.axis.values, ids, strict=True)
        asked |= {"axis": analysis.axis.name, "checkpoint_ids": "\n".join(f"{place(x)} = {id_}" for x, id_ in pairs)}
    elif len(ids) == 2:
        asked |= {"checkpoint_a_id": ids[0], "checkpoint_b_id": ids[1]}
    return asked


def _subject(session: Session, name: str, field: FieldInfo, value: str | None) -> _Field:
    if name == "axis":
        return _Field("axis", "Name of the axis, such as epoch", value or "epoch")
    if name == "checkpoint_ids":
        return _Field(name, "Checkpoints in order, one a line: place = id", value or "", lines=True)
    model: Any = models.Probe if name == "probe_id" else models.Checkpoint
    noun = {"probe_id": "Probe", "checkpoint_a_id": "Checkpoint A", "checkpoint_b_id": "Checkpoint B"}.get(
        name, "Checkpoint"
    )
    if name == "feature_set_id":
        model, noun = models.FeatureSet, "Feature set, in place of checkpoint and probe"
    rows = session.execute(sa.select(model.id, model.name).order_by(model.created_at.desc()).limit(_OFFERED)).all()
    choices = [(row[0], f"{row[1]} ({row[0][:8]})") for row in rows]
    if value and value not in dict(choices):
        choices.append((value, value))
    empty = [] if field.is_required() else [("", "none")]
    return _Field(name, noun, value or "", [*empty, *choices])


def _option(name: str, field: FieldInfo, given: Mapping[str, Any]) -> _Field:
    default = field.get_default(call_default_factory=True)
    value = given.get(name, default.model_dump() if isinstance(default, BaseModel) else default)
    about = f"{name.replace('_', ' ')}: {field.description or ''}"
    return _Field(name, about, _text(value), _choices(field.annotation))


def _choices(annotation: Any) -> list[tuple[str, str]] | None:
    if annotation is bool:
        return [("false", "no"), ("true", "yes")]
    if get_origin(annotation) is Literal:
        return [(str(value), str(value)) for value in get_args(annotation)]
    return None


def _text(value: Any) -> str:
    """Return a value as the form has it: text as it is, everything else as JSON, nothing for none."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _body(kind: str, form: FormData) -> dict[str, Any]:
    """Return the request that a form makes; what was left empty has its default."""
    model = _REQUESTS[kind]
    options_model = model.model_fields["options"].annotation
    assert isinstance(options_model, type)
    body: dict[str, Any] = {"kind": kind}
    for name in model.model_fields:
        text = str(form.get(name, "")).strip()
        if not text or name in ("kind", "options"):
            continue
        if name == "checkpoint_ids":
            places, body[name] = _places(text)
            body.setdefault("axis", {})["values"] = places
        elif name == "axis":
            body.setdefault("axis", {})["name"] = text
        else:
            body[name] = text
    options: dict[str, Any] = {}
    for name, field in options_model.model_fields.items():
        text = str(form.get(f"options.{name}", "")).strip()
        if text:
            options[name] = _value(text, field.annotation)
    return {**body, "options": options}


def _value(text: str, annotation: Any) -> Any:
    """Return an option's value: words as they are, everything else as JSON."""
    if _is_text(annotation):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _is_text(annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _is_text(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return all(_is_text(member) for member in get_args(annotation) if member is not type(None))
    return annotation is str or (origin is Literal and all(isinstance(value, str) for value in get_args(annotation)))


def _places(text: str) -> tuple[list[float], list[str]]:
    """Return the places and the ids of lines of the form place = id."""
    places, ids = [], []
    for line in filter(None, map(str.strip, text.splitlines())):
        place, separator, id_ = line.partition("=")
        try:
            places.append(float(place))
        except ValueError:
            separator = ""
        if not separator or not id_.strip():
            raise InvalidRequest(f"The line {line[:80]!r} is not of the form place = id, such as 10 = ID.")
        ids.append(id_.strip())
    return places, ids
