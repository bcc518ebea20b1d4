"""Peak memory of a path in copies of its parameters, from the checkpoints' files on, in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from analysis.networks.loading import build
from app.settings import Settings
from app.storage import Storage
from workers.compute import kinds
from workers.compute.features import FeatureCache

Row = dict[str, object]
# 100 million parameters, beside which a batch, its activations and what is measured on them are next to nothing.
_SIZES = [64, *[2048] * 25, 10]
_SAMPLES = 64
_GRID = [0.0, 1.0, 0.5]
# Beside the copies: activations, metrics (at d = 2,048), buffers of the linear algebra, the interpreter's own growth.
_BESIDE = 0.05


def rows(device: torch.device | str = "cpu") -> list[Row]:
    """Peak memory of a path between two checkpoints, as the worker computes it.

    Args:
        device: whose memory is measured: on a processor the process's resident set, mapped files included, beyond what
            it was before; on a GPU what tensors held.

    Returns:
        One row: what was measured, what it must reach, and whether it does.
    """
    # A C library that keeps what was freed for later would be measured with it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    with tempfile.TemporaryDirectory() as folder:
        environment["INTERPLAY_DATA_DIR"] = folder
        task, n_bytes = _task(_SIZES, Path(folder), "large")
        small, _ = _task([64, 16, 10], Path(folder), "small")
        command = [sys.executable, "-m", "benchmarks.memory", str(device)]
        given = json.dumps({"small": small, "task": task})
        ran = subprocess.run(command, input=given, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(ran.stdout)
    copies = (found["peak_bytes"] - found["before_bytes"]) / n_bytes
    row: Row = {
        "case": f"path of {len(_GRID)} points, mlp of {n_bytes // 4:,} parameters",
        "against": "the parameters, float32",
        "peak_mib": (found["peak_bytes"] - found["before_bytes"]) / 2**20,
        "against_mib": n_bytes / 2**20,
        "copies": copies,
        "must": f"at most 3 copies of the parameters, and {_BESIDE:g} for all else",
        "reached": copies <= 3 + _BESIDE,
    }
    return [row]


def _task(sizes: list[int], folder: Path, prefix: str) -> tuple[dict[str, Any], int]:
    """A path's task as the worker hands it to its child, and the bytes of one checkpoint's parameters."""
    architecture = {"family": "builtin", "name": "mlp", "args": {"sizes": sizes, "norm": "none"}}
    subjects, paths, n_bytes = [], {}, 0
    for name in ("a", "b"):
        # torch's own initialisation, from another state of its generator for each.
        state = build(architecture, device="cpu").state_dict()
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        paths[name] = str(folder / f"{prefix}-{name}.safetensors")
        save_file(state, paths[name])
        subjects.append(
            {
                "sha256": name,
                "architecture": architecture,
                "head": None,
                "prefix": "",
                "ignored": {},
                "asked_prefix": None,
            }
        )
    paths["probe"] = str(folder / f"{prefix}-probe.safetensors")
    save_file({"inputs": torch.randn(_SAMPLES, 64), "labels": torch.arange(_SAMPLES) % 10}, paths["probe"])
    options = {"grid": {"values": _GRID}, "normalisation": "interpolate", "alignment": "none", "seed": 0}
    about = {"n_classes": 10, "class_names": None, "preprocess": None}
    probe = {"sha256": "probe", "format": "safetensors", "content": "tensors", **about}
    task = {"analysis_id": prefix, "kind": "path", "step": "point", "options": {**options, "null_permutations": 0}}
    return {**task, "subjects": subjects, "probe": probe, "paths": paths}, n_bytes


def _walk(task: dict[str, Any], device: torch.device) -> None:
    # A path keeps no features.
    cache = FeatureCache(Storage(Settings()), 0)
    known: list[dict[str, Any]] = []
    last = False
    while not last:
        body = kinds.compute({**task, "points": known}, device, cache, lambda phase, done, total: None, {})
        known.append(body["known"])
        last = body["last"]


def _resident_bytes(field: str) -> int:
    """VmRSS or, at its highest, VmHWM of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def main() -> None:
    """The process that is measured: a small path first, so that what is loaded but once is there before."""
    given, device = json.load(sys.stdin), torch.device(sys.argv[1])
    torch.set_num_threads(1)
    _walk(given["small"], device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _walk(given["task"], device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        before = _resident_bytes("VmRSS")
        _walk(given["task"], device)
        peak = _resident_bytes("VmHWM")
    print(json.dumps({"before_bytes": before, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
