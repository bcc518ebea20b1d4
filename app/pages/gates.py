"""Pages of gates and baselines: versions, checks, moves, and what a gate says of each move."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Query, Request, Response

from app import models, schemas
from app.api.routes import ServiceDep
from app.database import read
from app.errors import NotFound, ServiceError
from app.gates import baselines, judging, versions
from app.gates.verdicts import Verdict
from app.listing import Listing
from app.pages.rendering import page, see_other
from app.pages.visitors import AuthorDep, VisitorDep
from app.schemas.kinds import KINDS

router = APIRouter()
_MOST = 200
# Judging reads two reports; a timeline shows so many moves.
_MOST_MOVES = 20
_REPORT = sa.select(models.Report.id, models.Report.name, models.Report.kind)


@dataclass(frozen=True)
class _Move:
    """A move of a baseline, and a gate's verdict on its report, or why there is none.

    Attributes:
        move: as it was requested.
        name: of the report's subject; None once the report was deleted.
        has_before: whether there is a report that it replaced.
        verdict: of the report against the one that it replaced; None without a gate.
        problem: why the gate cannot judge it.
    """

    move: schemas.BaselineMove
    name: str | None
    has_before: bool
    verdict: Verdict | None
    problem: str | None


@dataclass(frozen=True)
class _Asked:
    """A gate and a baseline, as an address names them."""

    gate: schemas.Id | None = None
    baseline: schemas.Slug | None = None
    baseline_report_id: schemas.Id | None = None


@router.get("/gates")
def list_gates(
    request: Request, visitor: VisitorDep, service: ServiceDep, listing: Annotated[Listing, Depends()]
) -> Response:
    """Every version of every gate, the newest first."""
    found = versions.list_page(service.engine, listing)
    return page(request, visitor, "gates.html", gates=found.items, next_cursor=found.next_cursor, listing=listing)


@router.get("/gates/{id}")
def show_gate(request: Request, id: schemas.Id, visitor: VisitorDep, service: ServiceDep) -> Response:
    """One version of a gate: its checks, and the other versions."""
    gate = versions.get(service.engine, id)
    others = versions.list_page(service.engine, Listing(limit=_MOST, name=gate.name)).items
    return page(request, visitor, "gate.html", gate=gate, versions=others)


@router.post("/gates/{id}/delete")
def delete_gate(request: Request, id: schemas.Id, _: AuthorDep, service: ServiceDep) -> Response:
    """Delete all versions of a gate, and show the others."""
    versions.delete(service.engine, id)
    return see_other(request, "/gates")


@router.post("/baselines/{baseline}/delete")
def delete_baseline(request: Request, baseline: schemas.Slug, _: AuthorDep, service: ServiceDep) -> Response:
    """Delete a baseline with its history, and show the others."""
    baselines.delete(service.engine, baseline)
    return see_other(request, "/baselines")


@router.get("/baselines")
def list_baselines(
    request: Request, visitor: VisitorDep, service: ServiceDep, listing: Annotated[Listing, Depends()]
) -> Response:
    """Baselines, and the reports that they point at."""
    found = baselines.list_page(service.engine, listing)
    return page(
        request,
        visitor,
        "baselines.html",
        baselines=found.items,
        names=_names(service.engine, [one.report_id for one in found.items]),
        next_cursor=found.next_cursor,
        listing=listing,
    )


@router.get("/baselines/{baseline}")
def show_baseline(
    request: Request,
    baseline: schemas.Slug,
    visitor: VisitorDep,
    service: ServiceDep,
    gate: Annotated[schemas.Id | None, Query()] = None,
    cursor: Annotated[str | None, Query(max_length=3000)] = None,
) -> Response:
    """The moves of a baseline; with `gate` what that gate says of each, against the report before."""
    found = baselines.list_moves(service.engine, baseline, Listing(limit=_MOST_MOVES, cursor=cursor))
    ids = [id_ for move in found.items for id_ in (move.report_id, move.before_report_id) if id_ is not None]
    names = _names(service.engine, ids)
    return page(
        request,
        visitor,
        "baseline.html",
        baseline=baseline,
        moves=[_judged(service.engine, move, names, gate) for move in found.items],
        next_cursor=found.next_cursor,
        gates=versions.list_page(service.engine, Listing(limit=_MOST)).items,
        chosen=gate,
    )


@router.get("/reports/{id}/verdict")
def show_verdict(
    request: Request,
    id: schemas.Id,
    visitor: VisitorDep,
    service: ServiceDep,
    asked: Annotated[_Asked, Depends()],
) -> Response:
    """What a gate says of a report, check by check; without a gate the form that asks for one."""
    with read(service.engine) as session:
        report = session.execute(_REPORT.where(models.Report.id == id)).one_or_none()
    if report is None:
        raise NotFound(f"There is no report {id!r}.")
    verdict, problem = None, None
    if asked.gate is not None:
        judged = schemas.GateRequest(
            gate_id=asked.gate, baseline=asked.baseline, baseline_report_id=asked.baseline_report_id
        )
        verdict, problem = _verdict(service.engine, id, judged)
    kinds = {report.kind, KINDS[report.kind].also_judged_as}
    return page(
        request,
        visitor,
        "verdict.html",
        report=report,
        gates=[one for one in versions.list_page(service.engine, Listing(limit=_MOST)).items if one.kind in kinds],
        baselines=baselines.list_page(service.engine, Listing(limit=_MOST)).items,
        chosen=asked.gate,
        baseline=asked.baseline,
        verdict=verdict,
        problem=problem,
    )


def _verdict(engine: sa.Engine, report_id: str, asked: schemas.GateRequest) -> tuple[Verdict | None, str | None]:
    """Return a gate's verdict, or why it cannot judge the report: it is of another kind, or the two do not compare."""
    try:
        return judging.judge(engine, report_id, asked), None
    except NotFound:
        raise
    except ServiceError as error:
        return None, error.detail


def _judged(
    engine: sa.Engine, move: schemas.BaselineMove, names: Mapping[str, str], gate_id: schemas.Id | None
) -> _Move:
    name, before = names.get(move.report_id), move.before_report_id
    verdict, problem = None, None
    if gate_id is not None and name is not None:
        if before is not None and before not in names:
            problem = "The report that it replaced was deleted: there is nothing to compare with."
        else:
            asked = schemas.GateRequest(gate_id=gate_id, baseline_report_id=before)
            verdict, problem = _verdict(engine, move.report_id, asked)
    return _Move(move, name, before in names, verdict, problem)


def _names(engine: sa.Engine, report_ids: Sequence[str]) -> dict[str, str]:
    """Return what the reports are of, by their ids."""
    query = sa.select(models.Report.id, models.Report.name).where(models.Report.id.in_(report_ids))
    with read(engine) as session:
        return {row.id: row.name for row in session.execute(query)}
