"""What a graph may not be or do, and what the errors say."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from analysis.errors import AnalysisError
from analysis.networks import exported as family
from analysis.networks.exported.graph import Node
from analysis.networks.exported.operations import allowed, operations
from analysis.networks.exported.rules import inner_size
from analysis.networks.loading import available_families, names_of
from tests.analysis.networks.exported.conftest import Exported, graph_of

Change = Callable[[dict[str, Any]], object]


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.fc = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(torch.relu(self.norm(self.inner(x))))
        return logits


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    return graph_of(_Small(), torch.zeros(2, 3))


def _created(graph: Any) -> nn.Module:
    """Build a network as the first time, without memory."""
    with torch.device("meta"):
        return family.create({"family": "exported", "graph": graph})


def _node(graph: dict[str, Any], operation: str) -> Any:
    return next(node for node in graph["nodes"] if node[0].startswith(f"aten.{operation}."))


def _inserted(node: list[Any]) -> Change:
    """Return a change that puts a node before the first, which uses only tensors and inputs."""

    def change(graph: dict[str, Any]) -> None:
        first = len(graph["tensors"]) + len(graph["inputs"])
        _shift(graph, first, node[2])
        graph["nodes"].insert(0, node)

    return change


def _shift(value: Any, first: int, by: int) -> None:
    """Add to the numbers of all values from `first` on."""
    if isinstance(value, dict):
        if "logits" in value:
            value["logits"][0] += by
        for key, one in value.items():
            if key == "ref" and one >= first:
                value[key] = one + by
            else:
                _shift(one, first, by)
    elif isinstance(value, list):
        for one in value:
            _shift(one, first, by)


def _zeros(size: list[int], dtype: str) -> list[Any]:
    return ["aten.zeros.default", {"size": size, "dtype": {"dtype": dtype}}, 1]


REFUSED: dict[str, tuple[Change, str]] = {
    "another form": (lambda g: g.update(version=2), "has the form 2; this worker reads 1"),
    "a member too many": (lambda g: g.update(code="x"), "must have the members"),
    "a cycle": (lambda g: _node(g, "linear")[1].update(input={"ref": 11}), "uses the value 11, which is not there"),
    "an unknown value": (lambda g: _node(g, "relu")[1].update(self={"ref": -1}), "uses the value -1"),
    "a truth for a number": (lambda g: _node(g, "relu")[1].update(self={"ref": True}), "not allowed: {'ref': True}"),
    "an argument of code": (lambda g: _node(g, "relu")[1].update({"a b": 1}), "arguments that are no names"),
    "an argument that there is not": (lambda g: _node(g, "relu")[1].update(out=None), "has no argument 'out'"),
    "a missing argument": (lambda g: _node(g, "relu")[1].clear(), "misses its argument 'self'"),
    "a huge number": (lambda g: _node(g, "relu")[1].update(self=2**63), "not allowed: 9223372036854775808"),
    "results that there are not": (lambda g: _node(g, "relu").__setitem__(2, 2), "has 1 results; the graph says 2"),
    "two tensors of a name": (lambda g: g["tensors"].append(g["tensors"][0]), "Two tensors"),
    "a name of torch's own": (lambda g: g["tensors"][0].__setitem__(0, "forward"), "no name that a module can have"),
    "a module that is a tensor": (lambda g: g["tensors"][1].__setitem__(0, "inner.weight.x"), "no name that a module"),
    "a name that is not printable": (lambda g: g["tensors"][0].__setitem__(0, "a\x00"), "must be [name, parameter"),
    "a type that there is not": (lambda g: g["tensors"][0].__setitem__(2, "os.system"), "has the dtype 'os.system'"),
    "no batch": (lambda g: g["inputs"][0].__setitem__(2, []), "one dimension at least"),
    "a size below zero": (lambda g: g["inputs"][0].__setitem__(2, [-1, 3]), "must be a size or a range"),
    "other logits than stated": (lambda g: g["logits"].__setitem__(1, [2, 2, 2]), "it states [2, 2, 2]"),
    "training": (lambda g: _node(g, "batch_norm")[1].update(training=True), "Call model.eval() before"),
    "a dropout in training": (
        _inserted(["aten.dropout.default", {"input": {"ref": 8}, "p": 0.5, "train": True}, 1]),
        "Call model.eval() before",
    ),
    "a dropout that does not say": (
        _inserted(["aten.native_dropout.default", {"input": {"ref": 8}, "p": 0.5, "train": None}, 2]),
        "Call model.eval() before",
    ),
    "a write into a weight": (
        _inserted(["aten.relu_.default", {"self": {"ref": 0}}, 1]), "writes into a weight, a buffer or an input",
    ),
    "a write into an input": (
        _inserted(["aten.zero_.default", {"self": {"ref": 8}}, 1]), "writes into a weight, a buffer or an input",
    ),
    "a write into a view of a weight": (
        lambda g: (
            _inserted(["aten.relu_.default", {"self": {"ref": 9}}, 1])(g),
            _inserted(["aten.t.default", {"self": {"ref": 0}}, 1])(g),
            g["nodes"][1][1].update(self={"ref": 9}),
        ),
        "writes into a weight, a buffer or an input",
    ),
    "an input of endless sizes": (
        lambda g: g["inputs"][0].__setitem__(2, [2**31 - 1, 2**31 - 1, 6, 3]), "The graph's input 'x' has",
    ),
    "far too much memory": (
        _inserted(["aten.zeros.default", {"size": [2**20, 2**20]}, 1]), "makes a tensor of 4398046511104 bytes",
    ),
    "windows that are copied side by side": (
        lambda g: (
            _inserted(["aten.conv3d.default", {"input": {"ref": 9}, "weight": {"ref": 10}, "padding": [32] * 3}, 1])(g),
            _inserted(_zeros([64, 64, 65, 65, 65], "float64"))(g),
            _inserted(_zeros([1, 64, 64, 64, 64], "float64"))(g),
            g["nodes"][2][1].update(input={"ref": 9}, weight={"ref": 10}),
        ),
        "unfolds its input to",
    ),
    "a pool of endless windows": (
        lambda g: (
            _inserted(["aten.max_pool3d.default", {"self": {"ref": 9}, "kernel_size": [2**11] * 3, "stride": [1] * 3,
                                                   "padding": [2**10] * 3}, 1])(g),
            _inserted(_zeros([1, 1, 2**10, 2**10, 2**10], "float32"))(g),
            g["nodes"][1][1].update(self={"ref": 9}),
        ),
        "multiplications a batch",
    ),
    "far too many pieces": (
        lambda g: (
            _inserted(["aten.unbind.int", {"self": {"ref": 9}}, 3])(g),
            _inserted(["aten.zeros.default", {"size": [10**9]}, 1])(g),
            g["nodes"][1][1].update(self={"ref": 9}),
        ),
        "makes 1000000000 tensors; the graph has 3",
    ),
    "arithmetic beyond bounds": (
        _inserted(["_operator.mul", {"a": 2**40, "b": 2**40}, 1]), "a size of 1208925819614629174706176 is beyond",
    ),
    "arithmetic of tensors": (
        _inserted(["_operator.add", {"a": {"ref": 0}, "b": 1}, 1]), "a size must be a number, not a Parameter",
    ),
    "a number for a type": (
        _inserted(["aten._to_copy.default", {"self": {"ref": 8}, "dtype": -1}, 1]), "has '-1' for its argument 'dtype'",
    ),
    "a text for a device": (
        _inserted(["aten._to_copy.default", {"self": {"ref": 8}, "device": "meta"}, 1]), "for its argument 'device'",
    ),
    "a type for a number": (
        _inserted(["aten.select.int", {"self": {"ref": 8}, "dim": {"dtype": "int8"}, "index": 0}, 1]), "argument 'dim'",
    ),
    "a division that ends the process": (
        lambda g: (
            _inserted(["aten.div.Scalar_mode", {"self": {"ref": 9}, "other": -1, "rounding_mode": "trunc"}, 1])(g),
            _inserted(["aten.full.default", {"size": [2], "fill_value": -(2**63)}, 1])(g),
            g["nodes"][1][1].update(self={"ref": 9}),
        ),
        "divides whole numbers and rounds to zero",
    ),
    "lengths of no direction": (
        lambda g: (
            _inserted(["aten._weight_norm.default", {"v": {"ref": 9}, "g": {"ref": 10}}, 1])(g),
            _inserted(["aten.zeros.default", {"size": [0, 1]}, 1])(g),
            _inserted(["aten.zeros.default", {"size": [0, 3]}, 1])(g),
            g["nodes"][2][1].update(v={"ref": 9}, g={"ref": 10}),
        ),
        "that do not fit each other",
    ),
    "a region without an end": (_inserted(["region.autocast_off", {}, 0]), "a region that it does not end"),
    "an end without a region": (_inserted(["region.end", {}, 0]), "a region that it has not begun"),
    "sizes that do not fit": (lambda g: g["inputs"][0].__setitem__(2, [[2, None], 5]), "aten.linear.default, fails"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_graph_that_is_not_right_is_refused_in_words(name: str, small: dict[str, Any]) -> None:
    """Before anything has memory; the error says where and what."""
    change, said = REFUSED[name]
    graph = copy.deepcopy(small)
    _created(graph)
    change(graph)
    with pytest.raises(AnalysisError) as caught:
        _created(graph)
    assert caught.value.kind == "invalid-architecture"
    assert said in caught.value.detail


@pytest.mark.parametrize(
    "operation",
    [
        "os.system", "builtins.exec", "_operator.pow", "_operator.getitem", "torch.load", "aten.from_file.default",
        "aten.set_.source_Tensor", "aten.as_strided.default", "aten.bernoulli.default", "aten.randn.default",
        "aten.nonzero.default", "aten.item.default", "aten.add.out", "aten.add", "aten.__class__.default",
        "aten.mul.left_t", "aten.narrow.Tensor",
        "aten.repeat_interleave.self_Tensor",
        "prims.add.default", "higher_order.cond", "aten.resize_.default", "aten.empty_like.default",
    ],
)  # fmt: skip
def test_an_operation_that_is_not_on_the_list_is_named(operation: str, small: dict[str, Any]) -> None:
    """Random numbers, files, sizes that depend on values, other libraries, lists and texts: none is allowed."""
    assert operation not in allowed()
    graph = copy.deepcopy(small)
    graph["nodes"].insert(0, [operation, {}, 0])
    with pytest.raises(AnalysisError) as caught:
        _created(graph)
    assert caught.value.members["operations"] == [operation]


def test_all_unknown_operations_are_named_at_once(small: dict[str, Any]) -> None:
    """So that a user can see what stands in the way."""
    graph = copy.deepcopy(small)
    graph["nodes"] = [*([f"my.op{n}", {}, 0] for n in range(30)), *graph["nodes"]]
    with pytest.raises(AnalysisError, match=r"uses 30 operations that this worker does not run: my\.op0, ") as caught:
        _created(graph)
    assert len(caught.value.members["operations"]) == 30


def test_no_operation_on_the_list_is_random_or_writes_elsewhere() -> None:
    """By what torch itself says of each: it is random by a flag alone, and writes into its first argument alone."""
    for name, overload in operations().items():
        schema = overload._schema
        written = [argument.name for argument in schema.arguments if argument.is_write]
        assert len(written) <= 1, name
        assert not written or schema.arguments[0].is_write, name
        random = torch.Tag.nondeterministic_seeded in overload.tags
        # Their flags of training, which graphs may not set, make them so.
        flags = {"train", "training", "dropout_p"} & {argument.name for argument in schema.arguments}
        assert not random or flags, name
        assert torch.Tag.data_dependent_output not in overload.tags, name


def test_the_family_offers_its_operations() -> None:
    """The service refuses a graph with others when it arrives."""
    assert "exported" in available_families()
    assert names_of("exported") == sorted(allowed())


class _Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.fc = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.cells(x)[0].mean(1))
        return logits


@pytest.mark.parametrize(("sides", "cost"), [(3, 27), ([3], 27), ([2, 3, 4], 24)])
def test_windows_of_pools_count_as_cost(sides: int | list[int], cost: int) -> None:
    """One side is that of all dimensions, also as a list of one."""
    node = Node("aten.max_pool3d.default", {}, 0, 1)
    assert inner_size(node, {"self": torch.zeros(1, 1, 4, 4, 4, device="meta"), "kernel_size": sides}) == cost


def test_a_long_loop_is_not_run_to_be_looked_at() -> None:
    """A recurrent network of 4,000 steps has its sizes looked at in its first ones; of two million it is refused."""
    graph = graph_of(_Loop(), torch.zeros(2, 5, 3))
    graph["inputs"][0][2][1] = 4000
    _created(graph)
    graph["inputs"][0][2][1] = 2_000_000
    with pytest.raises(AnalysisError, match="is a loop of 2000000 steps"):
        _created(graph)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (torch.zeros(3, 4), "float32 [2 or more, 3]; it got float32 ['n', 4]"),
        (torch.zeros(3, 3, dtype=torch.int64), "it got int64 ['n', 3]"),
        (torch.zeros(3, 3, 3), "it got float32 ['n', 3, 3]"),
        ({"words": torch.zeros(3, 3)}, "was exported with the inputs x; it got words"),
        ({"x": torch.zeros(3, 3), "y": torch.zeros(3, 3)}, "with the inputs x; it got x, y"),
    ],
)
def test_other_inputs_are_refused_in_words(inputs: Any, said: str, exported: Exported) -> None:
    """The error has the names and sizes that the network was exported with."""
    network = exported(_Small().eval(), torch.zeros(2, 3))
    with pytest.raises(AnalysisError) as caught:
        network.module(inputs)
    assert caught.value.kind == "inputs-refused"
    assert said in caught.value.detail


def test_a_write_that_only_one_sample_leads_into_a_weight_is_refused() -> None:
    """A repeated row is copied, and a single one is the weight itself: it is looked at where it runs, too."""
    graph = {
        "version": 1,
        "tensors": [["w", "parameter", "float32", [1, 5]]],
        "inputs": [["x", "float32", [[1, None], 5]]],
        "nodes": [
            ["aten.sym_size.int", {"self": {"ref": 1}, "dim": 0}, 1],
            ["aten.expand.default", {"self": {"ref": 0}, "size": [{"ref": 2}, 5]}, 1],
            ["aten.contiguous.default", {"self": {"ref": 3}}, 1],
            ["aten.add_.Tensor", {"self": {"ref": 4}, "other": {"ref": 1}}, 1],
        ],
        "logits": [5, [[1, None], 5]],
    }
    network = family.create({"family": "exported", "graph": graph}).eval().requires_grad_(False)
    weight = network.get_parameter("w").zero_()
    network(torch.ones(2, 5))
    with pytest.raises(AnalysisError, match="writes into a weight"):
        network(torch.ones(1, 5))
    assert not weight.any()


def test_sizes_that_shrink_are_looked_at_each_time() -> None:
    """A smaller batch may need more memory than a larger one that has run."""
    graph = {
        "version": 1,
        "tensors": [],
        "inputs": [["x", "float32", [[2, None], 5]]],
        "nodes": [
            ["aten.sym_size.int", {"self": {"ref": 0}, "dim": 0}, 1],
            ["_operator.sub", {"a": 4, "b": {"ref": 1}}, 1],
            ["_operator.mul", {"a": {"ref": 2}, "b": 2**40}, 1],
            ["torch.sym_max", {"a": {"ref": 3}, "b": 0}, 1],
            ["aten.zeros.default", {"size": [{"ref": 4}]}, 1],
            ["aten.sum.default", {"self": {"ref": 5}}, 1],
            ["aten.add.Tensor", {"self": {"ref": 0}, "other": {"ref": 6}}, 1],
        ],
        "logits": [7, [[2, None], 5]],
    }
    network = family.create({"family": "exported", "graph": graph})
    network(torch.ones(4, 5))
    for n, n_bytes in ((2, 8796093022208), (3, 4398046511104)):
        with pytest.raises(AnalysisError, match=f"makes a tensor of {n_bytes} bytes"):
            network(torch.ones(n, 5))


def test_what_a_narrow_network_copies_is_still_a_copy(exported: Exported) -> None:
    """Of bfloat16 `float()` is a copy; where both are float32 a write into it would change its source."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fc = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inner(x)
            wide = h.float()
            wide.mul_(0)
            logits: torch.Tensor = self.fc(h + wide.to(torch.bfloat16))
            return logits

    torch.manual_seed(0)
    model = Scaled().to(torch.bfloat16)
    network = exported(model, torch.ones(2, 3, dtype=torch.bfloat16))
    x, whole = torch.randn(5, 3), Scaled()
    whole.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    assert torch.allclose(network.module(x), whole.fc(whole.inner(x)), atol=1e-6)


def test_a_half_precision_network_computes_in_float32(exported: Exported) -> None:
    """Weights become float32, and so do the types that its own graph asks for."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.fc((x.float() * 2).to(torch.bfloat16) + torch.ones(3, dtype=torch.bfloat16))
            return logits

    torch.manual_seed(0)
    model = Half().to(torch.bfloat16)
    network = exported(model, torch.zeros(2, 3, dtype=torch.bfloat16))
    x = torch.randn(5, 3)
    weight, bias = model.fc.weight.float(), model.fc.bias.float()
    assert torch.allclose(network.module(x), (2 * x + 1) @ weight.T + bias, atol=1e-6)


def test_regions_without_autocast_stay_without(exported: Exported) -> None:
    """Under bfloat16 what the network computes in float32 by itself is still float32."""

    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fc = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                x = self.inner(x)
            logits: torch.Tensor = self.fc(x)
            return logits

    torch.manual_seed(0)
    model, x = Careful().eval(), torch.randn(5, 8)
    network = exported(model, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network.module(x), model(x))
        assert not torch.equal(model(x), model.fc(model.inner(x)))
