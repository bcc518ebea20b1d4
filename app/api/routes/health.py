"""Health, readiness and version of the service."""

import asyncio
import importlib.metadata
import time
from datetime import timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app import schemas
from app.api.admission import holds_key
from app.api.readiness import Part, living_workers
from app.api.routes import ServiceDep, problems
from app.schemas import reports

health = APIRouter(tags=["health"])
router = APIRouter(tags=["health"])

# Timeout for a worker that has just started and tries its libraries, which takes seconds on an idle machine.
_TRYING, _ROUND_SECONDS = timedelta(seconds=20), 0.25


@health.get("/healthz")
async def healthz() -> dict[str, str]:
    """Whether the process answers. Needs no thread, no database and no storage."""
    return {"status": "ok"}


@health.get("/readyz", responses={503: {"model": schemas.Readiness}})
async def readyz(
    service: ServiceDep,
    request: Request,
    response: Response,
    exclude: Annotated[
        list[Literal["database", "storage", "worker"]] | None,
        Query(description="Parts that are told, but do not count; workers may all be stopped while nothing waits."),
    ] = None,
) -> schemas.Readiness:
    """Whether an analysis that is sent now would run, and if not, which part is missing. The reason needs the key.

    The answer comes within two seconds, and may be one second old.
    """
    parts = await service.readiness.look()
    may_know = holds_key(service.settings, request.headers.get("authorization", "").encode("latin-1"))
    ready = all(part == Part() for name, part in parts.items() if name not in (exclude or ()))
    response.status_code = 200 if ready else 503
    response.headers["Cache-Control"] = "no-store"
    words = {
        name: f"{part.told}: {part.error}" if may_know and part.error else part.told for name, part in parts.items()
    }
    return schemas.Readiness(ready=ready, **words)


@health.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **problems(401)})
def metrics(service: ServiceDep) -> Response:
    """Figures for Prometheus (docs/operations.md). With a key of the service, it is needed here too."""
    return Response(generate_latest(service.measures.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/version", responses=problems(503))
async def version(service: ServiceDep) -> schemas.Version:
    """Versions of the service, and the families and libraries of its living workers.

    The answer waits for a limited time for a worker that has just started and is still trying to import families.
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
                memory_bytes=row.memory_bytes,
                torch_version=row.torch_version,
                families=row.families,
                untried=row.untried or [],
                unavailable=row.unavailable or {},
            )
            for row in workers
        ],
    )
