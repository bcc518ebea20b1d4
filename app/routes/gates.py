"""Gates, their verdicts, and baselines over HTTP."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response

from app import gatefile, gates, schemas, verdicts
from app.listing import Listing, listing_with
from app.routes import ServiceDep, problems

router = APIRouter(tags=["gates"])
ListingDep = Annotated[Listing, Depends(listing_with())]
BaselineName = Annotated[schemas.Slug, Path(description="Letters, digits, dots, dashes and underscores.")]


@router.post(
    "/gates",
    status_code=201,
    responses={200: {"model": gatefile.Gate, "description": "The current version is the same"}, **problems(413, 422)},
)
def create_gate(body: gatefile.GateSpec, request: Request, response: Response, service: ServiceDep) -> gatefile.Gate:
    """Keep a gate as the next version of its name. The same content as the current version gives that one, with 200."""
    gate, new = gates.create(service.engine, body)
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"{request.url.path}/{gate.id}"
    return gate


@router.get("/gates", responses=problems(422))
def list_gates(service: ServiceDep, listing: ListingDep) -> schemas.Page[gatefile.GateSummary]:
    """Every version of every gate, without its checks."""
    return gates.list_page(service.engine, listing)


@router.get("/gates/schema")
def get_gate_schema() -> dict[str, Any]:
    """The JSON Schema of a gate's file, for editors."""
    return gatefile.file_schema()


@router.get("/gates/{id}", responses=problems(404))
def get_gate(id: schemas.Id, service: ServiceDep) -> gatefile.Gate:
    return gates.get(service.engine, id)


@router.post("/reports/{id}/gate", responses=problems(404, 422))
def judge_report(id: schemas.Id, body: schemas.GateRequest, service: ServiceDep) -> verdicts.Verdict:
    """What a gate says of a report: the verdict, and each check with one sentence why."""
    return gates.judge(service.engine, id, body)


@router.get("/baselines", responses=problems(422))
def list_baselines(service: ServiceDep, listing: ListingDep) -> schemas.Page[schemas.Baseline]:
    return gates.list_baselines(service.engine, listing)


@router.get("/baselines/{baseline}", responses=problems(404, 422))
def get_baseline(baseline: BaselineName, service: ServiceDep) -> schemas.Baseline:
    return gates.get_baseline(service.engine, baseline)


@router.put("/baselines/{baseline}", responses=problems(404, 409, 422))
def set_baseline(baseline: BaselineName, body: schemas.BaselinePut, service: ServiceDep) -> schemas.Baseline:
    """Let a baseline point at a report; with `expected_report_id` only if nobody has moved it meanwhile."""
    return gates.set_baseline(service.engine, baseline, body)


@router.get("/baselines/{baseline}/history", responses=problems(404, 422))
def list_baseline_moves(
    baseline: BaselineName, service: ServiceDep, listing: ListingDep
) -> schemas.Page[schemas.BaselineMove]:
    """What was asked of a baseline, refused moves included, newest first."""
    return gates.list_moves(service.engine, baseline, listing)
