"""Evaluation, recalibration, alignment, paths and pruning of a graph are those of the network that it came of."""

from typing import Any

import pytest
import torch
from torch import nn

from analysis.errors import AnalysisError
from analysis.evaluation import EvaluationOptions, evaluate_network
from analysis.networks.loading import LoadedNetwork
from analysis.probes.probe import Probe
from analysis.sweeps.alignment import aligned, permutation_groups
from analysis.sweeps.paths import Path, recalibrate
from analysis.sweeps.pruning import Pruning, Scope
from tests.analysis.networks.exported.conftest import Exported
from tests.analysis.networks.exported.zoo import case
from tests.analysis.tiny import ARCHITECTURES, network_of, probe_of

CPU = torch.device("cpu")
NAMES = tuple(ARCHITECTURES)


def _pair(name: str, seed: int, exported: Exported) -> tuple[LoadedNetwork, LoadedNetwork]:
    """Return a network, and its graph."""
    native = network_of(name, seed)
    return native, exported(native.module, _inputs_of(name)[:2])


def _inputs_of(name: str) -> torch.Tensor:
    inputs = probe_of(name).inputs
    assert isinstance(inputs, torch.Tensor)
    return inputs


def _state(network: LoadedNetwork) -> dict[str, torch.Tensor]:
    state = network.module.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def _equal(first: LoadedNetwork, second: LoadedNetwork, within: float = 0.0) -> None:
    one, other = _state(first), _state(second)
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], rtol=within, atol=within), name


@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_is_the_same_to_the_last_digit(name: str, exported: Exported) -> None:
    """Every measure of every split."""
    native, graph = _pair(name, 0, exported)
    options = EvaluationOptions(null_permutations=2, batch_size=16)
    first, second = (evaluate_network(one, probe_of(name), device=CPU, options=options) for one in (native, graph))
    assert graph.head_name == native.head_name
    assert first.splits == second.splits


@pytest.mark.parametrize("name", NAMES)
def test_recalibration_finds_the_normalisation_of_the_graph(name: str, exported: Exported) -> None:
    """The same number of layers, and the same statistics, which a second pass uses."""
    native, graph = _pair(name, 0, exported)
    counts = [recalibrate(one, probe_of(name), device=CPU, batch_size=16) for one in (native, graph)]
    assert counts[0] == counts[1] > 0
    _equal(native, graph)
    assert not any(part.training for part in graph.module.modules())


class _Twice(nn.Module):
    """A normalisation that runs twice on a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(torch.relu(self.inner(self.norm(x)))))
        return logits


def test_a_normalisation_that_runs_twice_is_one(exported: Exported) -> None:
    """Its statistics are those of both runs, as of a module's."""
    torch.manual_seed(0)
    model = _Twice().eval().requires_grad_(False)
    native, graph = LoadedNetwork(model, "head"), exported(model, _inputs_of("mlp")[:2])
    counts = [recalibrate(one, probe_of("mlp"), device=CPU, batch_size=16) for one in (native, graph)]
    assert counts == [1, 1]
    _equal(native, graph)


@pytest.mark.parametrize("name", NAMES)
def test_a_path_with_alignment_is_the_same(name: str, exported: Exported) -> None:
    """The same units are permuted, and points between the ends have the same logits to 1e-6."""
    inputs = _inputs_of(name)
    ends = [_pair(name, seed, exported) for seed in (0, 1)]
    outputs = []
    for place in (0, 1):
        first, second = ends[0][place], ends[1][place]
        generator = torch.Generator().manual_seed(0)
        state, alignment, change = aligned(first.module, second.module, inputs, generator=generator)
        assert alignment.gain > 0
        assert change < 1e-4
        path = Path(first, state)
        recalibrate(path.move_to(0.3), probe_of(name), device=CPU, batch_size=16)
        outputs.append((first.module(inputs), sorted(map(sorted, (group.axes for group in _groups(second, inputs))))))
    assert outputs[0][1] == outputs[1][1]
    assert float((outputs[0][0] - outputs[1][0]).abs().max()) <= 1e-6 * float(outputs[0][0].abs().max())


def _groups(network: LoadedNetwork, inputs: Any) -> Any:
    return permutation_groups(network.module, inputs[:2])


@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize("include_head", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_weights_are_pruned(name: str, include_head: bool, scope: Scope, exported: Exported) -> None:
    """The head among them only where it is asked for."""
    native, graph = _pair(name, 0, exported)
    counts = [Pruning(one, scope, include_head=include_head).prune_to(0.6) for one in (native, graph)]
    assert counts[0] == counts[1] > 0
    _equal(native, graph)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("encoder", "head"),
        ("transformers GPT2", "lm_head"),
        pytest.param("transformers Bert", "classifier", marks=pytest.mark.slow),
        pytest.param("timm eca_nfnet_l0", "head.fc", marks=pytest.mark.slow),
    ],
)
def test_weights_of_every_kind_are_prunable(name: str, head: str, exported: Exported) -> None:
    """Attention's, those of transposed layers, a head that is tied to an embedding, and standardised ones."""
    made = case(name)
    native, graph = LoadedNetwork(made.model, head), exported(made.model, made.example)
    for include_head in (False, True):
        sizes = [Pruning(one, "global", include_head=include_head).n_prunable for one in (native, graph)]
        assert sizes[0] == sizes[1]


def test_reparametrised_weights_are_refused(exported: Exported) -> None:
    """As of a network of modules: zeros would not stay."""
    made = case("weight_norm")
    with pytest.raises(AnalysisError, match=r"first\.parametrizations\.weight\.original0") as caught:
        Pruning(exported(made.model, made.example), "global")
    assert caught.value.members["module"] == "first"


def test_a_weight_that_is_a_plain_parameter_is_prunable(exported: Exported) -> None:
    """The graph shows that it multiplies, whatever its name; the head's is left out."""
    made = case("einsum")
    sweep = Pruning(exported(made.model, made.example), "global")
    assert sweep.n_prunable == 6 * 8
    assert sweep.prune_to(0.5) == 24


class _Fixed(nn.Module):
    """A network that needs batches of four samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(torch.relu(self.inner(x)).view(4, 2, 4).flatten(1))
        return logits


@pytest.mark.parametrize("n", [3, 4, 10])
def test_a_fixed_batch_size_is_honoured(n: int, exported: Exported) -> None:
    """Every batch has it, the last one filled up; the numbers are those of the samples alone."""
    torch.manual_seed(0)
    model = _Fixed().eval()
    graph = exported(model, torch.randn(4, 12))
    inputs, labels = torch.randn(n, 12), torch.arange(n) % 5
    probe = Probe(inputs, labels, None, 5, None)
    found = evaluate_network(graph, probe, device=CPU, options=EvaluationOptions(null_permutations=0, batch_size=7))
    assert found.batch_size == 4
    logits = model.fc(torch.relu(model.inner(inputs)))
    expected = float((logits.argmax(1) == labels).float().mean())
    assert found.splits["all"].accuracy == pytest.approx(expected)
    assert torch.allclose(graph.module(inputs), logits, atol=1e-6)
