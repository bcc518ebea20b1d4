"""A fetch from its beginning to the resource that it makes; all of it may be repeated after a kill, and goes on.

What is on the disk survives the worker, and the next attempt on the same machine goes on from there. The resource and
the fetch's outcome are one transaction, so that a fetch makes one resource, however often it is repeated.
"""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from app import checkpoints, resources, schemas, traces
from app.database import read
from app.errors import ServiceError, Unavailable
from app.logs import about
from app.models import Fetch, now
from app.settings import Settings
from app.staging import WholeFile
from app.storage import Storage, StorageFull, StorageUnavailable, Upload
from workers import attempts
from workers.fetching import process
from workers.fetching.messages import Fetched, Order, problem_of
from workers.tasks import Progress, Result

logger = logging.getLogger("interplay")

_PAUSE_SECONDS = 1.0
_DATABASE_ERRORS = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)
_CREATE = {"checkpoint": resources.create_checkpoint, "probe": resources.create_probe}


def run(settings: Settings, engine: sa.Engine, storage: Storage, fetch_id: str) -> None:
    """Fetch a file and make its resource, unless it has been done or cancelled."""
    with about(fetch_id=fetch_id):
        row = attempts.patiently(lambda: attempts.begin_fetch(engine, fetch_id, settings.max_attempts))
    if row is not None:
        with about(fetch_id=fetch_id, request_id=row.request_id), _traced(row):
            _run(settings, engine, storage, row)


def _traced(row: Fetch) -> AbstractContextManager[object]:
    """Trace an attempt, in the trace of the request that asked for the fetch, if that is traced."""
    if row.traceparent is None:
        return nullcontext()
    if row.attempts == 1:
        traces.waited((now() - row.created_at).total_seconds(), parent=row.traceparent)
    return traces.span(
        f"fetch {row.makes}",
        parent=row.traceparent,
        fetch_id=row.id,
        request_id=row.request_id,
        attempt=row.attempts,
    )


def _run(settings: Settings, engine: sa.Engine, storage: Storage, row: Fetch) -> None:
    def on_tick(progress: Progress | None) -> bool:
        try:
            return attempts.note(engine, row.id, progress, Fetch)
        except sa.exc.SQLAlchemyError as error:
            logger.warning("progress of fetch %s was not stored: %s", row.id, error)
            return False

    result = _result(settings, engine, storage, row, on_tick)
    if result is not None:
        attempts.patiently(lambda: attempts.end(engine, Fetch, row.id, result))
    logger.info("the fetch has ended: %s", "succeeded" if result is None else result.outcome)
    _remove(storage, row.id)


def _result(
    settings: Settings,
    engine: sa.Engine,
    storage: Storage,
    row: Fetch,
    on_tick: Callable[[Progress | None], bool],
) -> Result | None:
    """Return how a fetch has ended; None if its resource has recorded it, or it has ended elsewhere."""
    try:
        fetched = process.run(settings, _order(settings, storage, row), on_tick)
        if fetched is None:
            return Result(outcome="cancelled")
        if not isinstance(fetched, Fetched):
            return Result(outcome="failed", problem=fetched)
        return _keep(settings, engine, storage, row, fetched, on_tick)
    except (ServiceError, StorageUnavailable, *_DATABASE_ERRORS) as error:
        return Result(outcome="failed", problem=problem_of(error))


def _keep(
    settings: Settings,
    engine: sa.Engine,
    storage: Storage,
    row: Fetch,
    fetched: Fetched,
    on_tick: Callable[[Progress | None], bool],
) -> Result | None:
    """Make the resource; try again as long as the storage or the database may come back.

    A cancel is heard between tries: a file that goes to the storage goes to its end.
    """
    deadline: float | None = None
    progress = Progress(phase="storing", done=fetched.size_bytes, total=fetched.size_bytes)
    while not on_tick(progress):
        try:
            with WholeFile(storage.fetched_path(row.id), fetched.sha256) as file:
                upload = Upload(
                    row.spec.encode(),
                    file,
                    use=partial(attempts.use, fetch_id=row.id),
                    origin=fetched.origin.model_dump(mode="json"),
                    brought=checkpoints.members_of(**fetched.descriptions),
                )
                _CREATE[row.makes](engine, storage, settings, upload)
            return None
        except attempts.Ended:
            break
        except StorageFull:
            raise
        except (StorageUnavailable, Unavailable, BlockingIOError, *_DATABASE_ERRORS) as error:
            # Counted from the first failure: the file may have taken hours to get into the storage.
            deadline = deadline or time.monotonic() + settings.fetch_patience_seconds
            if time.monotonic() > deadline:
                raise
            logger.warning("fetch %s waits for the storage or the database: %s", row.id, error)
            progress = progress.model_copy(update={"phase": "waiting for the storage"})
            time.sleep(_PAUSE_SECONDS)
    return Result(outcome="cancelled")


def _order(settings: Settings, storage: Storage, row: Fetch) -> Order:
    model = schemas.CheckpointSpec if row.makes == "checkpoint" else schemas.ProbeSpec
    spec = model.model_validate_json(row.spec)
    assert spec.source is not None, "it is a fetch's"
    return Order(
        source=spec.source,
        of_adapter=getattr(spec, "base_id", None) is not None,
        makes=row.makes,
        path=str(storage.fetched_path(row.id)),
        sources=settings.sources,
        hub_url=settings.hub_url,
        silence_seconds=settings.storage_timeout_seconds,
        patience_seconds=settings.fetch_patience_seconds,
        max_bytes=settings.max_fetch_bytes,
    )


def remove_leftovers(engine: sa.Engine, storage: Storage) -> None:
    """Remove files of fetches that have ended, on another machine or just before this one did."""
    names = storage.fetched_names()
    if not names:
        return
    with read(engine) as session:
        going_on = set(session.scalars(sa.select(Fetch.id).where(Fetch.id.in_(names), Fetch.outcome.is_(None))))
    for name in names:
        if name not in going_on:
            _remove(storage, name)


def _remove(storage: Storage, fetch_id: str) -> None:
    path: Path = storage.fetched_path(fetch_id)
    for one in (path, path.with_suffix(".plan")):
        with suppress(OSError):
            one.unlink()
