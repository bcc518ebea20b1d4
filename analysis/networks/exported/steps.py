"""From a node of a graph to a call of torch: the operation, and its arguments by position."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import AnalysisError
from ..building import refused
from .graph import Graph, Node, Ref, Special
from .operations import AUTOCAST_OFF, REGION_ENDS, SIZES, operations
from .rules import call_without_memory, check_before, check_flags, inner_size, rewritten, unfolded_bytes

DTYPES = {
    "bfloat16": torch.bfloat16, "bool": torch.bool, "complex64": torch.complex64, "float16": torch.float16,
    "float32": torch.float32, "float64": torch.float64, "int16": torch.int16, "int32": torch.int32,
    "int64": torch.int64, "int8": torch.int8, "uint8": torch.uint8,
}  # fmt: skip
_MEMORY_FORMATS = {
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
}
_FLOATING = ("bfloat16", "float16", "float64")
# Most bytes of one result: far beyond what a pass has room for.
MAX_RESULT_BYTES = 2**34
# Sizes that arithmetic of sizes may reach.
_MAX_NUMBER = 2**53


class Step:
    """A node that is ready to run.

    Args:
        node: of the graph.
        place: its place among the nodes, for errors.
        narrow: the floating type that the network was exported in, which becomes float32; None for float32 itself.

    Attributes:
        node: the node that runs.
        frees: numbers of values that nothing needs after it.
        region: AUTOCAST_OFF, REGION_ENDS, or None for an operation.

    Raises:
        AnalysisError: `invalid-architecture` for arguments that the operation does not have, or for training mode.
    """

    def __init__(self, node: Node, place: int, narrow: str | None) -> None:
        self.node, self._place = rewritten(node), place
        self.frees: list[int] = []
        self.region = node.operation if node.operation in (AUTOCAST_OFF, REGION_ENDS) else None
        check_flags(self.node, self.where)
        self._names: list[str] = []
        self._arguments: list[Any] = []
        self._keywords: dict[str, Any] = {}
        self._call: Any = None
        if self.region is None:
            self._call = operations().get(self.node.operation) or _bounded_size(self.node.operation)
            self._read(narrow)
        self._fill = [at for at, value in enumerate(self._arguments) if _needs_filling(value)]
        self._fill_keywords = [name for name, value in self._keywords.items() if _needs_filling(value)]
        self.writes = self.node.operation.startswith("aten.") and bool(self._call._schema.is_mutable)

    @property
    def where(self) -> str:
        """Its place, for errors."""
        return f"Node {self._place} of the graph, {self.node.operation},"

    def run(self, values: list[Any], device: torch.device, own: set[int]) -> None:
        """Run the operation and keep its results among the values.

        Args:
            values: of the graph.
            device: of whatever the operation makes.
            own: as of `run_without_memory`; where a tensor lies in memory may depend on its sizes.
        """
        arguments, keywords = self._filled(values, device)
        if self.writes and own and storage_of(arguments[0]) in own:
            raise refused(f"{self.where} writes into a weight, a buffer or an input of the network")
        self.keep(self._call(*arguments, **keywords), values)

    def run_with(self, name: str, value: Any, values: list[Any], device: torch.device) -> Any:
        """Return the operation's result with another value for one of its arguments."""
        arguments, keywords = self._filled(values, device)
        arguments[self._names.index(name)] = value
        return self._call(*arguments, **keywords)

    def keep(self, result: Any, values: list[Any]) -> None:
        """Put the operation's results among the values, and free those that nothing needs any more."""
        node = self.node
        if node.n_results == 1:
            values[node.first] = result[0] if isinstance(result, tuple | list) and result else result
        else:
            results = list(result) if isinstance(result, tuple | list) else [result]
            values[node.first : node.first + node.n_results] = (results + [None] * node.n_results)[: node.n_results]
        for number in self.frees:
            values[number] = None

    def run_without_memory(self, values: list[Any], own: set[int]) -> tuple[list[int], float]:
        """Run the operation on tensors without memory.

        Args:
            values: of the graph, on the meta device.
            own: storages that may not be written into: those of weights and inputs.

        Returns:
            Bytes of each result, and the number of multiplications.

        Raises:
            AnalysisError: `invalid-architecture`: it fails, has other results than the graph says, writes into a weight
                or an input, or asks for far too much memory.
        """
        arguments, keywords = self._filled(values, torch.device("meta"))
        named = dict(zip(self._names, arguments, strict=True)) | keywords
        if self.writes and (not isinstance(arguments[0], Tensor) or storage_of(arguments[0]) in own):
            raise refused(f"{self.where} writes into a weight, a buffer or an input of the network")
        try:
            check_before(self.node, named, self.where)
            result = call_without_memory(self.node, self._call, self._names, arguments, keywords)
            inner = inner_size(self.node, named)
            results = list(result) if isinstance(result, tuple | list) else [result]
            n_bytes = [_bounded(one, self.where) for one in results]
            elements = sum(one.numel() for one in results if isinstance(one, Tensor))
            unfolded = unfolded_bytes(self.node, named, elements)
            if unfolded > MAX_RESULT_BYTES:
                raise refused(f"{self.where} unfolds its input to {unfolded} bytes; {MAX_RESULT_BYTES} are allowed")
        except AnalysisError:
            raise
        except Exception as error:
            # Whatever an operation says about its arguments is the graph's fault.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise refused(f"{self.where} fails: {reason}") from error
        if len(results) != self.node.n_results and not self._lacks_gradients(len(results)):
            raise refused(f"{self.where} has {len(results)} results; the graph says {self.node.n_results}")
        self.keep(result, values)
        return n_bytes, float(elements) * inner

    def _lacks_gradients(self, n_results: int) -> bool:
        """Return whether only the results for the gradient are missing, as of a rewritten node."""
        return n_results == 1 and self.node.operation.startswith(_OF_ONE_RESULT)

    def _filled(self, values: list[Any], device: torch.device) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments with values in place of their numbers."""
        arguments, keywords = self._arguments.copy(), self._keywords
        for at in self._fill:
            arguments[at] = _filled(arguments[at], values, device)
        if self._fill_keywords:
            keywords = keywords | {name: _filled(keywords[name], values, device) for name in self._fill_keywords}
        return arguments, keywords

    def _read(self, narrow: str | None) -> None:
        node = self.node
        given = {name: _plain(value, narrow, self.where) for name, value in node.arguments.items()}
        if node.operation in SIZES:
            self._names, self._arguments = list(given), list(given.values())
            return
        schema = self._call._schema.arguments
        if unknown := sorted(set(given) - {one.name for one in schema}):
            raise refused(f"{self.where} has no argument {unknown[0]!r}")
        for name, value in given.items():
            _check_kind(name, value, self.where)
        if narrow is not None and node.operation.startswith("aten.to.") and "copy" in {one.name for one in schema}:
            # Types that the network told apart are one here; what it then writes into must still be a copy.
            given["copy"] = True
        if node.operation.split(".")[1] in _WITH_CUDNN:
            # Where there is none, it changes nothing.
            given["cudnn_enabled"] = True
        if node.operation.split(".")[1] in _MAKING:
            # A tensor that is made of no other is made where the network computes.
            given["device"] = Special("device", None)
        last = max((at for at, one in enumerate(schema) if one.name in given and not one.kwarg_only), default=-1)
        for at, one in enumerate(schema):
            if one.kwarg_only:
                if one.name in given:
                    self._keywords[one.name] = given[one.name]
                elif not one.has_default_value():
                    raise refused(f"{self.where} misses its argument {one.name!r}")
            elif at <= last or not one.has_default_value():
                if one.name not in given and not one.has_default_value():
                    raise refused(f"{self.where} misses its argument {one.name!r}")
                self._names.append(one.name)
                self._arguments.append(given.get(one.name, one.default_value))


# Operations of one result that may stand for ones of several.
_OF_ONE_RESULT = ("aten.batch_norm.", "aten.group_norm.", "aten._weight_norm.")
# Operations that must be told whether to use cuDNN; a graph does not say.
_WITH_CUDNN = ("batch_norm", "instance_norm")
# Operations that make a tensor of no other.
_MAKING = ("arange", "eye", "full", "linspace", "ones", "scalar_tensor", "tril_indices", "triu_indices", "zeros")


# Arguments that torch takes whole numbers and texts for, and looks up in its tables unchecked.
_KINDS: Mapping[str, type[Any] | str] = {
    "dtype": torch.dtype, "out_dtype": torch.dtype, "memory_format": torch.memory_format, "device": "device",
    "layout": "none", "pin_memory": "none", "generator": "none",
}  # fmt: skip


def _check_kind(name: str, value: Any, where: str) -> None:
    """Check that types, devices and memory formats are such, and stand where they belong.

    Raises:
        AnalysisError: `invalid-architecture`.
    """
    kind = _KINDS.get(name)
    is_special = isinstance(value, torch.dtype | torch.memory_format | Special)
    if value is None or (kind is None and not is_special):
        return
    fits = isinstance(value, Special) if kind == "device" else isinstance(kind, type) and isinstance(value, kind)
    if not fits:
        raise refused(f"{where} has {str(value)[:40]!r} for its argument {name!r}")


def storage_of(tensor: Tensor) -> int:
    """Return what identifies a tensor's storage, which its views share."""
    identity: int = tensor.untyped_storage()._cdata
    return identity


def plan_frees(steps: list[Step], graph: Graph) -> None:
    """Let each step free the values that it is the last to need; weights and inputs stay with their owners."""
    last: dict[int, Step] = {}
    first = len(graph.tensors)
    for step in steps:
        for number in (*step.node.refs(), *range(step.node.first, step.node.first + step.node.n_results)):
            last[number] = step
    last.pop(graph.logits, None)
    for number, step in last.items():
        if number >= first:
            step.frees.append(number)


def narrow_type(graph: Graph) -> str | None:
    """Return the floating type of most of a network's parameters, unless that is float32."""
    counts: dict[str, int] = {}
    for one in graph.tensors:
        if one.is_parameter and one.dtype in (*_FLOATING, "float32"):
            counts[one.dtype] = counts.get(one.dtype, 0) + 1
    most = max(counts, key=lambda name: counts[name], default="float32")
    return None if most == "float32" else most


def dtype_of(name: str, narrow: str | None) -> torch.dtype:
    """Return the type of a name; the one that the network was exported in is float32 here.

    Raises:
        AnalysisError: `invalid-architecture`.
    """
    if name not in DTYPES:
        raise refused(f"The graph has the dtype {name[:40]!r}; allowed are {', '.join(DTYPES)}")
    return torch.float32 if name == narrow else DTYPES[name]


def _plain(value: Any, narrow: str | None, where: str) -> Any:
    match value:
        case list():
            return [_plain(one, narrow, where) for one in value]
        case Special("dtype", str(name)):
            return dtype_of(name, narrow)
        case Special("memory_format", str(name)):
            if name not in _MEMORY_FORMATS:
                raise refused(f"{where} has the memory format {name[:40]!r}")
            return _MEMORY_FORMATS[name]
    return value


def _needs_filling(value: Any) -> bool:
    return isinstance(value, Ref | Special) or (isinstance(value, list) and any(map(_needs_filling, value)))


def _filled(value: Any, values: list[Any], device: torch.device) -> Any:
    if isinstance(value, Ref):
        return values[value.number]
    if isinstance(value, list):
        return [_filled(one, values, device) for one in value]
    return device if isinstance(value, Special) else value


def _bounded_size(operation: str) -> Any:
    compute = SIZES[operation]

    def size(*numbers: Any) -> Any:
        """Return arithmetic of sizes, which are no tensors and have bounds."""
        for one in numbers[0] if len(numbers) == 1 and isinstance(numbers[0], list) else numbers:
            if not isinstance(one, int | float):
                raise TypeError(f"a size must be a number, not a {type(one).__name__}")
        found = compute(*numbers)
        if not -_MAX_NUMBER <= found <= _MAX_NUMBER:
            raise ValueError(f"a size of {found} is beyond all bounds")
        return found

    return size


def _bounded(result: Any, where: str) -> int:
    if not isinstance(result, Tensor):
        return 0
    n_bytes = result.numel() * result.element_size()
    if n_bytes > MAX_RESULT_BYTES:
        raise refused(f"{where} makes a tensor of {n_bytes} bytes; at most {MAX_RESULT_BYTES} are allowed")
    return n_bytes
