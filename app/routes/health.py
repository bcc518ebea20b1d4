"""Is it up, can it work, what is it."""

import asyncio
import importlib.metadata
import time
from datetime import timedelta

import sqlalchemy as sa
from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool

import migrations
from app import models, reports, schemas
from app.database import clock, read
from app.models import Worker
from app.routes import ServiceDep
from app.storage import StorageUnavailable

health = APIRouter(tags=["health"])
router = APIRouter(tags=["health"])

# A worker writes its heartbeat every second or two; one that has missed several does not count.
_HEARTBEAT_SECONDS = 10.0
# How long a worker that has just started is waited for, which tries its libraries: seconds where nothing else runs.
_TRYING_SECONDS, _ROUND_SECONDS = 20.0, 0.25


@health.get("/healthz")
def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@health.get("/readyz", responses={503: {"model": schemas.Readiness}})
def readyz(service: ServiceDep, response: Response) -> schemas.Readiness:
    """An analysis that is sent now would run; where not, which part is missing and why."""
    try:
        found, wanted = migrations.current(service.engine), migrations.head()
        database = worker = "ok"
        if found != wanted:
            database = f"its tables are at revision {found}, this version needs {wanted}: run `interplay migrate`"
            worker = "unknown without the tables"
        elif not _workers(service.engine):
            worker = "no worker has been heard of in the last 10 seconds"
    except sa.exc.SQLAlchemyError as error:
        database, worker = f"does not answer: {type(error).__name__}", "unknown without the database"
    try:
        service.storage.check()
        storage = "ok"
    except StorageUnavailable as error:
        storage = f"does not answer: {error}"
    ready = database == storage == worker == "ok"
    response.status_code = 200 if ready else 503
    return schemas.Readiness(ready=ready, database=database, storage=storage, worker=worker)


@router.get("/version")
async def version(service: ServiceDep) -> schemas.Version:
    """Versions of the service and of what its living workers offer.

    The answer waits for a worker that has just started and is still trying which families it can import, for a while.
    """
    deadline = time.monotonic() + _TRYING_SECONDS
    while True:
        workers = await run_in_threadpool(_workers, service.engine)
        fresh = models.now() - timedelta(seconds=_TRYING_SECONDS)
        trying = any(row.untried and row.started_at > fresh for row in workers)
        if not trying or time.monotonic() > deadline:
            break
        await asyncio.sleep(_ROUND_SECONDS)
    return schemas.Version(
        version=importlib.metadata.version("interplay"),
        schema_version=reports.SCHEMA_VERSION,
        definitions_version=reports.DEFINITIONS_VERSION,
        workers=[
            schemas.WorkerVersion(
                id=row.id,
                device=row.device,
                torch_version=row.torch_version,
                families=row.families,
                untried=row.untried or [],
                unavailable=row.unavailable or {},
            )
            for row in workers
        ],
    )


def _workers(engine: sa.Engine) -> list[Worker]:
    with read(engine) as session:
        heard = clock(session) - timedelta(seconds=_HEARTBEAT_SECONDS)
        return list(session.scalars(sa.select(Worker).where(Worker.ended_at.is_(None), Worker.heartbeat_at > heard)))
