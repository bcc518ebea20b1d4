"""The permutation baseline of MIR: its value if features and head were independent of each other.

The spectrum of every permutation would cost as much as that of the observed pairs. But a permuted joint matrix J is
near the product S of both marginals, and the mutual information is the relative entropy of J to S. In the eigenbasis of
S, with eigenvalues s_k,

    MI = tr J log J - tr J log S = 1/2 sum_kl |J - S|_kl^2 (log s_k - log s_l) / (s_k - s_l) + terms of third order.

The second order is a weighted sum of squares, which needs no eigenvalues. In the leading directions, which hold most of
S and where the third order counts, the spectrum of J's block is computed, and the relative entropy is exact.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float32, Float64, Int
from torch import Tensor

from ..clock import Tell, silent
from .classes import LabelledFeatures
from .entropy import ZERO_ENTROPY, gram_spectrum, spectral
from .products import assembled, coordinates, pair_places, pairs_of, product_matrix, upper_places
from .spectrum import Entropies

# Most pairs in the baseline.
_PAIRS = 512
# Most entries of permuted matrices held at a time: they stay in a processor's cache.
_AT_A_TIME = 2**17
# Spectra up to this size cost less than their estimates.
_SMALL = 96
# The leading block of a larger spectrum: this share of its directions, at least so many.
_BLOCK_SHARE, _BLOCK = 0.3, 64
# Estimates are used as they are if the block leaves no more of the mass than this, and if the observed information is
# so many times theirs: an error of their mean is then a small part of the distance.
_BEYOND, _APART = 0.25, 2.5
# The share of the features' mass, in their smallest directions, that is left out.
_NEGLIGIBLE = 1e-4
# Least gap between permutations, in nats, for which their eigenvalues may be computed in float32.
_SURE = 1e-3
# The second order holds if the product of both marginals spreads over fewer directions than this share of the pairs;
# beyond, the rank of a permuted matrix is too small for it.
_SPREAD = 2 / 3
# Most different entries of a permuted matrix; more of them cost more than a spectrum of size 512.
_MOST_ENTRIES = 2**19


@dataclass(frozen=True)
class Null:
    """The permutation baseline of MIR: mean and standard deviation (n - 1) of n permutations, and the observed value.

    All of them are on the same `n_samples` pairs. `method` is `exact` if the spectrum of every permutation was
    computed, else `estimated`.
    """

    mean: float
    std: float
    n: int
    n_samples: int
    observed: float
    method: Literal["exact", "estimated"]


def sample_null(
    labelled: LabelledFeatures,
    *,
    permutations: int,
    generator: torch.Generator,
    known: Entropies | None = None,
    tell: Tell = silent,
) -> Null | None:
    """Return the permutation baseline at sample level: the labels are permuted among the samples.

    Args:
        labelled: samples by class and the head's directions.
        permutations: number of permutations, at least 1.
        generator: on the CPU; draws the subsample and the permutations.
        known: entropies of all these samples; reused if they are exact and the baseline takes all samples.
        tell: called with the share done.

    Returns:
        The baseline on a stratified subsample of at most 512 samples, or None if MIR is undefined on it.

    Numerics: up to 96 pairs all spectra, in float64. Beyond, permutations are estimated, by the second order or by
        tr J^2, and spectra computed of the two with the smallest and the largest estimate; of none if the second order
        is nearly everything and the observed value is far off. z of trained networks is then within 3 % of that of all
        spectra, of untrained ones within 9 %. The observed value is then as precise as float32 or, with few directions,
        as 1e-3 (docs/numerics.md).
    """
    shares = _stratify([len(rows) for rows in labelled.members], _PAIRS)
    drawn: list[Float64[Tensor, "_s d"]] = []
    positions: list[int] = []
    for position, (rows, share) in enumerate(zip(labelled.members, shares, strict=True)):
        chosen = torch.randperm(len(rows), generator=generator)[:share].sort().values
        directions = labelled.directions(rows[chosen.to(rows.device)])
        drawn.append(directions)
        positions.extend([position] * len(directions))
    if not positions:
        return None
    paired = torch.tensor(positions, dtype=torch.int64, device=labelled.features.device)
    pairs = _Pairs(torch.cat(drawn), labelled.head, paired, known if labelled.n_samples <= _PAIRS else None)
    return pairs.permuted(permutations, generator, tell)


def pair_null(
    features: Float64[Tensor, "n d"],
    head: Float64[Tensor, "n d"],
    *,
    permutations: int,
    generator: torch.Generator,
    known: Entropies | None = None,
) -> Null | None:
    """Return the permutation baseline of pairs, for example class means and head rows: the pairing is permuted.

    Args:
        features: unit rows.
        head: unit rows.
        permutations: number of permutations, at least 1.
        generator: on the CPU; draws the permutations and, of more than 512 pairs, the 512 that are used.
        known: as of `sample_null`.

    Returns:
        The baseline, or None if MIR is undefined.
    """
    if len(features) > _PAIRS:
        chosen = torch.randperm(len(features), generator=generator)[:_PAIRS].sort().values.to(features.device)
        features, head, known = features[chosen], head[chosen], None
    return _Pairs(features, head, torch.arange(len(head), device=head.device), known).permuted(permutations, generator)


def _stratify(counts: Sequence[int], limit: int) -> list[int]:
    """Return each class's share of a subsample of at most `limit`: in proportion, the largest remainders rounded up."""
    total = sum(counts)
    if total <= limit:
        return list(counts)
    shares = [count * limit // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda position: (-(counts[position] * limit % total), position))
    for position in by_remainder[: limit - sum(shares)]:
        shares[position] += 1
    return shares


class _Pairs:
    """Directions of n samples and of c classes, and the class of each sample.

    Args:
        features: one sample a row.
        head: one class a row.
        classes: of each sample.
        known: entropies of these pairs; used only if exact.
    """

    def __init__(
        self,
        features: Float64[Tensor, "n d"],
        head: Float64[Tensor, "c d"],
        classes: Int[Tensor, " n"],
        known: Entropies | None,
    ) -> None:
        # A small class may have no sample in the subsample.
        held, self.classes = torch.unique(classes, return_inverse=True)
        self.features, self.head, self.n = features, head[held], len(features)
        self.counts = torch.bincount(self.classes)
        self.known = known if known is not None and known.method.name == "exact" else None

    def permuted(self, permutations: int, generator: torch.Generator, tell: Tell = silent) -> Null | None:
        """Return mean and deviation of MIR if the classes are permuted among the samples."""
        orders = torch.stack([torch.randperm(self.n, generator=generator) for _ in range(permutations)])
        classes = self.classes[orders.to(self.classes.device)]
        if self.known is not None:
            of_features, of_head = self.known.features, self.known.head
        else:
            shares = self.counts.double() / self.n
            of_features = spectral(gram_spectrum(self.features / math.sqrt(self.n))).entropy
            of_head = spectral(gram_spectrum(self.head * shares.sqrt()[:, None])).entropy
        separate, smaller = of_features + of_head, min(of_features, of_head)
        if smaller < ZERO_ENTROPY:
            return None
        # Rounding must not hide the differences between permutations.
        near = self._near(separate)
        estimate = self._estimate(classes, near, tell) if self.n > _SMALL else None
        rounded = estimate is not None and estimate.gap > _SURE and self.n > 2 * _SMALL
        if self.known is None and near is not None and rounded and near.size < self.n:
            observed = near.information(self.classes)
        else:
            joint = self.known.joint if self.known else float(self._joint(self.classes[None], rounded=rounded))
            observed = separate - joint
        if estimate is None:
            found = separate - self._joint(classes, tell=tell)
        elif estimate.is_sure and observed > _APART * float(estimate.values.mean()):
            found = estimate.values
        else:
            ends = separate - self._joint(classes[estimate.ends], rounded=rounded)
            found = estimate.between(ends)
        values = found / smaller
        std = float(values.std()) if permutations > 1 else 0.0
        method: Literal["exact", "estimated"] = "exact" if estimate is None else "estimated"
        return Null(float(values.mean()), std, permutations, self.n, observed / smaller, method)

    def _near(self, separate: float) -> "_NearProduct | None":
        """Return the product of both marginals, if permuted matrices are near it and it has few enough entries."""
        (c, d), n = self.head.shape, self.n
        entries = [rank * (rank + 1) // 2 for rank in (min(n, d), min(c, d))]
        if n <= _SMALL or math.prod(entries) > _MOST_ENTRIES or math.exp(separate) > _SPREAD * n:
            return None
        return _NearProduct(self.features, self.head, self.counts)

    def _estimate(self, classes: Int[Tensor, "q n"], near: "_NearProduct | None", tell: Tell) -> "_Estimate":
        """Return the mutual information of each pairing, or a value that rises with it: n tr J^2 / 2."""
        if near is not None:
            return near.estimate(classes, tell)
        first, second = (self.features @ self.features.T / self.n).square_(), (self.head @ self.head.T).square_()
        purities: list[Tensor] = []
        for one in classes:
            purities.append((first * second[one[:, None], one]).sum())
            tell(len(purities) / len(classes))
        return _Estimate(torch.stack(purities).cpu() * self.n / 2, is_sure=False)

    def _joint(
        self, classes: Int[Tensor, "q n"], *, rounded: bool = False, tell: Tell = silent
    ) -> Float64[Tensor, " q"]:
        """Return the joint entropy of each pairing; `rounded` allows about 1e-5 nats, from float32 eigenvalues."""
        (c, d), n = self.head.shape, self.n
        # Generators: one matrix in memory at a time.
        if min(n, d) * min(c, d) < n:
            counts = self.counts.tolist()
            ordered = (self.features[one.argsort(stable=True)] for one in classes)
            matrices = (product_matrix(rows, counts, self.head, n) for rows in ordered)
        else:
            first, second = self.features @ self.features.T / n, self.head @ self.head.T
            matrices = (first * second[one[:, None], one] for one in classes)
        if rounded:
            spectra = [torch.linalg.eigvalsh(matrix.float()).double() for matrix in matrices]
            return torch.stack([torch.special.entr(spectrum.clamp(min=0)).sum() for spectrum in spectra]).cpu()
        found: list[float] = []
        for matrix in matrices:
            found.append(spectral(torch.linalg.eigvalsh(matrix)).entropy)
            tell(len(found) / len(classes))
        return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True)
class _Estimate:
    """Estimates for permutations without their spectra.

    Attributes:
        values: the mutual information of each in nats, or a value that rises with it.
        is_sure: whether values and differences may be used as they are.
    """

    values: Float64[Tensor, " q"]
    is_sure: bool

    @property
    def ends(self) -> list[int]:
        """The permutations with the smallest and the largest value."""
        return [int(self.values.argmin()), int(self.values.argmax())]

    @property
    def gap(self) -> float:
        """The difference of the largest and the smallest value."""
        return float(self.values.max() - self.values.min())

    def between(self, information: Float64[Tensor, "2"]) -> Float64[Tensor, " q"]:
        """Return all values, rescaled so that both ends have the computed information."""
        slope = float(information[1] - information[0]) / self.gap if self.gap > 0 else 0.0
        return information[0] + slope * (self.values - self.values.min())


class _NearProduct:
    """Joint matrices near the product of both marginals, in their eigenbases: p coordinates of features, r of the head.

    Args:
        features: directions of n samples.
        head: directions of c classes.
        counts: samples of each class, at least 1.

    Numerics: bases in float64, the rest in float32, which is more precise than the second order.
    """

    def __init__(
        self, features: Float64[Tensor, "n d"], head: Float64[Tensor, "c d"], counts: Int[Tensor, " c"]
    ) -> None:
        self.n = len(features)
        shares = counts.double() / self.n
        roots = shares.sqrt()[:, None]
        # In the eigenbasis of the head's rows weighted by their classes.
        first, second = coordinates(features), coordinates(head * roots) / roots
        # Without the smallest directions: they come first, and hold almost no mass.
        first = first[:, first.square().mean(dim=0).cumsum(0) > _NEGLIGIBLE]
        self.p, self.r = first.shape[1], second.shape[1]
        self.size = self.p * self.r
        #: Eigenvalues of the product of both marginals, by coordinate of the head and of the features.
        spectrum = torch.outer((second.square() * shares[:, None]).sum(dim=0), first.square().sum(dim=0) / self.n)
        self.spectrum, first, second = spectrum.float(), first.float(), second.float()
        self.pairs = pairs_of(second).T.contiguous()
        self.upper = upper_places(self.p, first.device)
        # Each class has as many places as the largest one; empty places hold a row of zeros.
        self.padded = torch.cat([first, first.new_zeros(1, self.p)])
        within = torch.arange(int(counts.max()), device=first.device)
        starts = counts.cumsum(0) - counts
        self.places = torch.where(within < counts[:, None], starts[:, None] + within, self.n)

    def estimate(self, classes: Int[Tensor, "q n"], tell: Tell) -> _Estimate:
        """Return the mutual information of each pairing: of second order outside a block of leading directions."""
        flat = self.spectrum.flatten()
        block = max(math.ceil(_BLOCK_SHARE * min(self.size, self.n)), _BLOCK)
        leading = flat.argsort(descending=True, stable=True)[:block]
        values = flat[leading]
        of_head, of_features = leading // self.p, leading % self.p
        rows = pair_places(self.r, flat.device)[of_head[:, None], of_head]
        columns = pair_places(self.p, flat.device)[of_features[:, None], of_features]
        mean, weights = self._second_order()
        inside = _slopes(values[:, None], values) / 2
        found = []
        for some in torch.split(classes, max(_AT_A_TIME // mean.numel(), 1)):
            sums = self._sums(some)
            matrices = sums[:, rows, columns]
            second_order = sums.sub_(mean).square_().flatten(1) @ weights.flatten()
            second_order -= ((matrices - values.diag()).square() * inside).sum(dim=(1, 2))
            found.append(second_order + _relative_entropies(matrices, values))
            tell(sum(map(len, found)) / len(classes))
        return _Estimate(torch.cat(found).double().cpu(), float(1 - values.sum()) <= _BEYOND)

    def information(self, classes: Int[Tensor, " n"]) -> float:
        """Return the mutual information of a pairing from all its eigenvalues, to about 1e-4 nats."""
        matrix = assembled(self._sums(classes[None])[0], self.r, self.p)
        order = (self.spectrum if self.r <= self.p else self.spectrum.T).flatten()
        return float(_relative_entropies(matrix[None], order))

    def _second_order(self) -> tuple[Float32[Tensor, "r2 p2"], Float32[Tensor, "r2 p2"]]:
        """Return the mean of the different entries, and the weight of the square of each one's deviation."""
        device, s = self.spectrum.device, self.spectrum
        i, j = torch.triu_indices(self.r, self.r, device=device)
        a, b = torch.triu_indices(self.p, self.p, device=device)
        of_i, of_j = s[i], s[j]
        mean = torch.where((i == j)[:, None] & (a == b), of_i[:, a], 0.0)
        # An entry stands for its images under symmetry: (i a, j b) and (i b, j a), each twice if they differ.
        times = (2.0 - (i == j).float()[:, None]) * (2.0 - (a == b).float())
        weights = _slopes(of_i[:, a], of_j[:, b]).add_(_slopes(of_i[:, b], of_j[:, a]))
        return mean, weights.mul_(times / 4)

    def _sums(self, classes: Int[Tensor, "q n"]) -> Float32[Tensor, "q r2 p2"]:
        """Return the different entries of the joint matrix of each pairing."""
        order = torch.nn.functional.pad(classes.argsort(dim=1, stable=True), (0, 1), value=self.n)
        by_class = self.padded[order[:, self.places]].flatten(0, 1)
        grams = (by_class.mT @ by_class).flatten(1).index_select(1, self.upper)
        return self.pairs @ grams.view(len(classes), len(self.places), -1) / self.n


def _relative_entropies(matrices: Float32[Tensor, "q k k"], values: Float32[Tensor, " k"]) -> Float32[Tensor, " q"]:
    """Return the relative entropy of each matrix, whose lower triangle is read, to the diagonal one of these values.

    Parts of states have different traces; the difference counts as well.
    """
    entropies = torch.special.entr(torch.linalg.eigvalsh(matrices).clamp(min=0)).sum(dim=1)
    diagonals = matrices.diagonal(dim1=1, dim2=2)
    found: Float32[Tensor, " q"] = values.sum() - entropies - diagonals @ (values.log() + 1)
    return found


def _slopes(x: Float32[Tensor, "..."], y: Float32[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """Return (log x - log y) / (x - y); 1 / x if both are equal."""
    ratio = (x / y).log()
    near = ratio.abs() < 1e-6
    return torch.where(near, 1 / x, ratio / torch.where(near, 1.0, x - y))
