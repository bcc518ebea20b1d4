"""Influence functions: how much each sample moves each metric, and the standard errors that follow.

Every metric T is a function of the samples' weights p, all 1/n. The influence of sample i is dT/dp_i, centred within
its class because samples are drawn within classes; the standard error is sqrt(sum_i influence_i^2) / n (the delta
method), at the cost of one evaluation in place of hundreds of resamples. `sensitivity.py` computes the entropies at
sample level; everything else here is an average or a function of the class means.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ..errors import AnalysisError
from .entropy import ZERO_ENTROPY, PairEntropies, unit_rows
from .labels import check_labels
from .losses import spectral_entropy
from .predictions import Predictions, calibration_gaps, predictions_of
from .sensitivity import Samples, sample_sensitivity

# Default number of principal directions that keep couplings: half a second of a processor core for their spectrum.
LARGEST_KEPT = 1024
# Names of the three entropies in a metric's path.
ENTROPIES = ("entropy_features", "entropy_head", "entropy_joint")
_EPS = torch.finfo(torch.float64).eps
# A standard deviation or a mean of distances below this is 0 up to rounding, and has no derivative.
_KINK = 1e-12


def influence(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    head: Float[Tensor, "c d"],
    logits: Float[Tensor, "n c"] | Predictions,
    *,
    largest: int = LARGEST_KEPT,
    within_classes: bool = True,
) -> dict[str, Float64[Tensor, " n"]]:
    """Return dT/dp_i of every metric T for every sample i, at p_i = 1/n and centred within the sample's class.

    Args:
        features: inputs of the head, one row a sample.
        labels: 0 to c - 1.
        head: one row a class.
        logits: of the network, with the bias; or its predictions, if logits are too many to keep.
        largest: most principal directions whose couplings enter the joint entropy, but at least 4 a class on average;
            with n or c d or more it is exact.
        within_classes: whether influences are centred within the samples' classes, whose sizes are then given, or over
            all samples, for sizes that are drawn with the samples.

    Returns:
        By the metric's path in a split of a report, such as `interplay.sample.global.mir` or `collapse.nc1`. A metric
        is missing if it is undefined, or has no derivative because it is at its own minimum or a vector has no
        direction. Metrics that no sample moves (those of the head) have zeros. The distance to an optimum has the
        influence of its metric up to the sign, because the class counts are given.

        The calibration error is treated as an average: the bin of a confidence and the sign of a bin's gap do not
        change with the weights. Its standard error is too small if gaps are of the size of their own error. The
        influence of NC4 through the class means is a kernel estimate, since NC4 is an average of steps.

    Raises:
        AnalysisError: `invalid-argument` without samples, for labels out of range or a `largest` below 1;
            `non-finite-values`.

    Numerics: float64; time and memory as `sensitivity.sample_sensitivity` for each centring, and a number for each
        sample and metric: never n x n beyond `largest`.

    Source: Hampel 1974 for influence functions; docs/metrics.md, "Comparing two checkpoints".
    """
    _check(features, labels, head, logits, largest)
    samples = Samples.of(features, labels, head)
    predictions = logits if isinstance(logits, Predictions) else predictions_of(logits, samples.labels)
    pieces = _Pieces(_of_predictions(samples, predictions), {})
    _nearest_means(samples, predictions.predicted, pieces)
    levels = {}
    for centring in ("none", "global"):
        centred = centring == "global"
        levels[f"interplay.sample.{centring}"] = _sample_level(samples, pieces, centred, largest)
        levels[f"interplay.class_mean.{centring}"] = _class_mean_level(samples, pieces, centred)
    _collapse(samples, pieces)
    found = pieces.resolve(samples, within_classes)
    for name, entropies in levels.items():
        if entropies is not None:
            found.update(_ratios(name, entropies, found))
    globally = levels["interplay.sample.global"]
    if globally is not None:
        entropy = found["interplay.sample.global.entropy_features"]
        found["effective_rank"] = math.exp(globally.features) * entropy
    return {name: values for name, values in found.items() if bool(torch.isfinite(values).all())}


def standard_errors(
    influences: Mapping[str, Float64[Tensor, " n"]], baseline: Mapping[str, Float64[Tensor, " n"]] | None = None
) -> dict[str, float]:
    """Return the standard error sqrt(sum_i influence_i^2) / n of each metric, or of its difference from a baseline.

    Args:
        influences: from `influence`.
        baseline: from `influence` for another checkpoint on the same samples in the same order: common effects cancel
            in the difference, as in a paired bootstrap.

    Returns:
        One number for each metric that both have: the spread of a bootstrap that resamples within classes.

    >>> standard_errors({"accuracy": torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64)})
    {'accuracy': 0.25}
    """
    if baseline is not None:
        influences = {name: influences[name] - baseline[name] for name in influences if name in baseline}
    return {name: float(values.norm()) / len(values) for name, values in influences.items()}


@dataclass(frozen=True)
class _Pieces:
    """dT/dp_i of each metric in two parts: with the class means fixed, and dT/dmu_c for the effect through the means.

    d mu_c / dp_i = (F_i - mu_c) n / n_c for the samples of class c.
    """

    direct: dict[str, Float64[Tensor, " n"]]
    through_means: dict[str, Float64[Tensor, "k d"]]

    def resolve(self, samples: Samples, within_classes: bool) -> dict[str, Float64[Tensor, " n"]]:
        """Return both parts together, centred within classes or over all; one pass over the samples for all metrics."""
        n = len(samples.labels)
        gradients = torch.stack(list(self.through_means.values())) if self.through_means else None
        moved = samples.means.new_zeros(len(self.through_means), n)
        for position, rows in enumerate(samples.members):
            if gradients is not None:
                moved[:, rows] = gradients[:, position] @ samples.deviations(position).T * (n / len(rows))
        found = {**self.direct, **dict(zip(self.through_means, moved, strict=True))}
        for name in self.direct.keys() & self.through_means.keys():
            found[name] = found[name] + self.direct[name]
        table = torch.stack(list(found.values()))
        if not within_classes:
            return dict(zip(found, table - table.mean(dim=1, keepdim=True), strict=True))
        counts = torch.bincount(samples.labels, minlength=len(samples.head)).clamp(min=1)
        # On the processor, class by class in order: a GPU adds in any order, so the last digit would differ.
        totals = torch.zeros(len(table), len(counts), dtype=table.dtype)
        averages = totals.index_add_(1, samples.labels.cpu(), table.cpu()).to(table.device) / counts
        return dict(zip(found, table - averages[:, samples.labels], strict=True))


def _check(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    head: Float[Tensor, "c d"],
    logits: Float[Tensor, "n c"] | Predictions,
    largest: int,
) -> None:
    """Check the arguments of `influence`."""

    def require(holds: bool, argument: str, detail: str) -> None:
        """Raise an error about an argument unless the condition holds."""
        if not holds:
            raise AnalysisError("invalid-argument", detail, argument=argument)

    require(largest >= 1, "largest", f"largest is {largest}; it must be at least 1.")
    require(len(labels) > 0, "features", "There are no samples.")
    check_labels(labels, len(head), "invalid-argument")
    numbers = logits.loss if isinstance(logits, Predictions) else logits
    for name, tensor in (("features", features), ("head", head), ("logits", numbers)):
        if not bool(torch.isfinite(tensor).all()):
            raise AnalysisError("non-finite-values", f"The {name} hold NaN or infinity.", tensor=name)


def _of_predictions(samples: Samples, predictions: Predictions) -> dict[str, Float64[Tensor, " n"]]:
    """Return the parts of accuracy and loss, averages over samples, and of the calibration error, one in each bin."""
    network, certain = predictions.predicted, predictions.confidence
    right = network == samples.labels
    correct, (bins, gaps) = right.double(), calibration_gaps(certain, right)
    return {
        "accuracy": correct,
        "loss": predictions.loss,
        "calibration_error": gaps.sign()[bins] * (correct - certain),
    }


def _nearest_means(samples: Samples, predicted: Int[Tensor, " n"], pieces: _Pieces) -> None:
    """Add NC4: the share of samples for which the network and the nearest class mean disagree.

    A mean that moves takes samples across the plane halfway between it and another. Their number is the density of
    samples at that plane, estimated by a kernel from those near it: the smooth part of an average of steps (Powell
        1984).
    """
    n, k = len(samples.labels), len(samples.means)
    centre = samples.statistics.centre
    means = samples.means - centre
    order = torch.zeros(n, 2, dtype=torch.int64, device=means.device)
    depth = means.new_full((n,), math.inf)
    for members in samples.members:
        rows = samples.features[members].double() - centre
        distances = means.square().sum(dim=1) - 2 * rows @ means.T
        two = distances.topk(min(2, k), dim=1, largest=False)
        order[members, : two.indices.shape[1]] = two.indices
        if k > 1:
            apart = (means[two.indices[:, 0]] - means[two.indices[:, 1]]).norm(dim=1)
            depth[members] = (two.values[:, 1] - two.values[:, 0]) / (2 * apart)
    classes = samples.classes[order]
    pieces.direct["collapse.nc4"] = (classes[:, 0] != predicted).double()
    if k == 1:
        return
    # Step of each sample: its change of NC4 if the second nearest mean becomes the nearest.
    step = (classes[:, 0] == predicted).double() - (classes[:, 1] == predicted).double()
    scale = min(float(depth.square().mean().sqrt()), float(depth.median()) / 0.6745)
    width = 2.34 * scale * n**-0.2
    near = ((depth < width) & (step != 0)).nonzero()[:, 0] if width > 0 else order.new_zeros(0)
    weights = 0.75 / width * (1 - (depth[near] / width).square()) * step[near]
    first, second = order[near].T
    weights = (weights / (n * (means[first] - means[second]).norm(dim=1)))[:, None]
    rows = samples.features[near].double() - centre
    gradient = torch.zeros_like(means, device="cpu")
    # A mean gains the samples that it approaches and loses those that it leaves. On the processor, in a fixed order.
    gradient.index_add_(0, first.cpu(), (-weights * (rows - means[first])).cpu())
    gradient.index_add_(0, second.cpu(), (weights * (rows - means[second])).cpu())
    pieces.through_means["collapse.nc4"] = gradient.to(means.device)


def _sample_level(samples: Samples, pieces: _Pieces, centred: bool, largest: int) -> PairEntropies | None:
    """Return entropies of z_i = F_i paired with v_i = W[y_i], and add their derivatives; None if no pair is left."""
    found = sample_sensitivity(samples, centred=centred, largest=largest)
    if found is None:
        return None
    path = f"interplay.sample.{'global' if centred else 'none'}"
    for name, by_weight, by_centre in zip(ENTROPIES, found.by_weight, found.by_centre, strict=True):
        pieces.direct[f"{path}.{name}"] = by_weight
        if centred:
            # The centre is the mean of the class means.
            pieces.through_means[f"{path}.{name}"] = (by_centre / len(samples.means)).expand_as(samples.means)
    return found.entropies


def _class_mean_level(samples: Samples, pieces: _Pieces, centred: bool) -> PairEntropies | None:
    """Return entropies of class means paired with head rows, and add derivatives; None if no pair is left."""
    head, usable = samples.head_directions(centred)
    with torch.enable_grad():
        means = samples.means.clone().requires_grad_()
        centre = means.mean(dim=0) if centred else torch.zeros_like(means[0])
        vectors = means - centre
        usable = usable & unit_rows(vectors.detach(), samples.statistics.sizes + centre.detach().norm())[1]
        n = int(usable.sum())
        if n == 0:
            return None
        vectors, head = vectors[usable], head[usable]
        z = vectors / vectors.norm(dim=1, keepdim=True)
        of_features = spectral_entropy((z @ z.T if n <= z.shape[1] else z.T @ z) / n)
        of_joint = spectral_entropy(z @ z.T * (head @ head.T) / n)
        gradients = [torch.autograd.grad(value, means, retain_graph=True)[0] for value in (of_features, of_joint)]
    path = f"interplay.class_mean.{'global' if centred else 'none'}"
    pieces.through_means[f"{path}.entropy_features"], pieces.through_means[f"{path}.entropy_joint"] = gradients
    pieces.direct[f"{path}.entropy_head"] = means.new_zeros(len(samples.labels))
    return PairEntropies(*(value.item() for value in (of_features, spectral_entropy(head @ head.T / n), of_joint)))


def _ratios(
    path: str, values: PairEntropies, found: Mapping[str, Float64[Tensor, " n"]]
) -> dict[str, Float64[Tensor, " n"]]:
    """Return mutual information, MIR and HDR from their entropies."""
    of_features, of_head, of_joint = (found[f"{path}.{name}"] for name in ENTROPIES)
    information = of_features + of_head - of_joint
    ratios = {f"{path}.mutual_information": information}
    ordered = sorted([(values.features, of_features), (values.head, of_head)], key=lambda pair: pair[0])
    (smaller, of_smaller), (larger, of_larger) = ordered
    if smaller >= ZERO_ENTROPY:
        mir = values.information / smaller
        ratios[f"{path}.mir"] = (information - mir * of_smaller) / smaller
    if larger >= ZERO_ENTROPY:
        # HDR = 1 - smaller / larger
        ratios[f"{path}.hdr"] = (smaller / larger * of_larger - of_smaller) / larger
    return ratios


def _collapse(samples: Samples, pieces: _Pieces) -> None:
    """Add NC1 to NC3; NC4 is an average and among the predictions."""
    n = len(samples.labels)
    for measure in ("equinorm", "equiangularity", "max_angle"):
        pieces.direct[f"collapse.nc2_{measure}_head"] = samples.means.new_zeros(n)
    if len(samples.classes) > 1:
        _geometry(samples, pieces)
        _variability(samples, pieces)


def _geometry(samples: Samples, pieces: _Pieces) -> None:
    """Add NC2 of the class means and NC3, which only the means move."""
    k = len(samples.classes)
    rows = (samples.head - samples.head.mean(dim=0))[samples.classes]
    with torch.enable_grad():
        means = samples.means.clone().requires_grad_()
        centred = means - means.mean(dim=0)
        scale = samples.statistics.sizes + samples.statistics.centre.norm()
        _, usable = unit_rows(centred.detach(), scale)
        if not bool(usable.all()):
            return
        norms = centred.norm(dim=1)
        directions = centred / norms[:, None]
        first, second = torch.triu_indices(k, k, offset=1, device=means.device)
        cosines = (directions @ directions.T)[first, second]
        measures = {
            "nc2_equinorm_means": norms.std(correction=0) / norms.mean(),
            "nc2_equiangularity_means": cosines.std(correction=0),
            "nc2_max_angle_means": (cosines + 1 / (k - 1)).abs().mean(),
        }
        if bool(unit_rows(rows, samples.head.norm(dim=1)[samples.classes])[1].any()):
            measures["nc3"] = (rows / rows.norm() - centred / centred.norm()).square().sum()
        for name, value in measures.items():
            if name == "nc3" or value.item() > _KINK:
                pieces.through_means[f"collapse.{name}"] = torch.autograd.grad(value, means, retain_graph=True)[0]


def _variability(samples: Samples, pieces: _Pieces) -> None:
    """Add NC1 = trace(Sigma_W Sigma_B^dagger) / k and the condition number of Sigma_B, on its r leading directions.

    With M = U s V^T the centred means, Sigma_B = M^T M / k: a change of M moves the pseudo-inverse B by
    -B dSigma B + (I - P) dSigma B^2 + B^2 dSigma (I - P), P the projection on its directions (Golub and Pereyra 1973).
    """
    k, d = samples.means.shape
    u, s, v = torch.linalg.svd(samples.means - samples.statistics.centre, full_matrices=False)
    rounding = max(k, d) * _EPS * float(samples.means.norm() + samples.statistics.sizes.norm())
    expected = min(k - 1, d)
    rank = min(int((s > rounding).sum()), expected)
    if rank == 0:
        return
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    within, outside = s.new_zeros(rank, d), 0.0
    forms = s.new_zeros(len(samples.labels))
    for position, rows in enumerate(samples.members):
        deviations = samples.deviations(position)
        along = deviations @ v.T
        within += along.T @ deviations / (len(rows) * k)
        squares = (along / s).square().sum(dim=1)
        # Each class weighs the same, however many samples it has.
        forms[rows] = (squares - squares.mean()) * (len(samples.labels) / (len(rows) * k))
        outside += float((deviations - along @ v).square().sum()) / (len(rows) * k)
    if rank < expected and math.sqrt(outside) > 1e-12 * float(samples.statistics.sizes.max()):
        return
    inverse = k / s.square()
    inside = within @ v.T
    product = -inverse[:, None] * inside * inverse @ v + inverse.square()[:, None] * (within - inside @ v)
    gradient = (2 / k**2) * (u * s) @ product
    pieces.direct["collapse.nc1"] = forms
    # The columns of U sum to 0, so this is the derivative in the means and in their differences.
    pieces.through_means["collapse.nc1"] = gradient
    ends = torch.outer(u[:, 0], v[0]) / s[0] - torch.outer(u[:, -1], v[-1]) / s[-1]
    pieces.through_means["collapse.nc1_condition"] = 2 * (s[0] / s[-1]).square() * ends
