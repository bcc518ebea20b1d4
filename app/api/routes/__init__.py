"""The routes of version 1, and their shared dependencies."""

from dataclasses import dataclass
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import Depends, Query, Request

from app.api.drawing import Drawings
from app.api.events import Events
from app.api.measures import Measures
from app.api.openapi import problem_response
from app.api.readiness import Readiness
from app.queue import LateClient
from app.reports import Subject
from app.schemas import PLAIN_TEXT, Kind
from app.settings import Settings
from app.storage import Storage


@dataclass(frozen=True)
class Service:
    """Dependencies of the routes; one instance for the whole process."""

    settings: Settings
    engine: sa.Engine
    storage: Storage
    queue: LateClient
    events: Events
    readiness: Readiness
    drawings: Drawings
    measures: Measures


# Async, as all dependencies of routes: FastAPI runs each synchronous one in a thread.
async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]
_IdFilter = Annotated[str | None, Query(max_length=36, pattern=PLAIN_TEXT)]


async def _subject(
    kind: Kind | None = None,
    checkpoint_id: _IdFilter = None,
    probe_id: _IdFilter = None,
    feature_set_id: _IdFilter = None,
) -> Subject:
    return Subject(kind, checkpoint_id, probe_id, feature_set_id)


SubjectDep = Annotated[Subject, Depends(_subject)]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI entries of a route's own problems; app/api/openapi.py adds those that all routes have."""
    return {status: problem_response() for status in statuses}
