"""Paths, recalibration, alignment and pruning: on the device what they are on the processor."""

import itertools
from dataclasses import asdict

import pytest
import torch

from analysis.evaluation import EvaluationOptions, evaluate_network
from analysis.sweeps.alignment import aligned, permutation_groups, permuted
from analysis.sweeps.paths import Path, recalibrate
from analysis.sweeps.pruning import Pruning
from tests.analysis.tiny import ARCHITECTURES, network_of, probe_of
from tests.campaigns import campaign
from tests.cuda.test_metrics import numbers

CPU = torch.device("cpu")
EXACT = EvaluationOptions(null_permutations=0, tolerance=0.0)


@pytest.mark.parametrize(
    ("key", "recalibrated"),
    campaign(itertools.product(ARCHITECTURES, [False, True]), often=[("mlp", False), ("cnn", True)]),
)
def test_points_of_a_path(key: str, recalibrated: bool, device: torch.device) -> None:
    """Every number of the ends and of points between, with statistics interpolated or counted anew."""
    probe, found = probe_of(key), {}
    for where in (CPU, device):
        first, second = (network_of(key, seed) for seed in (0, 1))
        first.module.to(where)
        path = Path(first, second.module.to(where).state_dict())
        for w in (0.0, 0.3, 1.0):
            network = path.move_to(w)
            if recalibrated:
                recalibrate(network, probe, device=where, batch_size=20)
            found[where, w] = numbers(asdict(evaluate_network(network, probe, device=where, options=EXACT)))
    for w in (0.0, 0.3, 1.0):
        assert found[CPU, w].keys() == found[device, w].keys()
        for name, value in found[CPU, w].items():
            assert found[device, w][name] == pytest.approx(value, rel=2e-3, abs=2e-4), (w, name)


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_a_permuted_copy_is_aligned(key: str, device: torch.device) -> None:
    """The device has normalisations of its own, which fix no group, and rounds to float32."""
    network, inputs = network_of(key, 0), probe_of(key, 8).inputs
    assert isinstance(inputs, torch.Tensor)
    first, inputs = network.module.to(device), inputs.to(device)
    second = network_of(key, 0).module.to(device)
    groups = permutation_groups(second, inputs[:2])
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(group.size, generator=generator) for group in groups]
    state = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    second.load_state_dict(permuted(state, groups, orders))
    result = aligned(first, second, inputs, generator=torch.Generator().manual_seed(0))
    assert result[2] < 1e-4
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(result[0][name], tensor)


@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_pruned_weights(scope: str, device: torch.device) -> None:
    """The same weights become zero at every sparsity."""
    masks = {}
    for where in (CPU, device):
        network = network_of("cnn", 0)
        network.module.to(where)
        pruning = Pruning(network, scope=scope)  # type: ignore[arg-type]
        for sparsity in (0.3, 0.9):
            pruning.prune_to(sparsity)
            masks[where, sparsity] = [(weight == 0).cpu() for weight in network.module.parameters()]
    for sparsity in (0.3, 0.9):
        assert all(map(torch.equal, masks[CPU, sparsity], masks[device, sparsity]))
