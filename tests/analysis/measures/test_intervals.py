"""Intervals near kinks, on normal variables: their coverage, and their stated errors."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from analysis.measures.intervals import Folded, lognormal_interval, paired_interval
from tests.campaigns import campaign

QUANTILE = 1.959964


def _covariance(rho: float) -> NDArray[np.float64]:
    """Return the covariance of l, s_a and s_b, the last two with correlation rho."""
    return np.array([[0.25, 0.1, 0.1], [0.1, 1.0, rho], [0.1, rho, 1.0]])


def _draws(means: NDArray[np.float64], covariance: NDArray[np.float64], n: int, seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    return generator.multivariate_normal(means, covariance, size=n, method="eigh")


@pytest.mark.parametrize(
    ("means", "rho"),
    campaign(
        [
            ((0.0, 1.2, -0.8), 0.5),
            ((0.3, -1.5, 3.0), 0.8),
            ((0.0, 0.5, 0.8), 0.99),  # two checkpoints that hardly differ
            ((0.1, 1.5, 1.52), 0.9999),
        ],
        often=[((0.0, 1.2, -0.8), 0.5), ((0.0, 0.5, 0.8), 0.99)],
    ),
)
def test_intervals_hold_the_mean(means: tuple[float, float, float], rho: float) -> None:
    """The interval of D = l + |s_b| - |s_a| contains the mean in at least 92 of 100 draws.

    The stated error is 0.85 to 1.3 times the true one. Between two near kinks the profile likelihood is conservative:
    up to 99.5 of 100.
    """
    place, covariance, signs = np.array(means), _covariance(rho), np.array([-1.0, 1.0])
    many = _draws(place, covariance, 200_000, 0)
    true = many[:, 0] + np.abs(many[:, 1:]) @ signs
    found = [Folded(seen, covariance, signs) for seen in _draws(place, covariance, 300, 1)]
    ends = [entry.interval(QUANTILE) for entry in found]
    held = np.mean([low <= true.mean() <= high for low, high in ends])
    assert 0.92 <= held <= 0.995
    assert 0.85 < np.mean([entry.standard_error() for entry in found]) / true.std() < 1.3


def test_far_from_kinks_nothing_is_folded() -> None:
    """The interval is the sum -+ q times its standard error, as for any smooth number."""
    covariance, signs = _covariance(0.3), np.array([-1.0, 1.0])
    entry = Folded(np.array([0.5, 30.0, -40.0]), covariance, signs)
    assert not entry.is_near()
    direction = np.array([1.0, -1.0, -1.0])
    error = math.sqrt(direction @ covariance @ direction)
    low, high = entry.interval(QUANTILE)
    assert (low, high) == pytest.approx((10.5 - QUANTILE * error, 10.5 + QUANTILE * error), rel=1e-4)
    assert entry.standard_error() == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("seen", [0.0, 0.7, 1.96, 3.0])
def test_one_absolute_value_is_the_folded_interval(seen: float) -> None:
    """The mean of |s| is sigma psi(t), and the interval runs from the nearest s to 0 to the farthest."""

    def psi(t: float) -> float:
        return float(t * (2 * norm.cdf(t) - 1) + 2 * norm.pdf(t))

    covariance = np.zeros((3, 3))
    covariance[2, 2] = 4.0
    entry = Folded(np.array([0.0, 0.0, 2 * seen]), covariance, np.array([-1.0, 1.0]))
    low, high = entry.interval(QUANTILE)
    assert low == pytest.approx(2 * psi(max(seen - QUANTILE, 0.0)), abs=1e-3)
    assert high == pytest.approx(2 * psi(seen + QUANTILE), rel=1e-3)


def test_nothing_that_moves_has_no_width() -> None:
    """For equal checkpoints s_a and s_b move together, and their difference is 0 in every draw."""
    covariance = np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    entry = Folded(np.array([0.0, 0.3, 0.3]), covariance, np.array([-1.0, 1.0]))
    assert entry.interval(QUANTILE) == pytest.approx((0.0, 0.0), abs=1e-7)
    assert entry.standard_error() == pytest.approx(0.0, abs=1e-7)


def test_positive_measures_have_errors_in_proportion() -> None:
    """The interval of b - a of two lognormal measures, also correlated ones, contains the mean in 92 to 98 of 100."""
    for rho, gap in ((0.3, 0.4), (0.999, 0.01)):
        covariance = 0.09 * np.array([[1.0, rho], [rho, 1.0]])
        generator = np.random.default_rng(0)
        logs = generator.multivariate_normal([0.0, gap], covariance, size=1000, method="eigh")
        a, b = np.exp(logs).T
        truth = math.exp(0.045) * (math.exp(gap) - 1)
        ends = [lognormal_interval(one, other, covariance, QUANTILE) for one, other in zip(a, b, strict=True)]
        assert 0.92 <= np.mean([low <= truth <= high for low, high in ends]) <= 0.98


def test_paired_shares_by_hand() -> None:
    """Without a discordant sample the ends are -+ z^2 / (n + z^2); exchanging the two mirrors the interval."""
    for n in (10, 90, 5000):
        square = 1.96**2
        low, high = paired_interval(0, 0, n, 1.96)
        assert [low, high] == pytest.approx([-square / (n + square), square / (n + square)], abs=1e-9)
    low, high = paired_interval(3, 12, 44, 1.96)
    assert list(paired_interval(12, 3, 44, 1.96)) == pytest.approx([-high, -low], abs=1e-9)
    assert low < 9 / 44 < high


@pytest.mark.parametrize("shares", [(0.002, 0.002), (0.01, 0.005), (0.05, 0.1)])
def test_paired_intervals_hold_the_truth(shares: tuple[float, float]) -> None:
    """The coverage is at least the stated one, within the error of 4,000 draws, for shares of any size."""
    n, draws = 500, 4000
    drawn = np.random.default_rng(0).multinomial(n, [*shares, 1 - sum(shares)], size=draws)
    ends = {(a, b): paired_interval(a, b, n, 1.959964) for a, b in {(int(a), int(b)) for a, b, _ in drawn}}
    truth = shares[1] - shares[0]
    held = sum(ends[int(a), int(b)][0] <= truth <= ends[int(a), int(b)][1] for a, b, _ in drawn) / draws
    assert held > 0.94
