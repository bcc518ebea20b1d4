"""The workflows that the queue runs. Each computed step is a durable step of one; everything else is repeatable.

A step's result is recorded once, but its body may run again: a kill between its end and the record repeats it. The
workflow's own body runs again from the start at every resumption. So all writes go through `attempts`, whose functions
are idempotent.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import sqlalchemy as sa
from dbos import DBOS

from app import queue
from app.errors import problem
from app.logs import about
from app.settings import Settings
from app.storage import Storage
from workers import attempts, inputs, reuse
from workers.child import ChildDied, ComputeChild
from workers.fetching import running as fetching
from workers.tasks import (
    Answer,
    FeatureSetTask,
    Json,
    NetworkTask,
    PointsTask,
    PointStep,
    Progress,
    ReportStep,
    Result,
    SeriesPointTask,
    WholeStep,
    Work,
    answer_of,
    point_step,
    report_step,
)

logger = logging.getLogger("interplay")

# A step whose child dies is retried once, in a fresh child.
_CHILD_ATTEMPTS = 2


@dataclass(frozen=True)
class Host:
    """The resources of this process's workflows; `active` holds the ids of the analyses that run in it now."""

    settings: Settings
    engine: sa.Engine
    storage: Storage
    child: ComputeChild
    active: set[str]


def register(host: Host) -> None:
    """Register the queue's functions, once for the process, before the queue is joined."""

    @DBOS.step(name="compute")
    def compute(step: WholeStep | PointStep | ReportStep) -> Json:
        return _compute(host, step).model_dump()

    @DBOS.workflow(name=queue.WORKFLOW)
    def run_analysis(analysis_id: str) -> None:
        host.active.add(analysis_id)
        try:
            with about(analysis_id=analysis_id):
                task = attempts.patiently(lambda: attempts.begin(host.engine, analysis_id, host.settings.max_attempts))
            if task is not None:
                with about(analysis_id=analysis_id, request_id=task.request_id):
                    result = _run(lambda step: Result.model_validate(compute(step)), task)
                    attempts.patiently(lambda: attempts.finish(host.engine, analysis_id, result))
                    logger.info("the analysis has ended: %s", result.outcome)
        finally:
            host.active.discard(analysis_id)

    @DBOS.workflow(name=queue.FETCH_WORKFLOW)
    def run_fetch(fetch_id: str) -> None:
        host.active.add(fetch_id)
        try:
            fetching.run(host.settings, host.engine, host.storage, fetch_id)
        finally:
            host.active.discard(fetch_id)


def _run(compute: Callable[[WholeStep | PointStep | ReportStep], Result], task: FeatureSetTask | NetworkTask) -> Result:
    """Run the only step of a task; for kinds with points one step for each, then one for the report.

    After a kill the recorded steps return their results again, and the first unrecorded one is computed.
    """
    if isinstance(task, WholeStep):
        return compute(task)
    assert isinstance(task, PointsTask)
    answers: list[Answer] = []
    while not (answers and answers[-1].last):
        result = compute(point_step(task, answers))
        if result.body is None:
            return result
        answers.append(answer_of(task, result.body))
    return compute(report_step(task, answers))


def _compute(host: Host, step: WholeStep | PointStep | ReportStep) -> Result:
    """Compute one step: check for cancellation, take an existing result or fetch files and compute."""

    def on_tick(progress: Progress | None) -> bool:
        try:
            return attempts.note(host.engine, step.analysis_id, progress)
        except sa.exc.DBAPIError as error:
            # The computation continues while the database is unavailable; the next tick retries.
            logger.warning("progress of analysis %s was not stored: %s", step.analysis_id, error)
            return False

    # Points may take less than one tick of the child, so cancellation is also checked before each point.
    if (begun := _begun(step)) and on_tick(begun):
        return Result(outcome="cancelled")
    if isinstance(step, SeriesPointTask):
        existing = attempts.patiently(lambda: reuse.existing_point(host.engine, step))
        if existing is not None:
            return Result(outcome="succeeded", body=existing.model_dump(mode="json", by_alias=True))
    with ExitStack() as stack:
        files = inputs.fetch(host.storage, host.settings, step, stack, on_tick)
        if isinstance(files, Result):
            return files
        return _compute_in_child(host.child, Work(step=step, files=files), on_tick)


def _compute_in_child(child: ComputeChild, work: Work, on_tick: Callable[[Progress | None], bool]) -> Result:
    """Compute in the child process, again in a fresh one if it dies; failures are results too."""
    reason = ""
    for _ in range(_CHILD_ATTEMPTS):
        try:
            return child.run(work, on_tick)
        except ChildDied as death:
            reason = str(death)
            logger.error("the compute process died during analysis %s: %s", work.step.analysis_id, reason)
            if on_tick(Progress(phase="starting again", done=0, total=0)):
                return Result(outcome="cancelled")
    detail = f"The compute process died {_CHILD_ATTEMPTS} times on this task: {reason}. Memory may have run out."
    return Result(outcome="failed", problem=problem("compute-crashed", "The compute process died", detail))


def _begun(step: WholeStep | PointStep | ReportStep) -> Progress | None:
    """Return the progress at the beginning of a step of a kind with points."""
    if isinstance(step, PointStep):
        return Progress(phase="point", done=len(step.known), total=step.total)
    if isinstance(step, ReportStep):
        return Progress(phase="report", done=len(step.points), total=len(step.points))
    return None
