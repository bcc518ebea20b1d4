"""Matrix entropy, mutual information, MIR and HDR, written as they are defined and computed in float64.

These need whole Gram matrices and all their eigenvalues. `spectrum.py` computes the same numbers for many samples.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from ..errors import AnalysisError

# An entropy below this is rounding: no ratio is taken over it.
ZERO_ENTROPY = 1e-12

_EPS = torch.finfo(torch.float64).eps
# Eigenvalues below the first factor times a rounding of the largest count as zero; so do those below the second factor
# times the most negative eigenvalue, which is rounding. For 50,000 samples of one direction they would add 1e-10 to the
# entropy.
_SHARE_ZERO, _TIMES_NEGATIVE = 16, 4


@dataclass(frozen=True)
class PairEntropies:
    """H(K1), H(K2) and H(K1 * K2) of pairs, in nats."""

    features: float
    head: float
    joint: float

    @property
    def information(self) -> float:
        """Matrix mutual information H(K1) + H(K2) - H(K1 * K2)."""
        return self.features + self.head - self.joint


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise an AnalysisError of kind `non-finite-values` if the tensor called `name` holds NaN or infinity."""
    # A sum is finite only if every term is; it is ten times as fast as checking each term.
    if math.isfinite(tensor.sum().item()):
        return
    wrong = int((~torch.isfinite(tensor)).sum())
    if wrong:
        raise AnalysisError(
            "non-finite-values",
            f"{wrong} of {tensor.numel()} values of the {name} are NaN or infinite.",
            tensor=name,
        )


def squarable(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Divide vectors by a power of two if their squares would overflow or vanish in float64.

    Args:
        vectors: only directions and ratios of lengths may be used afterwards.

    Returns:
        The vectors, unchanged but for the power of two; entries below 1e-150 of the largest may become zeros.

    >>> squarable(torch.tensor([[3e200, 0.0]], dtype=torch.float64)).max() < 1
    tensor(True)
    """
    if vectors.dtype != torch.float64 or not vectors.numel():
        return vectors
    least, most = vectors.aminmax()
    largest = max(-float(least), float(most))
    if largest == 0 or 1e-100 < largest < 1e100:
        return vectors
    # A subnormal number's reciprocal would overflow.
    return vectors * 2.0 ** -min(max(math.frexp(largest)[1], -1000), 1000)


def unit_rows(
    vectors: Float[Tensor, "n d"], scale: Float[Tensor, " n"] | None = None
) -> tuple[Float64[Tensor, "n d"], Bool[Tensor, " n"]]:
    """Divide every row by its Euclidean norm.

    Args:
        vectors: one vector a row.
        scale: size of the numbers that a row was computed from, if rows are differences. A row shorter than 1e-12 of it
            is rounding and has no direction. Default: only a row of zeros has no direction.

    Returns:
        The unit rows, with zeros in place of rows without direction, and a mask of the rows that have one.

    Numerics: float64; each row is first divided by its largest entry, so that squares neither overflow nor vanish.
    """
    rows = vectors.to(torch.float64, copy=True)
    largest = rows.abs().amax(dim=1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
    # The reciprocal of a subnormal number overflows: such a row counts as zero.
    usable = largest >= torch.finfo(torch.float64).tiny
    rows /= torch.where(usable, largest, 1.0)[:, None]
    norms = rows.norm(dim=1)
    if scale is not None:
        usable &= norms * largest > 1e-12 * scale
    rows /= torch.where(usable, norms, 1.0)[:, None]
    return torch.where(usable[:, None], rows, 0.0), usable


def spectrum_entropy(eigenvalues: Float64[Tensor, " n"], alpha: float = 1.0) -> float:
    """Return the entropy of a spectrum that sums to 1.

    That is H = - sum_k l_k log l_k, or of order alpha, log(sum_k l_k^a) / (1 - a).

    Args:
        eigenvalues: at least 0, up to rounding.
        alpha: order, at least 0; 0 gives the logarithm of the rank, infinity - log of the largest eigenvalue.

    Returns:
        The entropy in nats.

    Raises:
        AnalysisError: `invalid-argument` for a negative alpha.

    Numerics: eigenvalues below 16 eps of the largest (n eps for alpha < 1), or below four times the most negative
        eigenvalue in size, which is rounding, count as zero.
    """
    if not alpha >= 0:
        raise AnalysisError("invalid-argument", f"alpha must be at least 0, not {alpha}.", argument="alpha")
    # Small orders weigh small eigenvalues up: they take the usual cut-off of a numerical rank.
    support = _support(eigenvalues, _SHARE_ZERO if alpha >= 1 else max(_SHARE_ZERO, len(eigenvalues)))
    if alpha == 1:
        return max(float(torch.special.entr(support).sum()), 0.0)
    if math.isinf(alpha):
        return -math.log(float(support.max()))
    # The logarithm of the sum, taken over logarithms, keeps large orders from underflowing.
    return float(torch.logsumexp(alpha * support.log(), dim=0)) / (1 - alpha)


@dataclass(frozen=True)
class Spectral:
    """Entropy, rank and rounding error of a spectrum that sums to 1.

    Attributes:
        entropy: in nats.
        rank: number of eigenvalues that do not count as zero.
        rounding: bound of the entropy's rounding error, in nats.
    """

    entropy: float
    rank: int
    rounding: float


def spectral(eigenvalues: Float64[Tensor, " n"]) -> Spectral:
    """Return entropy, rank and rounding error of a spectrum that sums to 1.

    Args:
        eigenvalues: at least 0, up to rounding.

    Returns:
        All three. Each eigenvalue is known to two roundings of the largest, or to the size of the most negative one;
        its l log l then moves by 1 + log l times that.
    """
    support = _support(eigenvalues, _SHARE_ZERO)
    noise = max(2 * _EPS * float(support.max()), -float(eigenvalues.min()))
    rounding = noise * float((1 + support.log()).abs().sum())
    return Spectral(max(float(torch.special.entr(support).sum()), 0.0), len(support), rounding)


def gram_spectrum(weighted: Float64[Tensor, "n d"]) -> Float64[Tensor, " _r"]:
    """Return the eigenvalues of X X^T, all that are not zero, from the smaller of X X^T and X^T X."""
    n, d = weighted.shape
    eigenvalues: Float64[Tensor, " _r"] = torch.linalg.eigvalsh(
        weighted @ weighted.T if n <= d else weighted.T @ weighted
    )
    return eigenvalues


def spectrum_rank(eigenvalues: Float64[Tensor, " n"]) -> int:
    """Return the number of eigenvalues that do not count as zero; see `spectrum_entropy`."""
    return len(_support(eigenvalues, _SHARE_ZERO))


def matrix_entropy(gram: Float[Tensor, "n n"], alpha: float = 1.0) -> float:
    """Return the matrix entropy H(K) = - sum_k l_k log l_k, with l the eigenvalues of K/n.

    Args:
        gram: Gram matrix with unit diagonal.
        alpha: order, at least 0.

    Returns:
        The entropy in nats, from 0 to log n.

    Raises:
        AnalysisError: `invalid-argument` for a negative alpha or a matrix of size 0; `non-finite-values`.

    Numerics: float64, O(n^3); order 2 from the Frobenius norm alone, all other orders from all eigenvalues.

    Source: Giraldo, Rao and Principe 2015.

    >>> round(matrix_entropy(torch.eye(4)), 6)
    1.386294
    """
    check_finite("gram", gram)
    n = gram.shape[0]
    if n == 0:
        raise AnalysisError(
            "invalid-argument", "The Gram matrix is empty; an entropy needs at least one vector.", argument="gram"
        )
    scaled = gram.double() / n
    if alpha == 2:
        return -math.log(float(scaled.square().sum()))
    return spectrum_entropy(torch.linalg.eigvalsh(scaled), alpha)


def matrix_entropy_of_vectors(
    vectors: Float[Tensor, "n d"], alpha: float = 1.0, weights: Float[Tensor, " n"] | None = None
) -> float:
    """Return the matrix entropy of the Gram matrix of the rows' directions, or of a mixture.

    A mixture has l the eigenvalues of sum_i w_i z_i z_i^T / sum_i w_i.

    Args:
        vectors: one vector a row, of any length; rows of zeros have no direction and are left out.
        alpha: order, at least 0.
        weights: of the rows, at least 0, with a positive sum over those that have a direction. A weight of 2 counts
            like the row twice. Default: equal weights.

    Returns:
        The entropy in nats, from 0 to log min(n, d).

    Raises:
        AnalysisError: `invalid-argument` for a negative alpha or weight, or if no row has a direction and a weight;
            `non-finite-values`.

    Numerics: float64; Z Z^T / n and Z^T Z / n share their non-zero eigenvalues, the smaller is used.

    >>> round(matrix_entropy_of_vectors(torch.tensor([[1.0, 0.0], [3.0, 0.0]])), 12)
    0.0
    """
    check_finite("vectors", vectors)
    directions, usable = unit_rows(vectors)
    shares = usable.double()
    if weights is not None:
        check_finite("weights", weights)
        if bool((weights < 0).any()):
            detail = f"The lowest of the weights is {float(weights.min())}; expected at least 0."
            raise AnalysisError("invalid-argument", detail, argument="weights")
        shares = shares * weights.double()
    if not bool((shares > 0).any()):
        detail = f"None of the {len(vectors)} vectors has a direction and a weight; expected at least one."
        raise AnalysisError("invalid-argument", detail, argument="vectors")
    weighted = directions * (shares / shares.sum()).sqrt()[:, None]
    n, d = weighted.shape
    scaled = weighted @ weighted.T if n <= d else weighted.T @ weighted
    if alpha == 2:
        return -math.log(float(scaled.square().sum()))
    return spectrum_entropy(torch.linalg.eigvalsh(scaled), alpha)


def joint_entropy(
    first: Float[Tensor, "n n"],
    second: Float[Tensor, "n n"],
    alpha: float = 1.0,
) -> float:
    """Return the joint entropy H(K1 * K2) of two Gram matrices with unit diagonal, * the elementwise product.

    Args:
        first: K1.
        second: K2.
        alpha: order, at least 0.

    Returns:
        The entropy in nats; for alpha = 1 between max(H(K1), H(K2)) and H(K1) + H(K2).

    Source: Giraldo, Rao and Principe 2015.
    """
    return matrix_entropy(first.double() * second.double(), alpha)


def mutual_information(first: Float[Tensor, "n n"], second: Float[Tensor, "n n"]) -> float:
    """Return the matrix mutual information MI = H(K1) + H(K2) - H(K1 * K2).

    Args:
        first: K1, with unit diagonal.
        second: K2, with unit diagonal.

    Returns:
        The information in nats, at least 0 up to rounding.

    Source: Song et al. 2024 (arXiv 2406.03999).
    """
    return matrix_entropy(first) + matrix_entropy(second) - joint_entropy(first, second)


def mir(first: Float[Tensor, "n n"], second: Float[Tensor, "n n"]) -> float | None:
    """Return the matrix mutual information ratio MIR = MI / min(H(K1), H(K2)).

    Args:
        first: K1, with unit diagonal.
        second: K2, with unit diagonal.

    Returns:
        The ratio, from 0 to 1; None if the minimum is below 1e-12.

    Source: Song et al. 2024 (arXiv 2406.03999).

    >>> mir(torch.eye(4), torch.eye(4))
    1.0
    """
    smaller = min(matrix_entropy(first), matrix_entropy(second))
    return None if smaller < ZERO_ENTROPY else mutual_information(first, second) / smaller


def hdr(first: Float[Tensor, "n n"], second: Float[Tensor, "n n"]) -> float | None:
    """Return the matrix entropy difference ratio HDR = |H(K1) - H(K2)| / max(H(K1), H(K2)).

    Args:
        first: K1, with unit diagonal.
        second: K2, with unit diagonal.

    Returns:
        The ratio, from 0 to 1; None if the maximum is below 1e-12.

    Source: Song et al. 2024 (arXiv 2406.03999).

    >>> round(hdr(torch.eye(4), torch.ones(4, 4)), 12)
    1.0
    """
    entropies = matrix_entropy(first), matrix_entropy(second)
    larger = max(entropies)
    return None if larger < ZERO_ENTROPY else abs(entropies[0] - entropies[1]) / larger


def _support(eigenvalues: Float64[Tensor, " n"], roundings: int) -> Float64[Tensor, " r"]:
    """Return the eigenvalues that do not count as zero."""
    least, largest = eigenvalues.min(), eigenvalues.max()
    return eigenvalues[eigenvalues > torch.maximum(roundings * _EPS * largest, -_TIMES_NEGATIVE * least)]
