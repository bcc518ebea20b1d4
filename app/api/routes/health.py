"""Is it up, can it work, what is it."""

import asyncio
import importlib.metadata
import time
from datetime import timedelta

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from app import schemas
from app.api.admission import holds_key
from app.api.readiness import Part, living_workers
from app.api.routes import ServiceDep, problems
from app.schemas import reports

health = APIRouter(tags=["health"])
router = APIRouter(tags=["health"])

# How long a worker that has just started is waited for, which tries its libraries: seconds where nothing else runs.
_TRYING, _ROUND_SECONDS = timedelta(seconds=20), 0.25


@health.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers. It needs no thread, no database and no storage for that."""
    return {"status": "ok"}


@health.get("/readyz", responses={503: {"model": schemas.Readiness}})
async def readyz(service: ServiceDep, request: Request, response: Response) -> schemas.Readiness:
    """An analysis that is sent now would run; where not, which part is missing. Whoever sends the key hears why.

    The answer comes within two seconds, and may be one second old.
    """
    parts = await service.readiness.look()
    may_know = holds_key(service.settings, request.headers.get("authorization", "").encode("latin-1"))
    ready = all(part == Part() for part in parts.values())
    response.status_code = 200 if ready else 503
    response.headers["Cache-Control"] = "no-store"
    words = {
        name: f"{part.told}: {part.error}" if may_know and part.error else part.told for name, part in parts.items()
    }
    return schemas.Readiness(ready=ready, **words)


@router.get("/version", responses=problems(503))
async def version(service: ServiceDep) -> schemas.Version:
    """Versions of the service and of what its living workers offer.

    The answer waits for a worker that has just started and is still trying which families it can import, for a while.
    """
    deadline = time.monotonic() + _TRYING.total_seconds()
    while True:
        workers = await run_in_threadpool(living_workers, service.engine)
        trying = any(row.untried and row.heartbeat_at - row.started_at < _TRYING for row in workers)
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
