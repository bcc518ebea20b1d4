"""Is it up, can it work, what is it."""

import importlib.metadata

from fastapi import APIRouter, Request, Response

from app import reports, schemas
from app.admission import holds_key
from app.readiness import Part, living_workers
from app.routes import ServiceDep, problems

health = APIRouter(tags=["health"])
router = APIRouter(tags=["health"])


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
def version(service: ServiceDep) -> schemas.Version:
    """Versions of the service and of what its living workers offer."""
    workers = [
        schemas.WorkerVersion(id=row.id, device=row.device, torch_version=row.torch_version, families=row.families)
        for row in living_workers(service.engine)
    ]
    return schemas.Version(
        version=importlib.metadata.version("interplay"),
        schema_version=reports.SCHEMA_VERSION,
        definitions_version=reports.DEFINITIONS_VERSION,
        workers=workers,
    )
