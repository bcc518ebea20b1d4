"""Compute the entropy of the joint spectrum from factors of class Gram matrices, pinched within a tolerance."""

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float64
from torch import Tensor

from ..clock import Tell, silent
from .couplings import Couplings, KeptPart
from .entropy import ZERO_ENTROPY, Spectral, spectral
from .factors import EXACT, Factors
from .products import product_matrix

# Up to this size the exact spectrum costs less than an approximation.
_SMALL = 1024
# With fewer rows a class, couplings between classes are most of the spectrum, and costly: C x C at every step.
_FEW = 8
# Rows of a matrix that are multiplied at a time.
_STRIP = 512
# A part of this share of the largest one is not computed before it.
_NEARLY = 0.8
# Number of rows kept at first.
_FIRST_KEPT = 640


@dataclass(frozen=True)
class Method:
    """How a joint spectrum was computed.

    Attributes:
        name: `exact`, or `pinched` if some couplings were left out.
        kept: size of the matrix whose eigenvalues were computed.
        total: size that the exact spectrum needs.
        tail_mass: share of the trace outside the kept part, 0 to 1.
        error_estimate: how far MIR may be below the exact value.
    """

    name: str
    kept: int
    total: int
    tail_mass: float
    error_estimate: float


class JointSpectrum:
    """The joint matrix by rows of R, ranked: the leading row of every class, then from the largest eigenvalue down.

    A larger kept part therefore always contains a smaller one.

    Args:
        factors: finished.
        head: entropy and rank of the head's directions, weighted by the classes' samples.
    """

    def __init__(self, factors: Factors, head: Spectral) -> None:
        self.factors, self.bounds = factors, Bounds.of(factors.spectral, head)
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
        # Dropped rows rank behind all rows held, except for ties.
        missing = (self.within >= held[self.classes]).nonzero()[:, 0]
        self.held = int(missing[0]) if len(missing) else self.total
        self.head = factors.labelled.head
        #: Size of the smallest matrix that has the exact spectrum.
        self.exact = min(self.total, factors.spectral.rank * head.rank)
        # The mass beyond the first k rows, summed from the end; on the processor, where the order is fixed.
        self.tails: list[float] = [*self.values.cpu().flip(0).cumsum(0).flip(0).tolist(), 0.0]

    def matrix(self, kept: int) -> Float64[Tensor, "m m"]:
        """Return the joint matrix of the first `kept` rows."""
        classes, within = self.classes[:kept], self.within[:kept]
        # Each class's rows in the order of memory, then all of them in the order of ranks.
        counts = torch.bincount(classes, minlength=len(self.head))
        rows = torch.cat([rows[:count] for rows, count in zip(self.factors.rows, counts.tolist(), strict=True)])
        rows = rows[(counts.cumsum(0) - counts)[classes] + within]
        matrix = rows @ rows.T
        del rows
        directions = self.head[classes] / self.factors.n
        # In strips, as a second matrix of this size would be the largest thing in memory.
        for strip in torch.split(torch.arange(kept), _STRIP):
            part = slice(int(strip[0]), int(strip[-1]) + 1)
            matrix[part] *= directions[part] @ self.head[classes].T
        return matrix

    def exact_matrix(self) -> Float64[Tensor, "m m"]:
        """Return the smallest matrix with the whole spectrum; only its lower triangle if that is by ranks."""
        if self.exact == self.total:
            return self.matrix(self.total)
        sizes = [len(rows) for rows in self.factors.rows]
        return product_matrix(torch.cat(self.factors.rows), sizes, self.head, self.factors.n)

    @cached_property
    def couplings(self) -> Couplings:
        """The couplings between all rows in memory."""
        return Couplings(self.factors.blocks, self.head, self.factors.n)

    def enough(self, error: float) -> int:
        """Return the fewest rows to keep for which `bound` is within `error`."""
        return bisect_left(
            range(self.total), True, key=lambda kept: self.tails[kept] < 0.5 and self.bound(kept) <= error
        )

    def bound(self, kept: int) -> float:
        """Return the most that the pinched H can exceed the exact one, whatever the couplings.

        Measuring whether kept part or tail holds the state costs at most the entropy h(t) of that outcome. Within the
        tail, of mass t, only the couplings between classes are missing, worth at most the logarithm of the number of
        classes.
        """
        tail = min(self.tails[kept], 1.0)
        outcome = sum(-share * math.log(share) for share in (tail, 1.0 - tail) if share > 0)
        return outcome + tail * math.log(self.leaders)


@dataclass(frozen=True)
class Bounds:
    """Bounds of the joint entropy, and the entropy that MIR divides by.

    Attributes:
        lowest, highest: both hold for the exact value, so applying them can only correct rounding and pinching.
        unit: the smaller of the two entropies; 1 if MIR is undefined.
        rounding: bound of the rounding error of both entropies, in nats.
    """

    lowest: float
    highest: float
    unit: float
    rounding: float

    @classmethod
    def of(cls, features: Spectral, head: Spectral) -> "Bounds":
        """Return the bounds that follow from the entropies of features and head."""
        first, second = features.entropy, head.entropy
        unit = min(first, second) if min(first, second) >= ZERO_ENTROPY else 1.0
        return cls(max(first, second), first + second, unit, features.rounding + head.rounding)

    def held(self, joint: float) -> float:
        """Return the joint entropy, moved into the bounds."""
        return max(min(joint, self.highest), self.lowest)

    def error(self, most: float, joint: Spectral) -> float:
        """Return how far MIR may be off.

        Args:
            most: the most that the joint entropy may exceed the exact one, rounding aside.
            joint: the computed joint spectrum.
        """
        return (most + self.rounding + joint.rounding) / self.unit


def joint_entropy(
    spectrum: JointSpectrum,
    *,
    tolerance: float,
    largest: int,
    generator: torch.Generator,
    tell: Tell = silent,
) -> tuple[float, Method]:
    """Return the joint entropy, and how it was computed.

    As many rows are kept as the tolerance needs, `largest` at most; what the dropped couplings are surely worth is
    subtracted. If that costs no more, or the tolerance is 0, the spectrum is exact.

    Args:
        spectrum: the joint matrix.
        tolerance: likely error of MIR that is small enough.
        largest: most rows to keep.
        generator: on the CPU; draws the probes of `couplings`.
        tell: called with the share done.
    """
    bounds = spectrum.bounds
    total, error = spectrum.total, tolerance * bounds.unit
    within_reach = spectrum.held == total and spectrum.exact <= EXACT * largest
    few = spectrum.exact <= min(_SMALL, largest) or total < _FEW * spectrum.leaders
    if tolerance == 0 or (within_reach and few):
        return exact_entropy(spectral(torch.linalg.eigvalsh(spectrum.exact_matrix())), spectrum.exact, bounds)
    largest = min(largest, spectrum.held)
    kept = min(max(min(_FIRST_KEPT, spectrum.enough(error)), spectrum.leaders), largest)
    start, span = 0.0, 0.5
    while True:
        if EXACT * kept > spectrum.exact and within_reach:
            return exact_entropy(spectral(torch.linalg.eigvalsh(spectrum.exact_matrix())), spectrum.exact, bounds)
        tell(start)
        places = spectrum.couplings.offsets[spectrum.classes[:kept]] + spectrum.within[:kept]
        mass = spectrum.tails[kept]
        part = KeptPart.of(places, spectrum.matrix(kept), mass)
        pinched = spectral(torch.cat([part.eigenvalues, spectrum.values[kept:]]))
        worth = spectrum.couplings.worth(
            part,
            error=error,
            generator=generator,
            last=kept == largest,
            tell=lambda share, start=start, span=span: tell(start + span * (0.2 + 0.8 * share)),  # type: ignore[misc]
        )
        # Couplings that seem to be worth more than they can be are rounding: nothing is subtracted.
        bound = spectrum.bound(kept)
        taken = worth.least if worth.least <= bound else 0.0
        joint = bounds.held(pinched.entropy - taken)
        certain = min(bound - taken, joint - bounds.lowest)
        likely = min(worth.likely - taken, certain)
        if likely <= error or kept == largest:
            most = max(min(worth.most - taken, certain), 0.0)
            return joint, Method("pinched", kept, total, mass, bounds.error(most, pinched))
        # The worth of the dropped couplings falls about in proportion to the number of rows kept.
        kept = math.ceil(kept * min(max(likely / error, 1.25), 4.0))
        # Near the largest, another step to it would cost as much again.
        kept = largest if kept > _NEARLY * largest else kept
        del part
        # The number of rounds is unknown in advance: each counts as half of the rest.
        start, span = start + span, span / 2


def exact_entropy(joint: Spectral, size: int, bounds: Bounds) -> tuple[float, Method]:
    """Return the joint entropy of the whole spectrum, from a matrix of this size, and the method that says so."""
    return bounds.held(joint.entropy), Method("exact", size, size, 0.0, bounds.error(0.0, joint))
