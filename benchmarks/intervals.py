"""Measure how often the intervals of a comparison hold the truth: `python -m benchmarks.intervals`, by hand.

A design fixes class centres, two heads and two linear maps (two checkpoints that see the same samples), then draws the
samples anew for each replicate. The truth of a difference is its mean over the replicates. Each row gives the number
of replicates with an interval, the share of these that held the truth, the mean of the stated standard errors over the
true one, and the most frequent reason for a missing interval.
"""

import argparse
import math
import multiprocessing
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from analysis.comparison import ComparisonOptions, Difference, compare
from analysis.probes.feature_set import FeatureSet

METRICS = (
    "accuracy",
    "loss",
    "collapse.nc1",
    "collapse.nc4",
    *(
        f"interplay.{level}.{centring}.{name}"
        for level in ("sample", "class_mean")
        for centring in ("none", "global")
        for name in ("mir", "hdr")
    ),
)


@dataclass(frozen=True)
class Design:
    """Classes and width, samples of each class (None: drawn), noise, and the distance between both checkpoints.

    `heads` and `maps` are the sizes of the random changes to each checkpoint's head and map. With `step` the second
    checkpoint is the first, moved by that much more: two checkpoints that hardly differ.
    """

    n_classes: int
    width: int
    counts: tuple[int, ...] | None
    noise: str = "normal"
    spread: float = 1.2
    heads: tuple[float, float] = (0.3, 0.5)
    maps: tuple[float, float] = (0.2, 0.5)
    step: float | None = None
    relu: bool = False


DESIGNS = {
    "gauss": Design(8, 12, (50,) * 8),
    "heavy": Design(5, 8, (60,) * 5, noise="student"),
    "lognormal": Design(5, 8, (60,) * 5, noise="lognormal"),
    "imbalanced": Design(6, 10, (200, 100, 60, 30, 20, 12)),
    "random_sizes": Design(6, 10, None),
    "relu": Design(8, 24, (60,) * 8, relu=True),
    "near_zero": Design(6, 10, (60,) * 6, spread=0.35, heads=(0.0, 0.0), maps=(0.05, 0.1)),
    "near_identical": Design(8, 12, (50,) * 8, step=0.003),
    "near_identical_heavy": Design(5, 8, (60,) * 5, noise="student", step=0.03),
    "near_identical_imbalanced": Design(6, 10, (200, 100, 60, 30, 20, 12), step=0.01),
    "three_classes": Design(3, 8, (60,) * 3),
    "three_classes_near_identical": Design(3, 8, (80,) * 3, step=0.01),
    "tight": Design(6, 10, (60,) * 6, spread=0.6),
}


def replicate(design: Design, number: int) -> list[FeatureSet]:
    """Evaluate both checkpoints on one draw of the samples."""
    fixed, drawn = np.random.default_rng(77), np.random.default_rng(10_000 + number)
    c, d = design.n_classes, design.width
    centres = fixed.normal(size=(c, d))
    heads = [centres + size * fixed.normal(size=(c, d)) for size in design.heads]
    maps = [np.eye(d) + size * fixed.normal(size=(d, d)) / math.sqrt(d) for size in design.maps]
    if design.step is not None:
        heads[1] = heads[0] + design.step * fixed.normal(size=(c, d))
        maps[1] = maps[0] + design.step * fixed.normal(size=(d, d)) / math.sqrt(d)
    if design.counts is None:
        shares = np.array([0.3, 0.25, 0.2, 0.12, 0.08, 0.05])
        labels = np.sort(drawn.choice(c, 300, p=shares))
    else:
        labels = np.repeat(np.arange(c), design.counts)
    shape = (len(labels), d)
    draws: dict[str, Callable[..., Any]] = {
        "normal": drawn.normal,
        "student": partial(drawn.standard_t, 3),
        "lognormal": lambda size: drawn.lognormal(0, 0.8, size) - math.exp(0.32),
    }
    seen = centres[labels] + design.spread * draws[design.noise](size=shape)
    features = [seen @ one for one in maps]
    if design.relu:
        features = [np.maximum(one, 0) for one in features]
    return [
        FeatureSet(torch.from_numpy(one), torch.from_numpy(labels), torch.from_numpy(head), None, None, None)
        for one, head in zip(features, heads, strict=True)
    ]


def differences(design: Design, options: ComparisonOptions, number: int) -> dict[str, Difference]:
    """Return the differences that a comparison of one replicate reports."""
    torch.set_num_threads(1)
    a, b = replicate(design, number)
    found = compare(a, b, device=torch.device("cpu"), options=options)
    return {path: found.splits["all"].differences[path] for path in METRICS}


@dataclass(frozen=True)
class Coverage:
    """The coverage of one metric: replicates, those with an interval, and the most frequent reason among the others.

    `held` is the share of intervals that hold the truth, `ratio` the mean stated standard error over the true one;
    both are NaN with fewer than two intervals.
    """

    n: int
    n_intervals: int
    held: float
    ratio: float
    reason: str | None

    def __str__(self) -> str:
        numbers = f"held {self.held:.3f}  stated over true {self.ratio:.2f}"
        return f"{self.n_intervals} of {self.n}  {numbers}  {self.reason or ''}".rstrip()


def coverage(design: Design, options: ComparisonOptions, *, replicates: int, processes: int) -> dict[str, Coverage]:
    """Compare the given number of replicates of a design; return the coverage of each metric."""
    # Each process imports anew: the array type checks that the tests switch on take longer than the computation.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(partial(differences, design, options), range(replicates), chunksize=5))
    return {path: _coverage([entry[path] for entry in found]) for path in METRICS}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.intervals", description=__doc__)
    parser.add_argument("designs", nargs="*", metavar="DESIGN", help=f"default: all of {', '.join(DESIGNS)}")
    parser.add_argument("--replicates", type=int, default=400)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--interval", choices=("delta", "bootstrap"), default="delta")
    parser.add_argument("--resamples", type=int, default=10, help="of each bootstrap interval (default: 10)")
    given = parser.parse_args()
    options = ComparisonOptions(null_permutations=0, interval=given.interval, resamples=given.resamples)
    for name in given.designs or DESIGNS:
        found = coverage(DESIGNS[name], options, replicates=given.replicates, processes=given.processes)
        for path, entry in found.items():
            print(f"{name:28s} {path:32s} {entry}", flush=True)


def _coverage(found: list[Difference]) -> Coverage:
    reasons = Counter(entry.reason for entry in found if entry.low is None)
    reason = reasons.most_common(1)[0][0] if reasons else None
    known = [
        (entry.difference, entry.low, entry.high, entry.standard_error)
        for entry in found
        if entry.difference is not None and entry.low is not None and entry.high is not None
    ]
    if len(known) < 2:
        return Coverage(len(found), len(known), math.nan, math.nan, reason)
    values = np.array(known, dtype=float)
    truth, spread = values[:, 0].mean(), max(values[:, 0].std(ddof=1), 1e-300)
    held = ((values[:, 1] <= truth) & (truth <= values[:, 2])).mean()
    return Coverage(len(found), len(known), float(held), float(values[:, 3].mean() / spread), reason)


if __name__ == "__main__":
    main()
