"""MIR and HDR of a batch as a training loss: L = a (1 - MIR) + b HDR, differentiable in features and head.

Why gradients stay finite. d/dl (-l log l) is unbounded at l = 0, yet the entropy is continuously differentiable in the
vectors: a direction that the batch does not span has the eigenvalue s^2, with s linear in a small step of the vectors,
and s^2 log s^2 starts flat. So the derivative on the support (eigenvalues above n eps l_max) is the whole derivative,
also on batches with repeated samples, collapsed features or more samples than dimensions, and nothing is added to a
diagonal. And a sum over eigenvalues needs no derivative of eigenvectors: with f(l) = -l log l and K = V diag(l) V^T it
is V diag(f'(l)) V^T, without the 1 / (l_i - l_j) that diverge at equal eigenvalues.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float64, Int, Shaped
from torch import Tensor, nn

from ..errors import AnalysisError
from .entropy import ZERO_ENTROPY, unit_rows
from .labels import check_labels

Centring = Literal["none", "global"]


class InterplayLoss(nn.Module):
    """L = a (1 - MIR) + b HDR of a batch at sample level, with a = mir_weight and b = hdr_weight.

    Args:
        mir_weight: a, at least 0.
        hdr_weight: b, at least 0.
        centring: `none` takes features and head as they are, as the paper's loss does; `global` subtracts the mean of
            the batch's class means from the features and the mean row from the head.

    Raises:
        AnalysisError: `invalid-argument` for weights that are negative or not finite and for another centring.

    Source: Song et al. 2024 (arXiv 2406.03999), section 5.

    >>> loss = InterplayLoss(mir_weight=0.1, hdr_weight=0.1)
    >>> round(float(loss(torch.eye(4), torch.eye(4), torch.arange(4))), 6)
    0.0
    """

    def __init__(self, mir_weight: float, hdr_weight: float, *, centring: Centring = "none") -> None:
        super().__init__()
        for name, weight in (("mir_weight", mir_weight), ("hdr_weight", hdr_weight)):
            if not 0 <= weight < math.inf:
                raise AnalysisError(
                    "invalid-argument", f"{name} must be finite and at least 0, not {weight}.", argument=name
                )
        _check_centring(centring)
        self.mir_weight, self.hdr_weight, self.centring = mir_weight, hdr_weight, centring

    def forward(
        self,
        features: Float[Tensor, "n d"],
        head: Float[Tensor, "c d"],
        labels: Int[Tensor, " n"],
        mask: Shaped[Tensor, " n"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss of one batch.

        Args:
            features: inputs of the head, one row a sample.
            head: the head's weight, one row a class; its bias takes no part.
            labels: classes or pseudo-labels, 0 to c - 1; any number for samples with mask 0.
            mask: bool, or weights in [0, 1] such as confidences; no gradient flows into it. Default: all samples.

        Returns:
            A scalar, float32 or wider. Rows without direction are left out. A term is exactly 0, and so is its
            gradient, with fewer than two samples left, or if its ratio is undefined because the denominator is below
            1e-12 (one class alone leaves MIR undefined, as do collapsed features).

        Raises:
            AnalysisError: `invalid-argument` for shapes, dtypes, labels or mask values that do not fit;
                `non-finite-values` for NaN or infinity in the head or in samples that take part.

        Numerics: float64 from the features on, whatever autocast says: eigenvalues are squares of the features'
            variations, and a float32 spectrum of 256 samples would lose variations below 0.5 %. Eigenvalues above n eps
            l_max count. The MIR term takes O(m^3) with m = min(n, d min(k, d)), k the classes of the batch, the HDR
            term O(min(n, d)^3); a term whose weight is 0 is not computed. Differentiable once: a second derivative
            raises RuntimeError. If all features approach one point by a distance t the gradient of MIR grows like 1/t,
            as that of any ratio to a vanishing entropy; below t of about 1e-7 the term is 0. At equal entropies the
            derivative of HDR is taken as 0.
        """
        with torch.autocast(features.device.type, enabled=False):
            batch = _batch(features, head, labels, mask, self.centring)
            loss = _nothing(features, head)
            if batch is None:
                return loss
            first, second = batch.feature_entropy(), batch.head_entropy()
            if self.mir_weight and bool(torch.minimum(first, second) >= ZERO_ENTROPY):
                loss = loss + self.mir_weight * _mir_term(first, second, batch.joint_entropy())
            if self.hdr_weight and bool(torch.maximum(first, second) >= ZERO_ENTROPY):
                loss = loss + self.hdr_weight * _hdr_term(first, second)
            return loss.to(_result_dtype(features))

    def extra_repr(self) -> str:
        """Return the weights and the centring, for print."""
        return f"mir_weight={self.mir_weight}, hdr_weight={self.hdr_weight}, centring={self.centring!r}"


def mir_loss(
    features: Float[Tensor, "n d"],
    head: Float[Tensor, "c d"],
    labels: Int[Tensor, " n"],
    mask: Shaped[Tensor, " n"] | None = None,
    *,
    centring: Centring = "none",
) -> Float[Tensor, ""]:
    """Return 1 - MIR of a batch at sample level; with weights p that sum to 1 the Gram matrices are sqrt(p_i p_j) k_ij.

    Args:
        features, head, labels, mask: as of `InterplayLoss.forward`.
        centring: as of `InterplayLoss`.

    Returns:
        A scalar between 0 and 1, float32 or wider; exactly 0, with zero gradient, if MIR is undefined or fewer than two
        samples are left.

    Raises:
        AnalysisError: as `InterplayLoss.forward`.

    Numerics: as `InterplayLoss.forward`.

    Source: Song et al. 2024 (arXiv 2406.03999), section 5.
    """
    with torch.autocast(features.device.type, enabled=False):
        batch = _batch(features, head, labels, mask, centring)
        if batch is None:
            return _nothing(features, head)
        first, second = batch.feature_entropy(), batch.head_entropy()
        if not bool(torch.minimum(first, second) >= ZERO_ENTROPY):
            return _nothing(features, head)
        return _mir_term(first, second, batch.joint_entropy()).to(_result_dtype(features))


def hdr_loss(
    features: Float[Tensor, "n d"],
    head: Float[Tensor, "c d"],
    labels: Int[Tensor, " n"],
    mask: Shaped[Tensor, " n"] | None = None,
    *,
    centring: Centring = "none",
) -> Float[Tensor, ""]:
    """Return HDR = |H(K1) - H(K2)| / max(H(K1), H(K2)) of a batch at sample level.

    Args:
        features, head, labels, mask: as of `InterplayLoss.forward`.
        centring: as of `InterplayLoss`.

    Returns:
        A scalar between 0 and 1, float32 or wider; exactly 0, with zero gradient, if HDR is undefined or fewer than two
        samples are left. One class alone gives 1, with zero gradient.

    Raises:
        AnalysisError: as `InterplayLoss.forward`.

    Numerics: as `InterplayLoss.forward`.

    Source: Song et al. 2024 (arXiv 2406.03999), section 5.
    """
    with torch.autocast(features.device.type, enabled=False):
        batch = _batch(features, head, labels, mask, centring)
        if batch is None:
            return _nothing(features, head)
        first, second = batch.feature_entropy(), batch.head_entropy()
        if not bool(torch.maximum(first, second) >= ZERO_ENTROPY):
            return _nothing(features, head)
        return _hdr_term(first, second).to(_result_dtype(features))


def spectral_entropy(matrix: Float64[Tensor, "m m"]) -> Float64[Tensor, ""]:
    """Return H = - sum_k l_k log l_k over the eigenvalues of a matrix, with the derivative V diag(-log l - 1) V^T.

    Args:
        matrix: symmetric, positive semidefinite, of trace 1.

    Returns:
        The entropy in nats.

    Numerics: O(m^3); one eigendecomposition forward, one product backward. Eigenvalues above m eps l_max count. The
        derivative is taken on their space, which for a Gram matrix is the whole derivative (see the module's
        docstring). Differentiable once: a second derivative raises RuntimeError.
    """
    # torch leaves `apply` without types.
    apply: Callable[[Tensor], Tensor] = _SpectralEntropy.apply
    return apply(matrix)


class _SpectralEntropy(torch.autograd.Function):
    """The entropy of a spectrum, with its derivative on the support."""

    @staticmethod
    def forward(ctx: Any, matrix: Float64[Tensor, "m m"]) -> Float64[Tensor, ""]:
        """Return the entropy, and keep the eigenvectors and the slopes of the eigenvalues."""
        values, vectors = torch.linalg.eigh(matrix)
        cutoff = len(values) * torch.finfo(torch.float64).eps * values[-1]
        support = values > cutoff
        logarithms = torch.where(support, values, 1.0).log()
        ctx.save_for_backward(matrix, vectors, torch.where(support, -logarithms - 1, 0.0))
        entropy: Tensor = -(values * logarithms).sum()
        return entropy

    @staticmethod
    def backward(ctx: Any, gradient: Float64[Tensor, ""]) -> Float64[Tensor, "m m"]:
        """Return the derivative times the incoming gradient."""
        derivative: Callable[..., Tensor] = _Derivative.apply
        return gradient * derivative(*ctx.saved_tensors)


class _Derivative(torch.autograd.Function):
    """V diag(slopes) V^T. It receives the matrix only to make a second derivative fail.

    `once_differentiable` would not: it treats a product with a constant incoming gradient as a constant.
    """

    @staticmethod
    def forward(
        ctx: Any, matrix: Float64[Tensor, "m m"], vectors: Float64[Tensor, "m m"], slopes: Float64[Tensor, " m"]
    ) -> Float64[Tensor, "m m"]:
        """Return V diag(slopes) V^T."""
        derivative: Tensor = (vectors * slopes) @ vectors.T
        return derivative

    @staticmethod
    def backward(ctx: Any, gradient: Float64[Tensor, "m m"]) -> None:
        """Raise an error, as there is no second derivative."""
        raise RuntimeError("The entropy of a spectrum has no second derivative here: it is differentiable once.")


@dataclass(frozen=True)
class _Batch:
    """Pairs of directions in float64, with weights that sum to 1.

    Attributes:
        samples: directions of the samples, each times the square root of its weight.
        head: directions of the head rows of the classes present.
        shares: the weight of each of these classes.
        positions: for each sample, the index of its class among these.
    """

    samples: Float64[Tensor, "n d"]
    head: Float64[Tensor, "k d"]
    shares: Float64[Tensor, " k"]
    positions: Int[Tensor, " n"]

    def feature_entropy(self) -> Float64[Tensor, ""]:
        """Return H(K1)."""
        return _entropy_of_rows(self.samples)

    def head_entropy(self) -> Float64[Tensor, ""]:
        """Return H(K2)."""
        return _entropy_of_rows(self.head * self.shares.sqrt()[:, None])

    def joint_entropy(self) -> Float64[Tensor, ""]:
        """Return H(K1 * K2), from the smaller of two matrices with its spectrum."""
        n, d = self.samples.shape
        if n <= d * min(self.head.shape):
            coupling = (self.head @ self.head.T)[self.positions][:, self.positions]
            return spectral_entropy(self.samples @ self.samples.T * coupling)
        # K1 * K2 is the Gram matrix of the vectors z (x) v. In a basis of the head rows' span they have d times its
        # rank coordinates. The basis may stay fixed: outside of it there is no support, and so no derivative.
        basis = torch.linalg.qr(self.head.detach().T).Q
        coordinates = (self.head @ basis)[self.positions]
        return _entropy_of_rows((self.samples[:, :, None] * coordinates[:, None, :]).flatten(1))


def _entropy_of_rows(rows: Float64[Tensor, "n d"]) -> Float64[Tensor, ""]:
    """Return H of X X^T, from the smaller of X X^T and X^T X."""
    n, d = rows.shape
    return spectral_entropy(rows @ rows.T if n <= d else rows.T @ rows)


def _mir_term(
    first: Float64[Tensor, ""], second: Float64[Tensor, ""], joint: Float64[Tensor, ""]
) -> Float64[Tensor, ""]:
    return 1 - (first + second - joint) / torch.minimum(first, second)


def _hdr_term(first: Float64[Tensor, ""], second: Float64[Tensor, ""]) -> Float64[Tensor, ""]:
    return (first - second).abs() / torch.maximum(first, second)


def _nothing(features: Float[Tensor, "n d"], head: Float[Tensor, "c d"]) -> Float[Tensor, ""]:
    """Return 0 with zero gradients: a sum over no rows, which NaN elsewhere cannot reach."""
    return (features[:0].sum() + head[:0].sum()).to(_result_dtype(features))


def _result_dtype(features: Float[Tensor, "n d"]) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


def _batch(
    features: Float[Tensor, "n d"],
    head: Float[Tensor, "c d"],
    labels: Int[Tensor, " n"],
    mask: Shaped[Tensor, " n"] | None,
    centring: Centring,
) -> _Batch | None:
    """Return the pairs that take part, or None if there are fewer than two."""
    _check_centring(centring)
    _check_shapes(features, head, labels, mask)
    weights = _weights(mask, features)
    used = weights > 0
    weights, labels = weights[used], labels[used].long()
    samples, rows = features[used].double(), head.double()
    _check_values(samples, rows, labels)
    if len(samples) < 2:
        return None
    classes, positions = torch.unique(labels, return_inverse=True)
    head_scale = sample_scale = None
    if centring == "global":
        centre, head_centre = _mean_of_class_means(samples, weights, positions, len(classes)), rows.mean(dim=0)
        sample_scale = (samples.norm(dim=1) + centre.norm()).detach()
        head_scale = (rows[classes].norm(dim=1) + head_centre.norm()).detach()
        samples, rows = samples - centre, rows - head_centre
    directions, usable = _directions(samples, sample_scale)
    head_directions, head_usable = _directions(rows[classes], head_scale)
    usable = usable & head_usable[positions]
    if int(usable.sum()) < 2:
        return None
    # Samples without direction stay with a weight of 0: a further row of zeros changes no non-zero eigenvalue.
    weights = torch.where(usable, weights, 0.0)
    weights = weights / weights.sum()
    shares = weights.new_zeros(len(classes)).index_add(0, positions, weights)
    return _Batch(directions * weights.sqrt()[:, None], head_directions, shares, positions)


def _mean_of_class_means(
    samples: Float64[Tensor, "n d"], weights: Float64[Tensor, " n"], positions: Int[Tensor, " n"], n_classes: int
) -> Float64[Tensor, " d"]:
    """Return the mean of the weighted means of the classes."""
    totals = weights.new_zeros(n_classes).index_add(0, positions, weights)
    # Each class has the same weight, so a sample's weight is its share of its class.
    return (weights / totals[positions] / n_classes) @ samples


def _directions(
    rows: Float64[Tensor, "n d"], scale: Float64[Tensor, " n"] | None
) -> tuple[Float64[Tensor, "n d"], Bool[Tensor, " n"]]:
    """Return unit rows, differentiable, and which of them have a direction; the others are constant."""
    _, usable = unit_rows(rows.detach(), scale)
    # Squares of scaled rows neither overflow nor vanish; a positive factor changes no direction and no derivative.
    largest = torch.where(usable, rows.detach().abs().amax(dim=1), 1.0)
    scaled = torch.where(usable[:, None], rows / largest[:, None], 1.0)
    return scaled / scaled.norm(dim=1, keepdim=True), usable


def _weights(mask: Shaped[Tensor, " n"] | None, features: Float[Tensor, "n d"]) -> Float64[Tensor, " n"]:
    """Return a weight for each sample; 1 without a mask."""
    if mask is None:
        return torch.ones(len(features), dtype=torch.float64, device=features.device)
    weights = mask.detach().to(features.device, torch.float64)
    if not bool(((weights >= 0) & (weights <= 1)).all()):
        raise AnalysisError(
            "invalid-argument",
            f"The mask runs from {float(weights.min())} to {float(weights.max())}; it must be within 0 to 1.",
            argument="mask",
        )
    return weights


def _check_centring(centring: str) -> None:
    if centring not in ("none", "global"):
        raise AnalysisError(
            "invalid-argument", f"centring must be none or global, not {centring!r}.", argument="centring"
        )


def _check_shapes(
    features: Shaped[Tensor, "..."],
    head: Shaped[Tensor, "..."],
    labels: Shaped[Tensor, "..."],
    mask: Shaped[Tensor, "..."] | None,
) -> None:
    """Check types and shapes of the arguments."""

    def require(holds: bool, name: str, tensor: Shaped[Tensor, "..."], expected: str) -> None:
        """Raise an error about an argument unless the condition holds."""
        if not holds:
            came = f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
            raise AnalysisError("invalid-argument", f"{name} is {came}; it must be {expected}.", argument=name)

    def integer(tensor: Shaped[Tensor, "..."]) -> bool:
        """Return whether a tensor holds integers."""
        return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)

    fits = features.ndim == 2 and features.shape[1] > 0 and features.is_floating_point()
    require(fits, "features", features, "floating point, (n, d) with d at least 1")
    n, d = features.shape
    fits = head.ndim == 2 and head.shape[1] == d and head.is_floating_point()
    require(fits, "head", head, f"floating point, (classes, {d}), as wide as the features")
    require(labels.shape == (n,) and integer(labels), "labels", labels, f"integer, ({n},), one for each sample")
    if mask is not None:
        kind = mask.dtype == torch.bool or mask.is_floating_point()
        require(mask.shape == (n,) and kind, "mask", mask, f"bool or floating point, ({n},), one for each sample")


def _check_values(samples: Float64[Tensor, "n d"], head: Float64[Tensor, "c d"], labels: Int[Tensor, " n"]) -> None:
    """Check the labels, and that samples and head are finite."""
    if len(labels):
        check_labels(labels, len(head), "invalid-argument")
    for name, tensor in (("features", samples), ("head", head)):
        broken = ~torch.isfinite(tensor.detach()).all(dim=1)
        if bool(broken.any()):
            raise AnalysisError(
                "non-finite-values", f"{int(broken.sum())} rows of the {name} hold NaN or infinity.", tensor=name
            )
