"""What must be known of single operations: flags of training, checks before they run, costs, weights they multiply."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..building import refused
from .graph import Graph, Node, Ref

# The most steps of a recurrent network's loop, over all layers and directions, and those that run without memory, where
# each takes milliseconds. The most operands of an einsum.
_MAX_STEPS, _STEPS_WITHOUT_MEMORY, _MAX_OPERANDS = 2**20, 2, 8

# Operations whose kernels trust their arguments' sizes, and the one to run in their place. Results beyond the first are
# for the gradient.
_REWRITTEN: Mapping[str, tuple[str, Mapping[str, str | bool]]] = {
    "aten._native_batch_norm_legit_no_training.default": (
        "aten.batch_norm.default",
        {"weight": "weight", "bias": "bias", "running_mean": "running_mean", "running_var": "running_var",
         "momentum": "momentum", "eps": "eps", "training": False},
    ),
    "aten.native_batch_norm.default": (
        "aten.batch_norm.default",
        {"weight": "weight", "bias": "bias", "running_mean": "running_mean", "running_var": "running_var",
         "momentum": "momentum", "eps": "eps", "training": "training"},
    ),
    "aten.cudnn_batch_norm.default": (
        "aten.batch_norm.default",
        {"weight": "weight", "bias": "bias", "running_mean": "running_mean", "running_var": "running_var",
         "momentum": "exponential_average_factor", "eps": "epsilon", "training": "training"},
    ),
    "aten.native_group_norm.default": (
        "aten.group_norm.default", {"num_groups": "group", "weight": "weight", "bias": "bias", "eps": "eps"},
    ),
    "aten._weight_norm_interface.default": ("aten._weight_norm.default", {"v": "v", "g": "g", "dim": "dim"}),
}  # fmt: skip


def rewritten(node: Node) -> Node:
    """Return a node with an operation that checks its arguments, in place of one that does not."""
    if node.operation not in _REWRITTEN:
        return node
    operation, names = _REWRITTEN[node.operation]
    arguments = {
        name: of if isinstance(of, bool) else node.arguments.get(of)
        for name, of in names.items()
        if isinstance(of, bool) or of in node.arguments
    }
    first = {name: node.arguments[name] for name in ("input",) if name in node.arguments}
    return Node(operation, first | arguments, node.first, node.n_results)


def check_flags(node: Node, where: str) -> None:
    """Refuse a node that does something else in training, unless it is in evaluation mode.

    Raises:
        AnalysisError: `invalid-architecture`.
    """
    given = node.arguments
    # A recurrent network in training mode computes the same, unless it drops values between its layers.
    recurrent = "has_biases" in given
    training = given.get("training", given.get("train")) not in (None, False)
    # Without a word on training it is random.
    training |= _name(node) == "native_dropout" and given.get("train") is None
    drops = given.get("dropout" if recurrent else "dropout_p") not in (None, 0)
    normalises = _name(node) in ("batch_norm", "instance_norm")
    # Without running statistics, as for weights that are standardised, it is the same in both modes.
    keeps_none = given.get("running_mean") is None and given.get("running_var") is None
    updates = given.get("use_input_stats", False) is not False and not keeps_none
    if (
        updates
        or (drops and (training or not recurrent))
        or (training and not recurrent and not (normalises and keeps_none))
    ):
        raise refused(f"{where} is in training mode. Call model.eval() before the network is exported")


def check_before(node: Node, arguments: Mapping[str, Any], where: str) -> None:
    """Check what running an operation would cost, where that is far more than its result shows.

    Args:
        node: of the graph.
        arguments: its arguments, with tensors without memory.
        where: its place, for errors.

    Raises:
        AnalysisError: `invalid-architecture`.
    """
    name = _name(node)
    if name in _PIECES:
        pieces = _PIECES[name](arguments)
        if pieces > node.n_results:
            raise refused(f"{where} makes {pieces} tensors; the graph has {node.n_results} of them")
    elif name in _RECURRENT:
        steps = _recurrent_steps(arguments)
        if steps > _MAX_STEPS:
            raise refused(f"{where} is a loop of {steps} steps; at most {_MAX_STEPS} are allowed")
    elif arguments.get("rounding_mode") == "trunc" and not any(map(_is_floating, arguments.values())):
        # Division of the least number by -1 ends the process.
        raise refused(f"{where} divides whole numbers and rounds to zero, which is not allowed")
    elif name == "einsum" and len(arguments.get("tensors", ())) > _MAX_OPERANDS:
        raise refused(f"{where} multiplies {len(arguments['tensors'])} tensors; at most {_MAX_OPERANDS} are allowed")
    elif name == "_weight_norm" and not _weight_norm_fits(
        arguments.get("v"), arguments.get("g"), arguments.get("dim", 0)
    ):
        raise refused(f"{where} has a direction and lengths that do not fit each other")


def inner_size(node: Node, arguments: Mapping[str, Any]) -> int:
    """Return the number of multiplications for each element of the result."""
    name = _name(node)
    if name == "einsum":
        return max((max(one.shape, default=1) for one in arguments["tensors"]), default=1)
    if name == "scaled_dot_product_attention":
        return 2 * int(arguments["key"].shape[-2])
    if name in _RECURRENT:
        return 8 * int(arguments["input"].shape[-1])
    if name in _POOLS:
        given = arguments.get("kernel_size", 1)
        sides = list(given) if isinstance(given, list | tuple) else [given]
        # One number is the window's side in all dimensions.
        return prod(map(int, sides if len(sides) > 1 else sides * _POOLS[name]))
    of = _MULTIPLIED.get(name, ())
    sizes = [prod(found.shape[1:]) for place in of if isinstance(found := arguments.get(place), Tensor)]
    return max(sizes, default=1)


def unfolded_bytes(node: Node, arguments: Mapping[str, Any], n_elements: int) -> int:
    """Return the bytes of the windows that a convolution copies side by side before it multiplies.

    It does so in types that the libraries of convolutions have not, which are wider than float32, or whole numbers.

    Args:
        node: of the graph.
        arguments: its arguments, with tensors without memory.
        n_elements: of its result.
    """
    weight, given = arguments.get("weight"), arguments.get("input")
    if not _name(node).startswith("conv") or not isinstance(weight, Tensor) or weight.dtype in _DIRECT:
        return 0
    if ("transpose" in _name(node) or arguments.get("transposed")) and isinstance(given, Tensor):
        n_elements = given.numel()
    return n_elements // max(weight.shape[0], 1) * prod(weight.shape[1:]) * weight.element_size()


def _name(node: Node) -> str:
    return node.operation.split(".")[1] if node.operation.startswith("aten.") else node.operation


def _is_floating(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())


def _weight_norm_fits(v: Any, g: Any, dim: Any) -> bool:
    if not isinstance(v, Tensor) or not isinstance(g, Tensor) or not isinstance(dim, int) or not -1 <= dim < v.ndim:
        return False
    return v.numel() > 0 and v.dtype == g.dtype and g.numel() == (1 if dim == -1 else v.shape[dim])


def _size_of(arguments: Mapping[str, Any], default_dim: int = 0) -> int:
    tensor, dim = arguments.get("self"), arguments.get("dim", default_dim)
    if not isinstance(tensor, Tensor) or not isinstance(dim, int) or not -tensor.ndim <= dim < tensor.ndim:
        return 0
    return int(tensor.shape[dim])


def _split_pieces(arguments: Mapping[str, Any]) -> int:
    each = arguments.get("split_size", arguments.get("split_sizes"))
    return -(-_size_of(arguments) // each) if isinstance(each, int) and each > 0 else 0


def _chunk_pieces(arguments: Mapping[str, Any]) -> int:
    chunks = arguments.get("chunks")
    return min(chunks, _size_of(arguments)) if isinstance(chunks, int) else 0


def _section_pieces(arguments: Mapping[str, Any]) -> int:
    sections = arguments.get("sections")
    return sections if isinstance(sections, int) else 0


# Operations with as many results as an argument says: how many, before they are made.
_PIECES: Mapping[str, Callable[[Mapping[str, Any]], int]] = {
    "unbind": _size_of,
    "split": _split_pieces,
    "unsafe_split": _split_pieces,
    "chunk": _chunk_pieces,
    "unsafe_chunk": _chunk_pieces,
    "tensor_split": _section_pieces,
}
_RECURRENT = ("gru", "lstm", "rnn_relu", "rnn_tanh")


def _recurrent_steps(arguments: Mapping[str, Any]) -> int:
    layers, dim = arguments.get("num_layers", 1), _time_dim(arguments)
    if dim is None or not isinstance(layers, int):
        return 0
    return int(arguments["input"].shape[dim]) * abs(layers) * (2 if arguments.get("bidirectional") else 1)


def _time_dim(arguments: Mapping[str, Any]) -> int | None:
    """Return the dimension of time of a recurrent network's inputs; None where it has none."""
    inputs = arguments.get("input")
    if not isinstance(inputs, Tensor) or inputs.ndim not in (2, 3):
        return None
    return 1 if arguments.get("batch_first") and inputs.ndim == 3 else 0


def call_without_memory(
    node: Node, call: Callable[..., Any], names: Sequence[str], arguments: list[Any], keywords: dict[str, Any]
) -> Any:
    """Return the result of an operation on tensors without memory; a loop over time runs for its first steps only."""
    named = dict(zip(names, arguments, strict=True))
    dim = _time_dim(named) if _name(node) in _RECURRENT else None
    if dim is None or named["input"].shape[dim] <= _STEPS_WITHOUT_MEMORY:
        return call(*arguments, **keywords)
    inputs = named["input"]
    short = list(arguments)
    short[names.index("input")] = inputs.narrow(dim, 0, _STEPS_WITHOUT_MEMORY)
    output, *states = call(*short, **keywords)
    sizes = list(output.shape)
    sizes[dim] = inputs.shape[dim]
    return (output.new_empty(sizes), *states)


_DIRECT = (torch.float32, torch.float16, torch.bfloat16)
# Pools by windows, with their number of dimensions.
_POOLS = {
    "avg_pool1d": 1,
    "avg_pool2d": 2,
    "avg_pool3d": 3,
    "max_pool1d": 1,
    "max_pool2d": 2,
    "max_pool2d_with_indices": 2,
    "max_pool3d": 3,
    "max_pool3d_with_indices": 3,
}
# Operations that multiply their input by another argument, which may be a weight.
_MULTIPLIED: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight",),
    "conv1d": ("weight",),
    "conv2d": ("weight",),
    "conv3d": ("weight",),
    "conv_transpose1d": ("weight",),
    "conv_transpose2d": ("weight",),
    "conv_transpose3d": ("weight",),
    "convolution": ("weight",),
    "addmm": ("mat2", "mat1"),
    "mm": ("mat2", "self"),
    "matmul": ("other", "self"),
    "bmm": ("mat2", "self"),
    "baddbmm": ("batch2", "batch1"),
    "addbmm": ("batch2", "batch1"),
    "tensordot": ("other", "self"),
    "inner": ("other", "self"),
    "linalg_matmul": ("other", "self"),
    "mv": ("self",),
    "addmv": ("mat",),
    "bilinear": ("weight",),
}


@dataclass(frozen=True)
class LinearMap:
    """The names of a linear map's arguments, and whether its weight is (d, c) in place of (c, d)."""

    inputs: str
    weight: str
    bias: str | None
    transposed: bool


_LINEAR = {
    "linear": LinearMap("input", "weight", "bias", transposed=False),
    "addmm": LinearMap("mat1", "mat2", "self", transposed=True),
    "mm": LinearMap("self", "mat2", None, transposed=True),
    "matmul": LinearMap("self", "other", None, transposed=True),
    "conv2d": LinearMap("input", "weight", "bias", transposed=False),
    "convolution": LinearMap("input", "weight", "bias", transposed=False),
}


def linear_map(node: Node, graph: Graph, fixed: set[int]) -> LinearMap | None:
    """Return the form of a node that maps features to a sum of its weight's rows; None for any other.

    Args:
        node: of the graph.
        graph: a convolution counts where its weight is a tensor of the file of one position.
        fixed: values that depend on no input.
    """
    form, given = _LINEAR.get(_name(node)), node.arguments
    if form is None or any(given.get(name, 1) != 1 for name in ("alpha", "beta")):
        return None
    weight, inputs = given.get(form.weight), given.get(form.inputs)
    if not (isinstance(weight, Ref) and weight.number in fixed):
        return None
    if not isinstance(inputs, Ref) or inputs.number in fixed:
        return None
    bias = None if form.bias is None else given.get(form.bias)
    if bias is not None and not (isinstance(bias, Ref) and bias.number in fixed):
        return None
    if _name(node).startswith("conv"):
        shape = graph.tensors[weight.number].shape if weight.number < len(graph.tensors) else ()
        plain = given.get("transposed", False) is False and given.get("groups", 1) == 1
        still = all(one == 1 for one in _flat(given.get("stride", 1)))
        still &= all(one in (0, "valid") for one in _flat(given.get("padding", 0)))
        if len(shape) != 4 or shape[2:] != (1, 1) or not (plain and still):
            return None
    return form


def multiplied(node: Node, fixed: set[int]) -> list[int]:
    """Return the values that depend on no input and that a node multiplies what depends on one by."""
    given = [node.arguments.get(name) for name in _MULTIPLIED.get(_name(node), ())]
    if _name(node) == "einsum":
        given = list(_flat(node.arguments.get("tensors")))
    weights = [one.number for one in given if isinstance(one, Ref) and one.number in fixed]
    return weights if any(number not in fixed for number in node.refs()) else []


def is_batch_normalisation(node: Node, n_tensors: int) -> bool:
    """Return whether a node normalises with running statistics that are tensors of the file."""
    given = node.arguments
    if node.operation != "aten.batch_norm.default" or given.get("training") is not False:
        return False
    roles = [given.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
    tensors = all(one is None or (isinstance(one, Ref) and one.number < n_tensors) for one in roles)
    numbers = all(isinstance(given.get(name), float | int) for name in ("momentum", "eps"))
    return tensors and numbers and None not in roles[:2] and isinstance(given.get("input"), Ref)


def _flat(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]
