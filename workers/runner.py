"""From a task to the body of a report: which function of `analysis` computes which kind. Runs in the child."""

import hashlib
import importlib.metadata
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import analysis
from analysis.errors import AnalysisError
from analysis.evaluation import Evaluation, EvaluationOptions, evaluate_features, evaluate_network
from analysis.networks import FAMILIES, load_network
from analysis.probes import Preprocess, load_feature_set, load_probe
from app.errors import problem

logger = logging.getLogger("interplay")

Task = dict[str, Any]
OnProgress = Callable[[str, int, int], None]

# A batch of small inputs is done in microseconds: nobody reads more than so many updates.
_PROGRESS_SECONDS = 0.1


def set_up(device: str, threads: int) -> torch.device:
    """Choose the device, once for the process; `auto` takes CUDA where there is one.

    Raises:
        SystemExit: the device that was asked for does not exist here.
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
    """What this worker offers."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch_version": torch.__version__, "families": list(FAMILIES)}


def run(task: Task, device: torch.device, on_progress: OnProgress) -> dict[str, Any]:
    """Compute a task: `{"body": ...}`, the report but for its identity, or `{"problem": ...}`."""
    try:
        return {"body": _KINDS[task["kind"]](task, device, _throttled(on_progress))}
    except AnalysisError as error:
        return {"problem": problem(error.kind, error.title, error.detail, **error.members)}
    except Exception as error:
        # A bug of ours fails this analysis and says where; the next one runs.
        logger.exception("analysis %s failed", task["analysis_id"])
        detail = f"This is a fault of the service: {type(error).__name__}. The worker's log says more."
        return {"problem": problem("internal-error", "Internal error", detail)}


def run_evaluation(task: Task, device: torch.device, on_progress: OnProgress) -> dict[str, Any]:
    """An evaluation of a checkpoint on a probe, or of a feature set."""
    options = EvaluationOptions(**task["options"])
    subject, probe = task["subject"], task["probe"]
    feature_dtype = torch.float32
    started = time.perf_counter()
    on_progress("loading", 0, 0)
    if subject["kind"] == "feature_set":
        feature_set = load_feature_set(Path(task["subject_path"]))
        feature_dtype = feature_set.features.dtype
        load_seconds = time.perf_counter() - started
        evaluation = evaluate_features(feature_set, device=device, options=options, progress=on_progress)
    else:
        preprocess = Preprocess(**probe["preprocess"]) if probe["preprocess"] else None
        data = load_probe(
            Path(task["probe_path"]),
            format=task["probe_format"],
            preprocess=preprocess,
            n_classes=probe["n_classes"],
        )
        network = load_network(subject["architecture"], Path(task["subject_path"]), head=subject["head"], device=device)
        subject = {**subject, "head": network.head_name}
        load_seconds = time.perf_counter() - started
        evaluation = evaluate_network(network, data, device=device, options=options, progress=on_progress)
    return {
        "subject": {**subject, "n_features": evaluation.n_features, "n_classes": evaluation.n_classes},
        "probe": probe,
        "provenance": _provenance(task, device, evaluation, feature_dtype),
        "timings_seconds": {"load": load_seconds, **evaluation.timings_seconds},
        "splits": {name: asdict(split) for name, split in evaluation.splits.items()},
    }


_KINDS: dict[str, Callable[[Task, torch.device, OnProgress], dict[str, Any]]] = {"evaluation": run_evaluation}


def _provenance(task: Task, device: torch.device, evaluation: Evaluation, feature_dtype: torch.dtype) -> dict[str, Any]:
    return {
        "interplay_version": importlib.metadata.version("interplay"),
        "code_sha256": _code_sha256(),
        "torch_version": torch.__version__,
        "numpy_version": np.__version__,
        "python_version": platform.python_version(),
        "device": describe(device)["device"],
        "threads": torch.get_num_threads(),
        "feature_dtype": str(feature_dtype).removeprefix("torch."),
        "spectrum_dtype": "float64",
        "batch_size": evaluation.batch_size,
        "options": task["options"],
    }


@cache
def _code_sha256() -> str:
    """One hash of the mathematics' source, so that two reports tell whether the same code computed them."""
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
