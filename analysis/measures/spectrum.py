"""The joint spectrum of samples and their classes' head rows.

The naive way needs an N x N Gram matrix and all its eigenvalues. The head has only C distinct rows, and that is enough:

1. Exact reduction. With a factor R_c of each class Gram matrix (R_c^T R_c = Z_c^T Z_c, at most min(n_c, d) rows) the
   non-zero eigenvalues of K1 * K2 are those of the m x m matrix (R R^T) * g[class, class], R the stacked R_c and
   g the Gram matrix of the head's directions, m <= min(N, C d). Nor does K1 * K2 have more of them than the ranks of
   features and head give when multiplied: where that is the least, the matrix is of that size (`products.py`).
2. Pinched tail. Rows of R with small eigenvalues lose their couplings and enter the entropy as they are. Pinching never
   lowers entropy, so MIR is bounded from below.
3. What the lost couplings are worth (`couplings.py`) is bounded from both sides: the smaller amount is taken back, the
   gap between the two is the error estimate, and the kept part grows until the tolerance is met.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float64
from torch import Tensor

from ..clock import Tell, silent
from .classes import ClassBlock, ClassStream, LabelledFeatures, Observer, blocks_of_all
from .couplings import Couplings, FactorBlock
from .entropy import ZERO_ENTROPY, Spectral, gram_spectrum, spectral
from .products import coordinates, product_matrix

# Most rows that are kept: on a processor core, ten seconds. A tolerance of 0 goes beyond.
LARGEST_KEPT = 4096
# Up to here the exact spectrum costs less than approaching it.
_SMALL = 1024
# Eigenvalues alone of so many times the rows that are kept cost about what the kept ones do, eigenvectors and probes.
_EXACT = 3
# With fewer rows to a class couplings between classes are most of the spectrum, and dear: C x C at every step.
_FEW = 8
# The share of a spectrum's time that reading is taken for, where progress is told.
_READING = 0.2
# Rows that are kept at first.
_FIRST_KEPT = 640
# Numbers of the factors whose couplings are held: half a GiB.
MOST_NUMBERS = 2**27
# Rows whose products with all others are held at a time.
_ORDER_TWO_ROWS = 512


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


def mir_of(features: float, head: float, joint: float) -> float | None:
    """MIR from the three entropies; None where the smaller of the first two is below 1e-12."""
    smaller = min(features, head)
    return None if smaller < ZERO_ENTROPY else (features + head - joint) / smaller


def hdr_of(features: float, head: float) -> float | None:
    """HDR from the two entropies; None where the larger is below 1e-12."""
    larger = max(features, head)
    return None if larger < ZERO_ENTROPY else abs(features - head) / larger


def sample_entropies(
    labelled: LabelledFeatures | ClassStream,
    *,
    tolerance: float = 1e-4,
    largest: int = LARGEST_KEPT,
    generator: torch.Generator | None = None,
) -> Entropies | None:
    """Entropies at sample level: z_i = F_i, v_i = W[y_i], one pair a sample.

    Args:
        labelled: samples by class and the head's directions.
        tolerance: likely error of MIR that is small enough; 0 is exact. What is certain is the method's
            `error_estimate`, up to a few times that.
        largest: most rows to keep, whatever the tolerance, unless that is 0; all are kept, where they are up to
            three times as many and that costs no more.
        generator: on the CPU; draws the probes that tell what dropped couplings are worth. Default: one seeded with 0.

    Returns:
        The entropies, or None where no pair is left.

    Numerics: directions in the type that `labelled` says, sums of their products and all spectra in float64. Products
        of large float32 sets are taken in float32 about the class's mean direction, which moves MIR by about 1e-8. With
        m rows kept O(N d min(n_c, d) + C min(n_c, d)^3 + m^3) time; memory for the factors of the directions that may
        be kept or coupled and a few matrices of d x d, m x d and m x m. The joint entropy is never below the exact one
        but for rounding. Where the kept part reaches `largest` before the tolerance is met, `error_estimate` says so.

    Source: docs/metrics.md, "The joint spectrum, fast".
    """
    generator = generator or torch.Generator().manual_seed(0)
    factors = _Factors(labelled, _rows_kept(labelled, tolerance, largest))
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
    """`sample_entropies` of sets that differ in centre and head alone, from one reading of their features.

    Args:
        sets: of the same features and classes.
        tolerance: as of `sample_entropies`.
        largest: as of `sample_entropies`.
        generators: one for each set.
        observe: as of `classes.blocks_of_all`.
        tell: told what share is done: reading is taken for a fifth.

    Returns:
        The entropies of each set.
    """
    factors = [_Factors(entry, _rows_kept(entry, tolerance, largest)) for entry in sets]
    read = 0
    for blocks in blocks_of_all(sets, observe):
        for block, held in zip(blocks, factors, strict=True):
            held.add(block)
        read += len(blocks[0].positions)
        tell(_READING * read / len(sets[0].members))
    found, span = [], (1 - _READING) / len(sets)
    for number, (held, generator) in enumerate(zip(factors, generators, strict=True)):
        start = _READING + number * span
        found.append(_entropies(held, tolerance, generator, lambda share, start=start: tell(start + span * share)))  # type: ignore[misc]
        tell(start + span)
    return found


def _rows_kept(labelled: LabelledFeatures | ClassStream, tolerance: float, largest: int) -> int:
    """Most rows to keep: all of them where the spectrum is to be exact."""
    return labelled.n_samples if tolerance == 0 else largest


def _entropies(
    factors: "_Factors", tolerance: float, generator: torch.Generator, tell: Tell = silent
) -> Entropies | None:
    factors.finish()
    n = factors.n
    if n == 0:
        return None
    directions = factors.labelled.head
    head = spectral(gram_spectrum(directions * (factors.counts / n).sqrt()[:, None]))
    spectrum = _JointSpectrum(factors, directions, head.rank)
    joint, method = _joint_entropy(spectrum, factors.spectral, head, tolerance, factors.largest, generator, tell)
    return Entropies(factors.spectral.entropy, head.entropy, joint, method, n, factors.degenerate)


def sample_joint_entropy_of_order_two(labelled: LabelledFeatures | ClassStream) -> float | None:
    """Joint entropy of order 2 at sample level, - log ||K1 * K2 / n||_F^2, without eigenvalues.

    The squared norm is sum_cc' g_cc'^2 <Z_c^T Z_c, Z_c'^T Z_c'> / n^2.

    Args:
        labelled: samples by class and the head's directions.

    Returns:
        The entropy in nats, or None where no pair is left.

    Numerics: float64 but for large float32 sets' products, exact otherwise. O(N d min(n_c, d)) time for the Gram
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
            # Places that were filled up, and samples without direction, are zeros and add nothing.
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


class _Factors:
    """R_c of every class: rows from the largest class eigenvalue down, and H(K1) on the way.

    Rows that can be among the `largest` are held in float64, for the kept part; in float32, for couplings, all but the
    smallest of very many. The eigenvalues of all are held.
    """

    def __init__(
        self, labelled: LabelledFeatures | ClassStream, largest: int, most_numbers: int = MOST_NUMBERS
    ) -> None:
        (n_classes, d), device = labelled.head.shape, labelled.head.device
        none = torch.zeros(0, d, dtype=torch.float64, device=device)
        self.eigenvalues: list[Float64[Tensor, " _r"]] = [none[:, 0]] * n_classes
        self.rows: list[Float64[Tensor, "_q d"]] = [none] * n_classes
        self.blocks: list[FactorBlock] = []
        self.counts: Float64[Tensor, " c"] = torch.zeros(n_classes, dtype=torch.float64, device=device)
        self.labelled, self.largest, self.most_rows = labelled, largest, most_numbers // d
        self.scatter = torch.zeros(d, d, dtype=torch.float64, device=device) if labelled.n_samples > d else None
        self.held = self.blocks_held = 0
        #: The most that the ranks of features and head can give when multiplied, once that is asked for.
        self.products: int | None = None

    def add(self, block: ClassBlock) -> None:
        """Take in the block of a class, or of several."""
        if block.gram.shape[-1] == 0:
            return
        self._factorise(block)
        if self.scatter is None:
            return
        _add_scatter(self.scatter, block)
        self.held += sum(len(self.rows[position]) for position in block.positions)
        if self.held > _EXACT * self.largest and not self._all_are_needed():
            self.held = self._prune()
        self.blocks_held += self.blocks[-1].values.numel()
        if self.blocks_held > 2 * self.most_rows:
            self.blocks_held = self._prune_blocks()

    def finish(self) -> None:
        """Once all blocks came: how many samples had a direction, and H(K1)."""
        if self.blocks_held > self.most_rows:
            self._prune_blocks()
        self.n = int(self.counts.sum())
        self.degenerate = self.labelled.n_samples - self.n
        if self.n == 0:
            self.spectral = Spectral(0.0, 0, 0.0)
        elif self.scatter is None:
            # Few samples: the stacked factors, of which nothing was pruned, have the non-zero spectrum of Z.
            self.spectral = spectral(gram_spectrum(torch.cat(self.rows) / math.sqrt(self.n)))
        else:
            self.spectral = spectral(torch.linalg.eigvalsh(self.scatter / self.n))

    def _factorise(self, block: ClassBlock) -> None:
        values, vectors = torch.linalg.eigh(block.gram)
        values, vectors = values.flip(-1), vectors.mT.flip(-2)
        # What is left below is rounding: one sample repeated a thousand times has one direction, not a thousand.
        above = (values > 16 * torch.finfo(torch.float64).eps * values[:, :1]).sum(dim=1)
        ranks = torch.minimum(above, block.counts)
        values = values * (torch.arange(values.shape[1], device=values.device) < ranks[:, None])
        if block.rows is not None:
            factors = vectors @ block.rows.double() * (values > 0)[..., None]
        else:
            factors = vectors * values.sqrt()[..., None]
        most = max(int(ranks.max()), 1)
        self.blocks.append(FactorBlock(block.positions, values[:, :most], factors[:, :most].float()))
        for index, (position, rank) in enumerate(zip(block.positions, ranks.tolist(), strict=True)):
            self.counts[position] = block.counts[index]
            self.eigenvalues[position] = values[index, :rank]
            self.rows[position] = factors[index, :rank].clone() if len(factors) > 1 else factors[0, :rank]

    def _all_are_needed(self) -> bool:
        """Whether the exact spectrum may be within reach by the ranks of features and head, and its rows in memory."""
        if self.products is None:
            self.products = self.labelled.head.shape[1] * coordinates(self.labelled.head).shape[1]
        return self.products <= _EXACT * self.largest and 2 * self.held <= self.most_rows

    def _prune(self) -> int:
        """Let go of float64 rows that cannot be among the largest; how many are left."""
        threshold = self._threshold(self.largest)
        for position, rows in enumerate(self.rows):
            # Every class keeps its leading direction; clone() lets the rest of the storage go.
            above = max(int((self.eigenvalues[position] >= threshold).sum()), 1)
            if len(rows) > above:
                self.rows[position] = rows[:above].clone()
        return sum(len(rows) for rows in self.rows)

    def _prune_blocks(self) -> int:
        """Let go of float32 rows that cannot be among the largest; how many are left."""
        threshold = self._threshold(self.most_rows)
        for index, block in enumerate(self.blocks):
            above = max(int((block.values >= threshold).sum(dim=1).max()), 1)
            if block.rows.shape[1] > above:
                rows = block.rows[:, :above].clone()
                self.blocks[index] = FactorBlock(block.positions, block.values[:, :above], rows)
        return sum(block.values.numel() for block in self.blocks)

    def _threshold(self, largest: int) -> float:
        """The last of so many eigenvalues, the largest of those that came."""
        every = torch.cat(self.eigenvalues)
        return float(every.topk(min(largest, len(every))).values[-1])


def _add_scatter(scatter: Float64[Tensor, "d d"], block: ClassBlock) -> None:
    """Add the Z^T Z of all classes of a block."""
    if block.rows is None:
        scatter += block.gram.sum(dim=0)
        return
    rows = block.rows.flatten(0, 1).double()
    scatter += rows.T @ rows


class _JointSpectrum:
    """The joint matrix by rows of R, ranked: the leading one of every class, then from the largest eigenvalue down.

    A larger kept part so always holds a smaller one.
    """

    def __init__(self, factors: _Factors, head: Float64[Tensor, "c d"], head_rank: int) -> None:
        self.factors = factors
        values = torch.cat(factors.eigenvalues) / factors.n
        device = values.device
        sizes = torch.tensor([len(entry) for entry in factors.eigenvalues], device=device)
        held = torch.tensor([len(rows) for rows in factors.rows], device=device)
        classes = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes)
        within = torch.arange(len(values), device=device) - (sizes.cumsum(0) - sizes)[classes]
        order = torch.argsort(values + 2.0 * (within == 0), descending=True, stable=True)
        self.values, self.classes, self.within = values[order], classes[order], within[order]
        self.total = len(values)
        self.leaders = int((sizes > 0).sum())
        # Rows that were let go rank behind all that are held, but for ties.
        missing = (self.within >= held[self.classes]).nonzero()[:, 0]
        self.held = int(missing[0]) if len(missing) else self.total
        self.head = head
        #: What the exact spectrum needs: the least of the matrices that have it.
        self.exact = min(self.total, factors.spectral.rank * head_rank)
        # The mass beyond the first k rows, summed from the end up; on a processor always in the same order.
        self.tails: list[float] = [*self.values.cpu().flip(0).cumsum(0).flip(0).tolist(), 0.0]

    def matrix(self, kept: int) -> Float64[Tensor, "m m"]:
        """The joint matrix of the first `kept` rows."""
        classes, within = self.classes[:kept], self.within[:kept]
        # Each class's rows as they lie in memory, then all in the order of ranks.
        counts = torch.bincount(classes, minlength=len(self.head))
        rows = torch.cat([rows[:count] for rows, count in zip(self.factors.rows, counts.tolist(), strict=True)])
        rows = rows[(counts.cumsum(0) - counts)[classes] + within]
        matrix = rows @ rows.T
        directions = self.head[classes]
        matrix *= directions @ directions.T
        matrix /= self.factors.n
        return matrix

    def exact_matrix(self) -> Float64[Tensor, "m m"]:
        """The least matrix that has the whole spectrum; of the lower triangle alone where that is by ranks."""
        if self.exact == self.total:
            return self.matrix(self.total)
        sizes = [len(rows) for rows in self.factors.rows]
        return product_matrix(torch.cat(self.factors.rows), sizes, self.head, self.factors.n)

    @cached_property
    def couplings(self) -> Couplings:
        """The couplings between all rows at hand."""
        return Couplings(self.factors.blocks, self.head, self.factors.n)

    def enough(self, error: float) -> int:
        """The fewest rows to keep for which `bound` is within `error`."""
        return bisect_left(
            range(self.total), True, key=lambda kept: self.tails[kept] < 0.5 and self.bound(kept) <= error
        )

    def bound(self, kept: int) -> float:
        """Most that H can be above the exact one, whatever the couplings.

        Measuring which of kept part and tail holds the state costs at most the entropy h(t) of that outcome; within the
        tail, of mass t, only the couplings between the classes are left, worth at most log of their number.
        """
        tail = min(self.tails[kept], 1.0)
        outcome = sum(-share * math.log(share) for share in (tail, 1.0 - tail) if share > 0)
        return outcome + tail * math.log(self.leaders)


@dataclass(frozen=True)
class _Bounds:
    """Between what the joint entropy lies, and what MIR divides by.

    Attributes:
        lowest, highest: both hold for the exact value, so that they can only mend rounding and pinching.
        unit: the smaller of the two entropies; 1 where MIR is not defined.
        rounding: what rounding may account for in both entropies, in nats.
    """

    lowest: float
    highest: float
    unit: float
    rounding: float

    @classmethod
    def of(cls, features: Spectral, head: Spectral) -> "_Bounds":
        first, second = features.entropy, head.entropy
        unit = min(first, second) if min(first, second) >= ZERO_ENTROPY else 1.0
        return cls(max(first, second), first + second, unit, features.rounding + head.rounding)

    def held(self, joint: float) -> float:
        return max(min(joint, self.highest), self.lowest)

    def error(self, most: float, joint: Spectral) -> float:
        """How far MIR may be off, given what the joint entropy may be above the exact one without rounding."""
        return (most + self.rounding + joint.rounding) / self.unit


def _joint_entropy(
    spectrum: _JointSpectrum,
    features: Spectral,
    head: Spectral,
    tolerance: float,
    largest: int,
    generator: torch.Generator,
    tell: Tell = silent,
) -> tuple[float, Method]:
    """Keep as many rows as the tolerance needs, or `largest`, and take back what couplings are surely worth; or all."""
    bounds = _Bounds.of(features, head)
    total, error = spectrum.total, tolerance * bounds.unit
    within_reach = spectrum.held == total and spectrum.exact <= _EXACT * largest
    few = spectrum.exact <= min(_SMALL, largest) or total < _FEW * spectrum.leaders
    if tolerance == 0 or (within_reach and few):
        return _exact(spectral(torch.linalg.eigvalsh(spectrum.exact_matrix())), spectrum.exact, bounds)
    largest = min(largest, spectrum.held)
    kept = min(max(min(_FIRST_KEPT, spectrum.enough(error)), spectrum.leaders), largest)
    start, span = 0.0, 0.5
    while True:
        if _EXACT * kept > spectrum.exact and within_reach:
            return _exact(spectral(torch.linalg.eigvalsh(spectrum.exact_matrix())), spectrum.exact, bounds)
        tell(start)
        matrix = spectrum.matrix(kept)
        eigenvalues, vectors = torch.linalg.eigh(matrix)
        pinched = spectral(torch.cat([eigenvalues, spectrum.values[kept:]]))
        places = spectrum.couplings.offsets[spectrum.classes[:kept]] + spectrum.within[:kept]
        mass = spectrum.tails[kept]
        worth = spectrum.couplings.worth(
            places,
            matrix,
            eigenvalues,
            vectors,
            mass=mass,
            error=error,
            generator=generator,
            last=kept == largest,
            tell=lambda share, start=start, span=span: tell(start + span * (0.2 + 0.8 * share)),  # type: ignore[misc]
        )
        # Couplings that seem to be worth more than they can be are rounding, and nothing is taken back.
        bound = spectrum.bound(kept)
        taken = worth.least if worth.least <= bound else 0.0
        joint = bounds.held(pinched.entropy - taken)
        certain = min(bound - taken, joint - bounds.lowest)
        likely = min(worth.likely - taken, certain)
        if likely <= error or kept == largest:
            most = max(min(worth.most - taken, certain), 0.0)
            return joint, Method("pinched", kept, total, mass, bounds.error(most, pinched))
        # What couplings are worth falls about as the number of rows that keep theirs rises.
        kept = min(math.ceil(kept * min(max(likely / error, 1.25), 4.0)), largest)
        # How many parts there will be nobody knows: each takes half of what is left.
        start, span = start + span, span / 2


def _exact(joint: Spectral, size: int, bounds: _Bounds) -> tuple[float, Method]:
    return bounds.held(joint.entropy), Method("exact", size, size, 0.0, bounds.error(0.0, joint))


def pair_entropies(features: Float64[Tensor, "n d"], head: Float64[Tensor, "n d"]) -> Entropies:
    """Entropies of n pairs of unit rows, n at least 1, from n x n Gram matrices.

    Args:
        features: z, such as the directions of the class means.
        head: v, such as the directions of the head rows.

    Returns:
        The exact entropies.

    Numerics: float64, O(m^3) time for m the least of n and the ranks of both, multiplied.
    """
    n = len(features)
    first, second = spectral(gram_spectrum(features / math.sqrt(n))), spectral(gram_spectrum(head / math.sqrt(n)))
    size = min(n, first.rank * second.rank)
    matrix = features @ features.T * (head @ head.T) / n if size == n else product_matrix(features, [1] * n, head, n)
    joint, method = _exact(spectral(torch.linalg.eigvalsh(matrix)), size, _Bounds.of(first, second))
    return Entropies(first.entropy, second.entropy, joint, method, n, 0)
