"""Gates, their verdicts, and baselines over HTTP."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response

from app import schemas
from app.api.routes import ServiceDep, problems
from app.gates import baselines, form, judging, verdicts, versions
from app.listing import Listing, listing_with

router = APIRouter(tags=["gates"])
ListingDep = Annotated[Listing, Depends(listing_with())]
BaselineName = Annotated[schemas.Slug, Path(description="Letters, digits, dots, dashes and underscores.")]


@router.post(
    "/gates",
    status_code=201,
    responses={200: {"model": form.Gate, "description": "The current version is the same"}, **problems(413, 422)},
)
def create_gate(body: form.GateSpec, request: Request, response: Response, service: ServiceDep) -> form.Gate:
    """Store a gate as the next version of its name. The content of the current version returns that one, with 200."""
    gate, new = versions.create(service.engine, body)
    response.status_code = 201 if new else 200
    response.headers["Location"] = f"{request.url.path}/{gate.id}"
    return gate


@router.get("/gates", responses=problems(422))
def list_gates(service: ServiceDep, listing: ListingDep) -> schemas.Page[form.GateSummary]:
    """Every version of every gate, without its checks."""
    return versions.list_page(service.engine, listing)


@router.get("/gates/schema")
def get_gate_schema() -> dict[str, Any]:
    """The JSON Schema of a gate's file, for editors."""
    return form.file_schema()


@router.get("/gates/{id}", responses=problems(404))
def get_gate(id: schemas.Id, service: ServiceDep) -> form.Gate:
    return versions.get(service.engine, id)


@router.delete("/gates/{id}", status_code=204, responses=problems(404))
def delete_gate(id: schemas.Id, service: ServiceDep) -> None:
    """Delete the gate that this is a version of: all versions of its name. The next gate of this name is version 1."""
    versions.delete(service.engine, id)


@router.post("/reports/{id}/gate", responses=problems(404, 422))
def judge_report(id: schemas.Id, body: schemas.GateRequest, service: ServiceDep) -> verdicts.Verdict:
    """The verdict of a gate on a report, and each check with a one-sentence reason."""
    return judging.judge(service.engine, id, body)


@router.get("/baselines", responses=problems(422))
def list_baselines(service: ServiceDep, listing: ListingDep) -> schemas.Page[schemas.Baseline]:
    return baselines.list_page(service.engine, listing)


@router.get("/baselines/{baseline}", responses=problems(404, 422))
def get_baseline(baseline: BaselineName, service: ServiceDep) -> schemas.Baseline:
    return baselines.get(service.engine, baseline)


@router.put("/baselines/{baseline}", responses=problems(404, 409, 422))
def set_baseline(baseline: BaselineName, body: schemas.BaselinePut, service: ServiceDep) -> schemas.Baseline:
    """Point a baseline at a report; with `expected_report_id` only if the baseline has not moved meanwhile."""
    return baselines.put(service.engine, baseline, body)


@router.delete("/baselines/{baseline}", status_code=204, responses=problems(404, 422))
def delete_baseline(baseline: BaselineName, service: ServiceDep) -> None:
    """Delete a baseline with its history; the reports that it has pointed at stay."""
    baselines.delete(service.engine, baseline)


@router.get("/baselines/{baseline}/history", responses=problems(404, 422))
def list_baseline_moves(
    baseline: BaselineName, service: ServiceDep, listing: ListingDep
) -> schemas.Page[schemas.BaselineMove]:
    """The requested moves of a baseline, refused ones included, newest first."""
    return baselines.list_moves(service.engine, baseline, listing)
