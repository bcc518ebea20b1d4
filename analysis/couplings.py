"""What couplings between eigen-directions of different classes are worth, bounded from both sides.

The joint matrix J is a density matrix, D what pinching leaves of it, delta = J - D the couplings that were dropped. The
entropy that pinching adds is a relative entropy, H(D) - H(J) = S(J || D), and along D + t delta

    S(J || D) = int_0^1 (1 - t) gamma_t dt,    gamma_t = int_0^inf tr [delta (D + t delta + s)^-1]^2 ds.

gamma falls as the matrix in it rises, and is of degree -1 in it. Where mu D <= J <= kappa D, therefore,

    f(kappa) gamma_0 <= S(J || D) <= f(mu) gamma_0,    f(x) = [x log x - (x - 1)] / (x - 1)^2,  f(1) = 1/2,

and in the eigenbasis of D gamma_0 is the sum of delta_ij^2 / logmean(l_i, l_j). In the tail, J between classes c and c'
is g_cc' sqrt(l_i l_j) v_i.v_j with unit vectors v that are orthogonal within a class: there J lies between the extreme
eigenvalues of g times D. With X = D_K^-1/2 J_KT D_T^-1/2 between kept part K and tail T the largest eigenvalue of
D^-1/2 J D^-1/2 is at most 1 + (y + sqrt(y^2 + 4 |X|^2)) / 2, y that of g less 1, and likewise from below.

Source: the integral is Taylor's formula for the relative entropy with the Bogoliubov-Kubo-Mori metric (Petz 1994); that
the metric falls is operator monotonicity of the inverse.
"""

import math

import torch
from jaxtyping import Float32, Float64, Int
from torch import Tensor

# Lower bounds are taken for so much less: twice what float32 can lose in a sum of positive terms with this many digits.
_ROUNDING = 1e-4
# So many rows are coupled before any is judged by others.
_LEAST_ROWS = 1024
# Up to so many kept rows a spectrum for one norm costs little.
_LARGE = 1024
# Share of gamma that is likely lost: a half to leading order, measured 0.50 to 0.51 with independent directions of the
# head, 0.62 to 0.80 with centred ones and loose classes.
_LIKELY = 0.6
# Beyond the coupled rows couplings are judged by those of the strongest strip, times this.
_EXTRAPOLATION = 2.0


def entropy_share(ratio: float) -> float:
    """f(x) = [x log x - (x - 1)] / (x - 1)^2 for x >= 0: 1 at 0, 1/2 at 1, falling.

    >>> entropy_share(0.0), entropy_share(1.0), round(entropy_share(2.0), 6)
    (1.0, 0.5, 0.386294)
    """
    excess = ratio - 1
    if abs(excess) < 1e-4:
        return 0.5 - excess / 6
    logarithm = ratio * math.log(ratio) if ratio > 0 else 0.0
    return (logarithm - excess) / excess**2


def damping(first: Float32[Tensor, " m"], second: Float32[Tensor, " n"]) -> Float32[Tensor, "m n"]:
    """sqrt(ab) / logmean(a, b) = u / sinh u with u = log(a/b) / 2, for all pairs, each given by half its logarithm.

    Numerics: within 1e-5 of the value; 1 where they meet.
    """
    halves = (first[:, None] - second).abs_().clamp_(min=1e-4)
    return halves.div_(halves.sinh())


class Couplings:
    """The couplings between the leading rows of all classes, summed by strips, and what dropping some of them is worth.

    Args:
        rows: R / sqrt(n), ranked; within a class orthogonal, each of squared length l.
        values: l of these rows and of those behind them that are not at hand.
        classes: of each.
        head: g, the Gram matrix of the head's directions.
        strip: rows that are coupled at a time.
        error: what rows may be worth, in nats, that are left to be judged by others.

    Numerics: couplings in float32, lower bounds reduced by 1e-4 of themselves. Strip by strip, until the rows behind
        are worth less than `error` or MOST_ROWS are coupled. O(rows^2 d) time for half a product.
    """

    MOST_ROWS = 5120

    def __init__(
        self,
        rows: Float64[Tensor, "h d"],
        values: Float64[Tensor, " m"],
        classes: Int[Tensor, " m"],
        head: Float64[Tensor, "c c"],
        strip: int,
        error: float,
    ) -> None:
        self.values, self.classes, self.head = values, classes, head
        self.strip = strip
        spread = torch.linalg.eigvalsh(head)
        self.below, self.above = 1 - max(float(spread[0]), 0.0), max(float(spread[-1]), 1.0) - 1
        self.between = head.square().fill_diagonal_(0).float()
        self.rows = rows[: self.MOST_ROWS].float()
        held = values[: len(self.rows)]
        # (r_i.r_j)^2 / sqrt(l_i l_j) is the square of a product of rows that are scaled so.
        self.scaled = self.rows * held.pow(-0.25).float()[:, None]
        self.halves = (held.log() / 2).float()
        self.rest = 0.0
        self.sums = self._sums_by_strip(error)
        self.count = min(len(self.sums) * self.strip, len(self.rows))
        self.rows = self.rows[: self.count]
        self.scaled = self.scaled[: self.count]

    def _sums_by_strip(self, error: float) -> Float64[Tensor, "k k"]:
        """gamma between strips of rows, lower triangle with pairs counted twice, as gamma does; sets `rest`."""
        weights = self.values * (1 + (self.values[0] / self.values).log().clamp(min=0))
        behind = [*weights.flip(0).cumsum(0).flip(0).tolist(), 0.0]
        lines: list[Float64[Tensor, " _k"]] = []
        strengths: list[float] = []
        for start in range(0, len(self.rows), self.strip):
            stop = min(start + self.strip, len(self.rows))
            columns = self._gamma(slice(start, stop), slice(0, stop))
            lines.append(torch.stack([part.sum() for part in torch.split(columns, self.strip)]).cpu())
            lines[-1][:-1] *= 2
            # Rows behind couple with those before them like the strongest strip after the first (that one holds the
            # leading rows), by their mass and range of eigenvalues.
            strengths.append(float(lines[-1].sum()) / (behind[start] - behind[stop]))
            strongest = max(strengths[1:], default=strengths[0])
            self.rest = _EXTRAPOLATION * strongest * behind[stop]
            if self.rest <= error and stop >= _LEAST_ROWS:
                break
        sums = torch.zeros(len(lines), len(lines), dtype=torch.float64)
        for index, line in enumerate(lines):
            sums[index, : index + 1] = line
        return sums

    def _gamma(self, first: slice, second: slice) -> Float64[Tensor, " n"]:
        """gamma between two ranges of rows in the basis of the classes, summed over the first."""
        products = (self.scaled[first] @ self.scaled[second].T).square_()
        products *= self.between[self.classes[first]][:, self.classes[second]]
        products *= damping(self.halves[first], self.halves[second])
        return products.sum(dim=0, dtype=torch.float64)

    def needed(self, error: float, least: int, most: int) -> int:
        """The fewest rows to keep, `least` to `most`, for which what is taken back is likely within `error`."""
        # |X| is about as far from 0 as g from the identity, and at most 1 but for flooring.
        farthest = min(max(self.above, self.below), 1.0)
        gap = max(_LIKELY - entropy_share(_ratio(self.above, farthest, 1)), 0.0)
        by_row = self.sums.sum(dim=1).tolist()
        kept, dropped = self.count, 0.0
        for index in reversed(range(len(by_row))):
            dropped += by_row[index]
            if gap * dropped > error:
                break
            kept = index * self.strip
        return min(max(kept, least), most)

    def worth(self, eigenvalues: Float64[Tensor, " k"], vectors: Float64[Tensor, "k k"]) -> tuple[float, float, float]:
        """Least, likely and most by which H falls when the couplings beyond the first k rows join those within them.

        Args:
            eigenvalues: of the joint matrix of the first k rows.
            vectors: its eigenvectors, in columns.

        Returns:
            The three in nats. The bounds hold, but the upper one judges rows that are not coupled by others; the likely
            amount is the integral's leading term and a fifth, without those rows: keeping more would not tell more of
            them.
        """
        kept = len(eigenvalues)
        if kept >= self.count:
            return 0.0, 0.0, self.rest
        tail = self.values[kept : self.count]
        couplings = self.rows[:kept] @ (self.rows[kept:] * tail.pow(-0.25).float()[:, None]).T
        couplings *= self.head.float()[self.classes[:kept]][:, self.classes[kept : self.count]]
        couplings = vectors.T.float() @ couplings
        # Directions in which J all but vanishes would amplify rounding; raising D there keeps the lower bound one.
        raised = eigenvalues.clamp(min=0.1 * float(tail[0]))
        norm = self._norm(couplings * raised.rsqrt().float()[:, None] * tail.pow(-0.25).float())
        squares = couplings.square_()
        low = self._gamma_of_kept(squares, raised)
        high = self._gamma_of_kept(squares, eigenvalues.clamp(min=1e-6 * float(tail[0])))
        within = self._within_tail(kept)
        sure = entropy_share(_ratio(self.above, norm, 1)) * (1 - _ROUNDING) * (low + within)
        possible = entropy_share(_ratio(self.below, norm, -1)) * (1 + _ROUNDING) * (high + within + self.rest)
        likely = min(_LIKELY * (high + within), possible)
        return sure, max(sure, likely), possible

    def _gamma_of_kept(self, squares: Float32[Tensor, "k t"], eigenvalues: Float64[Tensor, " k"]) -> float:
        """gamma between kept part and tail, from the squares of J_KT in the kept eigenbasis over the tail's sqrt(l)."""
        weights = damping((eigenvalues.log() / 2).float(), self.halves[self.count - squares.shape[1] : self.count])
        rows = (weights * squares).sum(dim=1, dtype=torch.float64)
        return 2 * float((rows * eigenvalues.rsqrt()).sum())

    def _norm(self, scaled: Float32[Tensor, "k t"]) -> float:
        """Most that |X| can be: as computed, or where that is slow what J >= 0 allows at any rate."""
        if len(scaled) > _LARGE:
            return math.sqrt(1 + self.above)
        largest = float(torch.linalg.eigvalsh((scaled @ scaled.T).double())[-1])
        return min(math.sqrt(max(largest, 0.0)) * (1 + _ROUNDING), math.sqrt(1 + self.above))

    def _within_tail(self, kept: int) -> float:
        """gamma between rows that are not kept: whole strips from the sums, the one that is cut anew."""
        first = -(-kept // self.strip)
        whole = float(self.sums[first:, first:].sum())
        stop = min(first * self.strip, self.count)
        columns = self._gamma(slice(kept, stop), slice(kept, self.count))
        return whole + float(columns[: stop - kept].sum() + 2 * columns[stop - kept :].sum())


def _ratio(extreme: float, norm: float, sign: int) -> float:
    """The bound of J against D on one side, from that of the tail alone and the norm of what couples it."""
    return max(1 + sign * (extreme + math.sqrt(extreme**2 + 4 * norm**2)) / 2, 0.0)
