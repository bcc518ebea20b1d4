"""How often 95 % intervals of a difference contain the true value: a small seeded part of benchmarks/intervals.py.

The bounds allow for the uncertainty of 40 replicates: an interval with coverage 95 of 100 contains the true value fewer
than 34 of 40 times in one run of 300, and a stated standard error is known to 11 %.
"""

import pytest

from analysis.comparison import ComparisonOptions
from benchmarks.intervals import DESIGNS, coverage
from tests.campaigns import campaign

DELTA = ComparisonOptions(null_permutations=0)
# Few resamples, as each is two evaluations: Student's quantile makes up for them.
BOOTSTRAP = ComparisonOptions(null_permutations=0, interval="bootstrap", resamples=10)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", campaign(["imbalanced", "near_zero", "near_identical"], often=[]))
def test_intervals_hold_the_truth(name: str) -> None:
    """Intervals from influence functions, for each metric that has one in most replicates."""
    for path, found in coverage(DESIGNS[name], DELTA, replicates=40, processes=1).items():
        if found.n_intervals < 30:
            assert found.reason is not None, path
            continue
        assert found.held >= 0.85, (path, str(found))
        # Without metrics that a few replicates decide: crossings of a kink, and samples on which networks disagree.
        if path != "accuracy" and "class_mean" not in path:
            assert 0.7 < found.ratio < 1.5, (path, str(found))


@pytest.mark.slow
def test_bootstrap_intervals_hold_the_truth() -> None:
    """Intervals of smooth metrics from resamples, which hold samples twice and so disturb class means near a kink."""
    found = coverage(DESIGNS["three_classes"], BOOTSTRAP, replicates=40, processes=1)
    smooth = (f"interplay.sample.{name}" for name in ("none.mir", "global.mir", "none.hdr"))
    for path in ("accuracy", "loss", *smooth):
        assert found[path].held >= 0.85, (path, str(found[path]))
