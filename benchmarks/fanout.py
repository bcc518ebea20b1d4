"""One path on one worker and on two: how much faster, beside two independent processes, and what turns cost.

Every worker has one thread, so two workers have two cores. On shared cores two processes are rarely twice as fast as
one: the last row says how fast they could be here.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import httpx
import torch
from safetensors.torch import save_file

from analysis.evaluation import EvaluationOptions, evaluate_network
from analysis.networks.loading import build, load_network
from analysis.probes.reading import load_probe
from interplay import Client

Row = dict[str, object]
_NETWORK = {"family": "builtin", "name": "wide_resnet", "args": {"depth": 16, "widen_factor": 1, "n_classes": 10}}
_POINTS, _SAMPLES, _ROUNDS = 24, 1000, 3
_OPTIONS = {"null_permutations": 20, "grid": {"points": _POINTS}}


def rows(device: torch.device | str = "cpu") -> list[Row]:
    """Time a path of 24 points on one worker and on two, by turns, and the same points in bare processes.

    Args:
        device: of the workers.

    Returns:
        Rows of ratios, with their targets and whether they are reached.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = _files(folder)
        alone: list[float] = []
        together: list[float] = []
        computed: list[float] = []
        with _process(folder, "serve", device) as service, Client(url := _address(service)) as client:
            ids = [client.push_checkpoint(path, name=path.stem)["id"] for path in paths[:2]]
            probe = client.push_probe(paths[2], name="probe")["id"]
            for _ in range(_ROUNDS):
                seconds, inside = _path(client, ids, probe)
                alone.append(seconds)
                computed.append(inside)
                with _process(folder, "worker", device):
                    _wait_for_workers(url, 2)
                    # The new worker's first passes are slower, so one path goes before the one that counts.
                    _path(client, ids, probe)
                    together.append(_path(client, ids, probe)[0])
        bare = [_bare(paths, processes, device) for _ in range(_ROUNDS) for processes in (1, 2)]
    faster = min(alone) / min(together)
    limit = min(bare[::2]) / min(bare[1::2])
    cost = min(one / inside for one, inside in zip(alone, computed, strict=True))
    case = f"a path of {_POINTS} points, WRN-16-1, {_SAMPLES} images"
    return [
        {
            "case": f"{case}: two workers against one",
            "against": "at least 1.8 times as fast",
            "reached": faster >= 1.8,
            "ratio": faster,
            "seconds_of_one": min(alone),
            "seconds_of_two": min(together),
        },
        {
            "case": f"{case}: one worker, from the request to the report, against the time inside its points",
            "against": "at most 1.05 of it",
            "reached": cost <= 1.05,
            "ratio": cost,
        },
        {"case": f"{case}: two bare processes against one, which is the most that two workers could do",
         "reached": True, "ratio": limit},
    ]  # fmt: skip


def _files(folder: Path) -> list[Path]:
    """Write two random checkpoints and a probe; return their paths."""
    found = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, tensor in build(_NETWORK).state_dict().items():
            if not tensor.is_floating_point():
                tensors[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            elif name.endswith("running_var"):
                tensors[name] = torch.rand(tensor.shape, generator=generator) + 0.5
            else:
                tensors[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
        found.append(folder / f"net{seed}.safetensors")
        save_file(tensors, found[-1], metadata={"architecture": json.dumps(_NETWORK)})
    images = torch.randn(_SAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found.append(folder / "probe.safetensors")
    save_file({"inputs": images, "labels": torch.arange(_SAMPLES) % 10}, found[-1])
    return found


@contextmanager
def _process(folder: Path, command: str, device: torch.device | str) -> Iterator[subprocess.Popen[str]]:
    """Run `interplay serve` or `interplay worker` of one service."""
    settings = {"DATA_DIR": str(folder / "data"), "DEVICE": str(device), "THREADS": "1", "PORT": "0"}
    environment = {**os.environ, **{f"INTERPLAY_{name}": value for name, value in settings.items()}}
    program = str(Path(sys.executable).with_name("interplay"))
    with subprocess.Popen([program, command], env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _address(service: subprocess.Popen[str]) -> str:
    assert service.stdout is not None
    return service.stdout.readline().split()[-1]


def _wait_for_workers(url: str, count: int) -> None:
    while len(httpx.get(f"{url}/v1/version").json()["workers"]) < count:
        time.sleep(0.2)


def _path(client: Client, ids: Sequence[str], probe: str) -> tuple[float, float]:
    """Return the seconds from a path's request to its report, and those inside its points."""
    analysis = client.wait(client.create_path(ids[0], ids[1], probe_id=probe, options=_OPTIONS)["id"])
    report = client.get_report(analysis["report_id"], "path")
    assert analysis["finished_at"] is not None
    took = datetime.fromisoformat(analysis["finished_at"]) - datetime.fromisoformat(analysis["created_at"])
    return took.total_seconds(), sum(report["timings_seconds"].values())


def _bare(paths: Sequence[Path], processes: int, device: torch.device | str) -> float:
    """Return the seconds that processes take for as many evaluations as a path has points, in equal shares."""
    command = [sys.executable, "-m", "benchmarks.fanout", *map(str, paths), str(device), str(_POINTS // processes)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    began = time.perf_counter()
    for process in started:
        process.communicate("\n")
    return time.perf_counter() - began


def main() -> None:
    """Evaluate a checkpoint some times, once a line comes: the arguments are files, device and number."""
    first, _, probe_path, name, count = sys.argv[1:]
    torch.set_num_threads(1)
    device = torch.device(name)
    network = load_network(_NETWORK, Path(first), head=None, device=device)
    probe = load_probe(Path(probe_path), format="safetensors").prepared(device)
    options = EvaluationOptions(null_permutations=20)
    evaluate_network(network, probe, device=device, options=options)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(int(count)):
        evaluate_network(network, probe, device=device, options=options)


if __name__ == "__main__":
    main()
