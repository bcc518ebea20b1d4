"""The routes of version 1, and what each of them is given."""

import hmac
from dataclasses import dataclass
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import Depends, Request

from app.errors import Unauthorized
from app.queue import Client
from app.schemas import Problem
from app.settings import Settings
from app.storage import Storage


@dataclass(frozen=True)
class Service:
    """What a route works with; one for the whole process."""

    settings: Settings
    engine: sa.Engine
    storage: Storage
    queue: Client


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]


def authorize(request: Request, service: ServiceDep) -> None:
    """Every /v1 call needs the key where one is set. Keys with scopes will be looked up here."""
    key = service.settings.api_key
    if key is None:
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.encode(), key.get_secret_value().encode()):
        raise Unauthorized("Send the header 'Authorization: Bearer KEY' with the service's API key.")


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of a route's problems."""
    content = {"application/problem+json": {"schema": Problem.model_json_schema()}}
    return {status: {"description": "A problem, see docs/problems.md", "content": content} for status in statuses}
