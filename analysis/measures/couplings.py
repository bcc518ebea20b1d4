"""The worth of couplings between eigen-directions of different classes, bounded from both sides.

The joint matrix J is a density matrix, D is J after pinching, delta = J - D are the couplings that were dropped. The
entropy that pinching adds is a relative entropy, an integral of Stein's loss over shifts of both:

    H(D) - H(J) = S(J || D) = int_0^inf tr h(Delta_s) ds,   h(x) = x - log(1 + x),
    Delta_s = (D + s)^-1/2 delta (D + s)^-1/2,

because -(x + s) log(x + s) + (x + s) is the integral of -log(x + s), and tr delta = 0.

1. The trace is the mean of z^T h(Delta_s) z over vectors z of random signs. So only the correction is random, and the
   probes' own spread is its standard error. A product with delta needs no matrix between rows: J = (R R^T) * g means
   sums over each class, mixed by g.
2. With y = Delta_s z that is y^T k(Delta_s) y, k(x) = h(x) / x^2 = int_0^1 (1 - t) / (1 + t x)^2 dt. The derivatives of
   k alternate in sign, so a Gauss-Radau rule from a few Lanczos steps is below it if the prescribed node lies to the
   right of the spectrum, and above if it lies to the left.
3. To the left: 1 + Delta_s = (D + s)^-1/2 (J + s) (D + s)^-1/2 is at least s / (max D + s), as J >= 0. To the right: in
   units of D, J is the identity on the part that keeps its couplings and at most the largest eigenvalue of g on the
   tail; the coupling of the two is bounded by J >= 0. Delta_s is at most that eigenvalue.
4. Shifts begin at s_0, below which the smallest eigenvalues d_i of D still count. As tr Delta_s = 0 the integrand is
   log det(D + s) - log det(J + s). The part of J + s that their directions add, a Schur complement, is at least s: they
   contribute at most log(1 + d_i / s) to the integrand, and sum_i d_i log(1 + s_0 / d_i) + s_0 log(1 + d_i / s_0) to
   the integral.

Source: Hutchinson 1990; Golub and Meurant 1994; Bai, Fahey and Golub 1996 (bounds and confidence intervals for traces).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32, Float64, Int, Shaped
from torch import Tensor

from ..clock import Tell, silent

# Lanczos steps for each shift: until the gap between the bounds is below this share of the sum, or up to the first of
# these numbers; up to the second if only further steps can close the gap.
_SETTLED, _STEPS, _MOST_STEPS = 1e-3, 4, 16
# Shifts are e^this apart: the trapezoid rule in log s is then within 4e-4 of the integral, which _ROUNDING covers.
_SHIFT_STEP = 2.5
_ROUNDING = 2e-3
# The smallest rows, with this share of the tail's mass, need no shifts of their own; nor do rows whose worth is at most
# this share of the gap between the bounds.
_NEGLIGIBLE, _UNSEEN = 1e-5, 0.1
# Most numbers of Cholesky factors that are kept from one batch of probes to the next.
_FACTORS = 2**24
# Couplings among kept rows may cancel in float32 if the remainder counts for less than this, in nats.
_ROUNDED = 1e-11
# Number of probes in a batch, and most batches.
_PROBES, _BATCHES = 16, 4
# All batches reduce an error by less than this factor.
_HOPELESS = 3.0
# Student's quantiles for odds of 1 in 100,000, by batches: 15, 31, 47 and 63 degrees of freedom.
_QUANTILES = (6.109, 5.025, 4.742, 4.613)
# Likely place of the worth in the gap between the bounds: measured 0.01 to 0.08 above the lower one.
_LIKELY = 0.1
# Worth of rows that are not in memory, by mass, as a multiple of that of rows in memory.
_EXTRAPOLATION = 2.0


@dataclass(frozen=True)
class FactorBlock:
    """Factors R_c of some classes side by side, the rows of each ranked, padded with zeros.

    Attributes:
        positions: indices of the classes.
        values: squared lengths of the rows.
        rows: the rows.
    """

    positions: Sequence[int]
    values: Float64[Tensor, "b r"]
    rows: Float32[Tensor, "b r d"]


@dataclass(frozen=True)
class KeptPart:
    """The rows that keep their couplings, and the kept part of the joint matrix.

    Attributes:
        rows: their indices, by offset of their class and rank in it.
        couplings: the joint matrix on these rows, with zeros on the diagonal: rows of one class are orthogonal.
        lengths: its diagonal, the squared lengths of the rows.
        eigenvalues: of the joint matrix on these rows, in rising order.
        rest: mass of all other rows, including those that are not in memory.
    """

    rows: Int[Tensor, " k"]
    couplings: Float64[Tensor, "k k"]
    lengths: Float64[Tensor, " k"]
    eigenvalues: Float64[Tensor, " k"]
    rest: float

    @classmethod
    def of(cls, rows: Int[Tensor, " k"], matrix: Float64[Tensor, "k k"], rest: float) -> "KeptPart":
        """Return the part on some rows; `matrix` is the joint matrix on them, and is overwritten."""
        eigenvalues: Float64[Tensor, " k"] = torch.linalg.eigvalsh(matrix)
        lengths = matrix.diagonal().clone()
        return cls(rows, matrix.fill_diagonal_(0), lengths, eigenvalues, rest)

    def factor(self, shift: float) -> Float32[Tensor, "k k"]:
        """Return the Cholesky factor L of the kept part with a shift of its eigenvalues: L L^T = D + s.

        If the smallest eigenvalues are rounding, and the shift is below it, the least shift that is not.
        """
        own, size = torch.empty_like(self.couplings).mT, len(self.rows)
        info = torch.zeros((), dtype=torch.int32, device=own.device)
        least = size * torch.finfo(torch.float64).eps * float(self.eigenvalues[-1])
        while True:
            # In place, for a moment: a copy would be the largest thing in memory.
            self.couplings.diagonal().copy_(self.lengths + shift)
            torch.linalg.cholesky_ex(self.couplings, out=(own, info))
            self.couplings.fill_diagonal_(0)
            if int(info) == 0:
                return own.float()
            shift = max(2 * shift, least)


@dataclass(frozen=True)
class Worth:
    """The decrease of H, in nats, when dropped couplings are restored: surely, likely, and at most."""

    least: float
    likely: float
    most: float


def stein_share(x: Float64[Tensor, "*n"], above: Float64[Tensor, "*n"]) -> Float64[Tensor, "*n"]:
    """Return k(x) = [x - log(1 + x)] / x^2: 1/2 at 0, falling.

    Args:
        x: at least -1.
        above: 1 + x, which is more precise near -1.

    Returns:
        The values.

    >>> x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    >>> stein_share(x, 1 + x)
    tensor([0.5000, 0.3069], dtype=torch.float64)
    """
    small = x.abs() < 1e-3
    whole = torch.where(small, 1.0, x)
    return torch.where(small, 0.5 - x / 3 + x.square() / 4, (whole - torch.where(small, 1.0, above).log()) / whole**2)


class Couplings:
    """All couplings between rows of different classes, as an operator.

    Args:
        blocks: the factors of the classes, each class in one block; its last rows may be missing.
        head: the head's directions, whose Gram matrix is g.
        n: sum of the factors' squares: J = (R R^T) * g / n.
    """

    def __init__(self, blocks: Sequence[FactorBlock], head: Float64[Tensor, "c d"], n: int) -> None:
        self.rows = [block.rows for block in blocks]
        self.values = torch.cat([block.values.flatten() for block in blocks]) / n
        order = torch.tensor([position for block in blocks for position in block.positions], device=head.device)
        n_classes, width = head.shape
        self.largest = max(float(torch.linalg.eigvalsh(head.T @ head if width < n_classes else head @ head.T)[-1]), 1.0)
        directions = head[order] / math.sqrt(n)
        # For thousands of classes the sums go through the width of the head: 2 C width in place of C^2.
        self.directions = directions.float() if 2 * width < n_classes else None
        self.between = None if self.directions is not None else (directions @ directions.T).fill_diagonal_(0).float()
        #: For each class that has rows, the index of its first row among all rows.
        self.offsets: Int[Tensor, " c"] = torch.zeros(len(head), dtype=torch.int64, device=head.device)
        sizes = torch.tensor([rows.shape[1] for rows in self.rows for _ in rows], device=head.device)
        self.offsets[order] = sizes.cumsum(0) - sizes

    def worth(
        self,
        kept: KeptPart,
        *,
        error: float,
        generator: torch.Generator,
        last: bool = True,
        tell: Tell = silent,
    ) -> Worth:
        """Return bounds of the worth of all couplings beyond those among some rows.

        Args:
            kept: the rows whose couplings are not dropped.
            error: probes are added until the likely distance between `least` and the true worth is below this, in nats,
                or no longer due to the number of probes.
            generator: on the CPU; draws the probes.
            last: whether no larger part can be kept. Otherwise the computation stops once it is clear that a larger one
                is needed.
            tell: called with the share done, of all batches of probes.

        Returns:
            The bounds. Each fails with odds of about 1 in 100,000 if many rows share the worth of the couplings; `most`
            extrapolates to rows that are not in memory.

        Numerics: products in float32, about 30 of them, up to 150 in the last call, O((m d + C min(C, 2 d) d + k^2) q)
            time for each, for m rows in memory and q probes; memory for a few times (m + C d) q numbers.
        """
        operator = _Dropped(self, kept)
        shifts = self._shifts(operator)
        total = float(operator.tail.sum())
        rest = max(kept.rest / total - 1, 0.0) * _EXTRAPOLATION if total > 0 else 0.0
        below: list[Float64[Tensor, " q"]] = []
        above: list[Float64[Tensor, " q"]] = []
        for batch, quantile in enumerate(_QUANTILES[:_BATCHES]):
            signs = torch.randint(2, (_PROBES, len(self.values)), generator=generator) * 2.0 - 1
            found = self._bounds(
                operator,
                signs.to(operator.tail.device),
                shifts,
                error if last else math.inf,
                lambda share, batch=batch: tell((batch + share) / _BATCHES),  # type: ignore[misc]
            )
            below.append(found[0])
            above.append(found[1])
            low, high = torch.cat(below), torch.cat(above)
            spread = quantile / math.sqrt(len(low))
            least = max(float(low.mean() - spread * low.std()) * (1 - _ROUNDING), 0.0)
            gap = float((high - low).mean())
            likely = float(low.mean()) + _LIKELY * gap
            if likely - least <= max(error, 2 * _LIKELY * gap) or (likely - least > _HOPELESS * error and not last):
                break
        most = float(high.mean() + spread * high.std()) * (1 + _ROUNDING) * (1 + rest)
        return Worth(least, max(likely, least), max(most, likely))

    def product(self, vectors: Float32[Tensor, "q m"]) -> Float32[Tensor, "q m"]:
        """Return (J without its blocks of one class) times vectors."""
        products = _spread(self._mixed(self.by_class(vectors), self.rows), self.rows)
        return torch.cat([product.flatten(1) for product in products], dim=1)

    def product_without(
        self, vectors: Float32[Tensor, "q m"], kept: Sequence[Bool[Tensor, "_b _r"]], leading: Sequence[int]
    ) -> Float32[Tensor, "q m"]:
        """Return (J without its blocks of one class and without all couplings among kept rows) times vectors.

        Nothing is subtracted, so nothing cancels.

        Args:
            vectors: on all rows.
            kept: by block, a mask of each class's kept rows.
            leading: by block, the number of leading rows of a class that include them.
        """
        parts = self.by_class(vectors)
        heads = [rows[:, :count] for rows, count in zip(self.rows, leading, strict=True)]
        inside = [mask[:, :count] for mask, count in zip(kept, leading, strict=True)]
        from_kept = self._mixed(
            [part[..., :count] * mask for part, mask, count in zip(parts, inside, leading, strict=True)], heads
        )
        from_tail = self._mixed([part * ~mask for part, mask in zip(parts, kept, strict=True)], self.rows)
        onto_kept = _spread(from_tail, heads)
        products = _spread(from_kept.add_(from_tail), self.rows)
        for product, part, mask, count in zip(products, onto_kept, inside, leading, strict=True):
            product[..., :count] = torch.where(mask, part, product[..., :count])
        return torch.cat([product.flatten(1) for product in products], dim=1)

    def by_class(self, vectors: Shaped[Tensor, "q m"]) -> list[Shaped[Tensor, "q _b _r"]]:
        """Return numbers of rows by block, class and rank."""
        parts = torch.split(vectors, [rows.shape[0] * rows.shape[1] for rows in self.rows], dim=1)
        return [part.view(len(part), *rows.shape[:2]) for rows, part in zip(self.rows, parts, strict=True)]

    def _shifts(self, operator: "_Dropped") -> list[tuple[float, float]]:
        """Return the shifts of the integrand, evenly in log s, from the largest eigenvalue to the least that matters.

        Each shift comes with the most that eigenvalues of D too small for it add below it.
        """
        smallest = operator.tail.sort().values
        summed = smallest.cpu().cumsum(0)
        first = int((summed < _NEGLIGIBLE * summed[-1]).sum())
        least = float(smallest[min(first, len(smallest) - 1)])
        start, stop = math.log(max(least, 1e-30)) - _SHIFT_STEP, math.log(operator.most)
        count = max(math.ceil((stop - start) / _SHIFT_STEP), 1) + 1
        eigenvalues = torch.cat([operator.tail, operator.part.eigenvalues])
        shifts = []
        for index in reversed(range(count)):
            shift = math.exp(start + _SHIFT_STEP * index)
            # The factor excludes, in spite of rounding, the eigenvalue from which the first shift is computed.
            few = eigenvalues[(eigenvalues > 0) & (eigenvalues < shift * math.exp(_SHIFT_STEP) * (1 - 1e-9))]
            unseen = few * (shift / few).log1p() + shift * (few / shift).log1p()
            shifts.append((shift, float(unseen.sum())))
        return shifts

    def _bounds(
        self,
        operator: "_Dropped",
        signs: Float32[Tensor, "q m"],
        shifts: Sequence[tuple[float, float]],
        error: float,
        tell: Tell,
    ) -> tuple[Float64[Tensor, " q"], Float64[Tensor, " q"]]:
        """Return for each probe a lower and an upper bound of its share in the integral.

        At each of about ten shifts the gap between them is below `error`, a tenth of which is likely missing, unless 16
        steps leave more.
        """
        below: list[Float64[Tensor, " q"]] = []
        above: list[Float64[Tensor, " q"]] = []
        settled = between = unseen = 0.0
        # From the largest shift down: Delta_s is small there, and one step is enough.
        for number, (shift, unseen) in enumerate(shifts):
            tell(number / len(shifts))
            shifted = operator.at(shift)
            start = shifted.times(signs)
            squares = torch.linalg.vector_norm(start, dim=1).double().square()
            least = shift / (operator.most + shift)
            for steps, (diagonal, beside) in enumerate(_lanczos(shifted, start), 1):
                low, high = (
                    squares * _radau(diagonal, beside, node, least) * shift * _SHIFT_STEP
                    for node in (self.largest, least - 1)
                )
                gap, enough = float((high - low).mean()), _SETTLED * (settled + float(low.mean()))
                if gap <= enough or steps == _MOST_STEPS or (steps >= _STEPS and gap <= error):
                    break
            settled += float(low.mean())
            between += gap
            below.append(low)
            above.append(high)
            del shifted  # the factor of the next shift takes its place
            if unseen <= _UNSEEN * between:
                break
        # Above the largest shift s tr h falls like 1/s, below the smallest like s: under half a term at each end.
        return torch.stack(below).sum(dim=0), torch.stack([*above, above[0] / 2, above[-1] / 2]).sum(dim=0) + unseen

    def _mixed(
        self, parts: Sequence[Float32[Tensor, "q _b _r"]], rows: Sequence[Float32[Tensor, "_b _r d"]]
    ) -> Float32[Tensor, "c q d"]:
        """Return g / n without its diagonal, times the sum of each class's rows."""
        sums = torch.cat([part.transpose(0, 1) @ factor for factor, part in zip(rows, parts, strict=True)])
        flat = sums.flatten(1)
        if self.between is not None:
            return (self.between @ flat).view_as(sums)
        assert self.directions is not None
        own = self.directions.square().sum(dim=1, keepdim=True)
        return (self.directions @ (self.directions.T @ flat)).addcmul_(own, flat, value=-1).view_as(sums)


def _spread(
    mixed: Float32[Tensor, "c q d"], rows: Sequence[Float32[Tensor, "_b _r d"]]
) -> list[Float32[Tensor, "q _b _r"]]:
    """Return the result on each row of a class."""
    parts = torch.split(mixed, [len(factor) for factor in rows])
    return [(part @ factor.mT).transpose(0, 1) for factor, part in zip(rows, parts, strict=True)]


class _Dropped:
    """delta = J - D, where D keeps the couplings among some rows, and an inverse square root of D + s.

    On the kept rows that is L^-T, with the Cholesky factor L of D + s: L^-1 delta L^-T has the eigenvalues of
    (D + s)^-1/2 delta (D + s)^-1/2, at a fraction of the time and memory that eigenvectors take.
    """

    def __init__(self, couplings: Couplings, part: KeptPart) -> None:
        self.couplings, self.part, self.kept = couplings, part, part.rows
        self.tail = couplings.values.index_fill(0, part.rows, 0.0)
        self.most = max(float(part.eigenvalues[-1]), float(self.tail.max()))
        inside = torch.zeros_like(self.tail, dtype=torch.bool).index_fill_(0, part.rows, True)
        self.masks = [mask[0] for mask in couplings.by_class(inside[None])]
        # The leading rows of each class are kept, so a few leading rows of a block include all kept ones.
        self.leading = [int(mask.any(dim=0).sum()) for mask in self.masks]
        self._factors: dict[float, Float32[Tensor, "k k"]] = {}

    def at(self, shift: float) -> "_Shifted":
        """Return Delta_s at a shift."""
        factor = self._factors.get(shift)
        if factor is None:
            if (len(self._factors) + 1) * len(self.kept) ** 2 > _FACTORS:
                self._factors.clear()
            factor = self._factors[shift] = self.part.factor(shift)
        return _Shifted(self, shift, factor)


class _Shifted:
    """Delta_s at one shift, as an operator on vectors."""

    def __init__(self, dropped: _Dropped, shift: float, factor: Float32[Tensor, "k k"]) -> None:
        self._dropped, self._shift, self._factor = dropped, shift, factor
        self._scales = (dropped.tail + shift).rsqrt().float()
        self._subtracts: bool | None = None

    def times(self, vectors: Float32[Tensor, "q m"]) -> Float32[Tensor, "q m"]:
        """Return Delta_s times vectors; the first ones are random signs."""
        dropped = self._dropped
        kept, couplings = dropped.kept, dropped.couplings
        whitened = vectors * self._scales
        # x L = v has the solution L^-T v, as rows.
        whitened[:, kept] = torch.linalg.solve_triangular(self._factor, vectors[:, kept], upper=False, left=False)
        if self._subtracts is None:
            self._subtracts = self._rounding(whitened[:, kept]) < _ROUNDED
        if self._subtracts:
            product = couplings.product(whitened)
            product[:, kept] -= (whitened[:, kept].double() @ dropped.part.couplings).float()
        else:
            product = couplings.product_without(whitened, dropped.masks, dropped.leading)
        onto_kept = torch.linalg.solve_triangular(self._factor.mT, product[:, kept], upper=True, left=False)
        product *= self._scales
        product[:, kept] = onto_kept
        return product

    def _rounding(self, whitened: Float32[Tensor, "q k"]) -> float:
        """Return the error that the difference of two float32 products adds to the integrand, times the shift.

        It is 6e-8 of the lengths of both rows on each pair of kept rows, of random sign, divided by D + s; the
        integrand gets half its squared norm. The trace of the lengths over D + s is the mean over random signs.
        """
        lengths = (whitened.double().square() @ self._dropped.part.lengths).mean()
        return self._shift * _SHIFT_STEP * (6e-8 * float(lengths)) ** 2 / 2


def _lanczos(
    operator: _Shifted, start: Float32[Tensor, "q m"]
) -> Iterator[tuple[Float64[Tensor, "q p"], Float64[Tensor, "q p"]]]:
    """Yield Lanczos' matrix of Delta_s, a step larger each time: its diagonal, and the squares beside it."""
    following, previous = start, torch.zeros_like(start)
    length = torch.linalg.vector_norm(start, dim=1)
    diagonal: list[Float64[Tensor, " q"]] = []
    beside: list[Float64[Tensor, " q"]] = []
    while True:
        # If nothing is left the space is exhausted; zeros then have no weight.
        current = following * torch.where(length > 0, 1 / length, 0.0)[:, None]
        following = operator.times(current) - (length[:, None] * previous if diagonal else 0.0)
        along = (following * current).sum(dim=1)
        following -= along[:, None] * current
        length, previous = torch.linalg.vector_norm(following, dim=1), current
        diagonal.append(along.double())
        beside.append(length.double().square())
        yield torch.stack(diagonal, dim=1), torch.stack(beside, dim=1)


def _radau(
    diagonal: Float64[Tensor, "q p"], beside: Float64[Tensor, "q p"], node: float, least: float
) -> Float64[Tensor, " q"]:
    """Return y^T k(Delta_s) y / |y|^2 by the Gauss-Radau rule with one prescribed node, for q Lanczos matrices."""
    q, p = diagonal.shape
    matrix = torch.diag_embed(torch.nn.functional.pad(diagonal, (0, 1)))
    for index in range(p):
        matrix[:, index, index + 1] = matrix[:, index + 1, index] = beside[:, index].sqrt()
    shifted = matrix[:, :p, :p] - node * torch.eye(p, dtype=matrix.dtype, device=matrix.device)
    target = torch.zeros(q, p, 1, dtype=matrix.dtype, device=matrix.device)
    target[:, -1, 0] = beside[:, -1]
    matrix[:, p, p] = node + torch.linalg.solve(shifted, target)[:, -1, 0]
    nodes, vectors = torch.linalg.eigh(matrix)
    value: Tensor = (vectors[:, 0].square() * stein_share(nodes, (1 + nodes).clamp(min=least))).sum(dim=1)
    return value
