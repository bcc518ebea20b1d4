"""Neural collapse: NC1 to NC4 of features and head, and MIR and HDR at complete collapse."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from .classes import ClassStatistics, computing_dtype
from .entropy import ZERO_ENTROPY, spectrum_entropy, unit_rows

_EPS = torch.finfo(torch.float64).eps
# Number of samples projected at a time: their float64 copy stays in a processor's cache.
_CHUNK = 512


@dataclass(frozen=True)
class Optimum:
    """MIR and HDR at a simplex equiangular tight frame; `reachable` if the features have enough dimensions for one."""

    mir: float | None
    hdr: float | None
    reachable: bool


@dataclass(frozen=True)
class Collapse:
    """NC1 to NC4; an undefined value is None, with a reason under its name."""

    nc1: float | None
    nc1_condition: float | None
    nc2_equinorm_means: float | None
    nc2_equinorm_head: float | None
    nc2_equiangularity_means: float | None
    nc2_equiangularity_head: float | None
    nc2_max_angle_means: float | None
    nc2_max_angle_head: float | None
    nc3: float | None
    nc4: float | None
    absent_classes: int
    reasons: dict[str, str] = field(default_factory=dict)


def optimum(class_counts: Sequence[int], n_features: int) -> Optimum:
    """Return MIR and HDR if features and head are one simplex frame: vertex c repeated n_c times, cosines -1/(C-1).

    Args:
        class_counts: samples of each class; classes with 0 take no part.
        n_features: d. C vertices need C - 1 dimensions.

    Returns:
        The optimum; MIR and HDR are None (`zero_entropy`) with fewer than three classes.

    Numerics: float64; classes of equal size share an eigenvalue, so the matrix is as large as the number of different
        sizes.

    Source: Song et al. 2024 (arXiv 2406.03999), for unbalanced classes docs/metrics.md, "Where neural collapse leads".

    >>> optimum([100, 100, 100, 100], 64)
    Optimum(mir=0.753953169047..., hdr=0.0, reachable=True)
    """
    counts = [count for count in class_counts if count > 0]
    n_classes = len(counts)
    reachable = n_features >= n_classes - 1
    if n_classes < 3:
        return Optimum(None, None, reachable)
    cosine = -1 / (n_classes - 1)
    entropy, joint = _frame_entropy(counts, cosine), _frame_entropy(counts, cosine**2)
    if entropy < ZERO_ENTROPY:
        return Optimum(None, None, reachable)
    return Optimum((2 * entropy - joint) / entropy, 0.0, reachable)


class CollapsePass:
    """NC1 to NC4 as docs/metrics.md defines them, from one pass over the features that other measures may share.

    NC1 = trace(Sigma_W Sigma_B^dagger) / C, with Sigma_W the mean of the classes' covariances, Sigma_B the covariance
    of their means: every class has the same weight, whatever its size. NC2 of the class means runs over the classes
    present, NC2 of the head over all its rows, NC3 over the head rows of the classes present.

    Args:
        statistics: of the features.
        head: one row a class, including absent classes.
        predicted: the network's class of each row of the features.
        dtype: in which deviations are projected, for example from `classes.computing_dtype`.

    Numerics: O(N d C) time, in float64; deviations of large float32 sets from class means are projected in float32,
        which gives each to 7 digits. Sigma_B is inverted on its leading min(C - 1, d) directions. If it has fewer,
        because the features span no more, NC1 is computed on those; if the features vary outside them, NC1 is
        undefined (`dependent_means`: two classes have one mean, or the means lie in too small a space).

    Source: Papyan, Han and Donoho 2020.
    """

    def __init__(
        self,
        statistics: ClassStatistics,
        head: Float[Tensor, "c d"],
        predicted: Int[Tensor, " n"],
        dtype: torch.dtype,
    ) -> None:
        self.statistics, self.head, self.predicted, self.dtype = statistics, head.double(), predicted, dtype
        self.means = statistics.means - statistics.centre
        present, d = self.means.shape
        _, singular, directions = torch.linalg.svd(self.means, full_matrices=False)
        rounding = max(present, d) * _EPS * float(statistics.means.norm() + statistics.sizes.norm())
        # Centred means span one direction less than the number of classes.
        self.expected = min(present - 1, d)
        self.singular, self.directions = singular[: self.expected], directions[: self.expected]
        self.rank = int((self.singular > rounding).sum())
        self.narrow = self.directions.to(dtype)
        self.places = self.means @ self.directions.T
        self.squares = self.places.square().sum(dim=1)
        self.along, self.scatter, self.differing = torch.zeros_like(self.singular), 0.0, 0

    def take(self, position: int, rows: Int[Tensor, " b"], samples: Float[Tensor, "b d"]) -> None:
        """Add samples of one class: its index among the classes present, their rows, and the samples themselves."""
        statistics = self.statistics
        mean = statistics.means[position]
        high = mean.to(self.dtype)
        rest = mean - high.double()
        # About the class's own mean cancellation loses nothing, however far from the origin the mean lies.
        apart = samples.to(self.dtype) - high
        deviations = (self.narrow @ apart.T).T.double() - rest @ self.directions.T
        # The means lie in the span of their directions, so the nearest mean is the nearest within that span.
        offsets = self.squares - 2 * self.places[position] @ self.places.T
        nearest = torch.addmm(offsets, deviations, self.places.T, alpha=-2).argmin(dim=1)
        self.differing += int((statistics.classes[nearest] != self.predicted[rows]).sum())
        weight = len(statistics.members[position]) * len(self.means)
        self.along += deviations.square().sum(dim=0) / weight
        if self.rank < self.expected:
            outside = apart.double() - rest - deviations[:, : self.rank] @ self.directions[: self.rank]
            self.scatter += float(outside.square().sum()) / weight

    def finish(self) -> Collapse:
        """Return the measures, once every sample was added."""
        reasons: dict[str, str] = {}
        statistics, means = self.statistics, self.means
        scales = statistics.sizes + statistics.centre.norm()
        rows = self.head - self.head.mean(dim=0)
        row_scales = self.head.norm(dim=1) + self.head.mean(dim=0).norm()
        nc1, condition = self._variability(reasons)
        of_means = _equiangular(means, scales, "means", reasons)
        of_head = _equiangular(rows, row_scales, "head", reasons)
        held = statistics.classes
        return Collapse(
            nc1=nc1,
            nc1_condition=condition,
            nc2_equinorm_means=of_means[0],
            nc2_equinorm_head=of_head[0],
            nc2_equiangularity_means=of_means[1],
            nc2_equiangularity_head=of_head[1],
            nc2_max_angle_means=of_means[2],
            nc2_max_angle_head=of_head[2],
            nc3=_self_duality(means, scales, rows[held], row_scales[held], reasons),
            nc4=self._disagreement(reasons),
            absent_classes=len(self.head) - len(means),
            reasons=reasons,
        )

    def _disagreement(self, reasons: dict[str, str]) -> float | None:
        """Return NC4; None if all means are equal, as rounding alone would decide which is nearest."""
        if self.rank == 0 and len(self.means) > 1:
            reasons["nc4"] = "equal_means"
            return None
        return self.differing / sum(map(len, self.statistics.members))

    def _variability(self, reasons: dict[str, str]) -> tuple[float | None, float | None]:
        """Return NC1 and the condition number of Sigma_B."""
        if self.rank == 0:
            reason = "one_class" if len(self.means) == 1 else "equal_means"
        elif self.rank < self.expected and math.sqrt(self.scatter) > 1e-12 * float(self.statistics.sizes.max()):
            reason = "dependent_means"
        else:
            # Sigma_B = M^T M / k: its eigenvalues are s^2 / k, and NC1's division by k cancels theirs.
            singular, along = self.singular[: self.rank], self.along[: self.rank]
            return float((along / singular.square()).sum()), float(singular[0] / singular[-1]) ** 2
        reasons.update(nc1=reason, nc1_condition=reason)
        return None, None


def neural_collapse(
    features: Float[Tensor, "n d"],
    statistics: ClassStatistics,
    head: Float[Tensor, "c d"],
    predicted: Int[Tensor, " n"],
) -> Collapse:
    """Return NC1 to NC4 from a separate pass over the features; see `CollapsePass`.

    Args:
        features: one sample a row.
        statistics: of these features, or of some rows of them.
        head: one row a class, including absent classes.
        predicted: the network's class of each row.

    Returns:
        The measures.
    """
    one_pass = CollapsePass(statistics, head, predicted, computing_dtype(features, sum(map(len, statistics.members))))
    for position, members in enumerate(statistics.members):
        for rows in torch.split(members, _CHUNK):
            one_pass.take(position, rows, features.index_select(0, rows))
    return one_pass.finish()


def _frame_entropy(counts: Sequence[int], cosine: float) -> float:
    """Return the entropy of sqrt(p_c p_c') g_cc' with p the class shares, g 1 on the diagonal and `cosine` elsewhere.

    That is (1 - cosine) diag(p) + cosine sqrt(p) sqrt(p)^T: of k classes with equal share p, k - 1 directions have the
    eigenvalue (1 - cosine) p, and only their mean couples with the other shares.
    """
    shares = Counter(counts)
    sizes = torch.tensor(sorted(shares), dtype=torch.float64) / sum(counts)
    repeats = torch.tensor([shares[count] for count in sorted(shares)])
    means = (repeats * sizes).sqrt()
    coupled = torch.linalg.eigvalsh((1 - cosine) * torch.diag(sizes) + cosine * torch.outer(means, means))
    return spectrum_entropy(torch.cat([coupled, torch.repeat_interleave((1 - cosine) * sizes, repeats - 1)]))


def _equiangular(
    rows: Float64[Tensor, "k d"], scales: Float64[Tensor, " k"], name: str, reasons: dict[str, str]
) -> tuple[float | None, float | None, float | None]:
    """Return NC2 of centred rows: equinorm, equiangularity and max_angle."""
    k = len(rows)
    fields = [f"nc2_{measure}_{name}" for measure in ("equinorm", "equiangularity", "max_angle")]
    directions, usable = unit_rows(rows, scales)
    if k == 1 or not bool(usable.any()):
        reasons.update(dict.fromkeys(fields, "one_class" if k == 1 else "zero_norm"))
        return None, None, None
    norms = torch.where(usable, rows.norm(dim=1), 0.0)
    equinorm = float(norms.std(correction=0) / norms.mean())
    if not bool(usable.all()):
        reasons.update(dict.fromkeys(fields[1:], "zero_norm"))
        return equinorm, None, None
    # Pairs some rows at a time, each pair twice; a row with itself does not count.
    n_pairs, ideal = k * (k - 1), -1 / (k - 1)
    mean = (float(directions.sum(dim=0).square().sum()) - k) / n_pairs
    squares = gaps = 0.0
    for chosen in torch.split(torch.arange(k, device=rows.device), _CHUNK):
        cosines = directions[chosen] @ directions.T
        own = (torch.arange(len(chosen), device=rows.device), chosen)
        squares += float((cosines - mean).index_put(own, cosines.new_zeros(())).square().sum())
        gaps += float((cosines - ideal).index_put(own, cosines.new_zeros(())).abs().sum())
    return equinorm, math.sqrt(squares / n_pairs), gaps / n_pairs


def _self_duality(
    means: Float64[Tensor, "k d"],
    mean_scales: Float64[Tensor, " k"],
    rows: Float64[Tensor, "k d"],
    row_scales: Float64[Tensor, " k"],
    reasons: dict[str, str],
) -> float | None:
    """Return NC3 = || W/||W||_F - M/||M||_F ||_F^2."""
    matrices = []
    for matrix, scales in ((rows, row_scales), (means, mean_scales)):
        if not bool(unit_rows(matrix, scales)[1].any()):
            reasons["nc3"] = "one_class" if len(means) == 1 else "zero_norm"
            return None
        matrices.append(matrix / matrix.norm())
    return float((matrices[0] - matrices[1]).square().sum())
