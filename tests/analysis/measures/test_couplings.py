"""The bounds of the worth of dropped couplings, against relative entropies of whole matrices."""

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from analysis.measures import couplings
from analysis.measures.couplings import Couplings, FactorBlock, KeptPart, Worth, stein_share
from analysis.measures.entropy import spectrum_entropy, unit_rows


def test_the_examples_in_the_docstrings_hold() -> None:
    """The examples in the docstrings give the output shown."""
    assert doctest.testmod(couplings).failed == 0


@given(x=st.floats(-0.99, 50))
def test_the_share_is_the_integral_it_stands_for(x: float) -> None:
    """k(x) is int_0^1 (1 - t) / (1 + t x)^2 dt, also for x near -1."""
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    expected = float(torch.trapezoid((1 - t) / (1 + t * x) ** 2, t))
    value = torch.tensor([x], dtype=torch.float64)
    assert float(stein_share(value, 1 + value)) == pytest.approx(expected, rel=1e-5)


def test_the_quantiles_are_students() -> None:
    """They are one-sided odds of 1 in 100,000, for the probes of each number of batches."""
    for batches, quantile in enumerate(couplings._QUANTILES, 1):
        assert quantile == pytest.approx(student.ppf(1 - 1e-5, couplings._PROBES * batches - 1), abs=5e-4)


class Case:
    """Factors of some classes, and the joint matrix of all of their rows, from the largest eigenvalue down."""

    def __init__(
        self, seed: int, sizes: tuple[int, int, int], power: float, *, centred: bool, spread: float = 1.0
    ) -> None:
        n_classes, d, ranks = sizes
        generator = torch.Generator().manual_seed(seed)
        head = torch.randn(n_classes, d, generator=generator, dtype=torch.float64)
        head = unit_rows(head - head.mean(dim=0) if centred else head)[0]
        # Directions that have this share of themselves in common, and the rest each for itself.
        alone = torch.eye(n_classes, dtype=torch.float64) * (1 - spread) ** 0.5
        self.head = torch.cat([head * spread**0.5, alone], dim=1) if spread < 1 else head
        between = self.head @ self.head.T
        turns = torch.linalg.qr(torch.randn(n_classes, d, ranks, generator=generator, dtype=torch.float64)).Q.mT
        scales = 0.5 + torch.rand(n_classes, 1, generator=generator, dtype=torch.float64)
        values = torch.arange(1, ranks + 1).double().pow(-power) * scales
        values = values / values.sum()
        rows = turns * values.sqrt()[..., None]
        # A large class alone, the others side by side, one row longer than any of them.
        padded = torch.nn.functional.pad(rows[1:], (0, 0, 0, 1))
        self.blocks = [
            FactorBlock([0], values[:1], rows[:1].float()),
            FactorBlock(range(1, n_classes), torch.nn.functional.pad(values[1:], (0, 1)), padded.float()),
        ]
        self.classes = torch.arange(n_classes).repeat_interleave(ranks)
        self.within = torch.arange(ranks).repeat(n_classes)
        order = values.flatten().argsort(descending=True)
        self.values, self.classes, self.within = values.flatten()[order], self.classes[order], self.within[order]
        stacked = rows.flatten(0, 1)[order]
        self.joint = stacked @ stacked.T * between[self.classes][:, self.classes]

    def worth(
        self, kept: int, *, error: float = 0.0, mass: float | None = None, last: bool = True
    ) -> tuple[Worth, float]:
        """Return the bounds with so many rows kept, and the true worth."""
        eigenvalues = torch.linalg.eigvalsh(self.joint[:kept, :kept])
        pinched = spectrum_entropy(torch.cat([eigenvalues, self.values[kept:]]))
        lost = pinched - spectrum_entropy(torch.linalg.eigvalsh(self.joint))
        found = Couplings(self.blocks, self.head, 1)
        rows = found.offsets[self.classes[:kept]] + self.within[:kept]
        rest = float(self.values[kept:].sum()) if mass is None else mass
        worth = found.worth(
            KeptPart.of(rows, self.joint[:kept, :kept].clone(memory_format=torch.contiguous_format), rest),
            error=error,
            generator=torch.Generator().manual_seed(0),
            last=last,
        )
        return worth, lost


@pytest.mark.usefixtures("without_shape_checks")
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_classes=st.integers(3, 6),
    d=st.integers(12, 30),
    power=st.floats(0, 3),
    centred=st.booleans(),
    share=st.floats(0.1, 0.7),
)
def test_the_bounds_enclose_the_relative_entropy(
    seed: int, n_classes: int, d: int, power: float, centred: bool, share: float
) -> None:
    """For any kept part, flat and steep spectra, heads with and without a direction lost by centring."""
    case = Case(seed, (n_classes, d, d), power, centred=centred)
    worth, lost = case.worth(max(1, math.floor(share * len(case.values))))
    assert 0 <= worth.least <= lost + 1e-9
    assert worth.least <= worth.likely <= worth.most
    assert lost <= worth.most + 1e-9


@pytest.mark.parametrize("centred", [False, True])
def test_many_rows_are_known_to_a_few_percent(centred: bool) -> None:
    """Randomness averages out over 900 rows, half of them kept: the lower bound misses less than a tenth."""
    case = Case(0, (6, 150, 150), 1.0, centred=centred)
    worth, lost = case.worth(300)
    assert 0.9 * lost < worth.least <= lost <= worth.most
    assert abs(worth.likely - lost) < 0.08 * lost


def test_near_orthogonal_heads_leave_little_between_the_bounds() -> None:
    """If J is within a few percent of D the two quadratures meet, and only the probes' noise remains."""
    case = Case(0, (4, 60, 60), 1.0, centred=False, spread=0.1)
    worth, lost = case.worth(80)
    assert 0 < worth.least <= lost <= worth.most
    assert worth.most - worth.least < 0.2 * lost


def test_more_probes_are_drawn_where_their_number_is_what_is_lacking() -> None:
    """A small error needs all batches, a large one only the first; the bounds hold for both."""
    case = Case(1, (5, 40, 40), 0.5, centred=False)
    (few, lost), (many, _) = case.worth(60, error=1.0), case.worth(60, error=0.0)
    assert few.least < many.least <= lost <= many.most < few.most


@pytest.mark.parametrize("centred", [False, True])
def test_the_last_part_is_given_more_steps(centred: bool) -> None:
    """For many classes of a few rows, as tokens are, more steps bring the bounds closer, and both hold."""
    case = Case(4, (60, 12, 6), 0.5, centred=centred)
    (first, lost), (last, _) = case.worth(80, error=1e-3, last=False), case.worth(80, error=1e-3)
    assert first.least < last.least <= lost <= last.most < first.most
    assert last.most - last.least < 0.6 * (first.most - first.least)


def test_no_couplings_are_worth_nothing() -> None:
    """For orthogonal head rows all products are zero, and so are the bounds."""
    worth, lost = Case(0, (4, 20, 20), 1.0, centred=False, spread=0.0).worth(30)
    assert abs(lost) < 1e-12
    assert worth.least <= worth.likely <= worth.most < 1e-20


def test_rows_that_are_not_at_hand_widen_the_upper_bound() -> None:
    """With twice the mass in the tail the lower bound stays, and the upper one extrapolates."""
    case = Case(2, (5, 40, 40), 0.5, centred=False)
    whole, _ = case.worth(60)
    part, _ = case.worth(60, mass=2 * float(case.values[60:].sum()))
    assert part.least == pytest.approx(whole.least, rel=0.01)
    assert part.most == pytest.approx(3 * whole.most, rel=0.01)


@pytest.mark.parametrize("n_classes", [5, 45])
def test_the_operator_is_the_matrix(n_classes: int) -> None:
    """Products by sums over classes equal those with the matrix between rows, which is never computed.

    With fewer classes than twice the width of the head, and with more.
    """
    case = Case(3, (n_classes, 20, 12), 0.7, centred=True)
    found = Couplings(case.blocks, case.head, 1)
    places = found.offsets[case.classes] + case.within
    vectors = torch.randn(7, len(found.values), generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(vectors.shape, dtype=torch.float64)
    expected[:, places] = vectors[:, places].double() @ (case.joint * (case.classes[:, None] != case.classes))
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found.product(vectors).double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("n_classes", [5, 45])
def test_couplings_among_kept_rows_take_no_part(n_classes: int) -> None:
    """They do not cancel: if only the kept rows are large, the product on them is zero."""
    case = Case(3, (n_classes, 20, 12), 0.7, centred=True)
    found = Couplings(case.blocks, case.head, 1)
    places = found.offsets[case.classes] + case.within
    kept = 2 * n_classes
    inside = torch.zeros(len(found.values), dtype=torch.bool).index_fill_(0, places[:kept], True)
    masks = [mask[0] for mask in found.by_class(inside[None])]
    leading = [int(mask.any(dim=0).sum()) for mask in masks]
    assert max(leading) < 12
    vectors = torch.randn(7, len(found.values), generator=torch.Generator().manual_seed(0))
    dropped = case.joint * (case.classes[:, None] != case.classes)
    dropped[:kept, :kept] = 0
    expected = torch.zeros(vectors.shape, dtype=torch.float64)
    expected[:, places] = vectors[:, places].double() @ dropped
    found_product = found.product_without(vectors, masks, leading)
    torch.testing.assert_close(found_product.double(), expected, rtol=0, atol=1e-7)
    assert float(found.product_without(1e6 * vectors * inside, masks, leading)[:, inside].abs().max()) == 0


def test_a_singular_part_has_a_factor_at_any_shift() -> None:
    """Below its rounding the shift grows to what is not; above it the factor is that of the shifted matrix."""
    rows = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).repeat(4, 1)
    matrix = rows @ rows.T / 12
    for shift in (1e-30, 1e-3):
        part = KeptPart.of(torch.arange(12), matrix.clone(), 0.0)
        factor = part.factor(shift).double()
        shifted = matrix + shift * torch.eye(12, dtype=torch.float64)
        torch.testing.assert_close(factor @ factor.T, shifted, rtol=1e-6, atol=1e-6)
        assert float(part.couplings.diagonal().abs().max()) == 0
