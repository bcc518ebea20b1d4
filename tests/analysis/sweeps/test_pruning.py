"""Magnitude pruning: exact numbers of the smallest weights, in place, each time from the original network."""

import doctest

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from analysis.errors import AnalysisError
from analysis.networks.loading import LoadedNetwork
from analysis.sweeps import pruning
from analysis.sweeps.pruning import Pruning, Scope, knee
from tests.analysis.tiny import ARCHITECTURES, network_of

PRUNED = {
    "mlp": {"layers.0.weight", "layers.1.weight"},
    "cnn": {"convs.0.weight", "convs.1.weight"},
}


def test_the_examples_in_the_docstrings_hold() -> None:
    """The examples in the docstrings give the output shown."""
    assert doctest.testmod(pruning).failed == 0


@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize("name", PRUNED)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.999])
def test_exactly_the_least_weights_become_zero(name: str, scope: Scope, sparsity: float) -> None:
    """Globally or layer by layer; biases, normalisation and head stay."""
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
    """It is then one of the prunable weights."""
    without, within = (
        Pruning(network_of("mlp", 0), "layerwise"),
        Pruning(network_of("mlp", 0), "layerwise", include_head=True),
    )
    assert within.n_prunable - without.n_prunable == 5 * 16
    within.prune_to(0.5)
    assert int((within.network.weight == 0).sum()) == 40


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_magnitudes_do_not_change_the_count(name: str) -> None:
    """If all weights have one magnitude, exactly the requested number is pruned."""
    network = network_of(name, 0)
    for parameter in network.module.parameters():
        parameter.copy_(torch.where(torch.arange(parameter.numel()) % 2 == 0, 1.0, -1.0).view_as(parameter))
    sweep = Pruning(network, "global")
    count = sweep.prune_to(0.25)
    assert count == int(0.25 * sweep.n_prunable) == sum(int((weight == 0).sum()) for weight in sweep.weights)


def test_what_cannot_be_pruned_is_refused() -> None:
    """A sparsity of 1 or below 0, and a network that consists only of a head."""
    sweep = Pruning(network_of("mlp", 0), "global")
    for sparsity in (1.0, -0.1):
        with pytest.raises(AnalysisError, match=r"\[0, 1\)"):
            sweep.prune_to(sparsity)
    network = network_of("mlp", 0)
    network.module.layers = torch.nn.ModuleList()
    with pytest.raises(AnalysisError, match="no linear or convolutional"):
        Pruning(network, "global")


@pytest.mark.parametrize("sparsity", [0.29, 0.57, 0.58])
def test_the_share_is_that_of_the_decimal_number(sparsity: float) -> None:
    """0.29 of 100 weights are 29, though the float nearest to 0.29 is below it."""
    module = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 2)).requires_grad_(False)
    assert Pruning(LoadedNetwork(module, "1"), "global").prune_to(sparsity) == round(100 * sparsity)


def test_a_weight_that_is_made_anew_is_refused() -> None:
    """Zeros would not stay in a reparametrised weight; in a head that is not pruned it is allowed."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).requires_grad_(False)
    parametrizations.weight_norm(module[1])
    assert Pruning(LoadedNetwork(module, "1"), "global").n_prunable == 16
    parametrizations.weight_norm(module[0])
    with pytest.raises(AnalysisError, match="Remove the reparametrisation") as caught:
        Pruning(LoadedNetwork(module, "1"), "global")
    assert caught.value.members["module"] == "0"


@pytest.mark.parametrize(("widths", "n_weights"), [({}, 48), ({"kdim": 3, "vdim": 5}, 48)])
def test_attention_is_pruned_whole(widths: dict[str, int], n_weights: int) -> None:
    """The weights of queries, keys and values, in one tensor or in three, and that of the output."""
    module = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, **widths), "head": nn.Linear(4, 2)})
    module.requires_grad_(False)
    sweep = Pruning(LoadedNetwork(module, "head"), "global")
    assert sweep.n_prunable == n_weights + 16
    sweep.prune_to(0.99)
    assert sum(int((weight != 0).sum()) for name, weight in module.named_parameters() if "weight" in name) == 8 + 1


def test_a_weight_that_the_head_shares_stays_with_it() -> None:
    """Under any of its names it is pruned only if the head is."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    module[0].weight = module[1].weight
    with pytest.raises(AnalysisError, match="include_head prunes the head"):
        Pruning(LoadedNetwork(module, "1"), "global")
    assert Pruning(LoadedNetwork(module, "1"), "global", include_head=True).n_prunable == 16


def test_the_knee_is_within_a_point() -> None:
    """A difference of exactly one point counts, in spite of rounding; later recoveries count as well."""
    assert knee([0.0, 0.2, 0.5, 0.9], [0.95, 0.94, 0.93, 0.2]) == 0.2
    assert knee([0.0, 0.2, 0.5], [0.5, 0.4, 0.6]) == 0.5
    assert knee([0.0, 0.5], [1.0, 0.0]) == 0.0
