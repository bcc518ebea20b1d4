"""The bounds on what dropped couplings are worth, against relative entropies that are computed whole."""

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from analysis import couplings
from analysis.couplings import Couplings, damping, entropy_share
from analysis.entropy import spectrum_entropy, unit_rows


def test_the_examples_in_the_docstrings_hold() -> None:
    """What the docstrings show is what comes out."""
    assert doctest.testmod(couplings).failed == 0


@given(ratio=st.floats(0, 50))
def test_the_share_is_the_integral_it_stands_for(ratio: float) -> None:
    """int_0^1 (1 - t) / (1 + t (x - 1)) dt by Gauss-Legendre, away from its pole."""
    ratio = max(ratio, 1e-2)
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    expected = float(torch.trapezoid((1 - t) / (1 + t * (ratio - 1)), t))
    assert entropy_share(ratio) == pytest.approx(expected, abs=1e-6)


def test_damping_is_the_ratio_of_two_means() -> None:
    """sqrt(ab) (log a - log b) / (a - b), from equal numbers to twelve decades apart."""
    a = torch.logspace(-12, 0, 25, dtype=torch.float64)
    b = a[:7] * 1.0001
    found = damping((a.log() / 2).float(), (b.log() / 2).float()).double()
    expected = (a[:, None] * b).sqrt() * (a[:, None].log() - b.log()) / (a[:, None] - b)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)


def _joint(seed: int, n_classes: int, d: int, ranks: int, power: float, centred: bool) -> tuple[Tensor, ...]:
    """Rows of R in rank order, their squares and classes, and the Gram matrix of a head."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(n_classes, d, generator=generator, dtype=torch.float64)
    head = unit_rows(head - head.mean(dim=0) if centred else head)[0]
    turns = torch.linalg.qr(torch.randn(n_classes, d, ranks, generator=generator, dtype=torch.float64)).Q.mT
    values = torch.arange(1, ranks + 1).double().pow(-power) * torch.rand(n_classes, 1, generator=generator).double()
    values = values / values.sum()
    rows = (turns * values.sqrt()[..., None]).flatten(0, 1)
    order = values.flatten().argsort(descending=True)
    classes = torch.arange(n_classes).repeat_interleave(ranks)
    return rows[order], values.flatten()[order], classes[order], head @ head.T


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_classes=st.integers(2, 6),
    d=st.integers(3, 16),
    power=st.floats(0, 3),
    centred=st.booleans(),
    share=st.floats(0.1, 0.9),
    strip=st.integers(1, 20),
)
def test_the_bounds_enclose_the_relative_entropy(
    seed: int, n_classes: int, d: int, power: float, centred: bool, share: float, strip: int
) -> None:
    """Any kept part, flat and steep spectra, heads with and without a direction that is lost by centring."""
    rows, values, classes, head = _joint(seed, n_classes, d, d, power, centred)
    joint = rows @ rows.T * head[classes][:, classes]
    kept = max(1, math.floor(share * len(rows)))
    eigenvalues, vectors = torch.linalg.eigh(joint[:kept, :kept])
    pinched = spectrum_entropy(torch.cat([eigenvalues, values[kept:]]))
    lost = pinched - spectrum_entropy(torch.linalg.eigvalsh(joint))
    sure, likely, possible = Couplings(rows, values, classes, head, strip, 0.0).worth(eigenvalues, vectors)
    assert 0 <= sure <= lost + 1e-9
    assert sure <= likely <= possible
    assert lost <= possible + 1e-9


def test_near_orthogonal_heads_leave_little_between_the_bounds() -> None:
    """Where J is within a few percent of D on the tail, the loss is known to a few percent."""
    rows, values, classes, _ = _joint(0, 4, 30, 30, 1.0, False)
    head = torch.full((4, 4), 0.03, dtype=torch.float64).fill_diagonal_(1.0)
    joint = rows @ rows.T * head[classes][:, classes]
    eigenvalues, vectors = torch.linalg.eigh(joint[:40, :40])
    sure, likely, possible = Couplings(rows, values, classes, head, 16, 0.0).worth(eigenvalues, vectors)
    assert 0 < possible - sure < 0.1 * possible
    assert sure <= likely <= possible
