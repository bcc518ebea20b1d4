"""Fetches: files that lie elsewhere, asked for, queued, cancelled, and shown to clients.

A fetch makes a checkpoint or a probe, which is there once the whole file is, and not before. Workers do the fetching
(workers/fetching); the rows are theirs and ours.
"""

import hashlib
from contextlib import suppress
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import checkpoints, queue, schemas, traces
from app.database import read, write
from app.errors import InvalidRequest, NotFound, SourceNotAllowed, Unavailable
from app.listing import Listing, page
from app.logs import current_request
from app.models import Fetch
from app.resources import parse_spec
from app.settings import Settings
from app.sources import entry_for, parse_source
from app.storage import Upload

# How often two callers may meet.
_TRIES = 10


def create_if_asked(
    engine: sa.Engine, client: queue.LateClient, settings: Settings, makes: schemas.Makes, upload: Upload
) -> schemas.Fetch | None:
    """Queue a fetch if a spec names a source; None if it names none.

    As long as the same spec is being fetched, its fetch is the answer: a client whose answer was lost asks again.

    Raises:
        InvalidRequest: the source is no address, or there is a file or an upload beside it.
        SourceNotAllowed: the operator does not list it.
    """
    if upload.file is not None:
        return None
    spec = _parsed(makes, upload.spec, settings)
    if spec.source is None:
        return None
    if spec.upload_id is not None:
        raise InvalidRequest("The spec names a source and an upload; give one of them.")
    try:
        source = parse_source(spec.source)
    except ValueError as error:
        raise InvalidRequest(f"source: {error}.") from None
    if entry_for(settings.allowed_sources, source) is None:
        raise SourceNotAllowed(
            f"{source.shown} is not below an address that the service's operator lists in INTERPLAY_SOURCES.",
            address=source.shown,
        )
    if isinstance(spec, schemas.CheckpointSpec):
        checkpoints.check_before_file(engine, spec)
    digest = hashlib.sha256(makes.encode() + spec.model_dump_json().encode()).hexdigest()
    row = Fetch(
        makes=makes,
        name=spec.name,
        source=source.shown,
        spec=spec.model_dump_json(exclude_unset=True),
        request_sha256=digest,
        request_id=current_request(),
        traceparent=traces.current(),
    )
    same = sa.select(Fetch.id).where(
        Fetch.request_sha256 == digest, Fetch.outcome.is_(None), Fetch.cancel_requested_at.is_(None)
    )
    for _ in range(_TRIES):
        with read(engine) as session:
            if (earlier := session.scalar(same)) is not None:
                return _view(session, engine, earlier)
        # Whoever comes second finds the index, and then the first one's row, unless it has just ended.
        with suppress(sa.exc.IntegrityError), write(engine) as session:
            session.add(row)
            session.flush()
            queue.enqueue(client.get(), session, row.id, workflow=queue.FETCH_WORKFLOW, queue=queue.FETCHES)
            return _view(session, engine, row.id)
    raise Unavailable("The same fetch is asked for many times at once; ask again.")


def _parsed(makes: schemas.Makes, text: bytes, settings: Settings) -> schemas.CheckpointSpec | schemas.ProbeSpec:
    if makes == "checkpoint":
        return parse_spec(schemas.CheckpointSpec, text, settings)
    return parse_spec(schemas.ProbeSpec, text, settings)


def get(engine: sa.Engine, id_: str) -> schemas.Fetch:
    with read(engine) as session:
        return _view(session, engine, id_)


def cancel(engine: sa.Engine, id_: str) -> schemas.Fetch:
    """Record the request to cancel; a queued fetch ends here, a running one is stopped by its worker.

    Raises:
        NotCancellable: it has already succeeded or failed.
    """
    with write(engine) as session:
        row = session.get(Fetch, id_, with_for_update=True)
        if row is None:
            raise _missing(id_)
        queue.cancel(session, engine.dialect.name, row)
        session.flush()
        return _view(session, engine, id_)


def list_page(engine: sa.Engine, listing: Listing, *, status: schemas.Status | None) -> schemas.Page[schemas.Fetch]:
    """Return one page."""
    query = _select(engine.dialect.name)
    if status is not None:
        query = query.where(queue.status_of(engine.dialect.name, Fetch) == status)
    with read(engine) as session:
        rows, cursor = page(session, query, Fetch, listing, Fetch.resource_id.in_)
        return schemas.Page(items=[_resource(*row) for row in rows], next_cursor=cursor)


@cache
def _select(dialect: str) -> sa.Select[*tuple[Any, ...]]:
    return sa.select(Fetch, queue.status_of(dialect, Fetch))


def _view(session: Session, engine: sa.Engine, id_: str) -> schemas.Fetch:
    row = session.execute(_select(engine.dialect.name).where(Fetch.id == id_)).one_or_none()
    if row is None:
        raise _missing(id_)
    return _resource(*row)


def _missing(id_: str) -> NotFound:
    return NotFound(f"There is no fetch {id_!r}.")


def _resource(row: Fetch, status: schemas.Status) -> schemas.Fetch:
    return schemas.Fetch(
        id=row.id,
        makes=row.makes,
        name=row.name,
        source=row.source,
        status=status,
        progress=schemas.Progress(done=row.progress_done, total=row.progress_total, phase=row.progress_phase),
        resource_id=row.resource_id,
        attempts=row.attempts,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        problem=row.problem,
    )
