"""Magnitude pruning: exactly so many weights, the least of them, in place and from the whole network each time."""

import doctest

import pytest
import torch

from analysis import pruning
from analysis.errors import AnalysisError
from analysis.pruning import Pruning, Scope, knee
from tests.analysis.networks import ARCHITECTURES, network_of

PRUNED = {
    "mlp": {"layers.0.weight", "layers.1.weight"},
    "cnn": {"convs.0.weight", "convs.1.weight"},
}


def test_the_examples_in_the_docstrings_hold() -> None:
    """What the docstrings show is what comes out."""
    assert doctest.testmod(pruning).failed == 0


@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize("name", PRUNED)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.999])
def test_exactly_the_least_weights_become_zero(name: str, scope: Scope, sparsity: float) -> None:
    """Together or layer by layer; biases, normalisation and head stay."""
    network = network_of(name, 0)
    before = {key: tensor.clone() for key, tensor in network.module.state_dict().items()}
    sweep = Pruning(network, scope)
    sweep.prune_to(0.95)
    count = sweep.prune_to(sparsity)
    after = network.module.state_dict()
    groups = [sorted(PRUNED[name])] if scope == "global" else [[key] for key in sorted(PRUNED[name])]
    total = 0
    for group in groups:
        old, new = (torch.cat([state[key].flatten() for key in group]) for state in (before, after))
        zeros = int(sparsity * len(old))
        total += zeros
        assert int((new == 0).sum()) == zeros
        assert torch.equal(new[new != 0], old[new != 0])
        if 0 < zeros < len(old):
            assert float(old[new == 0].abs().max()) <= float(old[new != 0].abs().min())
    assert count == total
    assert all(torch.equal(after[key], before[key]) for key in before if key not in PRUNED[name])


def test_the_head_is_pruned_where_asked() -> None:
    """Then it is one of the prunable weights."""
    without, within = (
        Pruning(network_of("mlp", 0), "layerwise"),
        Pruning(network_of("mlp", 0), "layerwise", include_head=True),
    )
    assert within.n_prunable - without.n_prunable == 5 * 16
    within.prune_to(0.5)
    assert int((within.network.weight == 0).sum()) == 40


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_magnitudes_do_not_change_the_count(name: str) -> None:
    """Where all weights have one magnitude exactly so many go, not all and not none."""
    network = network_of(name, 0)
    for parameter in network.module.parameters():
        parameter.copy_(torch.where(torch.arange(parameter.numel()) % 2 == 0, 1.0, -1.0).view_as(parameter))
    sweep = Pruning(network, "global")
    count = sweep.prune_to(0.25)
    assert count == int(0.25 * sweep.n_prunable) == sum(int((weight == 0).sum()) for weight in sweep.weights)


def test_what_cannot_be_pruned_is_refused() -> None:
    """A sparsity of 1 or below 0, and a network that is nothing but a head."""
    sweep = Pruning(network_of("mlp", 0), "global")
    for sparsity in (1.0, -0.1):
        with pytest.raises(AnalysisError, match=r"\[0, 1\)"):
            sweep.prune_to(sparsity)
    network = network_of("mlp", 0)
    network.module.layers = torch.nn.ModuleList()
    with pytest.raises(AnalysisError, match="no linear or convolutional"):
        Pruning(network, "global")


def test_the_knee_is_within_a_point() -> None:
    """A difference of exactly a point counts, whatever its rounding; later recoveries count as well."""
    assert knee([0.0, 0.2, 0.5, 0.9], [0.95, 0.94, 0.93, 0.2]) == 0.2
    assert knee([0.0, 0.2, 0.5], [0.5, 0.4, 0.6]) == 0.5
    assert knee([0.0, 0.5], [1.0, 0.0]) == 0.0
