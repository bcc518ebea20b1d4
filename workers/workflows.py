"""The workflow that the queue runs. Each computed point is one durable step; everything else is repeatable.

A step's result is recorded once, but its body may run again: a kill between its end and the record repeats it. The
workflow's own body runs again from the start at every resumption. So all writes go through `attempts`, whose functions
are idempotent.
"""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import sqlalchemy as sa
from dbos import DBOS

from app import queue
from app.errors import problem
from app.files.datafile import Limits
from app.settings import Settings
from app.storage import BlobDamaged, Storage, StorageUnavailable
from workers import attempts
from workers.child import ChildDied, ComputeChild, Progress, Result

logger = logging.getLogger("interplay")
T = TypeVar("T")

# A task whose child dies is retried once, in a fresh child.
_CHILD_ATTEMPTS = 2
# Pause between retries of a database or storage that does not answer, and how long the storage is retried.
_PAUSE_SECONDS = 1.0
_STORAGE_PATIENCE_SECONDS = 600.0


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
    def compute(analysis_id: str, task: dict[str, Any]) -> dict[str, Any]:
        return asdict(_compute(host, analysis_id, task))

    @DBOS.workflow(name=queue.WORKFLOW)
    def run_analysis(analysis_id: str) -> None:
        host.active.add(analysis_id)
        try:
            task = _patiently(lambda: attempts.begin(host.engine, analysis_id, host.settings.max_attempts))
            if task is not None:
                result = _run(lambda task: Result(**compute(analysis_id, task)), task)
                _patiently(lambda: attempts.finish(host.engine, analysis_id, result))
        finally:
            host.active.discard(analysis_id)


def _run(compute: Callable[[dict[str, Any]], Result], task: dict[str, Any]) -> Result:
    """Run one step for an evaluation or a comparison; for other kinds one for each point, then one for the report.

    After a kill the recorded steps return their results again, and the first unrecorded one is computed.
    """
    if task["kind"] in ("evaluation", "comparison"):
        return compute(task)
    points: list[dict[str, Any]] = []
    total = 0
    while True:
        known = [point["known"] for point in points]
        result = compute({**task, "step": "point", "points": known, "total": total})
        if result.body is None:
            return result
        points.append(result.body)
        total = result.body["total"]
        if result.body["last"]:
            return compute({**task, "step": "report", "points": points, "total": total})


def _compute(host: Host, analysis_id: str, task: dict[str, Any]) -> Result:
    """Compute one step: a point, a report, or a whole evaluation or comparison; failures are results too."""

    def on_tick(progress: Progress | None) -> bool:
        try:
            return attempts.note(host.engine, analysis_id, progress)
        except sa.exc.DBAPIError as error:
            # The computation continues while the database is unavailable; the next tick retries.
            logger.warning("progress of analysis %s was not stored: %s", analysis_id, error)
            return False

    # Points may take less than one tick of the child, so cancellation is also checked before each point.
    if "step" in task and on_tick(Progress(task["step"], len(task["points"]), task["total"])):
        return Result("cancelled")
    if task["kind"] == "series" and task["step"] == "point":
        position = len(task["points"])
        report = _patiently(lambda: attempts.evaluation_of(host.engine, task, position))
        if report and _is_of_the_same_inputs(task, report):
            return Result("succeeded", body=_reused(task, position, report))
    reason = ""
    with ExitStack() as stack:
        fetched = _fetch_patiently(host.storage, task, stack, on_tick)
        if isinstance(fetched, Result):
            return fetched
        task = {**task, **fetched, "limits": _limits(host.settings)}
        for _ in range(_CHILD_ATTEMPTS):
            try:
                return host.child.run(task, on_tick)
            except ChildDied as death:
                reason = str(death)
                logger.error("the compute process died during analysis %s: %s", analysis_id, reason)
                if on_tick(Progress("starting again", 0, 0)):
                    return Result("cancelled")
    detail = f"The compute process died {_CHILD_ATTEMPTS} times on this task: {reason}. Memory may have run out."
    return Result("failed", problem=problem("compute-crashed", "The compute process died", detail))


def _fetch_patiently(
    storage: Storage, task: dict[str, Any], stack: ExitStack, on_tick: Callable[[Progress | None], bool]
) -> dict[str, Any] | Result:
    """Fetch the task's blobs, retrying while the storage is unavailable; else return the result without them."""
    deadline = time.monotonic() + _STORAGE_PATIENCE_SECONDS
    while True:
        try:
            return _fetch(storage, task, stack)
        except FileNotFoundError as error:
            body = problem("blob-missing", "A stored file is missing", f"The storage has no blob {error}.")
            return Result("failed", problem=body)
        except BlobDamaged as error:
            logger.error("%s", error)
            detail = (
                f"The bytes under the sha256 {error.sha256} are others ({error.found}): the disk or the store has "
                "damaged them. Nothing was computed from them. `interplay verify --set-aside` says which reports rest "
                "on them and makes room; then send the file again."
            )
            body = problem("blob-damaged", "A stored file is damaged", detail, sha256=error.sha256, found=error.found)
            return Result("failed", problem=body)
        except StorageUnavailable as error:
            logger.warning("the storage does not answer: %s", error)
            if time.monotonic() > deadline:
                detail = f"It did not answer for {_STORAGE_PATIENCE_SECONDS:g} s: {error}"
                return Result("failed", problem=problem("storage-unavailable", "The storage does not answer", detail))
            if on_tick(Progress("waiting for the storage", 0, 0)):
                return Result("cancelled")
            time.sleep(_PAUSE_SECONDS)


def _fetch(storage: Storage, task: dict[str, Any], stack: ExitStack) -> dict[str, Any]:
    """Return the paths of the blobs that a task needs now, by sha256, valid until the stack unwinds."""
    if task.get("step") == "report":
        return {"paths": {}}
    subjects = task["subjects"]
    if task["kind"] == "series":
        subjects = [subjects[len(task["points"])]]
    hashes = [subject["sha256"] for subject in subjects]
    if task["probe"]["kind"] == "probe":
        hashes.append(task["probe"]["sha256"])
        tokenizers = (owner["tokenizer_sha256"] for owner in (task["file"], *task["brought"]))
        hashes += [sha256 for sha256 in tokenizers if sha256 is not None]
    return {
        "paths": {sha256: str(stack.enter_context(storage.verified_copy(sha256))) for sha256 in dict.fromkeys(hashes)}
    }


def _limits(settings: Settings) -> dict[str, Any]:
    """Return the operator's limits for a probe's file, in the child's form."""
    return {"dataset": asdict(Limits.of(settings)), "image_pixels": settings.max_image_pixels}


def _is_of_the_same_inputs(task: dict[str, Any], report: dict[str, Any]) -> bool:
    """Return whether the report's inputs did not depend on its checkpoint's preprocessing or tokenizer, or all agree.

    If the checkpoints bring different ones the series is refused, whatever was evaluated before.
    """
    if all(brought == task["brought"][0] for brought in task["brought"]):
        return True
    probe = report["probe"]
    tokenizer = probe.get("tokenizer") or {}
    return "checkpoint" not in (probe.get("preprocess_source"), tokenizer.get("source"))


def _reused(task: dict[str, Any], position: int, report: dict[str, Any]) -> dict[str, Any]:
    """Return a point of a series as the child would have made it, from an existing report."""
    point = {
        "x": task["axis"]["values"][position],
        "checkpoint_id": task["subjects"][position]["id"],
        "reused_report_id": report["id"],
        "splits": report["splits"],
    }
    subject = report["subject"]
    known = {name: value for name, value in subject.items() if name not in ("architecture", "metadata")}
    known["probe"] = report["probe"]
    total = len(task["subjects"])
    return {"point": point, "known": known, "timings_seconds": {}, "last": position == total - 1, "total": total}


def _patiently(transaction: Callable[[], T]) -> T:
    """Run a transaction, retrying while the database is unavailable: a restart must not lose an outcome."""
    while True:
        try:
            return transaction()
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
            logger.warning("the database does not answer, trying again: %s", error)
            time.sleep(_PAUSE_SECONDS)
