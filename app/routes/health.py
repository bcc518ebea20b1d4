"""Is it up, can it work, what is it."""

import importlib.metadata
from datetime import timedelta

import sqlalchemy as sa
from fastapi import APIRouter, Response

import migrations
from app import reports, schemas
from app.database import clock, read
from app.models import Worker
from app.routes import ServiceDep
from app.storage import StorageUnavailable

health = APIRouter(tags=["health"])
router = APIRouter(tags=["health"])

# A worker writes its heartbeat every second or two; one that has missed several does not count.
_HEARTBEAT_SECONDS = 10.0


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
def version(service: ServiceDep) -> schemas.Version:
    """Versions of the service and of what its living workers offer."""
    workers = [
        schemas.WorkerVersion(id=row.id, device=row.device, torch_version=row.torch_version, families=row.families)
        for row in _workers(service.engine)
    ]
    return schemas.Version(
        version=importlib.metadata.version("interplay"),
        schema_version=reports.SCHEMA_VERSION,
        definitions_version=reports.DEFINITIONS_VERSION,
        workers=workers,
    )


def _workers(engine: sa.Engine) -> list[Worker]:
    with read(engine) as session:
        heard = clock(session) - timedelta(seconds=_HEARTBEAT_SECONDS)
        return list(session.scalars(sa.select(Worker).where(Worker.ended_at.is_(None), Worker.heartbeat_at > heard)))
