"""Turn a task into a report's body or a problem, on the chosen device. Runs in the child."""

import hashlib
import importlib.metadata
import logging
import platform
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import analysis
from analysis.errors import AnalysisError
from analysis.networks.loading import available_families
from app.errors import problem
from workers.compute import kinds
from workers.compute.features import FeatureCache
from workers.compute.kinds import OnProgress, Task

logger = logging.getLogger("interplay")

# Shortest time between two updates of progress: a batch of small inputs takes only microseconds.
_PROGRESS_SECONDS = 0.1


def set_up(device: str, threads: int) -> torch.device:
    """Choose the device, once for the process; `auto` takes CUDA if available.

    Raises:
        SystemExit: the requested device does not exist here.
    """
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        index = torch.device(device).index or 0
        if index >= torch.cuda.device_count():
            raise SystemExit(
                f"INTERPLAY_DEVICE is {device}; this machine has {torch.cuda.device_count()} CUDA devices."
            )
    return torch.device(device)


def describe(device: torch.device) -> dict[str, Any]:
    """Describe this worker: device, torch version and families."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch_version": torch.__version__, **families()}


def families() -> dict[str, list[str]]:
    """Return the installed families: those that need no import, and those that are still to be tried."""
    certain = ("builtin", "custom")
    found = available_families()
    return {
        "families": [name for name in found if name in certain],
        # torchvision first: whatever makes it fail makes timm fail too, with the same message.
        "untried": sorted((name for name in found if name not in certain), key=lambda name: name != "torchvision"),
    }


def run(task: Task, device: torch.device, cache: FeatureCache, on_progress: OnProgress) -> dict[str, Any]:
    """Compute a task and return `{"body": ...}`, as documented in `kinds`, or `{"problem": ...}`."""
    try:
        return {"body": kinds.compute(task, device, cache, _throttled(on_progress), _provenance(task, device))}
    except AnalysisError as error:
        return {"problem": problem(error.kind, error.title, error.detail, **error.members)}
    except Exception as error:
        # A bug in the service fails this analysis and is logged; the next one runs.
        logger.exception("analysis %s failed", task["analysis_id"])
        detail = f"This is a fault of the service: {type(error).__name__}. The worker's log says more."
        return {"problem": problem("internal-error", "Internal error", detail)}


def _provenance(task: Task, device: torch.device) -> dict[str, Any]:
    """Return the provenance that reports of all kinds share; each kind adds its own members."""
    return {
        "interplay_version": importlib.metadata.version("interplay"),
        "code_sha256": _code_sha256(),
        "torch_version": torch.__version__,
        "numpy_version": np.__version__,
        "library": _libraries([subject.get("architecture") for subject in task["subjects"]]),
        "python_version": platform.python_version(),
        "device": describe(device)["device"],
        "threads": torch.get_num_threads(),
        "spectrum_dtype": "float64",
        "options": task["options"],
    }


def _libraries(architectures: Sequence[dict[str, Any] | None]) -> str | None:
    """Return the libraries that build the networks, each once: a comparison's two networks may use different ones."""
    return ", ".join(dict.fromkeys(filter(None, map(_library, architectures)))) or None


def _library(architecture: dict[str, Any] | None) -> str | None:
    """Return the library that builds a network; None for the builtin family.

    Also None if the library is missing, as the analysis then fails.
    """
    family = architecture["family"] if architecture else "builtin"
    try:
        return None if family == "builtin" else f"{family} {importlib.metadata.version(family)}"
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _code_sha256() -> str:
    """Return one hash of the mathematics' source, which shows whether the same code computed two reports."""
    digest = hashlib.sha256()
    folder = Path(analysis.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _throttled(on_progress: OnProgress) -> OnProgress:
    last_phase, last_time = "", 0.0

    def report(phase: str, done: int, total: int) -> None:
        nonlocal last_phase, last_time
        now = time.monotonic()
        if phase != last_phase or done == total or now - last_time > _PROGRESS_SECONDS:
            last_phase, last_time = phase, now
            on_progress(phase, done, total)

    return report
