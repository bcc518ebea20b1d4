"""Analyses: asked for, queued, cancelled, and what a client sees of them.

What was asked, the wish to cancel and the outcome are columns of ours; who runs it now is the queue's to say. The two
meet in `_status` alone.
"""

import hashlib
import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import models, queue, resources, schemas
from app.database import read, write
from app.errors import IdempotencyConflict, NotCancellable, NotFound
from app.listing import Listing, page
from app.models import Analysis, Report


def create(
    engine: sa.Engine,
    client: queue.Client,
    request: schemas.EvaluationRequest,
    idempotency_key: str | None,
) -> schemas.Analysis:
    """Queue an analysis: its row and its place in the queue commit together.

    Raises:
        NotFound: what it should look at does not exist.
        IdempotencyConflict: the key was used with another body.
    """
    body = request.model_dump(mode="json")
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    try:
        with write(engine) as session:
            if idempotency_key is not None and (earlier := _by_key(session, idempotency_key)):
                return _same_request(engine, session, earlier, digest)
            row = Analysis(
                kind=request.kind,
                name=_lock_subjects(session, request),
                checkpoint_id=request.checkpoint_id,
                probe_id=request.probe_id,
                feature_set_id=request.feature_set_id,
                options=body["options"],
                idempotency_key=idempotency_key,
                request_sha256=digest,
            )
            session.add(row)
            session.flush()
            queue.enqueue(client, session, row.id)
            return _view(session, engine, row.id)
    except sa.exc.IntegrityError:
        # The same key came twice at once, and the other one was first.
        if idempotency_key is None:
            raise
        with read(engine) as session:
            earlier = _by_key(session, idempotency_key)
            if earlier is None:
                raise
            return _same_request(engine, session, earlier, digest)


def get(engine: sa.Engine, id_: str) -> schemas.Analysis:
    with read(engine) as session:
        return _view(session, engine, id_)


def cancel(engine: sa.Engine, id_: str) -> schemas.Analysis:
    """Note the wish to cancel; what no worker has taken yet ends here, what runs is stopped by its worker.

    Raises:
        NotCancellable: it has already succeeded or failed.
    """
    with write(engine) as session:
        row = session.get(Analysis, id_, with_for_update=True)
        if row is None:
            raise NotFound(f"There is no analysis {id_!r}.")
        if row.outcome not in (None, "cancelled"):
            raise NotCancellable(f"The analysis {id_!r} has {row.outcome} already.")
        if row.outcome is None:
            row.cancel_requested_at = row.cancel_requested_at or models.now()
            if not session.scalar(sa.select(queue.is_claimed(engine, sa.literal(id_)))):
                row.outcome, row.finished_at = "cancelled", models.now()
        session.flush()
        return _view(session, engine, id_)


def list_page(
    engine: sa.Engine, listing: Listing, *, status: schemas.Status | None, **equal: str | None
) -> schemas.Page[schemas.Analysis]:
    """One page; `equal` filters by columns of the table."""
    query = _select(engine)
    if status is not None:
        query = query.where(_status(engine) == status)
    for column, value in equal.items():
        if value is not None:
            query = query.where(getattr(Analysis, column) == value)
    subjects = [Analysis.checkpoint_id, Analysis.probe_id, Analysis.feature_set_id]
    with read(engine) as session:
        rows, cursor = page(session, query, Analysis, listing, subjects)
        return schemas.Page(items=[_resource(*row) for row in rows], next_cursor=cursor)


def _select(engine: sa.Engine) -> sa.Select[Any]:
    report_id = sa.select(Report.id).where(Report.analysis_id == Analysis.id).scalar_subquery()
    return sa.select(Analysis, _status(engine), report_id)


def _status(engine: sa.Engine) -> sa.ColumnElement[str]:
    claimed = queue.is_claimed(engine, Analysis.id.expression)
    return sa.func.coalesce(Analysis.outcome, sa.case((claimed, "running"), else_="queued"))


def _view(session: Session, engine: sa.Engine, id_: str) -> schemas.Analysis:
    row = session.execute(_select(engine).where(Analysis.id == id_)).one_or_none()
    if row is None:
        raise NotFound(f"There is no analysis {id_!r}.")
    return _resource(*row)


def _resource(row: Analysis, status: schemas.Status, report_id: str | None) -> schemas.Analysis:
    return schemas.Analysis(
        id=row.id,
        kind=row.kind,
        name=row.name,
        status=status,
        progress=schemas.Progress(done=row.progress_done, total=row.progress_total, phase=row.progress_phase),
        checkpoint_id=row.checkpoint_id,
        probe_id=row.probe_id,
        feature_set_id=row.feature_set_id,
        options=row.options,
        attempts=row.attempts,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        report_id=report_id,
        problem=row.problem,
    )


def _by_key(session: Session, idempotency_key: str) -> Analysis | None:
    return session.scalars(sa.select(Analysis).where(Analysis.idempotency_key == idempotency_key)).one_or_none()


def _same_request(engine: sa.Engine, session: Session, earlier: Analysis, digest: str) -> schemas.Analysis:
    if earlier.request_sha256 != digest:
        raise IdempotencyConflict(
            f"The key {earlier.idempotency_key!r} belongs to the analysis {earlier.id}, which was asked for by "
            "another body. Use a new key.",
            analysis_id=earlier.id,
        )
    return _view(session, engine, earlier.id)


def _lock_subjects(session: Session, request: schemas.EvaluationRequest) -> str:
    """The name of what is looked at; nothing of it can be deleted before the transaction ends."""
    if request.feature_set_id is not None:
        return resources.get(session, models.FeatureSet, request.feature_set_id, lock="share").name
    assert request.checkpoint_id is not None
    assert request.probe_id is not None
    resources.get(session, models.Probe, request.probe_id, lock="share")
    return resources.get(session, models.Checkpoint, request.checkpoint_id, lock="share").name
