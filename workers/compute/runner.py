"""Turn a task into a report's body or a problem, on the chosen device. Runs in the child."""

import hashlib
import importlib.metadata
import logging
import os
import platform
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

import analysis
from analysis.errors import AnalysisError
from analysis.networks.loading import available_families
from analysis.passes import scratch
from analysis.passes.extraction import reclaim
from app.errors import problem
from workers.compute import kinds
from workers.compute.context import Context, Held, OnProgress
from workers.compute.features import FeatureCache
from workers.tasks import AnyStep, FeatureSetTask, Hello, Json, PointStep, Work

logger = logging.getLogger("interplay.compute")

# Shortest time between two updates of progress: a batch of small inputs takes only microseconds.
_PROGRESS_SECONDS = 0.1
# Where Linux tells the limit of a container's memory.
_OF_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def set_up(device: str, threads: int, memory_bytes: int | None = None) -> torch.device:
    """Choose the device, once for the process; `auto` takes CUDA if available.

    Args:
        device: the device's name in torch, or `auto`.
        threads: of the CPU; 0 leaves torch's default.
        memory_bytes: as much of a GPU's memory as the process may use. Default: all.

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
        if memory_bytes is not None:
            share = memory_bytes / torch.cuda.get_device_properties(index).total_memory
            torch.cuda.set_per_process_memory_fraction(min(share, 1.0), index)
    return torch.device(device)


def describe(device: torch.device, memory_bytes: int | None = None) -> Hello:
    """Describe this worker: device and its memory, torch version and families.

    Args:
        device: the device.
        memory_bytes: as much of its memory as analyses may use. Default: all.
    """
    certain = ("builtin", "custom")
    found = available_families()
    return Hello(
        device=_device_name(device),
        memory_bytes=min(memory_bytes or sys.maxsize, _memory_bytes(device)),
        torch_version=torch.__version__,
        families=[name for name in found if name in certain],
        # torchvision first: whatever makes it fail makes timm fail too, with the same message.
        untried=sorted((name for name in found if name not in certain), key=lambda name: name != "torchvision"),
    )


class Runner:
    """Computes steps on one device, with what is held between the points of analyses.

    Args:
        device: the device.
        cache: cache of features.
        max_loaded_bytes: most bytes that are held for other analyses than the current one.
        scratch_folder: where features that memory should not hold lie.
    """

    def __init__(
        self, device: torch.device, cache: FeatureCache, max_loaded_bytes: int, scratch_folder: Path | None = None
    ) -> None:
        self._device, self._cache, self._held = device, cache, Held(max_loaded_bytes)
        self._scratch = scratch_folder

    def run(self, work: Work, on_progress: OnProgress) -> tuple[Json | None, Json | None]:
        """Compute a step; return its body, as documented in `kinds.compute`, or else a problem."""
        context = Context(
            files=work.files,
            device=self._device,
            cache=self._cache,
            held=self._held,
            provenance=_provenance(work.step, self._device),
            on_progress=_throttled(on_progress),
        )
        self._held.begin(work.step.analysis_id)
        # The size of a batch, and with it the last digits, must not depend on what else is loaded.
        reclaim.set(lambda: self._held.keep_only(work.step.analysis_id))
        scratch.folder.set(self._scratch)
        try:
            return self._compute(work.step, context), None
        except AnalysisError as error:
            return None, problem(error.kind, error.title, error.detail, **error.members)
        except (MemoryError, torch.OutOfMemoryError) as error:
            # Outside of a pass, which would have taken smaller batches.
            of = "device" if self._device.type == "cpu" or isinstance(error, torch.OutOfMemoryError) else "host"
            return None, problem("out-of-memory", "Memory ran out", f"The {of}'s memory ran out.", of=of)
        except Exception as error:
            # A bug in the service fails this analysis and is logged; the next one runs.
            logger.exception("analysis %s failed", work.step.analysis_id)
            detail = f"This is a fault of the service: {type(error).__name__}. The worker's log says more."
            return None, problem("internal-error", "Internal error", detail)
        finally:
            # A report is the end of its analysis, and an evaluation has no other step.
            if not isinstance(work.step, PointStep):
                self._held.forget(work.step.analysis_id)

    def _compute(self, step: AnyStep, context: Context) -> Json:
        """Compute a step; where memory runs out beside other analyses' networks, once more without them."""
        try:
            return kinds.compute(step, context)
        except (MemoryError, torch.OutOfMemoryError, AnalysisError) as error:
            ran_out = not isinstance(error, AnalysisError) or error.kind == "out-of-memory"
            if not ran_out or not self._held.keep_only(step.analysis_id):
                raise
            logger.warning("memory ran out beside networks of other analyses; they are freed")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return kinds.compute(step, context)


def _provenance(step: AnyStep, device: torch.device) -> Json:
    """Return the provenance that reports of all kinds share; each kind adds its own members."""
    checkpoints = () if isinstance(step, FeatureSetTask) else step.checkpoints
    return {
        "interplay_version": importlib.metadata.version("interplay"),
        "code_sha256": _code_sha256(),
        "torch_version": torch.__version__,
        "numpy_version": np.__version__,
        "library": _libraries([checkpoint.architecture for checkpoint in checkpoints]),
        "python_version": platform.python_version(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "spectrum_dtype": "float64",
        "options": step.options.model_dump(mode="json"),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _memory_bytes(device: torch.device) -> int:
    """Return the memory of a device; of a CPU the machine's, or as much as the process's container may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    of_machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(of_machine, int(_OF_CONTAINER.read_text()))
    except (OSError, ValueError):  # not in a container, or one without a limit, which says "max"
        return of_machine


def _libraries(architectures: Sequence[Json]) -> str | None:
    """Return the libraries that build the networks, each once: a comparison's two networks may use different ones."""
    return ", ".join(dict.fromkeys(filter(None, map(_library, architectures)))) or None


def _library(architecture: Json) -> str | None:
    """Return the library that builds a network; None for the builtin family, and for graphs, which torch alone runs.

    Also None if the library is missing, as the analysis then fails.
    """
    family = str(architecture["family"])
    try:
        return None if family in ("builtin", "exported") else f"{family} {importlib.metadata.version(family)}"
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
        if phase != last_phase or (total and done == total) or now - last_time > _PROGRESS_SECONDS:
            last_phase, last_time = phase, now
            on_progress(phase, done, total)

    return report
