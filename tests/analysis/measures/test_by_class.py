"""Predictions by class and by confidence: by hand, and against sums over all pairs of classes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.measures.by_class import Confusion, by_class, reliability
from analysis.measures.predictions import CALIBRATION_BINS, calibration_error


def test_by_hand() -> None:
    """Five classes: one without samples, one that is never predicted, and one prediction that is no class."""
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 4])
    predicted = torch.tensor([0, 0, 1, 0, 0, 2, 0, -1, 2])
    found = by_class(predicted, labels, 5)
    assert found.accuracy == [2 / 3, 0.0, 1 / 3, None, 0.0]
    assert found.predicted_counts == [5, 1, 2, 0, 0]
    assert found.confusions == [
        Confusion(1, 0, 2),
        Confusion(0, 1, 1),
        Confusion(2, None, 1),
        Confusion(2, 0, 1),
        Confusion(4, 2, 1),
    ]
    assert found.n_confused_otherwise == 0
    shorter = by_class(predicted, labels, 5, most=2)
    assert shorter.confusions == found.confusions[:2]
    assert shorter.n_confused_otherwise == 3


@given(
    pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(-1, 6)), min_size=1, max_size=60), most=st.integers(0, 9)
)
def test_counts_add_up(pairs: list[tuple[int, int]], most: int) -> None:
    """Right, confused and otherwise confused samples are all samples, and every count is that of a loop."""
    labels, predicted = (torch.tensor(column) for column in zip(*pairs, strict=True))
    found = by_class(predicted, labels, 7, most=most)
    for c in range(7):
        own = [p for label, p in pairs if label == c]
        assert found.accuracy[c] == (own.count(c) / len(own) if own else None)
        assert found.predicted_counts[c] == [p for _, p in pairs].count(c)
    for confusion in found.confusions:
        other = -1 if confusion.predicted is None else confusion.predicted
        assert confusion.n_samples == pairs.count((confusion.label, other)) > 0
    sizes = [confusion.n_samples for confusion in found.confusions]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) <= most
    assert sum(sizes) + found.n_confused_otherwise == sum(label != p for label, p in pairs)


def test_a_vocabulary_of_a_language_model_is_no_matrix() -> None:
    """With 200,000 classes the counts take the memory of the classes, not of their pairs."""
    n = 200_000
    labels = torch.arange(n)
    found = by_class((labels + 1) % n, labels, n)
    assert found.confusions[-1] == Confusion(999, 1000, 1)
    assert found.n_confused_otherwise == n - 1000


@given(values=st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50))
def test_the_calibration_error_is_that_of_the_diagram(values: list[tuple[float, bool]]) -> None:
    """Bins hold the samples that their edges say, and their weighted gaps are the calibration error."""
    confidence = torch.tensor([value for value, _ in values], dtype=torch.float64)
    correct = torch.tensor([right for _, right in values])
    bins = reliability(confidence, correct)
    assert [entry.low for entry in bins] == [k / CALIBRATION_BINS for k in range(CALIBRATION_BINS)]
    assert [entry.high for entry in bins[:-1]] == [entry.low for entry in bins[1:]]
    assert sum(entry.n_samples for entry in bins) == len(values)
    for entry in bins:
        if not entry.n_samples:
            assert (entry.confidence, entry.accuracy) == (None, None)
            continue
        assert entry.confidence is not None
        assert entry.low - 1e-15 <= entry.confidence <= entry.high + 1e-15
    gap = math.fsum(
        entry.n_samples * abs(entry.accuracy - entry.confidence)
        for entry in bins
        if entry.accuracy is not None and entry.confidence is not None
    )
    assert gap / len(values) == pytest.approx(calibration_error(confidence, correct), abs=1e-12)


def test_edges_of_the_bins() -> None:
    """An upper edge belongs to its bin, and probability 0 to the first."""
    confidence = torch.tensor([0.0, 1 / 15, 1 / 15 + 1e-9, 1.0], dtype=torch.float64)
    counts = [entry.n_samples for entry in reliability(confidence, torch.ones(4, dtype=torch.bool))]
    assert counts == [2, 1, *[0] * 12, 1]
