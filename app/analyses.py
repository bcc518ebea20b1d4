"""Analyses: requested, queued, cancelled, and shown to clients.

The request, the request to cancel and the outcome are our columns; the queue knows which worker runs it now. Only
`queue.status_of` combines the two into a status.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import models, queue, resources, schemas, traces
from app.database import read, write
from app.descriptions.alike import require_comparable, require_one_network
from app.descriptions.architectures import is_causal_lm
from app.descriptions.labels import match_labels, require_suitable
from app.errors import IdempotencyConflict, NotFound
from app.listing import Listing, page
from app.logs import current_request
from app.models import Analysis, AnalysisCheckpoint, Report
from app.shards import samples_of_a_shard


def create(
    engine: sa.Engine,
    client: queue.LateClient,
    request: schemas.AnalysisRequest,
    idempotency_key: str | None,
    *,
    shard_work: int = 0,
) -> schemas.Analysis:
    """Queue an analysis: its row and its place in the queue commit together.

    Args:
        engine: of the database.
        client: of the queue.
        request: what is asked for.
        idempotency_key: the same key and request return the same analysis.
        shard_work: as `shards.samples_of_a_shard` takes it.

    Raises:
        NotFound: a checkpoint, probe or feature set of the request does not exist.
        ArchitecturesDiffer: checkpoints of a path are of different networks, or those of a series of different classes.
        LabelsDiffer: the probe's class names are not the checkpoint's.
        ProbeUnsuitable: the probe has no labels for a classifier, or no tokens for a language model.
        IdempotencyConflict: the key was used with another body.
    """
    body = request.model_dump(mode="json")
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    try:
        with write(engine) as session:
            if idempotency_key is not None and (earlier := _by_key(session, idempotency_key)):
                return _same_request(engine, session, earlier, digest)
            checkpoint_ids = _checkpoint_ids(request)
            subjects = _lock_subjects(session, request, checkpoint_ids)
            row = Analysis(
                kind=request.kind,
                name=subjects.name,
                checkpoints=[AnalysisCheckpoint(position=n, checkpoint_id=id_) for n, id_ in enumerate(checkpoint_ids)],
                probe_id=request.probe_id,
                feature_set_id=_feature_set_id(request),
                options=body["options"],
                axis=body.get("axis"),
                shard_samples=subjects.shard_samples(request.kind, body["options"], shard_work),
                idempotency_key=idempotency_key,
                request_sha256=digest,
                request_id=current_request(),
                traceparent=traces.current(),
            )
            session.add(row)
            session.flush()
            queue.enqueue_analysis(client.get(), session, row)
            return _view(session, engine, row.id)
    except sa.exc.IntegrityError:
        # A concurrent request with the same key committed first.
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


def get_several(engine: sa.Engine, ids: Sequence[str]) -> list[schemas.Analysis]:
    """Return the existing ones of these analyses, in any order."""
    with read(engine) as session:
        return [_resource(*row) for row in session.execute(_select(engine.dialect.name).where(Analysis.id.in_(ids)))]


def cancel(engine: sa.Engine, id_: str) -> schemas.Analysis:
    """Record the request to cancel; a queued analysis ends here, a running one is stopped by its worker.

    Raises:
        NotCancellable: it has already succeeded or failed.
    """
    with write(engine) as session:
        row = session.get(Analysis, id_, with_for_update=True)
        if row is None:
            raise NotFound(f"There is no analysis {id_!r}.")
        queue.cancel(session, engine.dialect.name, row)
        session.flush()
        return _view(session, engine, id_)


def list_page(
    engine: sa.Engine,
    listing: Listing,
    *,
    status: schemas.Status | None,
    checkpoint_id: str | None,
    **equal: str | None,
) -> schemas.Page[schemas.Analysis]:
    """Return one page; `equal` filters by columns of the table."""
    query = _select(engine.dialect.name)
    if status is not None:
        query = query.where(_status(engine.dialect.name) == status)
    if checkpoint_id is not None:
        query = query.where(looks_at(Analysis.id, [checkpoint_id]))
    for column, value in equal.items():
        if value is not None:
            query = query.where(getattr(Analysis, column) == value)

    def subject_in(ids: Ids) -> sa.ColumnElement[bool]:
        return sa.or_(Analysis.probe_id.in_(ids), Analysis.feature_set_id.in_(ids), looks_at(Analysis.id, ids))

    with read(engine) as session:
        rows, cursor = page(session, query, Analysis, listing, subject_in)
        return schemas.Page(items=[_resource(*row) for row in rows], next_cursor=cursor)


def count_queued(engine: sa.Engine) -> int:
    """Return the number of analyses that wait for a worker."""
    query = sa.select(sa.func.count()).select_from(Analysis).where(_status(engine.dialect.name) == "queued")
    with read(engine) as session:
        return session.scalar(query) or 0


Ids = Sequence[str] | sa.Select[str]


def looks_at(analysis_id: sa.orm.InstrumentedAttribute[str], checkpoint_ids: Ids) -> sa.ColumnElement[bool]:
    """Return SQL that is true where an analysis uses one of these checkpoints."""
    places = sa.select(AnalysisCheckpoint.analysis_id).where(AnalysisCheckpoint.checkpoint_id.in_(checkpoint_ids))
    return analysis_id.in_(places)


# Built once per dialect: SQLAlchemy takes longer to build these than the database takes to answer.
@cache
def _select(dialect: str) -> sa.Select[Any]:
    report_id = sa.select(Report.id).where(Report.analysis_id == Analysis.id).scalar_subquery()
    return sa.select(Analysis, _status(dialect), report_id)


@cache
def _select_one(dialect: str) -> sa.Select[Any]:
    return _select(dialect).where(Analysis.id == sa.bindparam("id"))


@cache
def _status(dialect: str) -> sa.ColumnElement[str]:
    return queue.status_of(dialect, Analysis)


def _view(session: Session, engine: sa.Engine, id_: str) -> schemas.Analysis:
    row = session.execute(_select_one(engine.dialect.name), {"id": id_}).one_or_none()
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
        checkpoint_id=row.checkpoints[0].checkpoint_id if len(row.checkpoints) == 1 else None,
        checkpoint_ids=[place.checkpoint_id for place in row.checkpoints],
        probe_id=row.probe_id,
        feature_set_id=row.feature_set_id,
        axis=None if row.axis is None else schemas.Axis(**row.axis),
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


def _checkpoint_ids(request: schemas.AnalysisRequest) -> list[str]:
    match request:
        case schemas.PathRequest() | schemas.ComparisonRequest():
            return [request.checkpoint_a_id, request.checkpoint_b_id]
        case schemas.SeriesRequest():
            return request.checkpoint_ids
    return [] if request.checkpoint_id is None else [request.checkpoint_id]


def _feature_set_id(request: schemas.AnalysisRequest) -> str | None:
    return request.feature_set_id if isinstance(request, schemas.EvaluationRequest) else None


@dataclass(frozen=True)
class _Subjects:
    """What an analysis looks at: checkpoints and a probe, or without them a feature set; and the name of all."""

    name: str
    checkpoints: Sequence[models.Checkpoint] = ()
    probe: models.Probe | None = None

    def shard_samples(self, kind: schemas.Kind, options: Mapping[str, Any], work: int) -> int | None:
        if self.probe is None:
            return None
        return samples_of_a_shard(kind, self.checkpoints, self.probe, options, work=work)


def _lock_subjects(session: Session, request: schemas.AnalysisRequest, checkpoint_ids: Sequence[str]) -> _Subjects:
    """Return the subjects, locked so that none can be deleted before the transaction ends."""
    if (feature_set_id := _feature_set_id(request)) is not None:
        return _Subjects(resources.get(session, models.FeatureSet, feature_set_id, lock="share").name)
    assert request.probe_id is not None
    probe = resources.get(session, models.Probe, request.probe_id, lock="share")
    rows = [resources.get(session, models.Checkpoint, id_, lock="share") for id_ in checkpoint_ids]
    if request.kind == "path":
        require_one_network(rows)
    elif request.kind == "series":
        require_comparable(rows)
    for row in rows:
        require_suitable(
            row.architecture,
            content=probe.content,
            n_classes=probe.n_classes,
            input_shape=probe.input_shape,
        )
        if not is_causal_lm(row.architecture):
            match_labels(probe.class_names, row.architecture)
    name = rows[0].name if len(rows) == 1 else f"{rows[0].name} to {rows[-1].name}"[:200]
    return _Subjects(name, rows, probe)
