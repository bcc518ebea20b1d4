"""The form of a graph that is data: what a file says about a network, read strictly and bounded.

    {"version": 1,
     "tensors": [[name, "parameter" or "buffer", dtype, shape], ...],
     "inputs": [[name, dtype, dimensions], ...],
     "nodes": [[operation, {argument: value, ...}, number of results], ...],
     "logits": [number of a value, dimensions]}

Tensors, inputs and results of nodes are values, numbered in this order. A node uses values with smaller numbers only,
so a graph cannot have cycles. A dimension is a number, or [smallest, largest or null] where it may vary. The value of
an argument is null, a boolean, a number, a text, a list of values, or an object of one member: `{"ref": number}`,
`{"dtype": name}`, `{"float": "inf", "-inf" or "nan"}`, `{"memory_format": name}`, or `{"device": null}`, which is
the device of whoever runs the graph.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ..building import refused

VERSION = 1
#: Most bytes of a graph as text, and most nodes of it. Real networks have up to some thousands.
MAX_GRAPH_BYTES = 8 * 2**20
MAX_NODES = 20_000
_MAX_TENSORS, _MAX_INPUTS, _MAX_RANK = 100_000, 64, 8
_MAX_ARGUMENTS, _MAX_LIST, _MAX_NESTING, _MAX_RESULTS = 32, 4096, 3, 4096
_MAX_VALUES = 500_000
_MAX_TEXT, _MAX_NAME_BYTES, _MAX_OPERATION = 256, 512, 128
_MAX_SIZE = 2**31
# The most values from which a weight is computed, as by weight_norm.
_MAX_COMPUTATION = 64
_ARGUMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")


@dataclass(frozen=True)
class Ref:
    """A value of the graph, by its number."""

    number: int


@dataclass(frozen=True)
class Special:
    """A value that JSON has no form for: a dtype, a memory format, or the device."""

    kind: Literal["dtype", "memory_format", "device"]
    name: str | None


Size = int | tuple[int, int | None]
"""A dimension: its size, or the smallest and the largest."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the file."""

    name: str
    is_parameter: bool
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Input:
    """An input of the network."""

    name: str
    dtype: str
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class Node:
    """An operation: its arguments by name, and the number of its first result and of all of them."""

    operation: str
    arguments: Mapping[str, Any]
    first: int
    n_results: int

    def refs(self) -> Iterator[int]:
        """Yield the numbers of the values that it uses."""
        return refs_of(list(self.arguments.values()))


@dataclass(frozen=True)
class Graph:
    """A network's computation.

    Attributes:
        tensors: of the file; values 0 and on.
        inputs: the values after these.
        nodes: in the order in which they run.
        logits: the value that the network gives.
        logits_shape: its dimensions.
        n_values: number of all values.
    """

    tensors: tuple[Stored, ...]
    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    logits: int
    logits_shape: tuple[Size, ...]
    n_values: int

    @property
    def batch(self) -> tuple[int, int | None]:
        """The smallest and the largest number of samples; None for any."""
        sizes = [(one, one) if isinstance(one, int) else one for one in (given.shape[0] for given in self.inputs)]
        largest = [most for _, most in sizes if most is not None]
        return max(1, *(least for least, _ in sizes)), min(largest, default=None)

    def before(self, number: int) -> set[int]:
        """Return the numbers of the values that a value is computed from, itself too."""
        wanted = {number}
        for node in reversed(self.nodes):
            if any(one in wanted for one in range(node.first, node.first + node.n_results)):
                wanted.update(node.refs())
        return wanted

    def weights_of(self, number: int) -> list[Stored] | None:
        """Return the tensors of the file that a value is computed from, in their order; None of a long computation."""
        seen, todo = {number}, [number]
        while todo and len(seen) <= _MAX_COMPUTATION:
            node = self._makers.get(todo.pop())
            new = set() if node is None else set(node.refs()) - seen
            seen |= new
            todo += new
        return None if todo else [self.tensors[one] for one in sorted(seen) if one < len(self.tensors)]

    @cached_property
    def _makers(self) -> dict[int, Node]:
        return {node.first + place: node for node in self.nodes for place in range(node.n_results)}


def parse_graph(text: Any) -> Graph:
    """Read a graph from its JSON object.

    Raises:
        AnalysisError: `invalid-architecture` with the place of what has not the form.
    """
    match text:
        case {
            "version": int(version),
            "tensors": list(tensors),
            "inputs": list(inputs),
            "nodes": list(nodes),
            "logits": [int(logits), list(logits_shape)],
            **others,
        } if version == VERSION and type(version) is int and not others:
            pass
        case {"version": int(version)} if version != VERSION:
            raise refused(f"The graph has the form {version}; this worker reads {VERSION}")
        case _:
            raise refused("The graph must have the members version, tensors, inputs, nodes and logits")
    for what, found, most in (
        ("tensors", tensors, _MAX_TENSORS), ("inputs", inputs, _MAX_INPUTS), ("nodes", nodes, MAX_NODES),
    ):  # fmt: skip
        if len(found) > most:
            raise refused(f"The graph has {len(found)} {what}; at most {most} are allowed")
    stored = tuple(map(_stored, tensors))
    names = {one.name for one in stored}
    if len(names) != len(stored):
        raise refused("Two tensors of the graph have one name")
    given = tuple(map(_input, inputs))
    if not given or len({one.name for one in given}) != len(given):
        raise refused("The graph must have inputs, each of a name of its own")
    count = len(stored) + len(given)
    read: list[Node] = []
    for place, node in enumerate(nodes):
        read.append(_node(place, node, count))
        count += read[-1].n_results
        if count > _MAX_VALUES:
            raise refused(f"The graph has more than {_MAX_VALUES} values")
    if isinstance(logits, bool) or not 0 <= logits < count:
        raise refused(f"The graph's logits are the value {logits}; it has {count} values")
    graph = Graph(stored, given, tuple(read), logits, _shape(logits_shape, "logits"), count)
    least, largest = graph.batch
    if largest is not None and least > largest:
        raise refused("The graph's inputs allow no common number of samples")
    return graph


def refs_of(value: Any) -> Iterator[int]:
    """Yield the numbers of all values in an argument, in lists too."""
    if isinstance(value, Ref):
        yield value.number
    elif isinstance(value, list):
        for one in value:
            yield from refs_of(one)


def _stored(entry: Any) -> Stored:
    match entry:
        case [str(name), ("parameter" | "buffer") as kind, str(dtype), list(shape)] if _is_name(name):
            sizes = _shape(shape, name)
            if all(isinstance(size, int) for size in sizes):
                return Stored(name, kind == "parameter", dtype, tuple(size for size in sizes if isinstance(size, int)))
    raise refused(f"The graph's tensor {str(entry)[:100]} must be [name, parameter or buffer, dtype, shape]")


def _input(entry: Any) -> Input:
    match entry:
        case [str(name), str(dtype), [_, *_] as shape] if _is_name(name):
            return Input(name, dtype, _shape(shape, name))
    raise refused(f"The graph's input {str(entry)[:100]} must be [name, dtype, dimensions], one dimension at least")


def _is_name(name: str) -> bool:
    return name.isprintable() and 0 < len(name.encode("utf-8", "surrogatepass")) < _MAX_NAME_BYTES


def _shape(sizes: list[Any], name: str) -> tuple[Size, ...]:
    if len(sizes) > _MAX_RANK:
        raise refused(f"{name!r} of the graph has {len(sizes)} dimensions; at most {_MAX_RANK} are allowed")
    found: list[Size] = []
    for size in sizes:
        match size:
            case bool():
                break
            case int() if 0 <= size < _MAX_SIZE:
                found.append(size)
            case [int(least), None | int() as most] if 0 <= least < _MAX_SIZE and (most is None or most >= least):
                found.append((least, most))
            case _:
                break
    if len(found) < len(sizes):
        raise refused(f"{name!r} of the graph has the dimensions {str(sizes)[:100]}; each must be a size or a range")
    return tuple(found)


def _node(place: int, entry: Any, n_before: int) -> Node:
    match entry:
        case [str(operation), dict(arguments), int(n_results)] if (
            len(operation) <= _MAX_OPERATION
            and type(n_results) is int
            and 0 <= n_results <= _MAX_RESULTS
            and len(arguments) <= _MAX_ARGUMENTS
        ):
            pass
        case _:
            raise refused(f"Node {place} of the graph must be [operation, arguments, number of results]")
    if not all(_ARGUMENT.match(name) for name in arguments):
        raise refused(f"Node {place} of the graph has arguments that are no names: {str(list(arguments))[:100]}")
    where = f"Node {place} of the graph, {operation[:80]!r},"
    values = {name: _value(value, where, n_before, 0) for name, value in arguments.items()}
    return Node(operation, values, n_before, n_results)


def _value(value: Any, where: str, n_before: int, nesting: int) -> Any:
    match value:
        case None | bool():
            return value
        case int() if -(2**63) <= value < 2**63:
            return value
        case float() if math.isfinite(value):
            return value
        case str() if len(value) <= _MAX_TEXT and value.isprintable():
            return value
        case list() if len(value) <= _MAX_LIST and nesting < _MAX_NESTING:
            return [_value(one, where, n_before, nesting + 1) for one in value]
        case {"ref": int(number), **others} if not others and type(number) is int:
            if not 0 <= number < n_before:
                raise refused(f"{where} uses the value {number}, which is not there before it")
            return Ref(number)
        case {"float": ("inf" | "-inf" | "nan") as name, **others} if not others:
            return float(name)
        case {"device": None, **others} if not others:
            return Special("device", None)
        case {"dtype": str(name), **others} if not others:
            return Special("dtype", name)
        case {"memory_format": str(name), **others} if not others:
            return Special("memory_format", name)
    raise refused(f"{where} has an argument that is not allowed: {str(value)[:100]}")


def sizes_text(shape: Sequence[Size]) -> str:
    """Return dimensions as an error tells them, such as `[2 or more, 3, 32, 32]`."""
    return f"[{', '.join(_size_text(size) for size in shape)}]"


def _size_text(size: Size) -> str:
    if isinstance(size, int):
        return str(size)
    least, most = size
    return f"{least} or more" if most is None else f"{least} to {most}"
