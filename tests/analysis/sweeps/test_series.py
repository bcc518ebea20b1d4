"""Series of checkpoints: rank correlation and delayed generalisation."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.sweeps import series
from analysis.sweeps.series import Generalisation, generalisation, spearman


def test_the_examples_in_the_docstrings_hold() -> None:
    """The examples in the docstrings give the output shown."""
    assert doctest.testmod(series).failed == 0


@given(pairs=st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=20))
def test_spearman_is_pearson_of_mean_ranks(pairs: list[tuple[int, int]]) -> None:
    """With many ties, against ranks by counting."""
    first, second = ([float(value) for value in values] for values in zip(*pairs, strict=True))
    found = spearman(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
        return

    def ranks(values: list[float]) -> list[float]:
        return [sum((b < a) + (b == a) / 2 for b in values) for a in values]

    assert found == pytest.approx(np.corrcoef(ranks(first), ranks(second))[0, 1], abs=1e-12)


def test_spearman_passes_over_what_is_not_defined() -> None:
    """Places with a None take no part; fewer than three places have no correlation."""
    assert spearman([1.0, None, 2.0, 3.0], [3.0, 9.0, 2.0, 1.0]) == -1.0
    assert spearman([1.0, None, 2.0], [3.0, 9.0, 2.0]) is None


def test_delayed_generalisation() -> None:
    """The first x of each, and the difference; None if an accuracy is never reached."""
    axis = [0.0, 100.0, 200.0, 800.0]
    assert generalisation(axis, [0.1, 0.99, 1.0, 1.0], [0.1, 0.1, 0.2, 0.995]) == Generalisation(100.0, 800.0, 700.0)
    assert generalisation(axis, [0.1, 0.5, 1.0, 1.0], [0.1] * 4) == Generalisation(200.0, None, None)
