"""The joint spectrum of samples and their classes' head rows.

The naive way needs an N x N Gram matrix and all its eigenvalues. The head has only C distinct rows, which allows less:

1. Exact reduction. With a factor R_c of each class Gram matrix (R_c^T R_c = Z_c^T Z_c, at most min(n_c, d) rows) the
   non-zero eigenvalues of K1 * K2 are those of the m x m matrix (R R^T) * g[class, class], R the stacked R_c and
   g the Gram matrix of the head's directions, m <= min(N, C d). The number of non-zero eigenvalues is also at most the
   product of the ranks of features and head: if that is smaller, the matrix is of that size (`products.py`).
2. Pinched tail. Rows of R with small eigenvalues lose their couplings and enter the entropy as they are. Pinching never
   lowers entropy, so MIR is bounded from below.
3. The worth of the lost couplings (`couplings.py`) is bounded from both sides: the lower bound is subtracted, the gap
   between the two is the error estimate, and the kept part grows until the tolerance is met.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from ..clock import Tell, silent
from .classes import ClassStream, LabelledFeatures, Observer, blocks_of_all
from .entropy import ZERO_ENTROPY, PairEntropies, gram_spectrum, spectral
from .factors import Factors
from .joint import Bounds, JointSpectrum, Method, exact_entropy, joint_entropy
from .products import product_matrix

# Default limit of rows kept: ten seconds on a processor core. A tolerance of 0 ignores it.
LARGEST_KEPT = 4096
# The share of a spectrum's time that reading counts for in reports of progress.
_READING = 0.2
# Sets of at most so many numbers are read together.
_ONE_READING = 2**24
# Number of rows whose products with all others are held at a time.
_ORDER_TWO_ROWS = 512


@dataclass(frozen=True)
class Entropies(PairEntropies):
    """Entropies of pairs in nats, and how the joint one was computed."""

    method: Method
    n_pairs: int
    degenerate_samples: int


def mir_of(features: float, head: float, joint: float) -> float | None:
    """Return MIR from the three entropies; None if the smaller of the first two is below 1e-12."""
    smaller = min(features, head)
    return None if smaller < ZERO_ENTROPY else (features + head - joint) / smaller


def hdr_of(features: float, head: float) -> float | None:
    """Return HDR from the two entropies; None if the larger is below 1e-12."""
    larger = max(features, head)
    return None if larger < ZERO_ENTROPY else abs(features - head) / larger


def sample_entropies(
    labelled: LabelledFeatures | ClassStream,
    *,
    tolerance: float = 1e-4,
    largest: int = LARGEST_KEPT,
    generator: torch.Generator | None = None,
) -> Entropies | None:
    """Return the entropies at sample level: z_i = F_i, v_i = W[y_i], one pair a sample.

    Args:
        labelled: samples by class and the head's directions.
        tolerance: likely error of MIR that is small enough; 0 is exact. The certain bound is the method's
            `error_estimate`, up to a few times that.
        largest: most rows to keep, whatever the tolerance, unless that is 0. Up to three times as many rows are all
            kept, if that costs no more.
        generator: on the CPU; draws the probes that estimate the worth of dropped couplings. Default: one seeded with
            0.

    Returns:
        The entropies, or None if no pair is left.

    Numerics: directions in the type that `labelled` says, sums of their products and all spectra in float64. Products
        of large float32 sets are computed in float32 about the class's mean direction, which moves MIR by about 1e-8.
        With m rows kept O(N d min(n_c, d) + C min(n_c, d)^3 + m^3) time; memory for the factors of the directions that
        may be kept or coupled and a few matrices of d x d, m x d and m x m. The joint entropy is never below the exact
        one, up to rounding. If the kept part reaches `largest` before the tolerance is met, `error_estimate` says so.

    Source: docs/metrics.md, "The joint spectrum, fast".
    """
    generator = generator or torch.Generator().manual_seed(0)
    factors = Factors(labelled, _rows_kept(labelled, tolerance, largest))
    for block in labelled.blocks():
        factors.add(block)
    return _entropies(factors, tolerance, generator)


def sample_entropies_of_all(
    sets: Sequence[LabelledFeatures],
    *,
    tolerance: float = 1e-4,
    largest: int = LARGEST_KEPT,
    generators: Sequence[torch.Generator],
    observe: Observer | None = None,
    tell: Tell = silent,
) -> list[Entropies | None]:
    """Return `sample_entropies` of sets that differ only in centre and head, from one pass over their features.

    Large sets are read once for each, so that the factors of one at a time are in memory.

    Args:
        sets: of the same features and classes.
        tolerance: as of `sample_entropies`.
        largest: as of `sample_entropies`.
        generators: one for each set.
        observe: as of `classes.blocks_of_all`.
        tell: called with the share done: reading counts as a fifth.

    Returns:
        The entropies of each set.
    """
    if sets[0].n_samples * sets[0].features.shape[1] <= _ONE_READING:
        return _read_at_once(sets, tolerance, largest, generators, observe, tell)
    found: list[Entropies | None] = []
    share = 1 / len(sets)
    for number, (entry, generator) in enumerate(zip(sets, generators, strict=True)):
        found += _read_at_once(
            [entry],
            tolerance,
            largest,
            [generator],
            None if number else observe,
            lambda done, number=number: tell(share * (number + done)),  # type: ignore[misc]
        )
    return found


def _read_at_once(
    sets: Sequence[LabelledFeatures],
    tolerance: float,
    largest: int,
    generators: Sequence[torch.Generator],
    observe: Observer | None,
    tell: Tell,
) -> list[Entropies | None]:
    """Return the entropies of sets from one reading, with the factors of all of them in memory."""
    factors = [Factors(entry, _rows_kept(entry, tolerance, largest)) for entry in sets]
    read = 0
    for blocks in blocks_of_all(sets, observe):
        for block, held in zip(blocks, factors, strict=True):
            held.add(block)
        read += len(blocks[0].positions)
        tell(_READING * read / len(sets[0].members))
    found: list[Entropies | None] = []
    span = (1 - _READING) / len(sets)
    for number, generator in enumerate(generators):
        start = _READING + number * span
        # Freed before the next set's spectrum is computed.
        held = factors.pop(0)
        found.append(_entropies(held, tolerance, generator, lambda share, start=start: tell(start + span * share)))  # type: ignore[misc]
        del held
        tell(start + span)
    return found


def sample_joint_entropy_of_order_two(labelled: LabelledFeatures | ClassStream) -> float | None:
    """Return the joint entropy of order 2 at sample level, - log ||K1 * K2 / n||_F^2, without eigenvalues.

    The squared norm is sum_cc' g_cc'^2 <Z_c^T Z_c, Z_c'^T Z_c'> / n^2.

    Args:
        labelled: samples by class and the head's directions.

    Returns:
        The entropy in nats, or None if no pair is left.

    Numerics: exact in float64, except for products of large float32 sets. O(N d min(n_c, d)) time for the Gram
        matrices and O((C d)^2) for their products; memory for C matrices of d x d, or the rows of classes that have
        fewer samples.

    Source: Giraldo, Rao and Principe 2015.
    """
    d = labelled.head.shape[1]
    n = 0
    tall: list[int] = []
    short: list[int] = []
    grams, rows = [], []
    for block in labelled.blocks():
        n += int(block.counts.sum())
        if block.rows is None:
            tall.extend(block.positions)
            grams.append(block.gram.flatten(1))
        else:
            # Padding and samples without direction are zeros and add nothing.
            short.extend(position for position in block.positions for _ in range(block.rows.shape[1]))
            rows.append(block.rows.flatten(0, 1).double())
    if n == 0:
        return None
    between = (labelled.head @ labelled.head.T).square_()
    few = torch.cat(rows) if rows else labelled.head.new_zeros(0, d)
    many = torch.cat(grams) if grams else labelled.head.new_zeros(0, d * d)
    large, small = (torch.tensor(entry, dtype=torch.int64, device=between.device) for entry in (tall, short))
    total = (many @ many.T * between[large][:, large]).sum()
    for start in range(0, len(few), _ORDER_TWO_ROWS):
        part, classes = few[start : start + _ORDER_TWO_ROWS], small[start : start + _ORDER_TWO_ROWS]
        total += ((part @ few.T).square_() * between[classes][:, small]).sum()
        for gram, position in zip(many, tall, strict=True):
            total += 2 * ((part @ gram.view(d, d) * part).sum(dim=1) * between[classes, position]).sum()
    return -math.log(float(total) / n**2)


def pair_entropies(features: Float64[Tensor, "n d"], head: Float64[Tensor, "n d"]) -> Entropies:
    """Return the entropies of n pairs of unit rows, n at least 1, from n x n Gram matrices.

    Args:
        features: z, for example the directions of the class means.
        head: v, for example the directions of the head rows.

    Returns:
        The exact entropies.

    Numerics: float64, O(m^3) time for m the smaller of n and the product of both ranks.
    """
    n = len(features)
    first, second = spectral(gram_spectrum(features / math.sqrt(n))), spectral(gram_spectrum(head / math.sqrt(n)))
    size = min(n, first.rank * second.rank)
    matrix = features @ features.T * (head @ head.T) / n if size == n else product_matrix(features, [1] * n, head, n)
    joint, method = exact_entropy(spectral(torch.linalg.eigvalsh(matrix)), size, Bounds.of(first, second))
    return Entropies(first.entropy, second.entropy, joint, method, n, 0)


def _rows_kept(labelled: LabelledFeatures | ClassStream, tolerance: float, largest: int) -> int:
    """Return the most rows to keep: all of them if the spectrum is to be exact."""
    return labelled.n_samples if tolerance == 0 else largest


def _entropies(factors: Factors, tolerance: float, generator: torch.Generator, tell: Tell = silent) -> Entropies | None:
    """Return the entropies from factors to which all blocks were added; None if no pair is left."""
    factors.finish()
    n = factors.n
    if n == 0:
        return None
    directions = factors.labelled.head
    head = spectral(gram_spectrum(directions * (factors.counts / n).sqrt()[:, None]))
    joint, method = joint_entropy(
        JointSpectrum(factors, head), tolerance=tolerance, largest=factors.largest, generator=generator, tell=tell
    )
    return Entropies(factors.spectral.entropy, head.entropy, joint, method, n, factors.degenerate)
