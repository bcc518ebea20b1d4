"""NC1 to NC4 and the optimum against the naive reference, closed forms and edge cases."""

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from analysis.measures import collapse
from analysis.measures.classes import class_statistics
from analysis.measures.collapse import Collapse, neural_collapse, optimum
from tests.analysis import reference


def _measure(features: Tensor, labels: Tensor, head: Tensor, predicted: Tensor | None = None) -> Collapse:
    statistics = class_statistics(features, labels, len(head))
    return neural_collapse(features, statistics, head, labels if predicted is None else predicted)


def _frame(n_classes: int, d: int) -> Tensor:
    """Return the vertices of a simplex, of length 1, in the first dimensions of d, rotated."""
    rows = torch.eye(n_classes, d, dtype=torch.float64)
    rows[:, :n_classes] -= 1 / n_classes
    turn: Tensor = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))).Q
    return torch.nn.functional.normalize(rows, dim=1) @ turn


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1] * 3, 0.5),
        ([7] * 4, 0.753953169047),
        ([100] * 10, 0.952350782540),
        ([2] * 100, 0.997812935770),
        ([50, 30, 20, 10, 5], 0.869363798161),
        ([50, 0, 30, 20, 10, 0, 5], 0.869363798161),
    ],
)
def test_the_optimum_has_the_published_values(counts: list[int], expected: float) -> None:
    """The values are those in docs/metrics.md; classes without samples take no part."""
    found = optimum(counts, 128)
    assert found.mir == pytest.approx(expected, abs=2e-12)
    assert found.hdr == 0.0


@pytest.mark.parametrize("counts", [[4, 4, 9, 9, 1], [3, 2, 2, 30], [5, 6, 7, 8]])
def test_the_optimum_is_the_mir_of_a_repeated_frame(counts: list[int]) -> None:
    """MIR of vertex c repeated n_c times, with all its samples."""
    labels = np.repeat(np.arange(len(counts)), counts)
    frame = _frame(len(counts), len(counts) + 2).numpy()
    expected = reference.interplay(frame[labels], labels, frame, "sample", "none")
    assert optimum(counts, 16).mir == pytest.approx(expected.mir, abs=1e-11)


def test_the_optimum_needs_three_classes_and_room() -> None:
    """Two classes have no entropy at collapse; C vertices need C - 1 dimensions."""
    assert optimum([5, 5], 10).mir is None
    assert optimum([5, 0], 10).hdr is None
    assert optimum([1] * 10, 9).reachable
    assert not optimum([1] * 10, 8).reachable
    assert optimum([0, 1, 1, 1], 2).reachable


def test_the_examples_in_the_docstrings_hold() -> None:
    """The examples in the docstrings give the output shown."""
    assert doctest.testmod(collapse, optionflags=doctest.ELLIPSIS).failed == 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), counts=st.lists(st.integers(0, 15), min_size=2, max_size=8), extra=st.integers(0, 8))
def test_all_measures_follow_their_definitions(seed: int, counts: list[int], extra: int) -> None:
    """Random features with d >= C - 1, unbalanced and absent classes."""
    counts = [counts[0] + 1, counts[1] + 1, *counts[2:]]
    generator = torch.Generator().manual_seed(seed)
    d = len(counts) + extra
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    means, head = torch.randn(2, len(counts), d, dtype=torch.float64, generator=generator)
    features = means[labels] + torch.randn(len(labels), d, dtype=torch.float64, generator=generator)
    predicted = torch.randint(len(counts), (len(labels),), generator=generator)
    found = _measure(features, labels, head, predicted)
    expected = reference.collapse(features.numpy(), labels.numpy(), head.numpy(), predicted.numpy())
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-7, abs=1e-10), name
    assert found.absent_classes == counts.count(0)
    assert found.reasons == {}


@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_a_collapsed_network_has_zeros(n_classes: int) -> None:
    """With samples on their class means, the means a frame and the head a multiple of it, every measure is 0."""
    frame = _frame(n_classes, 16)
    labels = torch.arange(4 * n_classes) % n_classes
    found = _measure(3 * frame[labels] + 7, labels, 0.5 * frame)
    for name in Collapse.__dataclass_fields__:
        if name.startswith("nc") and name != "nc1_condition":
            assert getattr(found, name) == pytest.approx(0, abs=1e-12), name
    assert found.nc1_condition == pytest.approx(1, abs=1e-9)


def test_nc1_on_badly_scaled_means() -> None:
    """Diagonal by hand: separations of 1 and 1e-5 both count; a float32 pseudo-inverse would drop the second."""
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    means = torch.tensor([[1.0, 1e-5], [-1.0, 1e-5], [0.0, -2e-5]], dtype=torch.float64)
    spread = torch.tensor([[0.1, 1e-6], [-0.1, -1e-6]], dtype=torch.float64).repeat(3, 1)
    found = _measure(means[labels] + spread, labels, torch.eye(3, 2, dtype=torch.float64))
    # Sigma_W = diag(1e-2, 1e-12), Sigma_B = diag(2/3, 2e-10), and off the diagonal Sigma_B has nothing.
    assert found.nc1 == pytest.approx((1e-2 / (2 / 3) + 1e-12 / 2e-10) / 3, rel=1e-6)
    assert found.nc1_condition == pytest.approx((2 / 3) / 2e-10, rel=1e-6)


def test_features_that_never_vary_change_nothing() -> None:
    """With dead units Sigma_B has no full rank; NC1 is that of the other units."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 6
    features = torch.randn(60, 3, dtype=torch.float64, generator=generator) + labels[:, None].double()
    head = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    dead = torch.cat([features, torch.full((60, 5), 0.1, dtype=torch.float64)], dim=1)
    small = _measure(features, labels, head)
    large = _measure(dead, labels, torch.cat([head, torch.zeros(6, 5, dtype=torch.float64)], dim=1))
    assert small.nc1 is not None
    assert large.nc1 == pytest.approx(small.nc1, rel=1e-9)
    assert large.nc1_condition == pytest.approx(small.nc1_condition, rel=1e-6)


def test_two_classes_with_one_mean_have_no_nc1() -> None:
    """Samples vary in directions without differences of means: NC1 is null with a reason, not 0 or infinite."""
    spread = torch.tensor([[0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    features = torch.cat([spread, spread, spread + torch.tensor([5.0, 0.0])])
    found = _measure(features, torch.tensor([0, 0, 1, 1, 2, 2]), torch.eye(3, 2, dtype=torch.float64))
    assert found.nc1 is None
    assert found.nc1_condition is None
    assert found.reasons["nc1"] == found.reasons["nc1_condition"] == "dependent_means"
    assert found.nc4 == pytest.approx(1 / 3)


def test_means_that_are_all_equal_have_no_geometry() -> None:
    """Equal class means have no geometry; the head is still measured."""
    spread = torch.tensor([[0.1, 1.0], [-0.1, -1.0]])
    found = _measure(spread.repeat(3, 1) + 0.3, torch.tensor([0, 0, 1, 1, 2, 2]), torch.eye(3, 2))
    expected = dict.fromkeys(("nc1", "nc1_condition", "nc4"), "equal_means")
    names = ("nc2_equinorm_means", "nc2_equiangularity_means", "nc2_max_angle_means", "nc3")
    assert found.reasons == expected | dict.fromkeys(names, "zero_norm")
    assert found.nc2_equinorm_head is not None
    assert all(getattr(found, name) is None for name in found.reasons)


@pytest.mark.parametrize("value", [0.1, 1e6 / 3])
def test_equal_features_have_no_nearest_mean(value: float) -> None:
    """For equal features rounding would decide the nearest mean, so NC4 is null."""
    found = _measure(torch.full((60, 7), value), torch.arange(60) % 4, torch.eye(4, 7))
    assert found.nc4 is None
    assert found.reasons["nc4"] == "equal_means"


def test_one_class_has_neither_spread_nor_angles() -> None:
    """Measures that compare classes are null; NC4 still counts samples predicted as another class."""
    found = _measure(torch.randn(4, 3), torch.ones(4, dtype=torch.int64), torch.eye(3), torch.tensor([1, 1, 0, 2]))
    assert found.nc4 == 0.5
    assert found.absent_classes == 2
    assert {name for name in Collapse.__dataclass_fields__ if getattr(found, name) is None} == set(found.reasons)
    assert set(found.reasons.values()) == {"one_class"}
    assert "nc2_max_angle_head" not in found.reasons


def test_a_class_mean_at_the_centre_has_no_angle() -> None:
    """Its norm counts, its cosines are undefined."""
    features = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    found = _measure(features, torch.arange(3), torch.eye(3, 2))
    assert found.nc2_equinorm_means == pytest.approx(math.sqrt(2) / 2)
    assert found.nc2_equiangularity_means is None
    assert found.reasons["nc2_max_angle_means"] == "zero_norm"
