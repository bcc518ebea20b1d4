"""Compute one step: in the compute process, with its files, as long as nobody wants it cancelled."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import sqlalchemy as sa
from dbos import DBOSClient

from app import traces
from app.errors import problem, problem_type
from app.settings import Settings
from app.storage import Storage
from workers import attempts, inputs, reuse
from workers.child import ChildDied, ComputeChild
from workers.tasks import AnyStep, Progress, Result, SeriesPointTask, Work

logger = logging.getLogger("interplay")

OnTick = Callable[[Progress | None], bool]

# A step whose child dies is retried once, in a fresh child.
_CHILD_ATTEMPTS = 2
# Longest time for which neither progress is stored nor a wish to cancel is seen.
_LONGEST_SILENCE_SECONDS = 2.0
_OUT_OF_MEMORY = problem_type("out-of-memory")


class Slot:
    """The place of a worker that computes: one run at a time, although it takes runs from two queues.

    It takes none while the place is taken (`demand`), so a run waits for it only if both were claimed at one moment.
    """

    def __init__(self) -> None:
        self._free, self._counting = threading.Lock(), threading.Lock()
        self._waiting = 0

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait for the place, and hold it for a block."""
        self._count(1)
        with self._free:
            self._count(-1)
            yield

    @property
    def is_taken(self) -> bool:
        """Whether a run holds it."""
        return self._free.locked()

    @property
    def is_wanted(self) -> bool:
        """Whether another run of this worker waits for it."""
        return self._waiting > 0

    def _count(self, change: int) -> None:
        with self._counting:
            self._waiting += change


@dataclass(frozen=True)
class Host:
    """The resources of a worker process; `active` holds the ids of the queue's runs that run in it now."""

    worker_id: str
    settings: Settings
    engine: sa.Engine
    client: DBOSClient
    storage: Storage
    child: ComputeChild
    active: set[str]
    slot: Slot = field(default_factory=Slot)


def compute(host: Host, step: AnyStep, note: OnTick) -> Result:
    """Compute a step, or take its result from an existing report.

    Args:
        host: the worker.
        step: the step.
        note: stores progress, if any, and returns whether the step is to be cancelled.
    """

    told: Progress | None = None
    began = next_note = time.monotonic()

    def on_tick(progress: Progress | None) -> bool:
        nonlocal told, next_note
        told = progress or told
        now = time.monotonic()
        if now < next_note:
            return False
        # The longer it takes, the less often: of hundreds of workers each would write several times a second.
        next_note = now + min((now - began) / 8, _LONGEST_SILENCE_SECONDS)
        try:
            ends = note(told)
            told = None
            return ends
        except sa.exc.SQLAlchemyError as error:
            # The computation continues while the database is unavailable; the next tick retries.
            logger.warning("progress of analysis %s was not stored: %s", step.analysis_id, error)
            return False

    if isinstance(step, SeriesPointTask):
        existing = attempts.patiently(lambda: reuse.existing_point(host.engine, step))
        if existing is not None:
            return Result(outcome="succeeded", body=existing.model_dump(mode="json", by_alias=True))
    with ExitStack() as stack:
        with traces.span("fetch files"):
            files = inputs.fetch(host.storage, host.settings, step, stack, on_tick)
        if isinstance(files, Result):
            return files
        with traces.span(f"compute {step.step}") as opened:
            result = _compute_in_child(host.child, Work(step=step, files=files, timed=traces.is_on()), on_tick)
            traces.failed(opened, None if result.problem is None else str(result.problem["type"]))
    if result.problem is None or result.problem["type"] != _OUT_OF_MEMORY or result.problem.get("of") == "host":
        return result
    # Here, as the result may be recorded and judged by another worker.
    assert host.child.description is not None
    return result.model_copy(update={"too_little_bytes": host.child.description.memory_bytes})


def _compute_in_child(child: ComputeChild, work: Work, on_tick: OnTick) -> Result:
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
