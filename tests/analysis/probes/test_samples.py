"""Subsets of a probe, drawn in proportion."""

from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from analysis.errors import AnalysisError
from analysis.probes.feature_set import FeatureSet
from analysis.probes.probe import Probe, stratified_rows


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=4, max_size=60),
    st.floats(0.1, 1),
    st.integers(0, 100),
)
def test_each_class_of_each_split_has_its_share(rows: list[tuple[int, int]], share: float, seed: int) -> None:
    """The requested number, each stratum within one of its share, no row twice, in rising order."""
    labels, split = torch.tensor(rows).unbind(1)
    n = max(int(share * len(rows)), 2)
    # So many that the smaller of two classes is certain to be drawn from, or all.
    smallest = min(Counter(labels.tolist()).values())
    assume(len(set(labels.tolist())) > 1)
    n = max(n, min(len(rows), 2 * -(-len(rows) // smallest)))
    chosen = stratified_rows(labels, split, n, seed=seed)
    assert len(chosen) == n
    assert bool((chosen.diff() > 0).all())
    taken = Counter(rows[row] for row in chosen.tolist())
    for stratum, count in Counter(rows).items():
        assert abs(taken[stratum] - count * n / len(rows)) < 1
    assert torch.equal(chosen, stratified_rows(labels, split, n, seed=seed))


def test_another_seed_draws_others_and_all_are_drawn() -> None:
    """Over many seeds every row is drawn, each as often as its share says."""
    labels = torch.arange(40) % 2
    counts = torch.zeros(40)
    for seed in range(400):
        counts[stratified_rows(labels, None, 10, seed=seed)] += 1
    assert 60 < counts.min() <= counts.max() < 140


def test_one_class_is_too_few() -> None:
    """The subset must have two classes."""
    labels = torch.tensor([0] * 99 + [1])
    with pytest.raises(AnalysisError) as raised:
        stratified_rows(labels, None, 2, seed=0)
    assert raised.value.kind == "invalid-argument"


def test_rows_of_probes_and_feature_sets() -> None:
    """Every tensor gives the same rows; the head stays."""
    rows = torch.tensor([1, 3])
    ids = {"input_ids": torch.arange(8).view(4, 2), "attention_mask": torch.ones(4, 2)}
    probe = Probe(ids, torch.arange(4), torch.tensor([0, 0, 1, 1]), 4, None).take(rows)
    assert isinstance(probe.inputs, dict)
    assert probe.inputs["input_ids"].tolist() == [[2, 3], [6, 7]]
    assert probe.labels.tolist() == [1, 3]
    assert probe.split is not None
    assert probe.split.tolist() == [0, 1]
    features, head = torch.arange(12.0).view(4, 3), torch.eye(3)
    taken = FeatureSet(features, torch.arange(4), head, None, features + 1, None).take(rows)
    assert taken.logits is not None
    assert (taken.features.tolist(), taken.logits.tolist()) == (features[rows].tolist(), (features[rows] + 1).tolist())
    assert taken.head is head
