"""Paths between two checkpoints: the mix, its ends and its statistics."""

import pathlib

import pytest
import torch
from safetensors.torch import save_file

from analysis.errors import AnalysisError
from analysis.evaluation import EvaluationOptions, evaluate_network
from analysis.networks.loading import LoadedNetwork, load_network
from analysis.probes.probe import Probe
from analysis.sweeps.paths import Path, recalibrate, require_variances
from tests.analysis.tiny import ARCHITECTURES, network_of, probe_of

CPU = torch.device("cpu")
EXACT = EvaluationOptions(null_permutations=0, tolerance=0.0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_ends_are_the_endpoints_own_evaluations(name: str) -> None:
    """Bit for bit, also after other points, including integer buffers."""
    probe = probe_of(name)
    own = [evaluate_network(network_of(name, seed), probe, device=CPU, options=EXACT).splits for seed in (0, 1)]
    second = network_of(name, 1).module.state_dict()
    for tensor in second.values():
        if not tensor.is_floating_point():
            tensor.fill_(7)
    path = Path(network_of(name, 0), second)
    for w in (0.3, 1.0, 0.0):
        found = evaluate_network(path.move_to(w), probe, device=CPU, options=EXACT).splits
        if w in (0.0, 1.0):
            assert found == own[int(w)]
            state = path.network.module.state_dict()
            wanted = path.second if w else path.first
            assert all(torch.equal(state[key], wanted[key]) for key in wanted)
        else:
            counters = [tensor for tensor in path.mix.values() if not tensor.is_floating_point()]
            assert all(int(counter) == 0 for counter in counters)


def test_bfloat16_checkpoints_are_mixed_in_float32(tmp_path: pathlib.Path) -> None:
    """The mix of two stored numbers of 8 bits is not rounded back to their type."""
    states = [
        {
            key: t.bfloat16() if t.is_floating_point() else t
            for key, t in network_of("cnn", seed).module.state_dict().items()
        }
        for seed in (0, 1)
    ]
    loaded = []
    for place, state in enumerate(states):
        save_file(state, file := tmp_path / f"{place}.safetensors")
        loaded.append(load_network(ARCHITECTURES["cnn"], file, head=None, device="cpu"))
    path = Path(loaded[0], loaded[1].module.state_dict())
    for w in (0.0, 0.3, 1.0):
        mixed = path.move_to(w).module.state_dict()
        for key in ("convs.0.weight", "norms.1.running_var", "head.bias"):
            first, second = (state[key].double() for state in states)
            assert mixed[key].dtype == torch.float32
            wanted = first + w * (second - first)
            torch.testing.assert_close(mixed[key].double(), wanted, rtol=1e-6, atol=1e-7)
            if w == 0.3:
                assert not torch.equal(mixed[key], mixed[key].bfloat16().float())


def test_a_path_to_itself_is_flat() -> None:
    """Every tensor at every point is the checkpoint's own, to the last bit."""
    network = network_of("cnn", 0)
    own = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    path = Path(network, {name: tensor.clone() for name, tensor in own.items()})
    for w in (0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0, 1.5):
        state = path.move_to(w).module.state_dict()
        assert all(torch.equal(state[name], own[name]) for name in own)
    distance, cosine = path.distances()
    assert distance == 0.0
    assert cosine == pytest.approx(1.0)


def test_the_mix_is_linear_and_the_distances_are_those_of_the_parameters() -> None:
    """(1 - w) A + w B in float32; lengths of parameters only, without running statistics."""
    network, other = network_of("mlp", 0), network_of("mlp", 1)
    first = {name: tensor.clone().double() for name, tensor in network.module.state_dict().items()}
    second = {name: tensor.double() for name, tensor in other.module.state_dict().items()}
    path = Path(network, other.module.state_dict())
    for w in (-0.25, 0.25, 0.75):
        for name, tensor in path.move_to(w).module.state_dict().items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor.double(), (1 - w) * first[name] + w * second[name], rtol=0, atol=3e-7)
    names = [name for name, _ in network.module.named_parameters()]
    a, b = (torch.cat([state[name].flatten() for name in names]) for state in (first, second))
    distance, cosine = path.distances()
    assert distance == pytest.approx(float((a - b).norm()))
    assert cosine == pytest.approx(float(a @ b / a.norm() / b.norm()))


def test_negative_variances_beyond_the_ends_are_named() -> None:
    """Mixed variances are linear in w and may become negative outside of the ends; inside they need no check."""
    network, other = network_of("mlp", 0), network_of("mlp", 1).module.state_dict()
    path = Path(network, other)
    for w in (0.0, 0.5, 1.0, 1.001):
        require_variances(path.move_to(w), w)
    with pytest.raises(AnalysisError, match="normalisation recalibrate") as caught:
        require_variances(path.move_to(-5.0), -5.0)
    variances = [path.first[name] * 6 - other[name] * 5 for name in path.first if name.endswith("running_var")]
    assert caught.value.members["n_negative"] == sum(int((variance < 0).sum()) for variance in variances) > 0


def test_ends_of_two_shapes_are_refused() -> None:
    """The error gives the differing names."""
    with pytest.raises(AnalysisError, match="names or shapes") as caught:
        Path(network_of("mlp", 0), network_of("cnn", 0).module.state_dict())
    assert caught.value.members["argument"] == "other"
    assert "convs.0.weight" in caught.value.members["differing"]


def test_recalibration_takes_the_statistics_of_the_probe() -> None:
    """In one batch they are the activations' own mean and variance; the rest of the network does not change."""
    network, probe = network_of("mlp", 0), probe_of("mlp")
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    assert recalibrate(network, probe, device=CPU, batch_size=60) == 2
    state = network.module.state_dict()
    activations = probe.inputs @ before["layers.0.weight"].T + before["layers.0.bias"]
    torch.testing.assert_close(state["norms.0.running_mean"], activations.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["norms.0.running_var"], activations.var(dim=0), rtol=1e-4, atol=1e-5)
    assert not any(module.training for module in network.module.modules())
    assert all(torch.equal(state[name], before[name]) for name, _ in network.module.named_parameters())


def test_recalibration_is_deterministic_and_weighs_samples_alike() -> None:
    """Repeated calls give the same; a mean over batches of different sizes is that of all samples."""
    probe = probe_of("mlp")
    found: list[dict[str, torch.Tensor]] = []
    for seed in (0, 0):
        network = network_of("mlp", seed)
        network.module.get_buffer("norms.0.running_mean").fill_(100.0 * (len(found) + 1))
        recalibrate(network, probe, device=CPU, batch_size=32)
        found.append({name: tensor.clone() for name, tensor in network.module.state_dict().items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    state = network_of("mlp", 0).module.state_dict()
    mean = (probe.inputs @ state["layers.0.weight"].T + state["layers.0.bias"]).mean(dim=0)
    torch.testing.assert_close(found[0]["norms.0.running_mean"], mean, rtol=1e-4, atol=1e-5)


def test_recalibration_under_autocast_takes_the_statistics_of_its_activations() -> None:
    """Those of the first layer's output in bfloat16, in float32; a deeper network with images runs as well."""
    network, probe = network_of("mlp", 0), probe_of("mlp")
    state = network.module.state_dict()
    recalibrate(network, probe, device=CPU, batch_size=60, precision="bfloat16")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        activations = network.module.get_submodule("layers.0")(probe.inputs)
    assert activations.dtype == torch.bfloat16
    assert state["norms.0.running_mean"].dtype == torch.float32
    assert isinstance(probe.inputs, torch.Tensor)
    narrow, wide = (
        activations.float().mean(dim=0),
        torch.nn.functional.linear(probe.inputs, state["layers.0.weight"], state["layers.0.bias"]).mean(dim=0),
    )
    found = state["norms.0.running_mean"]
    torch.testing.assert_close(found, narrow, rtol=1e-5, atol=1e-5)
    assert float((found - wide).abs().max()) > 10 * float((found - narrow).abs().max())
    for name in ("cnn", "resnet"):
        other = network_of(name, 0)
        assert recalibrate(other, probe_of(name), device=CPU, batch_size=20, precision="bfloat16") > 0
        assert all(bool(torch.isfinite(tensor).all()) for tensor in other.module.state_dict().values())


def test_recalibration_does_not_depend_on_how_the_samples_lie() -> None:
    """Sorted by class, as in folders, the variance is that of all samples, not that within a class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat_interleave(100)
    inputs = 5 * torch.randn(10, 12, generator=generator)[labels] + torch.randn(1000, 12, generator=generator)
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 10)).eval().requires_grad_(False)
    network = LoadedNetwork(module, "1")
    assert recalibrate(network, Probe(inputs, labels, None, 10, None), device=CPU, batch_size=100) == 1
    variance = inputs.var(dim=0)
    torch.testing.assert_close(module[0].running_var, variance, rtol=0.05, atol=0)
    within = torch.stack([part.var(dim=0) for part in torch.split(inputs, 100)]).mean(dim=0)
    assert bool((within < 0.5 * variance).all())


def test_a_layer_that_runs_twice_has_the_statistics_of_both() -> None:
    """It sees two inputs in each of two batches."""

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.norm(x) + self.norm(x + 5))
            return logits

    module = Twice().eval().requires_grad_(False)
    inputs = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    probe = Probe(inputs, torch.arange(50) % 2, None, 2, None)
    recalibrate(LoadedNetwork(module, "head"), probe, device=CPU, batch_size=25)
    torch.testing.assert_close(module.norm.running_mean, inputs.mean(dim=0) + 2.5)


def test_a_last_batch_of_one_sample_is_no_obstacle() -> None:
    """It has no variance; a network without statistics gets no pass at all."""
    assert recalibrate(network_of("mlp", 0), probe_of("mlp", 61), device=CPU, batch_size=20) == 2
    assert recalibrate(network_of("mlp", 0), probe_of("mlp", 5), device=CPU, batch_size=1) == 2
    with pytest.raises(AnalysisError, match="two samples"):
        recalibrate(network_of("mlp", 0), probe_of("mlp", 1), device=CPU, batch_size=20)
    network = network_of("mlp", 0)
    network.module.norms = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    assert recalibrate(network, probe_of("mlp"), device=CPU, batch_size=20) == 0
