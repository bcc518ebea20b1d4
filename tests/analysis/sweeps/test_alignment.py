"""Permutation groups from the traced network, and weight matching along them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from analysis.errors import AnalysisError
from analysis.evaluation import EvaluationOptions, evaluate_network
from analysis.networks.loading import build
from analysis.sweeps.alignment import (
    PermutationGroup,
    aligned,
    check_same_function,
    permutation_groups,
    permuted,
    weight_matching,
)
from analysis.sweeps.grids import barrier, even_grid
from analysis.sweeps.paths import Path
from tests.analysis.tiny import ARCHITECTURES, network_of, probe_of


def _builtin(name: str, **args: Any) -> dict[str, Any]:
    return {"family": "builtin", "name": name, "args": args}


# Architecture, shape of an input, and the sizes of its groups as theory has them: each hidden width, each stream that
# additions hold together once for all of its blocks.
NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, ...], list[int]]] = {
    "mlp": (_builtin("mlp", sizes=[12, 16, 8, 5]), (12,), [16, 8]),
    "mlp of images, layer norm": (_builtin("mlp", sizes=[12, 16, 8, 5], norm="layer"), (3, 4), [16, 8]),
    "mlp, batch norm, gelu": (_builtin("mlp", sizes=[12, 9, 5], norm="batch", activation="gelu"), (12,), [9]),
    "linear": (_builtin("mlp", sizes=[12, 5]), (12,), []),
    "cnn": (_builtin("cnn", n_classes=5, in_channels=1, channels=[6, 8]), (1, 8, 8), [6, 8]),
    "cnn, no norm": (_builtin("cnn", n_classes=5, in_channels=1, channels=[6, 8], norm="none"), (1, 8, 8), [6, 8]),
    "cnn, one group": (_builtin("cnn", n_classes=5, in_channels=1, channels=[6, 8], norm="layer"), (1, 8, 8), [6, 8]),
    # A stream and two inner widths in each of four stages.
    "resnet": (
        _builtin("resnet", n_classes=5, in_channels=1, width=4),
        (1, 8, 8),
        [4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32],
    ),
    # The stem's channels, then in each of three stages a stream and one inner width.
    "wide resnet": (
        _builtin("wide_resnet", n_classes=5, in_channels=1, depth=10, widen_factor=2),
        (1, 8, 8),
        [16, 32, 32, 64, 64, 128, 128],
    ),
}


def _network(key: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    architecture, shape, _ = NETWORKS[key]
    torch.manual_seed(seed)
    module = build(architecture, device="cpu").eval().requires_grad_(False)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return module, torch.randn(8, *shape, generator=torch.Generator().manual_seed(1))


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _shuffled(module: nn.Module, groups: list[PermutationGroup], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return permuted(_state(module), groups, [torch.randperm(group.size, generator=generator) for group in groups])


@pytest.mark.parametrize("key", NETWORKS)
def test_groups_are_what_theory_says(key: str) -> None:
    """The groups are the hidden widths: neither inputs nor classes are permuted."""
    module, inputs = _network(key)
    groups = permutation_groups(module, inputs[:2])
    assert sorted(group.size for group in groups) == sorted(NETWORKS[key][2])
    named = [axis for group in groups for axis in group.axes]
    assert len(named) == len(set(named))
    head = next(name for name in reversed(list(module.state_dict())) if name.endswith("weight"))
    assert (head, 0) not in named


@pytest.mark.parametrize("key", NETWORKS)
def test_permuting_a_group_changes_no_logit(key: str) -> None:
    """All groups at once, at random, with the running statistics; only the order of sums changes."""
    module, inputs = _network(key)
    groups = permutation_groups(module, inputs[:2])
    before = module(inputs)
    module.load_state_dict(_shuffled(module, groups, 3))
    assert check_same_function(before, module(inputs)) < 1e-5


@pytest.mark.parametrize("key", [key for key in NETWORKS if NETWORKS[key][2]])
def test_a_permuted_copy_is_recovered(key: str) -> None:
    """Weight matching finds the inverse permutation: the copy's tensors become the original's, bit for bit."""
    module, inputs = _network(key)
    original, groups = _state(module), permutation_groups(module, inputs[:2])
    shuffled = _shuffled(module, groups, 4)
    parameters = {name for name, _ in module.named_parameters()}
    ends = [{name: state[name] for name in parameters} for state in (original, shuffled)]
    alignment = weight_matching(groups, *ends, generator=torch.Generator().manual_seed(0))
    found = permuted(shuffled, groups, alignment.permutations)
    assert all(torch.equal(found[name], original[name]) for name in original)
    assert alignment.gain > 0
    again = weight_matching(groups, *ends, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(alignment.permutations, again.permutations, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_permuted_copy_has_a_barrier_without_alignment_and_none_with_it(name: str) -> None:
    """The loss between a network and its permuted copy, for mlp, cnn and resnet."""
    options, probe = EvaluationOptions(null_permutations=0), probe_of(name)
    inputs = next(probe.batches(8, device="cpu"))
    groups = permutation_groups(network_of(name, 0).module, inputs[:2])
    found = []
    for align in (False, True):
        first, second = network_of(name, 0), network_of(name, 0)
        second.module.load_state_dict(_shuffled(second.module, groups, 5))
        state = dict(second.module.state_dict())
        if align:
            state = aligned(first.module, second.module, inputs, generator=torch.Generator().manual_seed(0))[0]
        path, ws = Path(first, state), even_grid(5)
        losses = []
        for w in ws:
            loss = (
                evaluate_network(path.move_to(w), probe, device=torch.device("cpu"), options=options).splits["all"].loss
            )
            assert loss is not None
            losses.append(loss)
        # Random networks may lose less in the middle: a barrier is any departure from the chord.
        found.append(max(barrier(ws, losses).value, barrier(ws, losses, falls=True).value))
    assert found[0] > 1e-2
    assert found[1] < 1e-3


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), key=st.sampled_from(["mlp", "cnn", "wide resnet"]))
def test_alignment_of_two_networks_never_lowers_the_objective(seed: int, key: str) -> None:
    """The gain is the difference of the inner products before and after, and the function stays."""
    (first, inputs), (second, _) = _network(key, seed), _network(key, seed + 1)
    names = [name for name, _ in first.named_parameters()]

    def objective(state: dict[str, Tensor]) -> float:
        own = first.state_dict()
        return sum(float((own[name].double() * state[name].double()).sum()) for name in names)

    before = objective(_state(second))
    state, alignment, change = aligned(first, second, inputs, generator=torch.Generator().manual_seed(0))
    assert alignment.gain >= 0
    assert objective(state) - before == pytest.approx(alignment.gain, abs=1e-6)
    assert change < 1e-4


class _Of(nn.Module):
    """A network defined by a function of its parameters."""

    def __init__(self, compute: Any, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False))
        self.compute = compute

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.compute(self, inputs)
        return result


linear, conv2d, functional = nn.functional.linear, nn.functional.conv2d, nn.functional


@pytest.mark.parametrize(
    ("module", "shape", "sizes"),
    [
        # An operation along the units that has no rule, and one whose result depends on their order.
        (_Of(lambda m, x: linear(linear(x, m.a).cumsum(dim=1), m.b), a=(6, 4), b=(3, 6)), (4,), []),
        (_Of(lambda m, x: linear(linear(x, m.a).sort(dim=1).values, m.b), a=(6, 4), b=(3, 6)), (4,), []),
        # Channels that are merged with positions are fixed; with positions of size 1 they are not.
        (_Of(lambda m, x: linear(conv2d(x, m.a).flatten(1), m.b), a=(6, 1, 3, 3), b=(3, 24)), (1, 4, 4), []),
        (_Of(lambda m, x: linear(conv2d(x, m.a).flatten(1), m.b), a=(6, 1, 3, 3), b=(3, 6)), (1, 3, 3), [6]),
        # Depthwise convolution moves with its channels; other groups are fixed.
        (
            _Of(
                lambda m, x: linear(conv2d(conv2d(x, m.a), m.b, groups=6).mean(dim=(2, 3)), m.c),
                a=(6, 1, 1, 1), b=(6, 1, 3, 3), c=(3, 6),
            ),
            (1, 4, 4),
            [6],
        ),
        (
            _Of(
                lambda m, x: linear(conv2d(conv2d(x, m.a), m.b, groups=2).mean(dim=(2, 3)), m.c),
                a=(6, 1, 1, 1), b=(4, 3, 3, 3), c=(3, 4),
            ),
            (1, 4, 4),
            [],
        ),
        # Two branches that are added are one group, two that follow each other are fixed.
        (_Of(lambda m, x: linear(linear(x, m.a) + linear(x, m.b), m.c), a=(6, 4), b=(6, 4), c=(3, 6)), (4,), [6]),
        (
            _Of(
                lambda m, x: linear(torch.cat([linear(x, m.a), linear(x, m.b)], dim=1), m.c),
                a=(6, 4), b=(6, 4), c=(3, 12),
            ),
            (4,),
            [],
        ),
        # A scale of one number for all, and a residual stream whose square weight has it on both axes.
        (_Of(lambda m, x: linear(linear(x, m.a) * m.s, m.b), a=(6, 4), s=(1,), b=(3, 6)), (4,), [6]),
        (
            _Of(lambda m, x: linear((h := linear(x, m.a)) + linear(h, m.b), m.c), a=(6, 4), b=(6, 6), c=(3, 6)),
            (4,),
            [6],
        ),
        # What bounds each unit goes with it; bounds that are written down are fixed.
        (
            _Of(lambda m, x: linear(linear(x, m.a).clamp(min=m.s), m.b), a=(6, 4), s=(6,), b=(3, 6)),
            (4,),
            [6],
        ),
        (_Of(lambda m, x: linear(linear(x, m.a).clamp(min=torch.arange(6.0)), m.b), a=(6, 4), b=(3, 6)), (4,), []),
        # A product of two weights, added to a third.
        (
            _Of(
                lambda m, x: linear(linear(x, torch.addmm(m.c, m.a, m.b)), m.d),
                a=(6, 2), b=(2, 4), c=(6, 4), d=(3, 6),
            ),
            (4,),
            [2, 6],
        ),
        # Units that are pooled as positions are, without a batch before them.
        (
            _Of(
                lambda m, x: linear(x, m.b @ functional.max_pool2d(m.a[None], 2).squeeze(0)),
                a=(6, 8), b=(3, 3),
            ),
            (4,),
            [],
        ),
        (
            _Of(lambda m, x: linear(functional.prelu(linear(x, m.a), m.s), m.b), a=(6, 4), s=(6,), b=(3, 6)),
            (4,),
            [6],
        ),
        (
            _Of(lambda m, x: linear(functional.rms_norm(linear(x, m.a), (6,), m.s), m.b), a=(6, 4), s=(6,), b=(3, 6)),
            (4,),
            [6],
        ),
        (
            _Of(lambda m, x: linear(linear(x, m.a) * m.s.expand(len(x), 6), m.b), a=(6, 4), s=(6,), b=(3, 6)),
            (4,),
            [6],
        ),
        # One head of attention: queries with keys, values with what reads them.
        (
            _Of(
                lambda m, x: linear(
                    ((linear(x, m.q) @ linear(x, m.k).mT).softmax(-1) @ linear(x, m.v)).mean(dim=1), m.b
                ),
                q=(6, 4), k=(6, 4), v=(7, 4), b=(3, 7),
            ),
            (5, 4),
            [6, 7],
        ),
        # Constants, of the graph or picked by it, have an order of their own.
        (_Of(lambda m, x: linear(linear(x, m.a) * torch.tensor([1.0, 2, 3]), m.b), a=(3, 4), b=(3, 3)), (4,), []),
        (_Of(lambda m, x: linear(linear(x, m.a)[:, torch.tensor([1, 0])], m.b), a=(6, 4), b=(3, 2)), (4,), []),
    ],
    ids=[
        "no rule", "sorted", "merged with space", "merged with ones", "depthwise", "grouped", "added", "joined",
        "scaled", "square", "bounded", "bounded by a constant", "product and sum", "pooled without a batch", "prelu",
        "rms norm", "expanded", "attention", "constant", "indexed",
    ],
)  # fmt: skip
def test_what_is_tied_and_what_is_fixed(module: nn.Module, shape: tuple[int, ...], sizes: list[int]) -> None:
    """Operations one by one: the sizes of the groups, and logits that stay under any permutation."""
    inputs = torch.randn(5, *shape, generator=torch.Generator().manual_seed(2))
    groups = permutation_groups(module.eval(), inputs[:2])
    assert sorted(group.size for group in groups) == sizes
    before = module(inputs)
    module.load_state_dict(_shuffled(module, groups, 6))
    assert check_same_function(before, module(inputs)) < 1e-5


def test_a_buffer_that_no_checkpoint_holds_is_fixed() -> None:
    """Neither the buffer nor the axes multiplied with it are permuted."""
    module = _Of(lambda m, x: linear(torch.relu(linear(x, m.a)) * m.scales, m.b), a=(6, 4), b=(3, 6))
    module.register_buffer("scales", torch.arange(6.0), persistent=False)
    assert permutation_groups(module.eval(), torch.randn(2, 4)) == []


def test_a_weight_of_two_names_is_one_tensor() -> None:
    """Both names and both axes are in one group, since each use ties the axes of the other."""
    layers = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)]
    torch.manual_seed(0)
    module = nn.Sequential(*layers).eval().requires_grad_(False)
    module[4].weight = module[2].weight
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    (group,) = permutation_groups(module, inputs[:2])
    assert {("2.weight", 0), ("2.weight", 1), ("4.weight", 0), ("4.weight", 1)} <= set(group.axes)
    before = module(inputs)
    module.load_state_dict(_shuffled(module, [group], 6))
    assert check_same_function(before, module(inputs)) < 1e-5


def test_the_gain_counts_a_weight_of_two_names_once() -> None:
    """It is the increase of the inner product of the two ends' parameters."""
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    first, second = (nn.Sequential(*(nn.Linear(*shape) for shape in ((4, 6), (6, 6), (6, 6), (6, 3)))) for _ in "AB")
    for module in (first, second):
        module[2].weight = module[1].weight
        module.eval().requires_grad_(False)

    def product() -> float:
        pairs = zip(first.parameters(), second.parameters(), strict=True)
        return sum(float((a.double() * b.double()).sum()) for a, b in pairs)

    before = product()
    _, alignment, _ = aligned(first, second, inputs, generator=torch.Generator().manual_seed(0))
    assert alignment.gain > 0
    assert alignment.gain == pytest.approx(product() - before, rel=1e-4)


class _Keeps(nn.Module):
    """Caches a table at its first call; concatenates an empty tensor of one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, 4)
        hidden = torch.cat([torch.tensor([]), torch.relu(self.first(x + self.table))], 1)
        logits: Tensor = self.head(torch.relu(self.second(hidden)))
        return logits


def test_tracing_leaves_nothing_in_the_network() -> None:
    """Cached values are numbers, not the shapes of tracing."""
    torch.manual_seed(0)
    first, second = (_Keeps().eval().requires_grad_(False) for _ in range(2))
    inputs = torch.randn(5, 4)
    expected = second(inputs).clone()
    second.table = None
    _, alignment, _ = aligned(first, second, inputs, generator=torch.Generator().manual_seed(0))
    assert len(alignment.permutations) == 1
    torch.testing.assert_close(second(inputs), expected)


def test_a_network_that_looks_at_values_cannot_be_traced() -> None:
    """The error says so, and what to do."""
    module = _Of(lambda m, x: linear(torch.relu(x), m.a) if x.max() > 0 else linear(x, m.a), a=(3, 4))
    with pytest.raises(AnalysisError, match=r"cannot be traced.*alignment none") as caught:
        permutation_groups(module.eval(), torch.randn(2, 4))
    assert caught.value.kind == "alignment-failed"


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_square_weight_never_lowers_the_objective(seed: int) -> None:
    """For two unrelated networks a linear guess that would lose is not applied."""

    def compute(m: Any, x: Tensor) -> Tensor:
        return linear((h := linear(x, m.a)) + linear(h, m.b), m.c)

    module = _Of(compute, a=(6, 4), b=(6, 6), c=(3, 6))
    groups = permutation_groups(module.eval(), torch.randn(2, 4))
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        {name: torch.randn(tensor.shape, generator=generator).double() for name, tensor in module.state_dict().items()}
        for _ in range(2)
    )
    alignment = weight_matching(groups, first, second, generator=generator)
    moved = permuted(second, groups, alignment.permutations)
    gain = sum(float((first[name] * (moved[name] - second[name])).sum()) for name in first)
    assert alignment.gain >= 0
    assert gain == pytest.approx(alignment.gain, abs=1e-9)


def test_a_square_weight_is_matched_as_far_as_it_goes() -> None:
    """With one group on both axes the objective is quadratic: a step is applied only if it gains."""
    module = _Of(lambda m, x: linear((h := linear(x, m.a)) + linear(h, m.b), m.c), a=(6, 4), b=(6, 6), c=(3, 6))
    groups = permutation_groups(module.eval(), torch.randn(2, 4))
    original, shuffled = _state(module), _shuffled(module, groups, 7)
    alignment = weight_matching(groups, original, shuffled, generator=torch.Generator().manual_seed(0))
    found = permuted(shuffled, groups, alignment.permutations)
    assert all(torch.equal(found[name], original[name]) for name in original)


def test_a_network_that_computes_something_else_is_refused() -> None:
    """The error gives the change of the logits."""
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert check_same_function(logits, logits.clone()) == 0
    with pytest.raises(AnalysisError, match="of the largest") as caught:
        check_same_function(logits, logits + 0.01)
    assert caught.value.kind == "alignment-failed"
    assert caught.value.members["change"] > 1e-3
    with pytest.raises(AnalysisError):
        check_same_function(logits, logits * float("nan"))


def test_an_aligned_network_is_held_once() -> None:
    """The result are the second network's own tensors, so a path needs no fourth copy of the parameters."""
    (first, inputs), (second, _) = (_network("mlp", seed) for seed in (0, 1))
    state = aligned(first, second, inputs, generator=torch.Generator().manual_seed(0))[0]
    own = second.state_dict()
    assert all(tensor.data_ptr() == own[name].data_ptr() for name, tensor in state.items())


def test_the_gain_does_not_depend_on_what_tensors_are_called() -> None:
    """Names are hashed differently in each process; the last bit of a sum must not follow them."""
    generator = torch.Generator().manual_seed(0)
    first, second = ([torch.randn(6, generator=generator) for _ in range(12)] for _ in range(2))

    def gain(prefix: str) -> float:
        names = [f"{prefix}{number}" for number in range(12)]
        group = PermutationGroup(6, tuple((name, 0) for name in names))
        ends = (dict(zip(names, tensors, strict=True)) for tensors in (first, second))
        return weight_matching([group], *ends, generator=torch.Generator().manual_seed(0)).gain

    assert len({gain(prefix) for prefix in "abcdefghijklmnopqrst"}) == 1
