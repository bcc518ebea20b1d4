"""The workflows that the queue runs.

An analysis of one step is a durable step: its result is recorded once, but its body may run again, as a kill between
its end and the record repeats it. All other workflows, and each workflow's own body, run again from the start at every
resumption. So all writes go through `attempts` and `turns`, whose functions are idempotent.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dbos import DBOS

from app import queue, traces
from app.logs import about
from workers import attempts, plans
from workers.fetching import running as fetching
from workers.steps import Host, compute
from workers.tasks import Json, Progress, Result, WholeStep

logger = logging.getLogger("interplay")


def register(host: Host) -> None:
    """Register the queue's functions, once for the process, before the queue is joined."""

    @DBOS.step(name="compute")
    def compute_whole(step: WholeStep) -> Json:
        def note(progress: Progress | None) -> bool:
            return attempts.note(host.engine, step.analysis_id, progress)

        return compute(host, step, note).model_dump()

    @DBOS.workflow(name=queue.WORKFLOW)
    def run_analysis(analysis_id: str) -> None:
        with _active(host, analysis_id), about(analysis_id=analysis_id), host.slot.hold():
            claimed_ns = time.time_ns()
            step = attempts.patiently(
                lambda: attempts.begin(
                    host.engine, host.client, host.worker_id, analysis_id, host.settings.max_attempts
                )
            )
            if step is not None:
                with (
                    about(analysis_id=analysis_id, request_id=step.request_id),
                    _traced(step, claimed_ns, worker=host.worker_id),
                ):
                    result = Result.model_validate(compute_whole(step))
                    with traces.span("write the report"):
                        ended = attempts.patiently(
                            lambda: attempts.finish(
                                host.engine,
                                host.client,
                                host.worker_id,
                                analysis_id,
                                result,
                                memory_patience_seconds=host.settings.memory_patience_seconds,
                            )
                        )
                    logger.info(
                        "the analysis has ended: %s" if ended else "the analysis goes on elsewhere, or has ended: %s",
                        result.outcome,
                    )

    @DBOS.workflow(name=queue.PLAN_WORKFLOW)
    def run_plan(plan_id: str) -> None:
        analysis_id = queue.analysis_of_plan(plan_id)
        with _active(host, plan_id), about(analysis_id=analysis_id):
            plans.look_after(host, analysis_id)

    @DBOS.workflow(name=queue.TURN_WORKFLOW)
    def run_turn(turn_id: str) -> None:
        with _active(host, turn_id), host.slot.hold():
            plans.take(host, turn_id)

    @DBOS.workflow(name=queue.FETCH_WORKFLOW)
    def run_fetch(fetch_id: str) -> None:
        with _active(host, fetch_id):
            fetching.run(host.settings, host.engine, host.storage, fetch_id)


@contextmanager
def _traced(step: WholeStep, claimed_ns: int, *, worker: str) -> Iterator[None]:
    """Trace an attempt at an analysis of one step: its wait, its claim, and what is done in the block."""
    if step.traceparent is None:
        yield
        return
    if step.waited_seconds is not None:
        traces.waited(step.waited_seconds, parent=step.traceparent)
    with traces.span(
        "attempt",
        parent=step.traceparent,
        began_ns=claimed_ns,
        analysis_id=step.analysis_id,
        request_id=step.request_id,
        worker=worker,
    ):
        traces.record([traces.Timed("claim", claimed_ns, time.time_ns())])
        yield


@contextmanager
def _active(host: Host, run_id: str) -> Iterator[None]:
    """Note that a run of the queue runs here; end this process if other workers have taken its work over."""
    host.active.add(run_id)
    try:
        yield
    except attempts.TakenOver:
        logger.error("other workers have taken this one for dead, and its work over; it ends")
        # At once: the queue would record how a run ended that is no longer this process's.
        os._exit(3)
    finally:
        host.active.discard(run_id)
