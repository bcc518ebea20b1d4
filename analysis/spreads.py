"""Standard errors and intervals of the difference between two checkpoints, from influences.

Three cases decide the interval of a metric. Most are smooth: their interval is the difference -+ q times the
standard error, with Student's quantile for as many samples as the error rests on. MIR and HDR have kinks, near which
`intervals.Folded` takes over; the error of NC1 is in proportion to it. Where no error is available, a reason is given.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float64, Int
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import t as student
from torch import Tensor

from .evaluation import SplitEvaluation
from .measures.influence import ENTROPIES
from .measures.intervals import FAR, Folded, lognormal_interval, paired_interval

# Where class sizes may have been drawn or given, the error is that of drawn sizes, but at most the first factor above
# that of given sizes; where both are farther apart than the second factor, neither is used.
_WIDENED, _APART = 1.15, 1.33
# Degrees of freedom: with fewer, a handful of samples decides, and the spread of their kind is unknown.
_FEWEST = 8.0


@dataclass(frozen=True)
class Spread:
    """The standard error of a difference, its interval, and biases where estimated; or the reason why they are missing.

    Beside an interval, `reason` says how it was computed: `near_zero`, `equal_entropies`, `too_few_disagreements`.
    """

    standard_error: float | None
    low: float | None = None
    high: float | None = None
    bias: float | None = None
    bias_a: float | None = None
    bias_b: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Sizes:
    """The classes of the samples, and whether the class sizes were given or drawn.

    Attributes:
        labels: 0 to k - 1.
        counts: by class.
        drawn: whether the sizes were certainly drawn: tokens of texts, or a class of one sample, which says nothing
            about the variation within its class.
        given: whether the sizes were certainly given: all classes have the same size.
    """

    labels: Int[Tensor, " n"]
    counts: Float64[Tensor, " k"]
    drawn: bool
    given: bool

    @classmethod
    def of(cls, labels: Int[Tensor, " n"], *, tokens: bool) -> "Sizes":
        """Return the sizes of the classes present; sizes of tokens count as drawn."""
        _, places, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        drawn = tokens or int(counts.min()) == 1
        return cls(places, counts.double(), drawn, not drawn and bool((counts == counts[0]).all()))

    def within(self, rows: Float64[Tensor, "k n"]) -> Float64[Tensor, "k n"]:
        """Centre rows in each class, and undo by scale the loss of variance from centring on the class's own mean."""
        sums = rows.new_zeros(len(rows), len(self.counts)).index_add_(1, self.labels, rows)
        stretch = (self.counts / (self.counts - 1).clamp(min=1)).sqrt()
        centred: Float64[Tensor, "k n"] = (rows - (sums / self.counts)[:, self.labels]) * stretch[self.labels]
        return centred


def delta_spreads(
    a: tuple[SplitEvaluation, Mapping[str, float | None], Mapping[str, Float64[Tensor, " n"]]],
    b: tuple[SplitEvaluation, Mapping[str, float | None], Mapping[str, Float64[Tensor, " n"]]],
    sizes: Sizes,
    *,
    confidence: float,
    fewest: int,
) -> dict[str, Spread]:
    """Return standard errors and intervals of B - A for every metric whose influence is known.

    Args:
        a, b: the evaluation, its metrics by path, and their influences, centred over all samples, of the same samples.
        sizes: of the classes.
        confidence: of the intervals.
        fewest: with fewer samples on which only one checkpoint is right (NC4: agrees), no difference can be shown.

    Returns:
        By path, including distances to the optimum; the optimum is fixed by the class counts.
    """
    first, second = (_Checkpoint(values, influences, _ideals(split)) for split, values, influences in (a, b))
    found = {}
    for path in first.values:
        sides = [_side(entry, path) for entry in (first, second)]
        if sides[0] is not None and sides[1] is not None:
            found[path] = _spread(path, sides[0], sides[1], sizes, confidence, fewest)
    return found


@dataclass(frozen=True)
class _Draw:
    """Covariance of several numbers over draws of the samples, and the degrees of freedom of one sum of them."""

    covariance: NDArray[np.float64]
    freedom: float
    reason: str | None


@dataclass(frozen=True)
class _Side:
    """A metric of one checkpoint: value and influence; for MIR and HDR, m + |s|, those of m and of s."""

    value: float
    influence: Float64[Tensor, " n"]
    kink: float = math.inf
    of_kink: Float64[Tensor, " n"] | None = None
    sign: float = 1.0


@dataclass(frozen=True)
class _Checkpoint:
    values: Mapping[str, float | None]
    influences: Mapping[str, Float64[Tensor, " n"]]
    ideals: Mapping[str, float | None] = field(default_factory=dict)


def _ideals(split: SplitEvaluation) -> dict[str, float | None]:
    return {
        f"interplay.{level}.{centring}.{name}": getattr(entry.optimum, name)
        for level, centrings in split.interplay.items()
        for centring, entry in centrings.items()
        for name in ("mir", "hdr")
    }


def _side(entry: _Checkpoint, path: str) -> _Side | None:
    """Return a metric of one checkpoint; None where it or its influence is unknown."""
    level, _, name = path.rpartition(".")
    if level.endswith(".distance_to_optimum"):
        return _distance(entry, f"{level.removesuffix('.distance_to_optimum')}.{name}")
    value = entry.values[path]
    if value is None or path not in entry.influences:
        return None
    if name in ("mir", "hdr"):
        return _of_branches(entry, level, name)
    return _Side(value, entry.influences[path])


def _of_branches(entry: _Checkpoint, level: str, name: str) -> _Side | None:
    """Return MIR or HDR as the larger of two smooth branches p and q: m + |s|, m = (p + q) / 2, s = (p - q) / 2."""
    values = [entry.values[f"{level}.{one}"] for one in ENTROPIES]
    h1, h2, joint = (value or 0.0 for value in values)
    i1, i2, of_joint = (entry.influences[f"{level}.{one}"] for one in ENTROPIES)
    if min(h1, h2) <= 0:
        # One of the branches is missing: H = 0.
        value = entry.values[f"{level}.{name}"]
        return None if value is None else _Side(value, entry.influences[f"{level}.{name}"])
    above, moves = (h1 + h2 - joint, i1 + i2 - of_joint) if name == "mir" else (h1 - h2, i1 - i2)
    # Where H1 is larger, MIR divides by H2, HDR by H1; else MIR divides by H1, HDR, with its sign reversed, by H2.
    by_head, by_features = above / h2, above / h1
    of_head, of_features = (moves - by_head * i2) / h2, (moves - by_features * i1) / h1
    if name == "mir":
        p, q, of_p, of_q = by_head, by_features, of_head, of_features
    else:
        p, q, of_p, of_q = by_features, -by_head, of_features, -of_head
    return _Side((p + q) / 2, (of_p + of_q) / 2, (p - q) / 2, (of_p - of_q) / 2)


def _distance(entry: _Checkpoint, path: str) -> _Side | None:
    """Return |MIR - ideal| or |HDR - ideal|: near 0 its kink is at 0, elsewhere it is that of MIR or HDR."""
    side, ideal, value = _side(entry, path), entry.ideals[path], entry.values[path]
    if side is None or ideal is None or value is None:
        return None
    influence = entry.influences[path]
    gap = value - ideal
    if side.of_kink is None or (ideal > 0 and abs(gap) < FAR * float(influence.norm()) / len(influence)):
        return _Side(0.0, torch.zeros_like(influence), gap, influence)
    sign = 1.0 if gap >= 0 else -1.0
    return _Side(sign * (side.value - ideal), sign * side.influence, side.kink, side.of_kink, sign)


def _spread(path: str, a: _Side, b: _Side, sizes: Sizes, confidence: float, fewest: int) -> Spread:
    if path in ("accuracy", "collapse.nc4"):
        # Samples that count for only one checkpoint move the difference by 1 / n, less than half of which is smooth.
        moves = b.influence - a.influence + b.value - a.value
        only_a, only_b = int((moves < -0.5).sum()), int((moves > 0.5).sum())
        if only_a + only_b < fewest:
            if path != "accuracy":
                return Spread(None, reason="too_few_disagreements")
            return _few_disagreements(only_a, only_b, len(moves), confidence)
    none = torch.zeros_like(a.influence)
    kinked = [side if side.of_kink is not None else _Side(0.0, none, math.inf, none) for side in (a, b)]
    of_a, of_b = (side.of_kink for side in kinked)
    assert of_a is not None
    assert of_b is not None
    signs = [-a.sign, b.sign]
    slopes = [sign * math.copysign(1.0, side.kink) for sign, side in zip(signs, kinked, strict=True)]
    rows = torch.stack([b.influence - a.influence, of_a, of_b])
    draw = _draw(rows, [1.0, *slopes], sizes)
    if draw.reason is not None:
        return Spread(None, reason=draw.reason)
    quantile = float(student.ppf((1 + confidence) / 2, draw.freedom))
    at = [side.kink if math.isfinite(side.kink) else 0.0 for side in kinked]
    difference = b.value - a.value + sum(sign * abs(one) for sign, one in zip(signs, at, strict=True))
    folded = Folded(np.array([b.value - a.value, *at]), draw.covariance, np.array(signs))
    if folded.is_near():
        low, high = folded.interval(quantile)
        # The interval always contains the observed difference, though the mean of an absolute value is above 0.
        reason = (
            "equal_entropies" if path.endswith(".mir") and math.isfinite(a.kink) and not _folds(a, b) else "near_zero"
        )
        return Spread(folded.standard_error(), min(low, difference), max(high, difference), reason=reason)
    direction = np.array([1.0, *slopes])
    error = math.sqrt(max(float(direction @ draw.covariance @ direction), 0.0))
    if path == "collapse.nc1" and min(a.value, b.value) > 0:
        scales = torch.stack([a.influence / a.value, b.influence / b.value])
        low, high = lognormal_interval(a.value, b.value, _draw(scales, [-1.0, 1.0], sizes).covariance, quantile)
        return Spread(error, min(low, difference), max(high, difference))
    return Spread(error, difference - quantile * error, difference + quantile * error)


def _few_disagreements(only_a: int, only_b: int, n: int, confidence: float) -> Spread:
    """Return the score interval of accuracies that hardly differ; it holds 0, as McNemar's exact test cannot reject."""
    low, high = paired_interval(only_a, only_b, n, float(ndtri((1 + confidence) / 2)))
    error = math.sqrt(only_a + only_b - (only_b - only_a) ** 2 / n) / n
    return Spread(error, min(low, 0.0), max(high, 0.0), reason="too_few_disagreements")


def _folds(a: _Side, b: _Side) -> bool:
    """Return whether both sides are distances near 0."""
    return a.value == 0.0 and b.value == 0.0


def _draw(rows: Float64[Tensor, "k n"], direction: list[float], sizes: Sizes) -> _Draw:
    """Return the covariance of numbers with these influences, and the degrees of freedom of one sum of them."""
    n = rows.shape[1]
    weights = rows.new_tensor(direction)
    within = sizes.within(rows)
    of_given, of_drawn = (part @ part.T / n**2 for part in (within, rows))
    given, drawn = (float(weights @ part @ weights) for part in (of_given, of_drawn))
    scale, reason = 1.0, None
    if not sizes.drawn and not sizes.given and drawn > given:
        if drawn > _APART**2 * given:
            reason = "class_sizes"
        scale = min(drawn / max(given, 1e-300), _WIDENED**2)
    moves = weights @ (rows if sizes.drawn else within)
    # Of numbers that are constant in every class, only rounding is left.
    moves = moves if float(moves.norm()) > 1e-12 * float((weights @ rows).norm()) else torch.zeros_like(moves)
    squares = moves.square()
    places = torch.zeros_like(sizes.labels) if sizes.drawn else sizes.labels
    counts = torch.bincount(places)
    averages = torch.zeros_like(sizes.counts[: len(counts)]).index_add_(0, places, squares) / counts
    about = float((squares - averages[places]).square().sum())
    freedom = 2 * float(squares.sum()) ** 2 / about if about > 0 else math.inf
    if reason is None and freedom < _FEWEST:
        reason = "few_samples"
    covariance: NDArray[np.float64] = (of_drawn if sizes.drawn else of_given * scale).cpu().numpy()
    return _Draw(covariance, min(freedom, float(n)), reason)
