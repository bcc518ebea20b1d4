"""Measure a path's peak memory in copies of its parameters, from the checkpoint files on, in a separate process."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from analysis.networks.loading import build
from app.files.datafile import Limits
from app.schemas import NamedGrid, PathOptions
from app.settings import Settings
from app.storage import Storage
from workers.compute.features import FeatureCache
from workers.compute.runner import Runner
from workers.tasks import (
    Answer,
    Checkpoint,
    Files,
    Json,
    PathPointTask,
    PathTask,
    Probe,
    Work,
    answer_of,
    point_step,
)

Row = dict[str, object]
# 100 million parameters; a batch, its activations and the measurements on them are negligible beside these.
_SIZES = [64, *[2048] * 25, 10]
_SAMPLES = 64
_GRID = [0.0, 1.0, 0.5]
# Beside the copies: activations, metrics (at d = 2,048), buffers of the linear algebra, the interpreter's own growth.
_BESIDE = 0.05


def rows(device: torch.device | str = "cpu") -> list[Row]:
    """Measure the peak memory of a path between two checkpoints, as the worker computes it.

    Args:
        device: the device whose memory is measured: on a processor the growth of the process's resident set, mapped
            files included; on a GPU the memory held by tensors.

    Returns:
        One row: the measurement, its target, and whether it is reached.
    """
    # Otherwise memory that the C library keeps after a free would be counted.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    with tempfile.TemporaryDirectory() as folder:
        environment["INTERPLAY_DATA_DIR"] = folder
        large, n_bytes = _step(_SIZES, Path(folder), "large")
        small, _ = _step([64, 16, 10], Path(folder), "small")
        command = [sys.executable, "-m", "benchmarks.memory", str(device)]
        given = json.dumps([small.model_dump_json(), large.model_dump_json()])
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


def _step(sizes: list[int], folder: Path, prefix: str) -> tuple[Work, int]:
    """Return a path's first step as the worker hands it to its child, and the bytes of one checkpoint's parameters."""
    architecture: Json = {"family": "builtin", "name": "mlp", "args": {"sizes": [*sizes], "norm": "none"}}
    checkpoints, paths, n_bytes = [], {}, 0
    for name in ("a", "b"):
        # torch's own initialisation, from a different generator state for each.
        state = build(architecture, device="cpu").state_dict()
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        paths[name] = folder / f"{prefix}-{name}.safetensors"
        save_file(state, paths[name])
        checkpoints.append(
            Checkpoint(
                id=name,
                name=name,
                sha256=name,
                size_bytes=n_bytes,
                n_parameters=n_bytes // 4,
                architecture=architecture,
                head=None,
                prefix="",
                ignored={},
                asked_prefix=None,
                preprocess=None,
                tokenizer_sha256=None,
                metadata={},
            )
        )
    paths["probe"] = folder / f"{prefix}-probe.safetensors"
    save_file({"inputs": torch.randn(_SAMPLES, 64), "labels": torch.arange(_SAMPLES) % 10}, paths["probe"])
    probe = Probe(
        id="probe",
        name="probe",
        sha256="probe",
        data_sha256=None,
        n_samples=_SAMPLES,
        n_classes=10,
        class_counts=torch.bincount(torch.arange(_SAMPLES) % 10).tolist(),
        class_names=None,
        format="safetensors",
        content="tensors",
        input_shape=[64],
        preprocess=None,
        columns=None,
        tokenizer_sha256=None,
        max_length=None,
    )
    step = PathPointTask(
        analysis_id=prefix,
        options=PathOptions(grid=NamedGrid(values=_GRID), null_permutations=0),
        checkpoints=tuple(checkpoints),
        probe=probe,
        number=0,
        place=0.0,
    )
    settings = Settings()
    files = Files(paths=paths, dataset=Limits.of(settings), image_pixels=settings.max_image_pixels)
    return Work(step=step, files=files), n_bytes


def _walk(work: Work, device: torch.device) -> None:
    assert isinstance(work.step, PathPointTask)
    # A path keeps no features.
    runner = Runner(device, FeatureCache(Storage(Settings()), 0), 0)
    task = PathTask.model_validate({name: getattr(work.step, name) for name in PathTask.model_fields})
    answers: list[Answer] = []
    while places := task.further(answers):
        for place in places:
            first = answers[0].known if answers else None
            step = point_step(task, number=len(answers), place=place, first=first)
            body, refusal = runner.run(Work(step=step, files=work.files), lambda phase, done, total: None)
            assert body is not None, refusal
            answers.append(answer_of(task, body))


def _resident_bytes(field: str) -> int:
    """Return VmRSS or VmHWM (the peak) of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def main() -> None:
    """Run the measured process: a small path first, so that one-time loading precedes the measurement."""
    small, large = (Work.model_validate_json(text) for text in json.load(sys.stdin))
    device = torch.device(sys.argv[1])
    torch.set_num_threads(1)
    _walk(small, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _walk(large, device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        before = _resident_bytes("VmRSS")
        _walk(large, device)
        peak = _resident_bytes("VmHWM")
    print(json.dumps({"before_bytes": before, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
