"""Intervals of differences whose metrics have kinks: absolute values, and ratios over the smaller of two entropies.

Entropies depend smoothly on the samples, MIR and HDR do not: with u = H(K1) - H(K2) both are the larger of two smooth
branches, max(p, q) = (p + q) / 2 + |p - q| / 2, that meet at u = 0. Near there a draw may lie on either side, and the
derivative on the observed side says little about the other. So a difference of two of them is written as

    D = l + k_b |s_b| - k_a |s_a|

with l, s_a, s_b smooth: about normal, with covariances from their influence functions. The estimated quantity is the
mean of D over probes of this size, in which each |s| is a folded normal of mean sigma psi(s / sigma),

    psi(t) = t (2 Phi(t) - 1) + 2 phi(t):

a smooth function of the means of l, s_a and s_b. Its interval is that of the profile likelihood: all values that it
takes for means that are at most q standard errors from the observed ones. Far from kinks it is D -+ q times the
standard error; for one |s| alone it is the folded interval of s.

Source: Fang and Santos 2019 for functionals with directional derivatives; Hall and Martin 1988 for the iterated
bootstrap.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import qmc

# Beyond so many standard errors a kink has no effect: one draw in 15,000 is on the other side.
FAR = 4.0
_STARTS, _STEPS = 96, 16


@dataclass(frozen=True)
class Folded:
    """D = l + k_b |s_b| - k_a |s_a|.

    Attributes:
        means: of l, s_a and s_b, as observed.
        covariance: of these three over draws of the samples.
        signs: of |s_a| and |s_b|: -k_a and k_b.
    """

    means: NDArray[np.float64]
    covariance: NDArray[np.float64]
    signs: NDArray[np.float64]

    def is_near(self) -> bool:
        """Return whether a draw may be on the other side of a kink."""
        spreads = self._spreads()
        return bool((np.abs(self.means[1:]) < FAR * spreads).any())

    def standard_error(self) -> float:
        """Return the standard deviation of D over draws.

        The observed point lies farther from a kink, on average, than the true one, and the deviation there differs. So
        the observed variance V is corrected by its change over one more draw: 2 V - E V, the iterated bootstrap.
        """
        spreads, drawn = self._spreads(), _NORMALS @ _root(self.covariance).T
        centre = float(self._mean(np.zeros((1, 3)), spreads)[0][0])
        seen = float(self._at(self.means + drawn).var())
        # Over one more draw E V is the variance over both draws minus that of the means between them.
        both = float(((self._at(self.means + math.sqrt(2) * drawn) - centre) ** 2).mean())
        between = float(((self._mean(drawn, spreads)[0] - centre) ** 2).mean())
        return math.sqrt(max(2 * seen - max(both - between, 0.0), seen / 3))

    def interval(self, quantile: float) -> tuple[float, float]:
        """Return the ends of the interval of the mean of D, `quantile` standard errors away."""
        root, spreads = _root(self.covariance), self._spreads()
        starts = _BALL * quantile
        of_starts, slopes_there = self._mean(starts @ root.T, spreads)
        ends = []
        for side in (-1.0, 1.0):
            # Steepest ascent on the ball of means within the quantile, from the best of many points in it.
            best = np.argsort(side * of_starts)[-6:]
            places, values, slopes = starts[best], of_starts[best], slopes_there[best] @ root
            step = 0.5 * quantile
            for _ in range(_STEPS):
                lengths = np.linalg.norm(slopes, axis=1, keepdims=True)
                moved = places + side * step * slopes / np.where(lengths > 0, lengths, 1.0)
                moved *= np.minimum(1.0, quantile / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-300))
                after, slopes_after = self._mean(moved @ root.T, spreads)
                better = side * after > side * values
                places = np.where(better[:, None], moved, places)
                values = np.where(better, after, values)
                slopes = np.where(better[:, None], slopes_after @ root, slopes)
                if not better.any():
                    step /= 2
            ends.append(float((side * values).max() * side))
        return ends[0], ends[1]

    def _spreads(self) -> NDArray[np.float64]:
        """Return the standard deviations of s_a and s_b."""
        return np.sqrt(np.diag(self.covariance))[1:]

    def _at(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return D at values of l, s_a and s_b."""
        return places[:, 0] + np.abs(places[:, 1:]) @ self.signs

    def _mean(
        self, moves: NDArray[np.float64], spreads: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return E D and its gradient at moved means."""
        means = self.means + moves
        widths = np.where(spreads > 0, spreads, 1e-300)
        t = np.clip(means[:, 1:] / widths, -1e8, 1e8)
        turned = 2 * ndtr(t) - 1
        folded = means[:, 1:] * turned + spreads * np.exp(-t * t / 2) * math.sqrt(2 / math.pi)
        values = means[:, 0] + folded @ self.signs
        return values, np.column_stack([np.ones(len(means)), turned * self.signs])


def lognormal_interval(a: float, b: float, covariance: NDArray[np.float64], quantile: float) -> tuple[float, float]:
    """Return the interval of the mean of b - a, two positive measures whose logarithms are about normal.

    Their errors are in proportion to them, so the measures' own errors are too small if the measures came out small.
    By the profile likelihood again, of the means exp(mu + sigma^2 / 2).

    Args:
        a, b: observed values, above 0.
        covariance: of log a and log b.
        quantile: standard errors.

    Returns:
        Both ends.
    """
    angles = np.linspace(0, 2 * math.pi, 721)
    moves = quantile * np.column_stack([np.cos(angles), np.sin(angles)]) @ _root(covariance).T
    means = np.exp(np.clip(moves + np.diag(covariance) / 2, -700, 700)) * [a, b]
    differences = means[:, 1] - means[:, 0]
    return float(differences.min()), float(differences.max())


def paired_interval(only_a: int, only_b: int, n: int, quantile: float) -> tuple[float, float]:
    """Return the score interval of a difference of two shares of the same samples, B - A.

    It has a width even if the two never differ, and a higher coverage than stated if they hardly differ.

    Args:
        only_a, only_b: samples that count for A alone, and for B alone.
        n: samples, at least 1.
        quantile: of the normal distribution, above 0.

    Returns:
        Both ends, within [-1, 1]: the differences that a score test would not reject.

    Numerics: by Brent's method, to 1e-12.

    Source: Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the
        paired-sample design".

    >>> low, high = paired_interval(0, 0, 100, 1.96)
    >>> round(low, 4), round(high, 4)
    (-0.037, 0.037)
    """

    def score(difference: float) -> float:
        """Return the score statistic of a difference."""
        # The most likely share of samples for A alone under this difference: a root of a quadratic.
        linear = -only_a - only_b + (2 * n - only_b + only_a) * difference
        constant = -only_a * difference * (1 - difference)
        share = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        return (only_b - only_a - n * difference) / math.sqrt(max(variance, 1e-300))

    seen = (only_b - only_a) / n

    def end(limit: float) -> float:
        """Return the end of the interval between the observed difference and a limit."""
        if seen == limit:
            return limit
        return float(brentq(lambda difference: abs(score(difference)) - quantile, seen, limit, xtol=1e-12))

    return end(-1.0), end(1.0)


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return A with A A^T the covariance, which may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    root: NDArray[np.float64] = vectors * np.sqrt(np.maximum(values, 0.0))
    return root


def _normals(n: int) -> NDArray[np.float64]:
    """Return points distributed like a three-dimensional normal distribution, the same at each call."""
    points = qmc.Sobol(3, scramble=True, seed=0).random(n)
    normals: NDArray[np.float64] = ndtri(np.clip(points, 1e-12, 1 - 1e-12))
    return normals


_NORMALS = _normals(2048)
# Points of the unit ball: on its surface and inside it.
_DIRECTIONS = _NORMALS[:_STARTS] / np.linalg.norm(_NORMALS[:_STARTS], axis=1, keepdims=True)
_BALL = np.concatenate([np.zeros((1, 3)), *(radius * _DIRECTIONS for radius in (0.25, 0.5, 0.75, 1.0))])
