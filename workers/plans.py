"""The plan and the turns of a planned analysis, as the queue runs them. Their state is in the database (`turns`).

A plan holds no device. It looks after its analysis every two seconds, until that has ended. A turn computes points.
Either may be killed at any time: it begins again on another worker, and finds in the database what is left.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from app import traces
from app.errors import problem
from app.logs import about
from app.storage import StorageUnavailable
from workers import attempts, turns
from workers.steps import Host, compute
from workers.tasks import Known, PointStep, Progress, Result

logger = logging.getLogger("interplay")

_ROUND_SECONDS = 2.0
# How often a turn looks whether others wait, where points are shorter than this.
_LOOK_SECONDS = 0.2


def look_after(host: Host, analysis_id: str) -> None:
    """Look after an analysis until it has ended."""
    heal = partial(
        turns.heal,
        host.engine,
        host.client,
        host.worker_id,
        analysis_id,
        memory_patience_seconds=host.settings.memory_patience_seconds,
    )
    while not attempts.patiently(heal):
        time.sleep(_ROUND_SECONDS)
    logger.info("the analysis has ended")
    try:
        attempts.patiently(lambda: turns.tidy(host.engine, host.storage, analysis_id))
    except StorageUnavailable as error:
        logger.warning("features of shards stay until the next sweep: %s", error)


def take(host: Host, turn_id: str) -> None:
    """Compute points of an analysis until none waits, or others wait for this worker."""
    try:
        begun = attempts.patiently(lambda: turns.begin(host.engine, host.client, host.worker_id, turn_id))
        if begun is not None:
            with about(analysis_id=begun.task.analysis_id, request_id=begun.task.request_id):
                traces.waited(begun.waited_seconds, parent=begun.task.traceparent)
                with _traced(begun, worker=host.worker_id):
                    _compute_points(host, turn_id, begun)
    except attempts.TakenOver:
        raise
    except Exception as error:
        # Another turn would meet it again, and another after that.
        logger.exception("turn %s failed", turn_id)
        detail = f"This is a fault of the service: {type(error).__name__}. The worker's log says more."
        fault = Result(outcome="failed", problem=problem("internal-error", "Internal error", detail))
        attempts.patiently(lambda: turns.give_up(host.engine, host.worker_id, turn_id, fault))
    attempts.patiently(lambda: turns.end(host.engine, host.client, host.worker_id, turn_id))


def _compute_points(host: Host, turn_id: str, begun: turns.Begun) -> None:
    task, began = begun.task, time.monotonic()
    first: Known | None = None
    looked = began
    phase = ""

    def note(progress: Progress | None) -> bool:
        # Within a point only its phases are told: many workers would write one row.
        nonlocal phase
        if progress is not None and not progress.total and progress.phase == phase:
            progress = None
        phase = progress.phase if progress else phase
        return turns.note(host.engine, host.worker_id, task.analysis_id, progress)

    while True:
        claimed_ns = time.time_ns()
        claimed = attempts.patiently(
            partial(
                turns.claim,
                host.engine,
                host.worker_id,
                turn_id,
                task,
                max_attempts=host.settings.max_attempts,
                first=first,
            )
        )
        if claimed is None:
            return
        if isinstance(claimed.step, PointStep):
            first = claimed.step.first or first
        with _point_traced(claimed, claimed_ns):
            result = compute(host, claimed.step, note)
            with traces.span("write the point" if isinstance(claimed.step, PointStep) else "write the report"):
                attempts.patiently(
                    partial(
                        turns.finish,
                        host.engine,
                        host.client,
                        host.worker_id,
                        task,
                        claimed.number,
                        result,
                        memory_patience_seconds=host.settings.memory_patience_seconds,
                    )
                )
        if host.slot.is_wanted:
            return
        now = time.monotonic()
        if now - looked > _LOOK_SECONDS:
            looked = now
            lets = partial(turns.lets_others, host.engine, host.worker_id, task.analysis_id)
            if attempts.patiently(partial(lets, used_seconds=now - began, waited_seconds=begun.waited_seconds)):
                return


def _traced(begun: turns.Begun, *, worker: str) -> AbstractContextManager[object]:
    """Trace a turn, in the trace of the request that asked for the analysis, if that is traced."""
    if begun.task.traceparent is None:
        return nullcontext()
    return traces.span(
        "turn",
        parent=begun.task.traceparent,
        analysis_id=begun.task.analysis_id,
        request_id=begun.task.request_id,
        worker=worker,
    )


@contextmanager
def _point_traced(claimed: turns.Claimed, claimed_ns: int) -> Iterator[None]:
    """Trace a point, or the report of all, and its claim."""
    step = claimed.step
    if step.traceparent is None:
        yield
        return
    if isinstance(step, PointStep):
        block = traces.span("point", began_ns=claimed_ns, number=step.number + 1, place=step.place)
    else:
        block = traces.span("report", began_ns=claimed_ns)
    with block:
        traces.record([traces.Timed("claim", claimed_ns, time.time_ns())])
        yield
