"""Points of a path and feature extraction, each beside the bare PyTorch loop that is the least possible work."""

import math
import time
from collections.abc import Callable, Sequence

import torch

from analysis.evaluation import EvaluationOptions, evaluate_network
from analysis.networks.loading import LoadedNetwork, build
from analysis.passes.extraction import extract_features
from analysis.passes.precision import arithmetic
from analysis.probes.probe import Probe
from analysis.sweeps.grids import even_grid
from analysis.sweeps.paths import Path

Row = dict[str, object]
# The demo's network, and one whose pass takes seconds: only a few of its points, each the same work. The last two
# numbers are the points of a path and the repeats of each: on a shared machine the minimum is the undisturbed time.
CASES = {
    "the demo's network": (
        {"name": "mlp", "args": {"sizes": [64, 512, 512, 64, 10], "norm": "batch"}}, "head", (64,), 1797, 25, 8,
    ),
    "WRN-28-2": (
        {"name": "wide_resnet", "args": {"depth": 28, "widen_factor": 2, "n_classes": 10}}, "fc", (3, 32, 32), 2000, 3,
        2,
    ),
}  # fmt: skip


def rows(device: torch.device | str = "cpu") -> list[Row]:
    """Time a path's points, and features alone, against bare loops over the same batches.

    Args:
        device: where both sides run.

    Returns:
        Two rows a network: the measurement, its target, and whether it is reached.
    """
    device = torch.device(device)
    return [row for name in CASES for row in _case(name, device)]


def _case(name: str, device: torch.device) -> list[Row]:
    architecture, head_name, shape, n, points, rounds = CASES[name]
    first, second = (_network({"family": "builtin", **architecture}, head_name, seed, device) for seed in (0, 1))
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 10
    probe = Probe(torch.randn(n, *shape, generator=generator), labels, None, 10, None).prepared(device)
    size = extract_features(first, probe, device=device)[2]

    def loop() -> None:
        with torch.inference_mode(), arithmetic(device):
            for batch in batches:
                second.module(batch)

    def extract() -> None:
        extract_features(first, probe, device=device, batch_size=size)

    batches = list(probe.batches(size, device=device))
    path = Path(first, second.module.state_dict())
    own, bare, metrics = _walk(path, probe, even_grid(points), rounds, loop, device)
    # In turns, so that other load on the machine affects both sides.
    turns = [
        (seconds_of(extract, device), seconds_of(loop, device))
        for _ in range(points * rounds if points > 3 else rounds)
    ]
    extracted, alone = (min(times) for times in zip(*turns, strict=True))
    # A GPU finishes these networks while the processor still launches kernels: a pass's fixed costs matter there.
    on_gpu = device.type == "cuda"
    return [
        {
            "case": f"path of {points} points, {name}, {n:,} inputs",
            "against": f"{points} bare forward loops in inference mode over the same batches",
            "seconds_without_metrics": own,
            "against_seconds": bare,
            "metrics_seconds": metrics,
            "times_the_loops": own / bare,
            "whole_times_loops_and_metrics": (own + metrics) / (bare + metrics),
            "must": f"at most 1.1 times, {'with' if on_gpu else 'beside'} the metrics' own time",
            "reached": own + metrics <= 1.1 * (bare + metrics) if on_gpu else own <= 1.1 * bare,
        },
        {
            "case": f"features of {n:,} inputs, {name}",
            "against": "a bare forward loop in inference mode over the same batches",
            "seconds": extracted,
            "against_seconds": alone,
            "speed_of_the_loop": alone / extracted,
            "must": "at least 0.9 of its speed, or 2 ms more" if on_gpu else "at least 0.95 of its speed",
            "reached": extracted <= max(alone / 0.9, alone + 2e-3) if on_gpu else alone >= 0.95 * extracted,
        },
    ]


def _walk(
    path: Path, probe: Probe, grid: Sequence[float], rounds: int, loop: Callable[[], None], device: torch.device
) -> tuple[float, float, float]:
    """Return seconds of a path without its metrics, of as many loops, and of the metrics: sums of each point's minimum.

    A point's time without its metrics is its total less the evaluation's phases other than `features`; time in no phase
    is the path's. The loops find their data in the caches, points do not.
    """
    options = EvaluationOptions(null_permutations=0)
    own, bare, metrics = ([math.inf] * len(grid) for _ in range(3))
    for _ in range(rounds):
        for index, w in enumerate(grid):
            phases: dict[str, float] = {}

            def point(w: float = w, phases: dict[str, float] = phases) -> None:
                network = path.move_to(w)
                phases.update(evaluate_network(network, probe, device=device, options=options).timings_seconds)

            whole = seconds_of(point, device)
            of_metrics = sum(seconds for phase, seconds in phases.items() if phase != "features")
            # A pass of seconds fills the caches by itself.
            if len(grid) > 3:
                loop()
            own[index] = min(own[index], whole - of_metrics)
            metrics[index] = min(metrics[index], of_metrics)
            bare[index] = min(bare[index], seconds_of(loop, device))
    return sum(own), sum(bare), sum(metrics)


def _network(architecture: dict[str, object], head_name: str, seed: int, device: torch.device) -> LoadedNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build(architecture, device=device).eval().requires_grad_(False)
    return LoadedNetwork(module, head_name)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of a call, including the work that it leaves to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
