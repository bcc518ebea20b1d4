"""Fetch the files of a step from the storage, as long as it takes the storage to answer."""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack

from app.errors import problem
from app.files.datafile import Limits
from app.settings import Settings
from app.storage import BlobDamaged, Storage, StorageUnavailable
from workers.tasks import (
    AnyStep,
    ComparisonReportTask,
    FeatureSetTask,
    Files,
    Progress,
    ReportStep,
    Result,
    SeriesPointTask,
    ShardedReportTask,
    SideTask,
)

logger = logging.getLogger("interplay")

# Pause between retries of a storage that does not answer, and how long it is retried.
_PAUSE_SECONDS = 1.0
_PATIENCE_SECONDS = 600.0


def fetch(
    storage: Storage,
    settings: Settings,
    step: AnyStep,
    stack: ExitStack,
    on_tick: Callable[[Progress | None], bool],
) -> Files | Result:
    """Return the files of a step, valid until the stack unwinds; retry while the storage is unavailable.

    Args:
        storage: the storage.
        settings: with the operator's limits.
        step: the step.
        stack: holds the files.
        on_tick: told that the storage is waited for; returns whether the analysis is cancelled.

    Returns:
        The files; a result if the analysis ends without them, failed or cancelled.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            paths = {sha256: stack.enter_context(storage.verified_copy(sha256)) for sha256 in _needed(step)}
            return Files(paths=paths, dataset=Limits.of(settings), image_pixels=settings.max_image_pixels)
        except FileNotFoundError as error:
            body = problem("blob-missing", "A stored file is missing", f"The storage has no blob {error}.")
            return Result(outcome="failed", problem=body)
        except BlobDamaged as error:
            logger.error("%s", error)
            detail = (
                f"The bytes under the sha256 {error.sha256} are others ({error.found}): the disk or the store has "
                "damaged them. Nothing was computed from them. `interplay verify --set-aside` says which reports rest "
                "on them and makes room; then send the file again."
            )
            body = problem("blob-damaged", "A stored file is damaged", detail, sha256=error.sha256, found=error.found)
            return Result(outcome="failed", problem=body)
        except StorageUnavailable as error:
            logger.warning("the storage does not answer: %s", error)
            if time.monotonic() > deadline:
                detail = f"It did not answer for {_PATIENCE_SECONDS:g} s: {error}"
                return Result(
                    outcome="failed", problem=problem("storage-unavailable", "The storage does not answer", detail)
                )
            if on_tick(Progress(phase="waiting for the storage", done=0, total=0)):
                return Result(outcome="cancelled")
            time.sleep(_PAUSE_SECONDS)


def _needed(step: AnyStep) -> list[str]:
    """Return the sha256 of the blobs that a step needs, each once."""
    # Features that were kept may be gone by then.
    if isinstance(step, ReportStep) and not isinstance(step, ComparisonReportTask | ShardedReportTask):
        return []
    if isinstance(step, FeatureSetTask):
        return [step.feature_set.sha256]
    checkpoints = step.checkpoints
    if isinstance(step, SeriesPointTask | SideTask):
        checkpoints = (checkpoints[step.number],)
    tokenizers = [step.probe.tokenizer_sha256, *(checkpoint.tokenizer_sha256 for checkpoint in step.checkpoints)]
    bases = [checkpoint.base.sha256 for checkpoint in checkpoints if checkpoint.base is not None]
    needed = [*(one.sha256 for one in checkpoints), *bases, step.probe.sha256, *filter(None, tokenizers)]
    return list(dict.fromkeys(needed))
