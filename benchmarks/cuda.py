"""`python -m benchmarks.cuda`: measure everything that a GPU changes, on a GPU machine with its image's own packages.

The tests (tests/cuda) run first, then the rows of the other benchmarks that depend on the device, networks of real
size, and features of ImageNet's size. Nothing of the service is imported. `--device cpu` runs it without a GPU, with
smaller cases.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

import tests.operators.sitecustomize  # noqa: F401  torchvision may be imported beside a CPU build of torch
from analysis.evaluation import EvaluationOptions, evaluate_features, evaluate_network
from analysis.networks.loading import LoadedNetwork, build
from analysis.passes.extraction import extract_features
from analysis.passes.precision import Precision, arithmetic
from analysis.probes.feature_set import FeatureSet
from analysis.probes.inputs import Inputs
from analysis.probes.preprocess import Preprocess
from analysis.probes.probe import Probe
from analysis.sweeps.paths import Path
from benchmarks import losses, paths, spectra
from benchmarks.paths import seconds_of

Row = dict[str, Any]
# timm's names, and the number of samples that go through each: enough for a second or more on an H100.
NETWORKS = {"resnet50": 4096, "vit_base_patch16_224": 2048, "convnext_base": 2048}
FEW = 32
# Features of ImageNet's size: 1,281,167 training samples of ResNet-50's 2,048 features, 1,000 classes.
IMAGENET = (1_281_167, 2048, 1000)
SMALL = (2_000, 32, 10)
COPIES = 3.05


def main() -> None:
    """Run the requested parts, print one table, and write it to the path that `--output` gives."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=FilePath, help="JSON: every row with all of its figures")
    options = parser.parse_args()
    device = torch.zeros(0, device=options.device).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {platform.machine()}"
    rows: list[Row] = []
    for part in options.only:
        start = time.perf_counter()
        print(f"{part} ...", file=sys.stderr, flush=True)
        for row in _kept_going(PARTS[part], device):
            rows.append({"part": part, **row})
            print(_line(rows[-1]), file=sys.stderr, flush=True)
        print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if options.output:
            about = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "rows": rows}
            options.output.write_text(json.dumps(about, indent=2) + "\n")
    print(f"\n{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}\n")
    print("| | part | case | seen | must |\n|---|---|---|---|---|")
    print("\n".join(map(_line, rows)))
    if not all(row["reached"] for row in rows):
        sys.exit(1)


def _kept_going(part: Callable[[torch.device], Iterable[Row]], device: torch.device) -> Iterable[Row]:
    """Yield the rows of a part, and a row with the error if the part fails; the parts after it run nevertheless."""
    try:
        yield from part(device)
    except Exception as error:  # noqa: BLE001  whatever it is, the table says so
        yield {"case": "failed", "seen": f"{type(error).__name__}: {error}"[:300], "must": "no error", "reached": False}


def _line(row: Row) -> str:
    """Return a row of the table; figures without their own `seen` are listed."""
    left_out = ("part", "case", "must", "reached", "against", "seen")
    figures = ", ".join(f"{key} {_short(value)}" for key, value in row.items() if key not in left_out)
    state = "reached" if row["reached"] else "MISSED"
    return f"| {state} | {row['part']} | {row['case']} | {row.get('seen') or figures} | {row['must']} |"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tests(device: torch.device) -> Iterable[Row]:
    """Run all of tests/cuda in a separate process; leave out tests/conftest.py, which starts services."""
    command = [sys.executable, "-m", "pytest", "tests/cuda", "--confcutdir=tests/cuda", "-p", "no:cacheprovider", "-q"]
    command += ["-m", "slow or not slow"]
    environment = {**os.environ, "DEVICE": str(device)}
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        print(ran.stdout, file=sys.stderr, flush=True)
    last = ran.stdout.strip().rsplit("\n", 1)[-1].strip("= ")
    yield {"case": "tests/cuda", "seen": last, "must": "none fails", "reached": ran.returncode == 0}


def _spectra(device: torch.device) -> Iterable[Row]:
    names = ["gram", "whole", "null", "validation", "random"] if device.type == "cuda" else ["null"]
    for name in names:
        yield from spectra.PARTS[name](device)


def _networks(device: torch.device) -> Iterable[Row]:
    """Measure networks of real size: features of uint8 images in the processor's memory, against a bare loop."""
    import timm

    for name, samples in NETWORKS.items():
        n = samples if device.type == "cuda" else FEW
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = timm.create_model(name, num_classes=1000).eval().requires_grad_(False).to(device)
        head = next(key for key, part in reversed(list(module.named_modules())) if isinstance(part, nn.Linear))
        network = LoadedNetwork(module, head)
        images = torch.randint(256, (n, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        preprocess = Preprocess(scale=1 / 255, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
        probe = Probe(images, torch.arange(n) % 1000, None, 1000, preprocess)
        for precision in ("float32", "bfloat16") if device.type == "cuda" else ("float32",):
            yield _pass_row(name, network, probe, precision, device)
        del module, network


def _pass_row(name: str, network: LoadedNetwork, probe: Probe, precision: Precision, device: torch.device) -> Row:
    n = len(probe.labels)
    size = extract_features(network, probe, device=device, precision=precision)[2]
    prepared = list(probe.batches(size, device=device))[:4]

    def bare(batches: Iterable[Inputs]) -> None:
        with torch.no_grad(), arithmetic(device, precision):
            for batch in batches:
                network.module(batch)

    def extract() -> None:
        extract_features(network, probe, device=device, batch_size=size, precision=precision)

    done = sum(len(batch) for batch in prepared)
    turns = [(seconds_of(extract, device), seconds_of(lambda: bare(prepared), device)) for _ in range(3)]
    ours = min(of_ours for of_ours, _ in turns) / n
    theirs = min(of_theirs for _, of_theirs in turns) / done
    return {
        "case": f"features of {n:,} images of 224 x 224 in host memory, {name}, {precision}",
        "against": "a bare loop over prepared batches that lie on the device",
        "samples_a_second": 1 / ours,
        "batch_size": size,
        "speed_of_the_loop": theirs / ours,
        "must": "at least 0.9 of the bare loop" if device.type == "cuda" else "no limit",
        "reached": theirs / ours >= 0.9 or device.type != "cuda",
    }


def _imagenet(device: torch.device) -> Iterable[Row]:
    """Measure a full evaluation of as many features as ImageNet has training samples."""
    n, d, c = IMAGENET if device.type == "cuda" else SMALL
    generator = torch.Generator(device).manual_seed(0)
    scales = torch.arange(1, d + 1, device=device).float().pow(-0.5)
    head = torch.randn(c, d, generator=generator, device=device) * scales
    labels = torch.randint(c, (n,), generator=generator, device=device)
    features = torch.empty(n, d, device=device)
    for start in range(0, n, 2**16):
        part = labels[start : start + 2**16]
        features[start : start + 2**16] = head[part] + scales * torch.randn(
            len(part), d, generator=generator, device=device
        )
    data = FeatureSet(features, labels, head, None, None, None)
    before = _reset_peak(device)
    start_seconds = time.perf_counter()
    found = evaluate_features(data, device=device, options=EvaluationOptions())
    seconds = time.perf_counter() - start_seconds
    sample = found.splits["all"].interplay["sample"]
    yield {
        "case": f"evaluation of {n:,} x {d:,} features, C={c:,}, both levels and centrings, null of 10 permutations",
        "seconds": seconds,
        **{f"seconds_{phase}": value for phase, value in found.timings_seconds.items()},
        "mir": sample["none"].mir,
        "mir_error_estimate": method.error_estimate if (method := sample["none"].method) else None,
        "mir_method": method.name if method else None,
        "features_gib": features.nbytes / 2**30,
        "peak_gib_beside_features": (_peak(device) - before) / 2**30,
        "must": "under two minutes",
        "reached": seconds < 120,
    }


def _memory(device: torch.device) -> Iterable[Row]:
    """Measure the peak number of parameter copies that a path holds on the device."""
    architecture = {"family": "builtin", "name": "mlp", "args": {"sizes": [64, *[2048] * 25, 10], "norm": "none"}}
    probe = Probe(torch.randn(64, 64), torch.arange(64) % 10, None, 10, None)
    if device.type != "cuda":
        return
    before = _reset_peak(device)
    networks = [LoadedNetwork(build(architecture, device=device).eval().requires_grad_(False), "head") for _ in "ab"]
    n_bytes = sum(tensor.nbytes for tensor in networks[0].module.state_dict().values())
    path = Path(networks[0], networks[1].module.state_dict())
    for w in (0.0, 1.0, 0.5):
        evaluate_network(path.move_to(w), probe, device=device, options=EvaluationOptions(null_permutations=0))
    copies = (_peak(device) - before) / n_bytes
    yield {
        "case": f"path of 3 points, mlp of {n_bytes // 4:,} parameters",
        "copies": copies,
        "must": f"at most {COPIES} copies of the parameters on the device",
        "reached": copies <= COPIES,
    }


def _reset_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _same_bits(device: torch.device) -> Iterable[Row]:
    """Check that a repeated pass and evaluation are equal in every digit, for networks of real size."""
    import timm

    name = "resnet50" if device.type == "cuda" else "resnet18"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = timm.create_model(name, num_classes=10).eval().requires_grad_(False).to(device)
    n = 512 if device.type == "cuda" else 16
    inputs = torch.randn(n, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    probe = Probe(inputs, torch.arange(n) % 10, None, 10, None)
    found: list[tuple[Tensor, Any]] = []
    for _ in range(2):
        features = extract_features(LoadedNetwork(module, "fc"), probe, device=device)[0]
        evaluated = evaluate_network(LoadedNetwork(module, "fc"), probe, device=device, options=EvaluationOptions())
        found.append((features, evaluated.splits))
    same = torch.equal(found[0][0], found[1][0]), found[0][1] == found[1][1]
    yield {
        "case": f"{n} images through {name} twice: features, and every number of the evaluation",
        "seen": f"features {'equal' if same[0] else 'differ'}, numbers {'equal' if same[1] else 'differ'}",
        "must": "equal bit for bit",
        "reached": all(same),
    }


PARTS: dict[str, Callable[[torch.device], Iterable[Row]]] = {
    "tests": _tests,
    "repeat": _same_bits,
    "losses": losses.rows,
    "paths": paths.rows,
    "memory": _memory,
    "networks": _networks,
    "imagenet": _imagenet,
    "spectra": _spectra,
}


if __name__ == "__main__":
    main()
