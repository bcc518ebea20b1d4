"""Points of a path and feature extraction, each beside the bare loop of PyTorch that it cannot do without."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from analysis.evaluation import EvaluationOptions, evaluate_network
from analysis.extraction import extract_features
from analysis.networks import LoadedNetwork, build
from analysis.paths import Path, even_grid
from analysis.probes import Probe

Row = dict[str, object]
# The demo's network, and one whose pass takes seconds: of that a few points, each the same work.
CASES = {
    "the demo's network": (
        {"name": "mlp", "args": {"sizes": [64, 512, 512, 64, 10], "norm": "batch"}}, "head", (64,), 1797, 25,
    ),
    "WRN-28-2": (
        {"name": "wide_resnet", "args": {"depth": 28, "widen_factor": 2, "n_classes": 10}}, "fc", (3, 32, 32), 2000, 3,
    ),
}  # fmt: skip


def rows(device: torch.device | str = "cpu") -> list[Row]:
    """Time of a path's points, and of features alone, against bare loops over the same batches.

    Args:
        device: where both sides run.

    Returns:
        Two rows a network: what was measured, what it must reach, and whether it does.
    """
    device = torch.device(device)
    return [row for name in CASES for row in _case(name, device)]


def _case(name: str, device: torch.device) -> list[Row]:
    architecture, head_name, shape, n, points = CASES[name]
    first, second = (_network({"family": "builtin", **architecture}, head_name, seed, device) for seed in (0, 1))
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 10
    probe = Probe(torch.randn(n, *shape, generator=generator), labels, None, 10, None).prepared(device)
    size = extract_features(first, probe, device=device)[2]
    batches = list(probe.batches(size, device=device))
    path, options = Path(first, second.module.state_dict()), EvaluationOptions(null_permutations=0)
    metrics = 0.0

    def walk() -> None:
        nonlocal metrics
        metrics = 0.0
        for w in even_grid(points):
            evaluation = evaluate_network(path.move_to(w), probe, device=device, options=options)
            metrics += sum(seconds for phase, seconds in evaluation.timings_seconds.items() if phase != "features")

    def loop() -> None:
        for _ in range(points):
            _bare(second.module, batches)

    # In turns, so that what else the machine does falls on both sides.
    rounds = [(_seconds(walk, device) - metrics, _seconds(loop, device)) for _ in range(3 if points > 3 else 2)]
    own, bare = (min(times) for times in zip(*rounds, strict=True))
    extraction = [
        (
            _seconds(lambda: extract_features(first, probe, device=device, batch_size=size), device),
            _seconds(lambda: _bare(second.module, batches), device),
        )
        for _ in range(7 if points > 3 else 2)
    ]
    extracted, alone = (min(times) for times in zip(*extraction, strict=True))
    return [
        {
            "case": f"path of {points} points, {name}, {n:,} inputs",
            "against": f"{points} bare forward loops in inference mode over the same batches",
            "seconds_without_metrics": own,
            "against_seconds": bare,
            "metrics_seconds": metrics,
            "times_the_loops": own / bare,
            "must": "at most 1.1 times, beside the metrics' own time",
            "reached": own <= 1.1 * bare,
        },
        {
            "case": f"features of {n:,} inputs, {name}",
            "against": "a bare forward loop in inference mode over the same batches",
            "seconds": extracted,
            "against_seconds": alone,
            "speed_of_the_loop": alone / extracted,
            "must": "at least 0.95 of its speed",
            "reached": alone >= 0.95 * extracted,
        },
    ]


def _network(architecture: dict[str, object], head_name: str, seed: int, device: torch.device) -> LoadedNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build(architecture, device=device).eval().requires_grad_(False)
    head = module.get_submodule(head_name)
    assert isinstance(head, nn.Linear)
    return LoadedNetwork(module, head_name, head.weight.detach(), head.bias.detach())


def _bare(module: nn.Module, batches: list[Tensor]) -> None:
    with torch.inference_mode():
        for batch in batches:
            module(batch)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
