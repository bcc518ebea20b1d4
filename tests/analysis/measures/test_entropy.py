"""Matrix entropy and measures derived from it, against closed forms and the facts in docs/metrics.md."""

import doctest
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from analysis.errors import AnalysisError
from analysis.measures import entropy
from analysis.measures.entropy import (
    hdr,
    joint_entropy,
    matrix_entropy,
    matrix_entropy_of_vectors,
    mir,
    mutual_information,
    unit_rows,
)
from tests.analysis import reference


def _vectors(seed: int, n: int, d: int) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _gram(seed: int, n: int, d: int) -> Tensor:
    rows = torch.nn.functional.normalize(_vectors(seed, n, d), dim=1)
    return rows @ rows.T


def test_the_examples_in_the_docstrings_hold() -> None:
    """The examples in the docstrings give the output shown."""
    assert doctest.testmod(entropy).failed == 0


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_orthogonal_vectors_have_log_n_at_every_order(n: int, alpha: float) -> None:
    """The spectrum of the identity is flat."""
    assert matrix_entropy(torch.eye(n), alpha) == pytest.approx(math.log(n), abs=1e-12)
    assert matrix_entropy_of_vectors(3 * torch.eye(n), alpha) == pytest.approx(math.log(n), abs=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0, math.inf])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (512, 512), (2000, 300)])
def test_equal_vectors_have_no_entropy(n: int, d: int, alpha: float) -> None:
    """Vectors of one direction have entropy 0, whatever their number and lengths."""
    row = _vectors(0, 1, d)
    lengths = torch.linspace(1, 9, n, dtype=torch.float64)[:, None]
    assert matrix_entropy_of_vectors(lengths * row, alpha) == pytest.approx(0, abs=1e-12)


def test_orders_follow_their_formula() -> None:
    """Two eigenvalues, 0.9 and 0.1, by hand."""
    gram = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    assert matrix_entropy(gram) == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), abs=1e-13)
    assert matrix_entropy(gram, 0.5) == pytest.approx(2 * math.log(math.sqrt(0.9) + math.sqrt(0.1)), abs=1e-13)
    assert matrix_entropy(gram, 2.0) == pytest.approx(-math.log(0.82), abs=1e-13)
    assert matrix_entropy(gram, 3.0) == pytest.approx(-math.log(0.73) / 2, abs=1e-13)
    assert matrix_entropy(gram, 0.0) == pytest.approx(math.log(2), abs=1e-13)
    assert matrix_entropy(gram, 1e4) == pytest.approx(-math.log(0.9), rel=1e-3)


def test_identity_with_itself_shares_everything() -> None:
    """K1 = K2 = identity: MIR 1, HDR 0."""
    assert mir(torch.eye(5), torch.eye(5)) == pytest.approx(1, abs=1e-12)
    assert hdr(torch.eye(5), torch.eye(5)) == pytest.approx(0, abs=1e-12)


def test_ratios_over_nothing_are_not_defined() -> None:
    """Without entropy on one side MIR is undefined, on both sides HDR too."""
    assert mir(torch.eye(3), torch.ones(3, 3)) is None
    assert hdr(torch.eye(3), torch.ones(3, 3)) == 1.0
    assert hdr(torch.ones(3, 3), torch.ones(3, 3)) is None


@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), d=st.integers(1, 12), e=st.integers(1, 12))
def test_joint_entropy_lies_between_its_bounds(seed: int, n: int, d: int, e: int) -> None:
    """max(H1, H2) <= H12 <= H1 + H2, and therefore 0 <= MIR <= 1."""
    first, second = _gram(seed, n, d), _gram(seed + 1, n, e)
    h1, h2, joint = matrix_entropy(first), matrix_entropy(second), joint_entropy(first, second)
    assert max(h1, h2) - 1e-10 <= joint <= h1 + h2 + 1e-10
    assert mutual_information(first, second) == pytest.approx(h1 + h2 - joint, abs=1e-12)
    ratio = mir(first, second)
    assert ratio is None or -1e-8 <= ratio <= 1 + 1e-8


@given(seed=st.integers(0, 10**6), n=st.integers(1, 20), d=st.integers(1, 20), scale=st.floats(1e-3, 1e3))
def test_the_entropy_of_vectors_is_that_of_their_gram_matrix(seed: int, n: int, d: int, scale: float) -> None:
    """For either side smaller and any lengths, it agrees with NumPy."""
    vectors, gram = scale * _vectors(seed, n, d), _gram(seed, n, d)
    expected = reference.entropy(np.asarray(gram))
    assert matrix_entropy(gram) == pytest.approx(expected, abs=1e-11)
    assert matrix_entropy_of_vectors(vectors) == pytest.approx(expected, abs=1e-11)
    assert matrix_entropy_of_vectors(vectors, 2.0) == pytest.approx(matrix_entropy(gram, 2.0), abs=1e-11)


@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 12), d=st.integers(1, 12), alpha=st.sampled_from([0.5, 1.0, 2.0, 3.0])
)
def test_a_weight_counts_like_repeating_the_row(seed: int, n: int, d: int, alpha: float) -> None:
    """Whole weights repeat a row, zero leaves it out, a common factor changes nothing."""
    vectors = _vectors(seed, n, d)
    weights = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(seed)).double()
    weights[0] = 2
    expected = matrix_entropy_of_vectors(vectors.repeat_interleave(weights.long(), dim=0), alpha)
    assert matrix_entropy_of_vectors(vectors, alpha, weights) == pytest.approx(expected, abs=1e-10)
    assert matrix_entropy_of_vectors(vectors, alpha, 0.3 * weights) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_are_widened_before_anything_is_computed(dtype: torch.dtype) -> None:
    """The entropy is exactly that of the stored numbers."""
    vectors = _vectors(0, 40, 9).to(dtype)
    assert matrix_entropy_of_vectors(vectors) == pytest.approx(matrix_entropy_of_vectors(vectors.double()), abs=1e-13)


def test_unit_rows_survive_extreme_lengths() -> None:
    """Squares that overflow or vanish do not change a direction; rows of zeros have none."""
    rows = torch.tensor([[3e200, 4e200], [3e-200, 4e-200], [0.0, 0.0], [0.0, -5.0]], dtype=torch.float64)
    directions, usable = unit_rows(rows)
    assert usable.tolist() == [True, True, False, True]
    expected = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(directions, expected, rtol=1e-14, atol=1e-14)


def test_differences_that_are_rounding_have_no_direction() -> None:
    """At a scale of 1 a length of 1e-13 is rounding, one of 1e-9 is not."""
    _, usable = unit_rows(torch.tensor([[1e-13, 0.0], [1e-9, 0.0]], dtype=torch.float64), torch.ones(2))
    assert usable.tolist() == [False, True]


def test_annotations_are_checked() -> None:
    """The import hook of the tests is active: a shape that does not fit its annotation is an error."""
    with pytest.raises(TypeCheckError):
        matrix_entropy(torch.zeros(2, 3))


def test_wrong_arguments_are_named() -> None:
    """Negative orders and weights, empty matrices and values that are not finite are refused."""
    calls: list[Callable[[], float]] = [
        lambda: matrix_entropy(torch.eye(2), -1.0),
        lambda: matrix_entropy(torch.zeros(0, 0)),
        lambda: matrix_entropy_of_vectors(torch.zeros(3, 2)),
        lambda: matrix_entropy_of_vectors(torch.eye(2), math.nan),
        lambda: matrix_entropy_of_vectors(torch.eye(2), 1.0, torch.tensor([1.0, -1.0])),
        lambda: matrix_entropy_of_vectors(torch.eye(2), 1.0, torch.zeros(2)),
    ]
    for call in calls:
        with pytest.raises(AnalysisError) as caught:
            call()
        assert caught.value.kind == "invalid-argument"
    bad: dict[str, Callable[[], float]] = {
        "gram": lambda: matrix_entropy(torch.full((2, 2), math.nan)),
        "vectors": lambda: matrix_entropy_of_vectors(torch.full((2, 2), math.inf)),
        "weights": lambda: matrix_entropy_of_vectors(torch.eye(2), 1.0, torch.tensor([1.0, math.nan])),
    }
    for name, call in bad.items():
        with pytest.raises(AnalysisError) as caught:
            call()
        assert (caught.value.kind, caught.value.members["tensor"]) == ("non-finite-values", name)
