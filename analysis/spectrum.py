"""The joint spectrum of samples and their classes' head rows, and the permutation baseline beside it.

The naive way needs an N x N Gram matrix and all its eigenvalues. The head has only C distinct rows, and that is enough:

1. Exact reduction. With a factor R_c of each class Gram matrix (R_c^T R_c = Z_c^T Z_c, at most min(n_c, d) rows) the
   non-zero eigenvalues of K1 * K2 are those of the m x m matrix (R R^T) * g[class, class], R the stacked R_c and
   g the Gram matrix of the head's directions, m <= min(N, C d).
2. Pinched tail. Rows of R with small eigenvalues lose their couplings and enter the entropy as they are. Pinching never
   lowers entropy, so MIR is bounded from below.
3. Adaptive. The kept part grows until MIR settles.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from analysis.entropy import ZERO_ENTROPY, spectrum_entropy, unit_rows

# Most rows that are kept: a matrix of 128 MiB and, on a processor core, half a minute. A tolerance of 0 goes beyond.
LARGEST_KEPT = 4096
# Up to here the exact spectrum costs less than approaching it.
_SMALL = 512
# The first kept part leaves at most this share of the trace in the tail, however many rows that takes: a small part of
# a flat spectrum hardly couples, and MIR seems settled long before it is.
_FIRST_TAIL = 0.5
# Pairs in the permutation baseline.
_NULL_PAIRS = 512
# Permutations whose Gram matrices are held at a time.
_NULL_CHUNK = 16


@dataclass(frozen=True)
class Method:
    """How a joint spectrum was computed.

    Attributes:
        name: `exact`, or `pinched` where some couplings were left out.
        kept: size of the matrix whose eigenvalues were taken.
        total: size that the exact spectrum needs.
        tail_mass: share of the trace outside the kept part, 0 to 1.
        error_estimate: how far MIR may be below the exact value.
    """

    name: str
    kept: int
    total: int
    tail_mass: float
    error_estimate: float


@dataclass(frozen=True)
class Entropies:
    """H(K1), H(K2) and H(K1 * K2) in nats, and how the last was computed."""

    features: float
    head: float
    joint: float
    method: Method
    n_pairs: int
    degenerate_samples: int


@dataclass(frozen=True)
class Null:
    """The permutation baseline of MIR: mean and standard deviation (n - 1) of n permutations, and what was observed.

    All of it on the same `n_samples` pairs.
    """

    mean: float
    std: float
    n: int
    n_samples: int
    observed: float


@dataclass(frozen=True)
class LabelledFeatures:
    """Features by class beside the directions of the head rows, as the sample level pairs them.

    Attributes:
        features: one sample a row, as they came.
        members: for each class that takes part, the rows of its samples.
        centre: what is subtracted from every sample.
        head: the direction of each of these classes' head rows.
    """

    features: Float[Tensor, "n d"]
    members: Sequence[Int[Tensor, " _"]]
    centre: Float64[Tensor, " d"]
    head: Float64[Tensor, "c d"]

    def directions(self, rows: Int[Tensor, " m"]) -> Float64[Tensor, "k d"]:
        """Unit vectors of these samples, without those that have no direction."""
        samples = self.features[rows].double()
        scale = samples.norm(dim=1) + self.centre.norm()
        directions, usable = unit_rows(samples - self.centre, scale)
        return directions if bool(usable.all()) else directions[usable]


def mir_of(features: float, head: float, joint: float) -> float | None:
    """MIR from the three entropies; None where the smaller of the first two is below 1e-12."""
    smaller = min(features, head)
    return None if smaller < ZERO_ENTROPY else (features + head - joint) / smaller


def hdr_of(features: float, head: float) -> float | None:
    """HDR from the two entropies; None where the larger is below 1e-12."""
    larger = max(features, head)
    return None if larger < ZERO_ENTROPY else abs(features - head) / larger


def sample_entropies(
    labelled: LabelledFeatures, *, tolerance: float = 1e-4, largest: int = LARGEST_KEPT
) -> Entropies | None:
    """Entropies at sample level: z_i = F_i, v_i = W[y_i], one pair a sample.

    Args:
        labelled: samples by class and the head's directions.
        tolerance: change of MIR between two enlargements of the kept part that counts as settled; 0 is exact.
        largest: most rows to keep, whatever the tolerance, unless that is 0.

    Returns:
        The entropies, or None where no pair is left.

    Numerics: float64. With m rows kept O(N d min(n_c, d) + C min(n_c, d)^3 + m^3) time; memory for the factors of
        the directions that may be kept and a few matrices of size m x m and d x d. The joint entropy is never below the
        exact one but for rounding. Where the kept part reaches `largest` unsettled, `error_estimate` says so.

    Source: METRICS, "The joint spectrum, fast".
    """
    factors = _Factors(labelled, len(labelled.features) if tolerance == 0 else largest)
    n = factors.n
    if n == 0:
        return None
    weighted_head = labelled.head * (factors.counts / n).sqrt()[:, None]
    features = factors.entropy
    head = gram_entropy(weighted_head)
    joint, method = _joint_entropy(_JointSpectrum(factors, labelled.head), features, head, tolerance, largest)
    return Entropies(features, head, joint, method, n, factors.degenerate)


class _Factors:
    """R_c of every class: rows from the largest class eigenvalue down, and H(K1) on the way.

    Only rows that can be among the `largest` are held; the eigenvalues of all are.
    """

    def __init__(self, labelled: LabelledFeatures, largest: int) -> None:
        d = labelled.features.shape[1]
        n_members = sum(len(rows) for rows in labelled.members)
        device = labelled.features.device
        self.eigenvalues: list[Float64[Tensor, " _r"]] = []
        self.rows: list[Float64[Tensor, "_q d"]] = []
        counts: list[int] = []
        scatter = torch.zeros(d, d, dtype=torch.float64, device=device) if n_members > d else None
        for members in labelled.members:
            directions = labelled.directions(members)
            counts.append(len(directions))
            values, rows = _factor(directions, scatter)
            self.eigenvalues.append(values)
            self.rows.append(rows)
            if scatter is not None and sum(len(rows) for rows in self.rows) > 2 * largest:
                self._prune(largest)
        self.counts: Float64[Tensor, " c"] = torch.tensor(counts, dtype=torch.float64, device=device)
        self.n = sum(counts)
        self.degenerate = n_members - self.n
        if self.n == 0:
            self.entropy = 0.0
        elif scatter is None:
            # Few samples: the stacked factors, of which nothing was pruned, have the non-zero spectrum of Z.
            self.entropy = gram_entropy(torch.cat(self.rows) / math.sqrt(self.n))
        else:
            self.entropy = spectrum_entropy(torch.linalg.eigvalsh(scatter / self.n))

    def _prune(self, largest: int) -> None:
        threshold = torch.cat(self.eigenvalues).topk(largest).values[-1]
        for position, rows in enumerate(self.rows):
            # Every class keeps its leading direction; clone() lets the rest of the storage go.
            above = max(int((self.eigenvalues[position] >= threshold).sum()), 1)
            if len(rows) > above:
                self.rows[position] = rows[:above].clone()


def _factor(
    directions: Float64[Tensor, "n d"], scatter: Float64[Tensor, "d d"] | None
) -> tuple[Float64[Tensor, " r"], Float64[Tensor, "r d"]]:
    """Eigenvalues of a class Gram matrix, largest first, and rows R with R^T R = Z^T Z; adds Z^T Z to `scatter`."""
    n, d = directions.shape
    if n == 0:
        return directions.new_zeros(0), directions
    product = directions.T @ directions if n > d or scatter is not None else None
    if product is not None and scatter is not None:
        scatter += product
    if product is not None and n > d:
        values, vectors = torch.linalg.eigh(product)
        rows = vectors.T * values.clamp(min=0).sqrt()[:, None]
    else:
        values, vectors = torch.linalg.eigh(directions @ directions.T)
        rows = vectors.T @ directions
    values, rows = values.flip(0), rows.flip(0)
    # What is left below is rounding: one sample repeated a thousand times has one direction, not a thousand.
    rank = int((values > 16 * torch.finfo(torch.float64).eps * values[0]).sum())
    return values[:rank], rows[:rank]


def gram_entropy(weighted: Float64[Tensor, "n d"]) -> float:
    """H of the matrix X X^T, whose trace is 1, through the smaller of X X^T and X^T X."""
    n, d = weighted.shape
    return spectrum_entropy(torch.linalg.eigvalsh(weighted @ weighted.T if n <= d else weighted.T @ weighted))


class _JointSpectrum:
    """The joint spectrum with the couplings of the leading rows alone.

    Rows are ranked with the leading one of every class first and then from the largest eigenvalue down, so that
    a larger kept part always holds a smaller one.
    """

    def __init__(self, factors: _Factors, head: Float64[Tensor, "c d"]) -> None:
        values = torch.cat(factors.eigenvalues) / factors.n
        sizes = torch.tensor([len(entry) for entry in factors.eigenvalues], device=values.device)
        classes = torch.repeat_interleave(torch.arange(len(sizes), device=values.device), sizes)
        starts = sizes.cumsum(0) - sizes
        leading = torch.zeros_like(values)
        leading[starts[sizes > 0]] = 2.0
        order = torch.argsort(values + leading, descending=True, stable=True)
        self.values, self.classes = values[order], classes[order]
        self.factors = factors
        self.coupling = head @ head.T / factors.n
        self.total = len(values)
        self.leaders = int((sizes > 0).sum())
        # Beyond the first k rows: their mass, and what dropping their couplings costs but for one factor. To second
        # order a coupling between eigenvalues a > b costs in proportion to a b log(a/b) / (a - b), about
        # b (1 + log(a/b)), and a row couples with all before it.
        ranks = torch.arange(self.total, dtype=torch.float64, device=values.device)
        logarithms = self.values.log()
        ratios = (logarithms.cumsum(0) - logarithms - ranks * logarithms).clamp(min=0)
        self.tails = _suffix_sums(self.values)
        self.weights = _suffix_sums(self.values * (ranks + ratios))

    def entropy(self, kept: int) -> float:
        """H with the couplings of the first `kept` rows; the others enter as they are."""
        # Within a class the kept rows are the first ones, because its eigenvalues fall.
        sizes = torch.bincount(self.classes[:kept], minlength=len(self.factors.rows))
        rows = torch.cat([rows[:size] for rows, size in zip(self.factors.rows, sizes.tolist(), strict=True)])
        classes = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
        matrix = rows @ rows.T
        matrix *= self.coupling[classes][:, classes]
        eigenvalues = torch.linalg.eigvalsh(matrix)
        return spectrum_entropy(torch.cat([eigenvalues, self.values[kept:]]))

    def bound(self, kept: int) -> float:
        """Most that H can be above the exact one, whatever the couplings.

        Measuring which of kept part and tail holds the state costs at most the entropy h(t) of that outcome; within the
        tail, of mass t, only the couplings between the classes are left, worth at most log of their number.
        """
        tail = min(self.tails[kept], 1.0)
        outcome = torch.special.entr(torch.tensor([tail, 1.0 - tail], dtype=torch.float64))
        return float(outcome.sum()) + tail * math.log(self.leaders)


def _suffix_sums(values: Float64[Tensor, " m"]) -> list[float]:
    """Sums of values[k:] for k = 0 to m, each from the end up."""
    return [*values.flip(0).cumsum(0).flip(0).tolist(), 0.0]


def _first_at_most(falling: list[float], limit: float) -> int:
    """The first position of a falling list that ends with 0 whose entry is at most `limit`."""
    return bisect.bisect_left(falling, -limit, key=lambda entry: -entry)


def _joint_entropy(
    spectrum: _JointSpectrum, features: float, head: float, tolerance: float, largest: int
) -> tuple[float, Method]:
    """Enlarge the kept part until MIR settles, everything is kept or `largest` is reached."""
    unit = min(features, head) if min(features, head) >= ZERO_ENTROPY else 1.0
    total, weights = spectrum.total, spectrum.weights
    largest = total if tolerance == 0 else min(largest, total)
    kept = max(_SMALL // 2, spectrum.leaders, _first_at_most(spectrum.tails, _FIRST_TAIL))
    # Where not everything can be kept, two sizes are needed to tell how far off the second is.
    kept = min(kept, largest if largest == total else largest // 2)
    if tolerance == 0 or total <= min(_SMALL, largest):
        kept = total
    before, weight_before = math.inf, math.inf
    while True:
        if kept > 0.7 * total and largest == total:
            kept = total
        pinched = spectrum.entropy(kept)
        # Both bounds hold for the exact value, so the lower can only mend rounding and the upper only help.
        joint = max(min(pinched, features + head), features, head)
        if kept == total:
            return joint, Method("exact", total, total, 0.0, 0.0)
        weight = weights[kept]
        rate = (before - pinched) / unit / (weight_before - weight) if math.isfinite(before) else math.inf
        certain = min(spectrum.bound(kept), joint - max(features, head)) / unit
        if min(certain, rate * weight) <= tolerance or kept == largest:
            # Three times, because couplings are not as even as the weights assume.
            estimate = min(certain, 3 * rate * weight)
            return joint, Method("pinched", kept, total, spectrum.tails[kept], estimate)
        needed = _first_at_most(weights, 0.9 * tolerance / rate) if 0 < rate < math.inf else 0
        kept = min(max(needed, kept * 3 // 2), largest)
        before, weight_before = pinched, weight


def pair_entropies(features: Float64[Tensor, "n d"], head: Float64[Tensor, "n d"]) -> Entropies:
    """Entropies of n pairs of unit rows, n at least 1, from n x n Gram matrices.

    Args:
        features: z, such as the directions of the class means.
        head: v, such as the directions of the head rows.

    Returns:
        The exact entropies.

    Numerics: float64, O(n^3) time and O(n^2) memory.
    """
    n = len(features)
    joint = spectrum_entropy(torch.linalg.eigvalsh(features @ features.T * (head @ head.T) / n))
    feature_entropy, head_entropy = gram_entropy(features / math.sqrt(n)), gram_entropy(head / math.sqrt(n))
    bounded = max(min(joint, feature_entropy + head_entropy), feature_entropy, head_entropy)
    return Entropies(feature_entropy, head_entropy, bounded, Method("exact", n, n, 0.0, 0.0), n, 0)


def sample_null(labelled: LabelledFeatures, *, permutations: int, generator: torch.Generator) -> Null | None:
    """Permutation baseline at sample level: the labels change places among the samples.

    Args:
        labelled: samples by class and the head's directions.
        permutations: how many, at least 1.
        generator: on the CPU; draws the subsample and the permutations.

    Returns:
        The baseline on a stratified subsample of at most 512 samples, or None where MIR is not defined on it.

    Numerics: float64, the spectrum of one Gram matrix of at most 512 x 512 a permutation.
    """
    shares = _stratify([len(rows) for rows in labelled.members], _NULL_PAIRS)
    drawn: list[Float64[Tensor, "_s d"]] = []
    classes: list[int] = []
    for position, (rows, share) in enumerate(zip(labelled.members, shares, strict=True)):
        chosen = torch.randperm(len(rows), generator=generator)[:share].sort().values
        directions = labelled.directions(rows[chosen.to(rows.device)])
        drawn.append(directions)
        classes.extend([position] * len(directions))
    paired = torch.tensor(classes, dtype=torch.int64, device=labelled.features.device)
    return _permuted(torch.cat(drawn), labelled.head[paired], permutations, generator) if classes else None


def pair_null(
    features: Float64[Tensor, "n d"], head: Float64[Tensor, "n d"], *, permutations: int, generator: torch.Generator
) -> Null | None:
    """Permutation baseline of pairs, such as class means and head rows: the pairing changes.

    Args:
        features: unit rows.
        head: unit rows.
        permutations: how many, at least 1.
        generator: on the CPU; draws the permutations and, of more than 512 pairs, the 512 that are used.

    Returns:
        The baseline, or None where MIR is not defined.
    """
    if len(features) > _NULL_PAIRS:
        chosen = torch.randperm(len(features), generator=generator)[:_NULL_PAIRS].sort().values.to(features.device)
        features, head = features[chosen], head[chosen]
    return _permuted(features, head, permutations, generator)


def _stratify(counts: Sequence[int], limit: int) -> list[int]:
    """How many of each class make a subsample of at most `limit`: in proportion, the largest remainders rounded up."""
    total = sum(counts)
    if total <= limit:
        return list(counts)
    shares = [count * limit // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda position: (-(counts[position] * limit % total), position))
    for position in by_remainder[: limit - sum(shares)]:
        shares[position] += 1
    return shares


def _permuted(
    features: Float64[Tensor, "n d"], head: Float64[Tensor, "n d"], permutations: int, generator: torch.Generator
) -> Null | None:
    n = len(features)
    first, second = features @ features.T / n, head @ head.T
    feature_entropy, head_entropy = gram_entropy(features / math.sqrt(n)), gram_entropy(head / math.sqrt(n))
    # The first order is the pairing as it is.
    orders = torch.stack([torch.arange(n), *(torch.randperm(n, generator=generator) for _ in range(permutations))])
    values: list[float] = []
    for chunk in torch.split(orders.to(features.device), _NULL_CHUNK):
        joint = torch.linalg.eigvalsh(first * second[chunk[:, :, None], chunk[:, None, :]])
        for eigenvalues in joint.cpu():
            value = mir_of(feature_entropy, head_entropy, spectrum_entropy(eigenvalues))
            if value is None:
                return None
            values.append(value)
    observed, null = values[0], torch.tensor(values[1:], dtype=torch.float64)
    std = float(null.std()) if permutations > 1 else 0.0
    return Null(float(null.mean()), std, permutations, n, observed)
