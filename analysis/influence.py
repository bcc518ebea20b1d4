"""Influence functions: how much each sample moves each metric, and the standard errors that follow.

Every metric T is a function of the samples' weights p, all 1/n. The influence of sample i is dT/dp_i, centred within
its class because samples are drawn within classes; the standard error is sqrt(sum_i influence_i^2) / n (the delta
method), at the cost of one evaluation in place of hundreds of resamples.

Entropies need no derivative of an eigendecomposition. With unit vectors u_i, rho = sum_i p_i u_i u_i^T of trace 1 and
H = - tr(rho log rho):

    dH/dp_i = - <u_i, log(rho) u_i> - H         p_i moves, the weights are divided by their sum
    dH/du_i = - 2 p_i log(rho) u_i              u_i turns and keeps its length

For K1 u_i is the direction z_i of a sample, for K2 that of its head row v_c, for K1 * K2 it is z_i (x) v_c. These last
have d C dimensions, but rho = Y^T Y with a row sqrt(D_a) e_a (x) v_c for every principal direction e_a of class c, D_a
its eigenvalue over n. With M = Y Y^T, the m x m matrix of METRICS, "The joint spectrum, fast", and E_c the rows e_a,

    z_i (x) v_c = Y^T w,    w = D^(-1/2) E_c z_i on the rows of class c,    <u_i, log(rho) u_i> = w^T (M log M) w:

only the diagonal blocks of M log M are needed, and one product of every sample with its class's principal directions.
With centring "global" the samples also move the centre, and every z_i turns with it.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from analysis.entropy import ZERO_ENTROPY, unit_rows
from analysis.errors import AnalysisError
from analysis.losses import spectral_entropy

# Principal directions whose couplings are kept: an eigendecomposition of half a second on a processor core.
LARGEST_KEPT = 1024
_CALIBRATION_BINS = 15
_ENTROPIES = ("entropy_features", "entropy_head", "entropy_joint")
_EPS = torch.finfo(torch.float64).eps
# A standard deviation or a mean of distances below this is 0 but for rounding, where it has no derivative.
_KINK = 1e-12


def influence(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    head: Float[Tensor, "c d"],
    logits: Float[Tensor, "n c"],
    *,
    largest: int = LARGEST_KEPT,
) -> dict[str, Float64[Tensor, " n"]]:
    """dT/dp_i of every metric T for every sample i, at p_i = 1/n and centred within the sample's class.

    Args:
        features: what the head receives, one row a sample.
        labels: 0 to c - 1.
        head: one row a class.
        logits: what the network predicts from, with the bias.
        largest: most principal directions whose couplings enter the joint entropy; with at least n or c d it is exact.

    Returns:
        By the metric's path in a split of a report, such as `interplay.sample.global.mir` or `collapse.nc1`. A metric
        that is not defined, or has no derivative because it sits on its own minimum or a vector has no direction,
        is not among them. Metrics that no sample moves (the head's) have zeros. The distance to an optimum has the
        influence of its metric but for the sign, because the class counts are given.

        NC4 and the calibration error are taken as averages: which class mean is nearest, into which bin a confidence
        falls and which sign a bin's gap has do not change with the weights. Their standard error is too small where
        many samples are close to such a border, and for calibration where gaps are of the size of their own error.

    Raises:
        AnalysisError: `invalid-argument` without samples, for labels out of range or a `largest` below 1;
            `non-finite-values`.

    Numerics: float64. O(n d^2 + c min(n/c, d)^3 + m^3) time with m the directions kept; memory for the principal
        directions of all classes, at most min(n, c d) x d, and a few matrices of size m x m and d x d; never n x n
        beyond `largest`. The directions that are not kept enter the joint entropy as they are (pinched).

    Source: Hampel 1974 for influence functions; METRICS, "Comparing two checkpoints".
    """
    _check(features, labels, head, logits, largest)
    samples = _samples(features, labels, head)
    pieces = _Pieces(_of_predictions(samples, logits), {})
    levels = {}
    for centring in ("none", "global"):
        centred = centring == "global"
        levels[f"interplay.sample.{centring}"] = _sample_level(samples, pieces, centred, largest)
        levels[f"interplay.class_mean.{centring}"] = _class_mean_level(samples, pieces, centred)
    _collapse(samples, pieces)
    found = pieces.resolve(samples)
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
    """Standard error sqrt(sum_i influence_i^2) / n of each metric, or of its difference from a baseline.

    Args:
        influences: from `influence`.
        baseline: from `influence` for another checkpoint on the same samples in the same order: what both share drops
            out of the difference, as in a paired bootstrap.

    Returns:
        One number a metric, for those that both have: the spread of a bootstrap that resamples within classes.

    >>> standard_errors({"accuracy": torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64)})
    {'accuracy': 0.25}
    """
    if baseline is not None:
        influences = {name: influences[name] - baseline[name] for name in influences if name in baseline}
    return {name: float(values.norm()) / len(values) for name, values in influences.items()}


@dataclass(frozen=True)
class _Samples:
    """Features by class, as `classes`, `members`, `means` and `sizes` (mean length) list them."""

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    head: Float64[Tensor, "c d"]
    classes: Int[Tensor, " k"]
    members: Sequence[Int[Tensor, " _"]]
    means: Float64[Tensor, "k d"]
    sizes: Float64[Tensor, " k"]

    def deviations(self, position: int) -> Float64[Tensor, "m d"]:
        """Samples of one class, without its mean."""
        return self.features[self.members[position]].double() - self.means[position]

    def directions(
        self, position: int, centre: Float64[Tensor, " d"]
    ) -> tuple[Int[Tensor, " m"], Float64[Tensor, "m d"], Float64[Tensor, " m"]]:
        """Of one class: which samples have a direction from the centre, these directions and the distances."""
        rows = self.members[position]
        vectors = self.features[rows].double()
        scale = vectors.norm(dim=1) + centre.norm()
        vectors -= centre
        directions, usable = unit_rows(vectors, scale)
        return rows[usable], directions[usable], vectors[usable].norm(dim=1)

    def head_directions(self, centred: bool) -> tuple[Float64[Tensor, "k d"], Bool[Tensor, " k"]]:
        """Directions of the head rows of the classes present; all rows, also of absent classes, make the centre."""
        centre = self.head.mean(dim=0) if centred else torch.zeros_like(self.head[0])
        rows = self.head[self.classes]
        return unit_rows(rows - centre, rows.norm(dim=1) + centre.norm())


@dataclass(frozen=True)
class _Entropies:
    features: float
    head: float
    joint: float


@dataclass(frozen=True)
class _Pieces:
    """dT/dp_i of each metric in two parts: with the class means held, and dT/dmu_c for what moves them.

    d mu_c / dp_i = (F_i - mu_c) n / n_c for the samples of class c.
    """

    direct: dict[str, Float64[Tensor, " n"]]
    through_means: dict[str, Float64[Tensor, "k d"]]

    def resolve(self, samples: _Samples) -> dict[str, Float64[Tensor, " n"]]:
        """Both parts together, centred within classes; one pass over the samples for all metrics."""
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
        counts = torch.bincount(samples.labels, minlength=len(samples.head)).clamp(min=1)
        averages = table.new_zeros(len(table), len(counts)).index_add_(1, samples.labels, table) / counts
        return dict(zip(found, table - averages[:, samples.labels], strict=True))


def _check(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    head: Float[Tensor, "c d"],
    logits: Float[Tensor, "n c"],
    largest: int,
) -> None:
    def require(holds: bool, argument: str, detail: str) -> None:
        if not holds:
            raise AnalysisError("invalid-argument", detail, argument=argument)

    require(largest >= 1, "largest", f"largest is {largest}; at least 1 direction is kept")
    require(len(labels) > 0, "features", "there are no samples")
    lowest, highest = int(labels.min()), int(labels.max())
    fit = f"labels run from {lowest} to {highest}; the head has {len(head)} rows, so 0 to {len(head) - 1} fit"
    require(lowest >= 0 and highest < len(head), "labels", fit)
    for name, tensor in (("features", features), ("head", head), ("logits", logits)):
        if not bool(torch.isfinite(tensor).all()):
            raise AnalysisError("non-finite-values", f"{name} hold NaN or infinity", tensor=name)


def _samples(features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], head: Float[Tensor, "c d"]) -> _Samples:
    counts = torch.bincount(labels.long(), minlength=len(head))
    classes = counts.nonzero()[:, 0]
    members = torch.tensor_split(torch.argsort(labels, stable=True), counts[classes].cumsum(0)[:-1].cpu())
    means, sizes = [], []
    for rows in members:
        vectors = features[rows].double()
        means.append(vectors.mean(dim=0))
        sizes.append(vectors.norm(dim=1).mean())
    return _Samples(features, labels.long(), head.double(), classes, members, torch.stack(means), torch.stack(sizes))


def _of_predictions(samples: _Samples, logits: Float[Tensor, "n c"]) -> dict[str, Float64[Tensor, " n"]]:
    """Accuracy, loss and NC4 are averages over samples; the calibration error is one within each bin."""
    predicted, confidence, losses = [], [], []
    # In parts, so that the float64 copy of the logits stays at 32 MiB.
    rows = max(2**22 // logits.shape[1], 1)
    for part, target in zip(torch.split(logits, rows), torch.split(samples.labels, rows), strict=True):
        logarithms = part.double().log_softmax(dim=1)
        top = logarithms.max(dim=1)
        predicted.append(top.indices)
        confidence.append(top.values.exp())
        losses.append(-logarithms.gather(1, target[:, None])[:, 0])
    network, certain = torch.cat(predicted), torch.cat(confidence)
    correct = (network == samples.labels).double()
    bins = (certain * _CALIBRATION_BINS).ceil().long().clamp(1, _CALIBRATION_BINS) - 1
    gaps = certain.new_zeros(_CALIBRATION_BINS).index_add_(0, bins, correct - certain)
    nearest = torch.empty_like(samples.labels)
    centre = samples.means.mean(dim=0)
    means = samples.means - centre
    for members in samples.members:
        distances = means.square().sum(dim=1) - 2 * (samples.features[members].double() - centre) @ means.T
        nearest[members] = samples.classes[distances.argmin(dim=1)]
    return {
        "accuracy": correct,
        "loss": torch.cat(losses),
        "calibration_error": gaps.sign()[bins] * (correct - certain),
        "collapse.nc4": (nearest != network).double(),
    }


@dataclass(frozen=True)
class _Factor:
    """A class, the number of its pairs, and the non-zero eigenvalues and eigenvectors of its Z_c^T Z_c."""

    position: int
    count: int
    values: Float64[Tensor, " r"]
    principal: Float64[Tensor, "r d"]


@dataclass(frozen=True)
class _Spectra:
    """The spectra of K1, K2 and K1 * K2.

    Attributes:
        n: pairs.
        values: D, the non-zero eigenvalues of K1 / n.
        principal: E, the principal directions that they belong to.
        factors: the same of the classes that have pairs, their eigenvalues over n too.
        head_forms: <v_c, log(rho) v_c> of K2 for each of these classes.
        forms: D^(-1/2) (M log M)_cc D^(-1/2) of the directions of each class whose couplings are kept, its first.
        coupled_logarithm: log(M) * g[class, class] of all directions kept.
    """

    n: int
    entropies: _Entropies
    values: Float64[Tensor, " r"]
    principal: Float64[Tensor, "r d"]
    factors: Sequence[_Factor]
    head_forms: Float64[Tensor, " b"]
    forms: Sequence[Float64[Tensor, "_q _q"]]
    coupled_logarithm: Float64[Tensor, "m m"]

    def feature_form(self, z: Float64[Tensor, "m d"]) -> Float64[Tensor, " m"]:
        """<z, log(rho) z> of K1."""
        return (z @ self.principal.T).square() @ self.values.log()

    def joint_form(self, block: int, z: Float64[Tensor, "m d"]) -> Float64[Tensor, " m"]:
        """<z (x) v, log(rho) z (x) v> of K1 * K2 for samples of one class and its v."""
        factor, form = self.factors[block], self.forms[block]
        kept, rest = (z @ factor.principal.T).tensor_split([len(form)], dim=1)
        # Directions without couplings: M is diagonal there.
        return (kept @ form * kept).sum(dim=1) + rest.square() @ factor.values[len(form) :].log()

    def feature_pull(self, pull: Float64[Tensor, " d"]) -> Float64[Tensor, " d"]:
        """log(rho) of K1 times a vector."""
        return (self.values.log() * (self.principal @ pull)) @ self.principal

    def joint_pull(self, pulls: Float64[Tensor, "b d"]) -> Float64[Tensor, " d"]:
        """sum_c of log(rho) (pull_c (x) v_c), each contracted with the v of the class: for K1 * K2."""
        total, kept = torch.zeros_like(pulls[0]), []
        for factor, form, pull in zip(self.factors, self.forms, pulls, strict=True):
            along, first = factor.principal @ pull, len(form)
            kept.append(along[:first] / factor.values[:first].sqrt())
            total += (factor.values[first:].log() * along[first:]) @ factor.principal[first:]
        coupled = torch.split(self.coupled_logarithm @ torch.cat(kept), [len(form) for form in self.forms])
        for factor, part in zip(self.factors, coupled, strict=True):
            total += (part * factor.values[: len(part)].sqrt()) @ factor.principal[: len(part)]
        return total


def _principal(
    product: Float64[Tensor, "m m"], rows: Float64[Tensor, "m d"] | None
) -> tuple[Float64[Tensor, " r"], Float64[Tensor, "r d"]]:
    """Non-zero eigenvalues of Z^T Z, largest first, and unit eigenvectors, from Z^T Z or from Z Z^T and the rows Z."""
    values, vectors = torch.linalg.eigh(product)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = int((values > 16 * _EPS * values[0]).sum())
    values, principal = values[:rank], vectors[:, :rank].T
    return values, principal if rows is None else principal @ rows / values.sqrt()[:, None]


def _logarithm(
    matrix: Float64[Tensor, "m m"],
) -> tuple[Float64[Tensor, "m m"], Float64[Tensor, "m m"], float]:
    """log M and M log M on the support of M, and the entropy - tr(M log M)."""
    values, vectors = torch.linalg.eigh(matrix)
    support = values > len(values) * _EPS * values[-1]
    logarithms = torch.where(support, values, 1.0).log()
    products = values * logarithms
    return (vectors * logarithms) @ vectors.T, (vectors * products) @ vectors.T, -float(products.sum())


def _factors(
    samples: _Samples, centre: Float64[Tensor, " d"], usable: Bool[Tensor, " k"]
) -> tuple[list[_Factor], Float64[Tensor, " r"], Float64[Tensor, "r d"]]:
    """Of every class with pairs, and of all pairs together; eigenvalues over the number of pairs."""
    d = len(centre)
    scatter = centre.new_zeros(d, d) if len(samples.labels) > d else None
    factors, together = [], [centre.new_zeros(0, d)]
    for position in usable.nonzero()[:, 0].tolist():
        _, z, _ = samples.directions(position, centre)
        if len(z) == 0:
            continue
        product = z.T @ z if scatter is not None else None
        if scatter is not None and product is not None:
            scatter += product
        else:
            together.append(z)
        values, principal = _principal(z @ z.T, z) if product is None or len(z) <= d else _principal(product, None)
        factors.append(_Factor(position, len(z), values, principal))
    n = sum(factor.count for factor in factors)
    z = torch.cat(together)
    if n == 0:
        return [], centre[:0], z
    values, principal = _principal(z @ z.T, z) if scatter is None else _principal(scatter, None)
    factors = [replace(factor, values=factor.values / n) for factor in factors]
    return factors, values / n, principal


def _kept(factors: Sequence[_Factor], largest: int) -> list[int]:
    """How many directions of each class keep their couplings: the first of each, then from the largest down."""
    values = torch.cat([factor.values for factor in factors])
    sizes = torch.tensor([len(factor.values) for factor in factors], device=values.device)
    owner = torch.repeat_interleave(torch.arange(len(factors), device=values.device), sizes)
    ranked = values.clone()
    ranked[sizes.cumsum(0) - sizes] = math.inf
    order = torch.argsort(ranked, descending=True, stable=True)
    kept: list[int] = torch.bincount(owner[order[: max(largest, len(factors))]], minlength=len(factors)).tolist()
    return kept


def _spectra(samples: _Samples, centre: Float64[Tensor, " d"], centred: bool, largest: int) -> _Spectra | None:
    head, usable = samples.head_directions(centred)
    factors, values, principal = _factors(samples, centre, usable)
    if not factors:
        return None
    n = sum(factor.count for factor in factors)
    head = head[[factor.position for factor in factors]]
    coupling = head @ head.T
    shares = centre.new_tensor([factor.count for factor in factors]) / n
    _, of_head, head_entropy = _logarithm(coupling * torch.outer(shares, shares).sqrt())
    sizes = _kept(factors, largest)
    roots = [factor.values[:size].sqrt() for factor, size in zip(factors, sizes, strict=True)]
    rows = [factor.principal[: len(root)] * root[:, None] for factor, root in zip(factors, roots, strict=True)]
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(head.device)
    coupled = coupling[owner][:, owner]
    stacked = torch.cat(rows)
    logarithm, product, joint = _logarithm(stacked @ stacked.T * coupled)
    joint += sum(
        float(torch.special.entr(factor.values[size:]).sum()) for factor, size in zip(factors, sizes, strict=True)
    )
    ends = itertools.accumulate(sizes)
    forms = [
        product[end - size : end, end - size : end] / torch.outer(root, root)
        for end, size, root in zip(ends, sizes, roots, strict=True)
    ]
    entropies = _Entropies(float(torch.special.entr(values).sum()), head_entropy, joint)
    head_forms = of_head.diagonal() / shares
    return _Spectra(n, entropies, values, principal, factors, head_forms, forms, logarithm * coupled)


def _sample_level(samples: _Samples, pieces: _Pieces, centred: bool, largest: int) -> _Entropies | None:
    """Entropies of z_i = F_i beside v_i = W[y_i] and their derivatives; None where no pair is left."""
    centre = samples.means.mean(dim=0) if centred else torch.zeros_like(samples.means[0])
    spectra = _spectra(samples, centre, centred, largest)
    if spectra is None:
        return None
    n, n_all = spectra.n, len(samples.labels)
    path = f"interplay.sample.{'global' if centred else 'none'}"
    forms, paired = centre.new_zeros(3, n_all), torch.zeros_like(samples.labels, dtype=torch.bool)
    # By class, the sum of z_j / (n |F_j - centre|), and for K1 and K1 * K2 the sum of all with their quadratic forms.
    pulls, radial = centre.new_zeros(len(spectra.factors), len(centre)), centre.new_zeros(2, len(centre))
    for block, factor in enumerate(spectra.factors):
        rows, z, distances = samples.directions(factor.position, centre)
        of_features, of_joint = spectra.feature_form(z), spectra.joint_form(block, z)
        forms[:, rows] = torch.stack([of_features, spectra.head_forms[block].expand(len(rows)), of_joint])
        paired[rows] = True
        z /= (n * distances)[:, None]
        pulls[block] = z.sum(dim=0)
        radial += torch.stack([of_features, of_joint]) @ z
    values = spectra.entropies.features, spectra.entropies.head, spectra.entropies.joint
    for name, form, value in zip(_ENTROPIES, forms, values, strict=True):
        pieces.direct[f"{path}.{name}"] = torch.where(paired, -form - value, 0.0) * (n_all / n)
    if centred:
        # The centre is the mean of the class means, and z_j turns by -(I - z_j z_j^T) / |F_j - centre| of its step.
        turned = spectra.feature_pull(pulls.sum(dim=0)) - radial[0], spectra.joint_pull(pulls) - radial[1]
        for name, gradient in zip(("entropy_features", "entropy_joint"), turned, strict=True):
            pieces.through_means[f"{path}.{name}"] = (2 * gradient / len(samples.means)).expand_as(samples.means)
    return spectra.entropies


def _class_mean_level(samples: _Samples, pieces: _Pieces, centred: bool) -> _Entropies | None:
    """Entropies of the class means beside the head's rows and their derivatives; None where no pair is left."""
    head, usable = samples.head_directions(centred)
    with torch.enable_grad():
        means = samples.means.clone().requires_grad_()
        centre = means.mean(dim=0) if centred else torch.zeros_like(means[0])
        vectors = means - centre
        usable = usable & unit_rows(vectors.detach(), samples.sizes + centre.detach().norm())[1]
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
    return _Entropies(*(value.item() for value in (of_features, spectral_entropy(head @ head.T / n), of_joint)))


def _ratios(
    path: str, values: _Entropies, found: Mapping[str, Float64[Tensor, " n"]]
) -> dict[str, Float64[Tensor, " n"]]:
    """Mutual information, MIR and HDR from their entropies."""
    of_features, of_head, of_joint = (found[f"{path}.{name}"] for name in _ENTROPIES)
    information = of_features + of_head - of_joint
    ratios = {f"{path}.mutual_information": information}
    ordered = sorted([(values.features, of_features), (values.head, of_head)], key=lambda pair: pair[0])
    (smaller, of_smaller), (larger, of_larger) = ordered
    if smaller >= ZERO_ENTROPY:
        mir = (values.features + values.head - values.joint) / smaller
        ratios[f"{path}.mir"] = (information - mir * of_smaller) / smaller
    if larger >= ZERO_ENTROPY:
        # HDR = 1 - smaller / larger
        ratios[f"{path}.hdr"] = (smaller / larger * of_larger - of_smaller) / larger
    return ratios


def _collapse(samples: _Samples, pieces: _Pieces) -> None:
    """NC1 to NC3; NC4 is an average and among the predictions."""
    n = len(samples.labels)
    for measure in ("equinorm", "equiangularity", "max_angle"):
        pieces.direct[f"collapse.nc2_{measure}_head"] = samples.means.new_zeros(n)
    if len(samples.classes) > 1:
        _geometry(samples, pieces)
        _variability(samples, pieces)


def _geometry(samples: _Samples, pieces: _Pieces) -> None:
    """NC2 of the class means and NC3, which only the means move."""
    k = len(samples.classes)
    rows = (samples.head - samples.head.mean(dim=0))[samples.classes]
    with torch.enable_grad():
        means = samples.means.clone().requires_grad_()
        centred = means - means.mean(dim=0)
        scale = samples.sizes + samples.means.mean(dim=0).norm()
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


def _variability(samples: _Samples, pieces: _Pieces) -> None:
    """NC1 = trace(Sigma_W Sigma_B^dagger) / k and the condition number of Sigma_B, both on its r leading directions.

    With M = U s V^T the centred means, Sigma_B = M^T M / k: a change of M moves the pseudo-inverse B by
    -B dSigma B + (I - P) dSigma B^2 + B^2 dSigma (I - P), P the projection on its directions (Golub and Pereyra 1973).
    """
    k, d = samples.means.shape
    u, s, v = torch.linalg.svd(samples.means - samples.means.mean(dim=0), full_matrices=False)
    rounding = max(k, d) * _EPS * float(samples.means.norm() + samples.sizes.norm())
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
        forms[rows] = (along / s).square().sum(dim=1) * (len(samples.labels) / (len(rows) * k))
        outside += float((deviations - along @ v).square().sum()) / (len(rows) * k)
    if rank < expected and math.sqrt(outside) > 1e-12 * float(samples.sizes.max()):
        return
    inverse = k / s.square()
    inside = within @ v.T
    product = -inverse[:, None] * inside * inverse @ v + inverse.square()[:, None] * (within - inside @ v)
    gradient = (2 / k**2) * (u * s) @ product
    pieces.direct["collapse.nc1"] = forms
    pieces.through_means["collapse.nc1"] = gradient - gradient.mean(dim=0)
    ends = torch.outer(u[:, 0], v[0]) / s[0] - torch.outer(u[:, -1], v[-1]) / s[-1]
    pieces.through_means["collapse.nc1_condition"] = 2 * (s[0] / s[-1]).square() * (ends - ends.mean(dim=0))
