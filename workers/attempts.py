"""An attempt at an analysis, or at a fetch, as the database records it: begun, in progress, ended.

Each function is one transaction that locks the run's row, so it stays consistent beside concurrent writers: a client
that cancels, or a worker that was assumed dead and still runs.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar
from uuid import uuid4

import sqlalchemy as sa
from dbos import DBOSClient
from pydantic import JsonValue, TypeAdapter, ValidationError
from sqlalchemy.orm import Session

from app import queue
from app.database import clock, read, write
from app.errors import problem
from app.models import (
    Analysis,
    AnalysisCheckpoint,
    Checkpoint,
    FeatureSet,
    Fetch,
    MetadataEntry,
    Probe,
    Report,
    ReportMetric,
    Run,
    Worker,
    now,
)
from app.schemas.metrics import metrics_of
from app.schemas.reports import DEFINITIONS_VERSION, SCHEMA_VERSION, EvaluationReport, Subject
from app.schemas.reports import Report as AnyReport
from workers import memory, tasks
from workers.tasks import Json, Progress, Result

_REPORTS: TypeAdapter[AnyReport] = TypeAdapter(AnyReport)
# Characters of a prefix that a checkpoint's row stores; a report has all of it.
_MAX_PREFIX = 200
# Pause between retries of a database that does not answer.
_PAUSE_SECONDS = 1.0
AnyRun = TypeVar("AnyRun", Analysis, Fetch)
T = TypeVar("T")
logger = logging.getLogger("interplay")


class TakenOver(Exception):
    """Other workers have taken this one for dead, and its work over."""


class Ended(Exception):
    """A run that something was made for has ended meanwhile."""


def begin(
    engine: sa.Engine, client: DBOSClient, worker_id: str, analysis_id: str, max_attempts: int
) -> tasks.WholeStep | None:
    """Count an attempt at an analysis of one step and return it; None if there is nothing to do here.

    One that needs more memory than this worker has is planned, for those that have enough.

    Raises:
        TakenOver: others have taken this worker for dead.
    """
    with write(engine) as session:
        row = _begun(session, Analysis, analysis_id, max_attempts)
        require_alive(session, worker_id)
        if row is None:
            return None
        task = task_of(session, row)
        assert isinstance(task, tasks.WholeStep)
        if task.needs_bytes > memory.of_worker(session, worker_id):
            _plan_later(session, client, row, task.needs_bytes)
            return None
        if row.traceparent is None or row.attempts > 1:
            return task
        return task.model_copy(update={"waited_seconds": (clock(session) - row.created_at).total_seconds()})


def begin_fetch(engine: sa.Engine, fetch_id: str, max_attempts: int) -> Fetch | None:
    """Count an attempt and return the fetch, with its spec; None if there is nothing left to do."""
    with write(engine) as session:
        row = _begun(session, Fetch, fetch_id, max_attempts)
        if row is not None:
            session.refresh(row, ["spec"])
        return row


def _begun(session: Session, model: type[AnyRun], id_: str, max_attempts: int) -> AnyRun | None:
    row = session.get(model, id_, with_for_update=True)
    if row is None or row.outcome is not None:
        return None
    if isinstance(row, Analysis) and row.needs_bytes is not None:
        return None  # its turns go on
    if row.cancel_requested_at is not None:
        _end(session, row, Result(outcome="cancelled"))
        return None
    if row.attempts >= max_attempts:
        detail = f"Its worker died in each of {row.attempts} attempts; it is not tried again."
        what = "The analysis was given up" if model is Analysis else "The fetch was given up"
        _end(
            session,
            row,
            Result(outcome="failed", problem=problem("too-many-attempts", what, detail, attempts=row.attempts)),
        )
        return None
    row.attempts += 1
    row.started_at = row.started_at or now()
    row.progress_phase, row.progress_done, row.progress_total = "starting", 0, 0
    return row


def evaluation_of(engine: sa.Engine, task: tasks.SeriesTask, checkpoint: tasks.Checkpoint) -> EvaluationReport | None:
    """Return the newest evaluation report of a task's checkpoint on its probe with its options, or None."""
    places = sa.select(AnalysisCheckpoint.analysis_id).where(AnalysisCheckpoint.checkpoint_id == checkpoint.id)
    reports = (
        sa.select(Report.content)
        .where(Report.kind == "evaluation", Report.probe_id == task.probe.id, Report.analysis_id.in_(places))
        .order_by(Report.created_at.desc(), Report.id.desc())
    )
    with read(engine) as session:
        for content in session.scalars(reports):
            try:
                # The schema gives a report that is older than an option the option's default, as it was computed.
                report = EvaluationReport.model_validate_json(content)
            except ValidationError:
                # Of another version, with members that this one does not have or without some that it needs.
                continue
            if report.provenance.options == task.options and report.definitions_version == DEFINITIONS_VERSION:
                return report
    return None


def note(
    engine: sa.Engine, run_id: str, progress: Progress | None, model: type[Analysis] | type[Fetch] = Analysis
) -> bool:
    """Store progress, if any; return whether the run is to be cancelled or has ended elsewhere."""
    going_on = sa.and_(model.id == run_id, model.outcome.is_(None), model.cancel_requested_at.is_(None))
    with engine.begin() as connection:
        if progress is None:
            return connection.scalar(sa.select(sa.literal(1)).where(going_on)) is None
        told = sa.update(model).where(going_on)
        values = {"progress_done": progress.done, "progress_total": progress.total}
        return not connection.execute(told.values(progress_phase=progress.phase, **values)).rowcount


def finish(
    engine: sa.Engine,
    client: DBOSClient,
    worker_id: str,
    analysis_id: str,
    result: Result,
    *,
    memory_patience_seconds: float,
) -> bool:
    """Record the outcome and the report once; return False if an outcome was already recorded, or none is yet.

    An analysis for which its worker's memory was too little is planned, for workers that have more.

    Raises:
        TakenOver: others have taken this worker for dead.
    """
    with write(engine) as session:
        row = session.get(Analysis, analysis_id, with_for_update=True)
        require_alive(session, worker_id)
        if row is None or row.outcome is not None:
            return False
        needs = memory.needed(result)
        if needs is not None and row.cancel_requested_at is None:
            memories = memory.Memories.now(session, memory_patience_seconds)
            if memories.may_have(needs):
                _plan_later(session, client, row, needs)
                return False
            result = memory.too_little(needs, memories.largest, result.problem)
        record(session, row, result)
        return True


def _plan_later(session: Session, client: DBOSClient, row: Analysis, needs_bytes: int) -> None:
    """Plan an analysis of one step for workers with more memory; it waits as if nobody had begun it."""
    queue.plan_later(client, session, row, needs_bytes)
    # At once, as the plan itself may wait behind others.
    if queues := memory.living(session, needs_bytes):
        queue.enqueue_turns(client, session, row.id, memory.least_taken(session, queues, 1))
    row.attempts, row.started_at, row.progress_phase = row.attempts - 1, None, "queued"
    row.progress_done = row.progress_total = 0


def record(session: Session, row: Analysis, result: Result) -> None:
    """Record the outcome, and the report if there is one, of a locked analysis without an outcome."""
    if result.body is not None:
        report = _report(row, result.body)
        subjects = _subjects(report)
        _store(session, row, report)
        session.add_all(MetadataEntry.entries(report.id, _metadata(subjects)))
        _note_names(session, subjects)
        row.progress_phase, row.progress_done = "finished", row.progress_total
    _end(session, row, result)


def require_alive(session: Session, worker_id: str) -> None:
    """Check that others have not taken this worker for dead: they do its work now, and it must not write.

    Raises:
        TakenOver: they have.
    """
    worker = session.get(Worker, worker_id)
    if worker is None or worker.ended_at is not None:
        raise TakenOver(worker_id)


def end(engine: sa.Engine, model: type[Analysis] | type[Fetch], run_id: str, result: Result) -> None:
    """Record an outcome that leaves no report; nothing happens if one was already recorded."""
    with write(engine) as session:
        row = session.get(model, run_id, with_for_update=True)
        if row is not None and row.outcome is None:
            _end(session, row, result)


def use(session: Session, resource_id: str, *, fetch_id: str) -> None:
    """Record, in the transaction that makes the resource, what a fetch has become.

    Raises:
        Ended: it has ended meanwhile: cancelled, or by another worker.
    """
    row = session.get(Fetch, fetch_id, with_for_update=True)
    if row is None or row.outcome is not None or row.cancel_requested_at is not None:
        raise Ended
    row.resource_id, row.progress_phase = resource_id, "finished"
    _end(session, row, Result(outcome="succeeded"))


def patiently(transaction: Callable[[], T]) -> T:
    """Run a transaction, retrying while the database is unavailable: a restart must not lose an outcome."""
    while True:
        try:
            return transaction()
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            if not _is_outage(error):
                raise
            logger.warning("the database does not answer, trying again: %s", error)
            time.sleep(_PAUSE_SECONDS)


def _is_outage(error: sa.exc.DBAPIError | sa.exc.TimeoutError) -> bool:
    """Return whether a transaction failed because the database was away, or had ended the session."""
    away = isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.TimeoutError)
    return away or (isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated)


def _end(session: Session, row: Run, result: Result) -> None:
    if isinstance(row, Fetch):
        row.spec = ""
    elif isinstance(row, Analysis) and queue.is_planned(row):
        queue.close_turns(session, row.id)
    row.outcome, row.problem, row.finished_at = result.outcome, result.problem, now()


def task_of(session: Session, row: Analysis) -> tasks.TurnTask:
    """Return the task that an analysis's row and the rows of its subjects describe."""
    common: dict[str, object] = {
        "analysis_id": row.id,
        "request_id": row.request_id,
        "traceparent": row.traceparent,
        "options": row.options,
    }
    if row.feature_set_id is not None:
        feature_set = tasks.FeatureSet.of(session.get_one(FeatureSet, row.feature_set_id))
        return tasks.FeatureSetTask.model_validate({**common, "feature_set": feature_set})
    checkpoints = [session.get_one(Checkpoint, place.checkpoint_id) for place in row.checkpoints]
    common["checkpoints"] = tuple(map(tasks.Checkpoint.of, checkpoints))
    common["probe"] = tasks.Probe.of(session.get_one(Probe, row.probe_id))
    common["shard_samples"] = row.shard_samples
    if row.axis is not None:
        common["axis"] = row.axis
    is_cut = row.kind == "evaluation" and row.shard_samples is not None
    task = (tasks.ShardedTask if is_cut else tasks.TASKS[row.kind]).model_validate(common)
    assert isinstance(task, tasks.TurnTask)
    return task


def _subjects(report: AnyReport) -> Sequence[Subject]:
    """Return all subjects of a report."""
    return report.subjects if hasattr(report, "subjects") else [report.subject]


def _note_names(session: Session, subjects: Sequence[Subject]) -> None:
    """Store on the checkpoints how their files name tensors, which was a guess before a network was built."""
    found = {subject.id: subject for subject in subjects if subject.infixes is not None}
    unchecked = sa.select(Checkpoint).where(Checkpoint.id.in_(found), ~Checkpoint.names_checked)
    # Locked in one order, so that two analyses of the same checkpoints cannot deadlock.
    for checkpoint in session.scalars(unchecked.order_by(Checkpoint.id).with_for_update()):
        subject = found[checkpoint.id]
        assert subject.prefix is not None
        assert subject.ignored is not None
        assert subject.n_parameters is not None
        checkpoint.prefix, checkpoint.ignored = subject.prefix[:_MAX_PREFIX], dict(subject.ignored)
        checkpoint.n_parameters, checkpoint.names_checked = subject.n_parameters, True


def _metadata(subjects: Sequence[Subject]) -> Json:
    """Return the metadata of all subjects of a report: each key with every value that a subject has."""
    found: dict[str, list[JsonValue]] = {}
    for subject in subjects:
        for key, value in subject.metadata.items():
            found.setdefault(key, []).extend(value if isinstance(value, list) else [value])
    return {**found}


def _report(row: Analysis, body: Json) -> AnyReport:
    """Return the report of an analysis."""
    return _REPORTS.validate_python(
        {
            "schema_version": SCHEMA_VERSION,
            "definitions_version": DEFINITIONS_VERSION,
            "kind": row.kind,
            "id": str(uuid4()),
            "analysis_id": row.id,
            "created_at": now(),
            **body,
        }
    )


def _store(session: Session, row: Analysis, report: AnyReport) -> None:
    """Store a report and its metrics."""
    content = report.model_dump_json(by_alias=True)
    session.add(
        Report(
            id=report.id,
            created_at=report.created_at,
            analysis_id=row.id,
            kind=row.kind,
            name=row.name,
            probe_id=row.probe_id,
            feature_set_id=row.feature_set_id,
            sha256=hashlib.sha256(content.encode()).hexdigest(),
            content=content,
        )
    )
    session.flush()  # metrics refer to the report
    metrics = [
        {"report_id": report.id, "path": path, "value": value}
        for path, value in metrics_of(row.kind, json.loads(content)).items()
    ]
    if metrics:
        session.execute(sa.insert(ReportMetric), metrics)
