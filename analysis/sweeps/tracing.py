"""Find the axes of a network's tensors that belong together, from its computation as ATen operations.

Every axis of every tensor of the traced graph is an element of a union-find structure. An operation ties axes that
carry the same units (a weight's rows and its outputs), and blocks axes whose order has a meaning: inputs, logits,
positions in space, split, merged or indexed axes, and all axes that an operation without a rule touches.
"""

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import AnalysisError
from ..networks.loading import forget, parts_that_keep
from ..probes.inputs import Inputs

Axes = tuple[int, ...]
# Axes of a node's result, or of each part of it.
Result = tuple[Any, ...]


def tied_axes(module: nn.Module, example: Inputs) -> list[list[tuple[str, int]]]:
    """Return the axes of a network's parameters and buffers that any one permutation may move together.

    Args:
        module: in evaluation mode.
        example: an input.

    Returns:
        For each set of axes, name and dimension of its members.

    Raises:
        AnalysisError: `alignment-failed` where the computation depends on values, or has no rule for shapes.
    """
    state = dict(module.state_dict(keep_vars=True))
    graph = _traced(module, state, example)
    axes = _Axes()
    results: dict[fx.Node, Result] = {}
    places = [node for node in graph.nodes if node.op == "placeholder"]
    owned: dict[int, Axes] = {}
    for tensor, node in zip(state.values(), places[: len(state)], strict=True):
        results[node] = owned.setdefault(id(tensor), axes.new(tensor.ndim))
    for node in places[len(state) :]:
        results[node] = axes.new(node.meta["val"].ndim, blocked=True)
    for node in graph.nodes:
        if node.op == "get_attr":
            # Its order is fixed: a constant outside the state is never permuted.
            results[node] = axes.new(node.meta["val"].ndim, blocked=True)
        elif node.op == "call_function":
            results[node] = _apply(axes, node, results)
        elif node.op == "output":
            axes.block([axis for used in node.all_input_nodes for axis in _flat(results[used])])
    groups: dict[int, list[tuple[str, int]]] = {}
    for name, node in zip(state, places[: len(state)], strict=True):
        for dim, axis in enumerate(_flat(results[node])):
            if not axes.is_blocked(axis):
                groups.setdefault(axes.root(axis), []).append((name, dim))
    return list(groups.values())


def _traced(module: nn.Module, state: dict[str, Tensor], example: Inputs) -> fx.Graph:
    """Return the network's operations, traced by shapes without computing; tensors outside the state are constants."""
    # Tensors cached for the network's next call would have no values: a copy with the same parameters caches them.
    shell = copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
    forget(parts_that_keep(shell))

    def compute(tensors: dict[str, Tensor], inputs: Inputs) -> Any:
        """Call the network with these tensors in place of its own."""
        # A tensor with two names is passed twice; its axes are tied below.
        return functional_call(shell, tensors, (inputs,), tie_weights=False)

    traced = make_fx(compute, tracing_mode="fake", _allow_non_fake_inputs=True)
    try:
        return traced({name: tensor.detach() for name, tensor in state.items()}, example).graph
    except Exception as error:
        # Library code that reads values, or an operation without support for fake tensors, may raise anything.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise AnalysisError(
            "alignment-failed",
            f"The network cannot be traced to find the units that can be permuted: {reason} Use alignment none.",
        ) from error


class _Axes:
    """Union-find over axes; a set with a blocked member is blocked."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._blocked: list[bool] = []

    def new(self, count: int, *, blocked: bool = False) -> Axes:
        """Return new axes, each a set of its own."""
        first = len(self._parents)
        self._parents += range(first, first + count)
        self._blocked += [blocked] * count
        return tuple(range(first, first + count))

    def root(self, axis: int) -> int:
        """Return the representative of an axis's set."""
        while self._parents[axis] != axis:
            self._parents[axis] = axis = self._parents[self._parents[axis]]
        return axis

    def tie(self, first: int, second: int) -> None:
        """Join the sets of two axes."""
        first, second = self.root(first), self.root(second)
        self._parents[second] = first
        self._blocked[first] |= self._blocked[second]

    def block(self, several: Sequence[int]) -> None:
        """Block the sets of these axes."""
        for axis in several:
            self._blocked[self.root(axis)] = True

    def is_blocked(self, axis: int) -> bool:
        """Return whether the axis's set is blocked."""
        return self._blocked[self.root(axis)]


class _Call:
    """An operation of the graph: its arguments by position, axes in place of tensors, and the shapes involved."""

    def __init__(self, node: fx.Node, results: dict[fx.Node, Result]) -> None:
        self.args: list[Any] = list(node.args)
        self.kwargs = node.kwargs
        self.results = results
        self.value: Any = node.meta.get("val")

    def axes(self, position: int) -> Axes:
        """Return the axes of the tensor at a position."""
        return _flat(self.results[self.args[position]])

    def optional(self, position: int) -> Axes:
        """Return the axes of an optional tensor, such as a bias; empty if it is missing."""
        given = self.args[position] if position < len(self.args) else None
        return _flat(self.results[given]) if isinstance(given, fx.Node) else ()

    def shape(self, position: int) -> list[int]:
        """Return the shape of the tensor at a position."""
        return list(self.args[position].meta["val"].shape)

    def get(self, position: int, default: Any = None) -> Any:
        """Return the argument at a position, or the default."""
        return self.args[position] if position < len(self.args) else default


def _apply(axes: _Axes, node: fx.Node, results: dict[fx.Node, Result]) -> Result:
    if node.target is operator.getitem:
        whole, index = list[Any](node.args)
        part: Result = results[whole][index]
        return part
    rule = _RULES.get(str(getattr(node.target, "overloadpacket", None)).removeprefix("aten."))
    # Rules see only positional tensors: a keyword tensor (for example `out`) is unknown to them.
    if rule is not None and not any(isinstance(given, fx.Node) for given in node.kwargs.values()):
        return rule(axes, _Call(node, results))
    for used in node.all_input_nodes:
        axes.block(_flat(results[used]))
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return tuple(axes.new(getattr(part, "ndim", 0), blocked=True) for part in value)
    return axes.new(getattr(value, "ndim", 0), blocked=True)


def _flat(result: Result) -> Axes:
    return tuple(axis for part in result for axis in (part if isinstance(part, tuple) else (part,)))


Rule = Callable[[_Axes, _Call], Result]


def _elementwise(axes: _Axes, call: _Call) -> Result:
    """Tie axes of elementwise operations with broadcasting; also of a softmax, which commutes with a permutation."""
    found: list[int | None] = [None] * call.value.ndim
    for position, given in enumerate(call.args):
        if isinstance(given, fx.Node):
            _broadcast(axes, call, position, found)
    # A value repeated along an axis is the same in any order.
    return tuple(axes.new(1)[0] if axis is None else axis for axis in found)


def _broadcast(axes: _Axes, call: _Call, position: int, found: list[int | None]) -> None:
    """Tie one argument's axes to those found so far for the result, from the last to the first."""
    shape, own = call.shape(position), call.axes(position)
    for dim, axis in enumerate(own):
        place = len(found) - len(own) + dim
        if shape[dim] == 1 and call.value.shape[place] != 1:
            continue
        tied = found[place]
        if tied is None:
            found[place] = axis
        else:
            axes.tie(tied, axis)


def _convolution(axes: _Axes, call: _Call) -> Result:
    inputs, weight, bias = call.axes(0), call.axes(1), call.optional(2)
    transposed, groups = call.get(6, False), call.get(8, 1)
    into, out = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    shape = call.shape(1)
    if groups == 1:
        axes.tie(inputs[1], into)
    elif groups == shape[0] == call.shape(0)[1] and not transposed:
        axes.tie(inputs[1], out)
    else:
        axes.block([inputs[1], into, out])
    for axis in bias:
        axes.tie(out, axis)
    # Positions in kernels and images have a fixed order.
    axes.block([*weight[2:], *inputs[2:]])
    return (inputs[0], out, *axes.new(len(inputs) - 2, blocked=True))


def _batch_norm(axes: _Axes, call: _Call) -> Result:
    """Tie weight, bias, running mean and variance to the channels."""
    inputs = call.axes(0)
    for position in range(1, 5):
        for axis in call.optional(position):
            axes.tie(inputs[1], axis)
    return _beside(axes, call, inputs)


def _layer_norm(axes: _Axes, call: _Call) -> Result:
    """Tie scale and shift to the normalised axes; mean and variance do not depend on their order."""
    inputs = call.axes(0)
    for position in (2, 3):
        own = call.optional(position)
        for axis, with_ in zip(own, inputs[len(inputs) - len(own) :], strict=True):
            axes.tie(with_, axis)
    return _beside(axes, call, inputs)


def _group_norm(axes: _Axes, call: _Call) -> Result:
    inputs = call.axes(0)
    for position in (1, 2):
        for axis in call.optional(position):
            axes.tie(inputs[1], axis)
    if call.get(6) != 1:
        axes.block([inputs[1]])
    return _beside(axes, call, inputs)


def _beside(axes: _Axes, call: _Call, first: Axes) -> Result:
    """Return a result of several parts, the first of which the network uses further."""
    return (first, *(axes.new(getattr(part, "ndim", 0), blocked=True) for part in call.value[1:]))


def _addmm(axes: _Axes, call: _Call) -> Result:
    first, second = call.axes(1), call.axes(2)
    axes.tie(first[1], second[0])
    _broadcast(axes, call, 0, [first[0], second[1]])
    return (first[0], second[1])


def _matmul(axes: _Axes, call: _Call) -> Result:
    """Tie axes of mm and bmm."""
    first, second = call.axes(0), call.axes(1)
    axes.tie(first[-1], second[-2])
    for one, other in zip(first[:-2], second[:-2], strict=True):
        axes.tie(one, other)
    return (*first[:-1], second[-1])


def _linear(axes: _Axes, call: _Call) -> Result:
    inputs, weight = call.axes(0), call.axes(1)
    axes.tie(inputs[-1], weight[1])
    for axis in call.optional(2):
        axes.tie(weight[0], axis)
    return (*inputs[:-1], weight[0])


def _embedding(axes: _Axes, call: _Call) -> Result:
    weight, indices = call.axes(0), call.axes(1)
    axes.block([weight[0]])
    return (*indices, weight[1])


def _transpose(axes: _Axes, call: _Call) -> Result:
    found = list(call.axes(0))
    first, second = call.get(1, 0), call.get(2, 1)
    if len(found) > 1:
        found[first], found[second] = found[second], found[first]
    return tuple(found)


def _permute(axes: _Axes, call: _Call) -> Result:
    own = call.axes(0)
    return tuple(own[dim] for dim in call.args[1])


def _reduce(axes: _Axes, call: _Call) -> Result:
    own = call.axes(0)
    given = call.get(1)
    dims = {dim % len(own) for dim in ([given] if isinstance(given, int) else given or range(len(own)))}
    if call.value.ndim == len(own):
        return tuple(axes.new(1)[0] if dim in dims else axis for dim, axis in enumerate(own))
    return tuple(axis for dim, axis in enumerate(own) if dim not in dims)


def _pool(axes: _Axes, call: _Call) -> Result:
    """Block the last two axes, over which it pools, with or without a batch before the channels."""
    own = call.axes(0)
    axes.block(own[-2:])
    found = (*own[:-2], *axes.new(2, blocked=True))
    return (found, axes.new(len(own), blocked=True)) if isinstance(call.value, (tuple, list)) else found


def _view(axes: _Axes, call: _Call) -> Result:
    """Keep axes that stay whole; block axes that are split or merged."""
    before, after, own = call.shape(0), list(call.value.shape), call.axes(0)
    found: list[int] = []
    first = last = 0
    while first < len(before) or last < len(after):
        # The next run of axes on both sides with the same number of elements.
        start, stop = first, last
        old = new = 1
        if first < len(before):
            old, first = before[first], first + 1
        if last < len(after):
            new, last = after[last], last + 1
        while old != new:
            if old < new:
                old, first = old * before[first], first + 1
            else:
                new, last = new * after[last], last + 1
        many = [dim for dim in range(start, first) if before[dim] != 1]
        into = [dim for dim in range(stop, last) if after[dim] != 1]
        whole = len(many) == 1 == len(into)
        if not whole:
            axes.block([own[dim] for dim in many])
        found += [
            own[many[0]] if whole and dim in into else axes.new(1, blocked=not whole)[0] for dim in range(stop, last)
        ]
    return tuple(found)


def _cat(axes: _Axes, call: _Call) -> Result:
    """Block the axis of concatenation; tie the other axes of the parts."""
    # torch allows an empty one-dimensional tensor among any others.
    parts = [_flat(call.results[part]) for part in call.args[0] if list(part.meta["val"].shape) != [0]]
    dim = call.get(1, 0) % len(parts[0])
    for part in parts:
        axes.block([part[dim]])
        for place, axis in enumerate(part):
            if place != dim:
                axes.tie(parts[0][place], axis)
    return tuple(axes.new(1, blocked=True)[0] if place == dim else axis for place, axis in enumerate(parts[0]))


_ELEMENTWISE = (
    "relu", "relu_", "gelu", "tanh", "sigmoid", "silu", "silu_", "elu", "leaky_relu", "hardtanh", "hardtanh_",
    "hardswish", "hardswish_", "hardsigmoid", "mish", "softplus", "_prelu_kernel", "clamp", "clamp_min", "clamp_max",
    "neg", "exp", "log", "sqrt", "rsqrt", "reciprocal", "abs", "square", "pow", "erf", "sin", "cos", "clone", "detach",
    "alias", "_to_copy", "contiguous", "expand", "_softmax", "add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div",
    "div_", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "where", "masked_fill",
)  # fmt: skip
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "convolution": _convolution,
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
        _batch_norm,
    ),
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "addmm": _addmm,
    "mm": _matmul,
    "bmm": _matmul,
    "linear": _linear,
    "embedding": _embedding,
    "t": _transpose,
    "transpose": _transpose,
    "permute": _permute,
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduce),
    **dict.fromkeys(
        ("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool2d"), _pool
    ),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "flatten", "unsqueeze", "squeeze"), _view),
    "cat": _cat,
}
