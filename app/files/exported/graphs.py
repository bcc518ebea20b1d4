"""Turn the JSON of an exported program into the graph that workers run, whose form analysis/networks/exported defines.

What does not matter is left out: names of values, traces of code, devices, checks, and all that the logits do not need.
So one network has one graph, whatever machine exported it, and its text has one hash. A graph of a network that
`interplay.save_checkpoint` wrote is the same (a test compares).
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import InvalidFile

#: Key of the graph in a safetensors file's metadata.
GRAPH = "graph"
# The bounds of analysis/networks/exported/graph.py, which a test compares.
MAX_GRAPH_BYTES = 8 * 2**20
MAX_NODES = 20_000
_MAX_CONTAINERS, _MAX_OPERATION = 1_000_000, 128
# Regions within regions.
_MAX_DEPTH = 8
_MAX_SHOWN = 8
# A size that export takes for unbounded.
_UNBOUNDED = 2**31
# Types by torch's numbers, and by their names in safetensors.
_TYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    10: "complex64", 12: "bool", 13: "bfloat16",
}  # fmt: skip
_MEMORY_FORMATS = {1: "contiguous_format", 2: "channels_last", 3: "channels_last_3d", 4: "preserve_format"}
_STRIDED = 7
# What analysis/saving/exporting.py leaves out, and its names of regions.
_OF_MACHINE = ("layout", "pin_memory", "cudnn_enable", "cudnn_enabled")
_CHECKS = re.compile(r"aten\.(_assert_\w+|sym_constrain_range\w*|_functional_assert\w*|_functional_sym_constrain\w*)\.")
_NO_GRADIENTS, _AUTOCAST = "higher_order.wrap_with_set_grad_enabled", "higher_order.wrap_with_autocast"
_AUTOCAST_OFF, _REGION_ENDS = "region.autocast_off", "region.end"
_INTEGER = re.compile(r"(?:Integer\()?(\d{1,18})\)?\Z")
_SYMBOL = re.compile(r"(?:Symbol\('(?P<called>\w+)'[^()]*\)|(?P<plain>[a-z]+\d+))\Z")


class Malformed(Exception):
    """The JSON is not as torch writes it."""


@dataclass(frozen=True)
class StoredAs:
    """A tensor of the archive.

    Attributes:
        dtype: torch's number of its type.
        shape: its sizes.
        identity: equal for tensors that are one, such as tied embeddings.
    """

    dtype: int
    shape: tuple[int, ...]
    identity: tuple[Any, ...]


@dataclass
class _Value:
    """A value of the graph; it gets its number once it is known which values the logits need."""

    number: int = -1


@dataclass(frozen=True)
class _Special:
    """A value of an argument that has a form of its own."""

    form: Mapping[str, Any]


@dataclass(frozen=True)
class _Node:
    operation: str
    arguments: dict[str, Any]
    results: list[_Value]
    stays: bool


def graph_text(graph: Mapping[str, Any]) -> str:
    """Return a graph as its one text.

    Raises:
        InvalidFile: it is too long, or no graph.
    """
    try:
        text = json.dumps(graph, allow_nan=False, sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        raise InvalidFile("The file's graph holds numbers that are not finite, or is nested too deeply.") from None
    if len(text) > MAX_GRAPH_BYTES:
        raise InvalidFile(f"The graph has {len(text)} bytes; at most {MAX_GRAPH_BYTES} are allowed.")
    return text


def describe_graph(text: str) -> tuple[dict[str, Any], list[str]]:
    """Return the architecture of a network by the graph in its file: its hash, and what the network takes and gives.

    Args:
        text: of the graph, as the file's metadata have it.

    Returns:
        The description, and the names of the operations that the graph uses.

    Raises:
        InvalidFile: it is too long, or has not the form of a graph.
    """
    if len(text) > MAX_GRAPH_BYTES:
        raise InvalidFile(f"The graph has {len(text)} bytes; at most {MAX_GRAPH_BYTES} are allowed.")
    # Counted first, as those of an archive.
    if text.count("{") + text.count("[") > _MAX_CONTAINERS:
        raise InvalidFile(f"The file's graph holds more than {_MAX_CONTAINERS} objects and lists.")
    try:
        graph = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidFile("The file's graph is not JSON.") from None
    match graph:
        case {
            "version": int(version),
            "inputs": list(inputs),
            "nodes": list(nodes),
            "logits": [int(), list(logits)],
        } if type(version) is int and version == 1:
            described = [_described(one) for one in inputs]
        case _:
            raise InvalidFile("The file's graph must have the members version (1), tensors, inputs, nodes and logits.")
    if len(nodes) > MAX_NODES:
        raise InvalidFile(f"The graph has {len(nodes)} operations; at most {MAX_NODES} are allowed.")
    operations = {
        node[0][:_MAX_OPERATION] for node in nodes if isinstance(node, list) and node and isinstance(node[0], str)
    }
    sha256 = hashlib.sha256(graph_text(graph).encode()).hexdigest()
    architecture = {
        "family": "exported", "graph": sha256, "inputs": described, "logits": _sizes(logits), "n_nodes": len(nodes),
    }  # fmt: skip
    return architecture, sorted(operations)


def graph_of(model: Mapping[str, Any], tensors: Mapping[str, StoredAs]) -> dict[str, Any]:
    """Return the graph of a program.

    Args:
        model: the content of the archive's model.json.
        tensors: those that the archive holds, by name.

    Raises:
        Malformed: the JSON is not as torch writes it.
        InvalidFile: the program holds what is no data, or gives no logits.
    """
    return _Writer(model, tensors).graph()


def of_type(kind: type[Any], value: Any) -> Any:
    """Return a value of the JSON, which must be of a type.

    Raises:
        Malformed: it is not.
    """
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Malformed(f"it has {str(value)[:80]!r} where a {kind.__name__} belongs")
    return value


class _Writer:
    """Collects the nodes of a program, and writes those that the logits need."""

    def __init__(self, model: Mapping[str, Any], tensors: Mapping[str, StoredAs]) -> None:
        self._module = of_type(dict, model.get("graph_module"))
        self._ranges = of_type(dict, model.get("range_constraints", {}))
        self._stored = tensors
        self._nodes: list[_Node] = []
        self._tensors: list[tuple[str, bool, _Value]] = []
        # Name of the input, of its value in the JSON, and the value.
        self._inputs: list[tuple[str, str, _Value]] = []

    def graph(self) -> dict[str, Any]:
        graph = of_type(dict, self._module.get("graph"))
        self._about = of_type(dict, graph.get("tensor_values"))
        values = self._given(of_type(list, of_type(dict, self._module.get("signature")).get("input_specs")))
        self._take(of_type(list, graph.get("nodes")), values, 0)
        outputs = of_type(list, graph.get("outputs"))
        place = self._logits_place(len(outputs))
        kind, given = _union(outputs[place]) if place < len(outputs) else ("", None)
        if kind != "as_tensor":
            raise InvalidFile("The program's output must be a tensor of logits, or hold one as `logits`.")
        name = _name_in(given, "name")
        logits = _known(values, name)
        if not isinstance(logits, _Value):
            raise Malformed("its output is no value of the graph")
        nodes, needed = self._needed(logits)
        tensors = [one for one in self._tensors if id(one[2]) in needed]
        values_in_order = [one[2] for one in (*tensors, *self._inputs)] + [
            one for node in nodes for one in node.results
        ]
        for number, value in enumerate(values_in_order):
            value.number = number
        return {
            "version": 1,
            "tensors": [
                [
                    one,
                    "parameter" if is_parameter else "buffer",
                    _TYPES[self._stored[one].dtype],
                    list(self._stored[one].shape),
                ]
                for one, is_parameter, _ in tensors
            ],
            "inputs": [[one, *self._shaped(placeholder)] for one, placeholder, _ in self._inputs],
            "nodes": [[node.operation, _written(node.arguments), len(node.results)] for node in nodes],
            "logits": [logits.number, self._shaped(name)[1]],
        }

    def _needed(self, logits: _Value) -> tuple[list[_Node], set[int]]:
        """Return the nodes that the logits need, in order, and the identities of all values that these use."""
        needed = {id(logits)}
        kept: list[_Node] = []
        for node in reversed(self._nodes):
            if node.stays or any(id(one) in needed for one in node.results):
                kept.append(node)
                needed.update(id(one) for one in _values_in(list(node.arguments.values())))
        whole: list[_Node] = []
        for node in reversed(kept):
            if node.operation == _REGION_ENDS and whole and whole[-1].operation == _AUTOCAST_OFF:
                whole.pop()
            else:
                whole.append(node)
        if len(whole) > MAX_NODES:
            raise InvalidFile(f"The program has {len(whole)} operations; at most {MAX_NODES} are allowed.")
        return whole, needed

    def _given(self, specs: list[Any]) -> dict[str, Any]:
        """Return the values that the program begins with, by their names."""
        values: dict[str, Any] = {}
        known: dict[tuple[Any, ...], _Value] = {}
        given: list[str] = []
        for spec in specs:
            match _union(spec):
                case ("parameter" | "buffer" | "tensor_constant") as kind, {"arg": {"name": str(placeholder)}, **about}:
                    name = of_type(str, about.get(f"{kind}_name"))
                    if name not in self._stored:
                        raise InvalidFile(f"The archive lacks the tensor {name[:200]!r} of its graph.")
                    same = self._stored[name].identity
                    if same not in known:
                        known[same] = _Value()
                        self._tensors.append((name, kind == "parameter", known[same]))
                    values[placeholder] = known[same]
                case "user_input", {"arg": {"as_tensor": {"name": str(placeholder)}}}:
                    values[placeholder] = _Value()
                    given.append(placeholder)
                case "user_input", {"arg": dict(arg)}:
                    raise InvalidFile(f"The program takes an input that is no tensor, {next(iter(arg), '')}.")
                case "constant_input", {"name": str(placeholder), "value": value}:
                    values[placeholder] = self._argument(value, values)
                    given.append("")
                case kind, _:
                    raise InvalidFile(f"The program holds what is no tensor, a {kind}; only tensors are data.")
        names = self._input_names(given)
        self._inputs = [(name, one, values[one]) for name, one in zip(names, given, strict=True) if one]
        return values

    def _take(self, nodes: list[Any], values: dict[str, Any], depth: int) -> None:
        """Take the nodes of a graph or of a region of it, and keep their results among the values."""
        for node in nodes:
            operation = of_type(str, of_type(dict, node).get("target")).removeprefix("torch.ops.")
            given = of_type(list, node.get("inputs"))
            if _CHECKS.match(operation):
                continue
            if operation in (_NO_GRADIENTS, _AUTOCAST):
                self._take_region(operation, node, given, values, depth)
                continue
            arguments: dict[str, Any] = {}
            for one in given:
                name, value = of_type(str, of_type(dict, one).get("name")), self._argument(one.get("arg"), values)
                if name not in _OF_MACHINE and not (name == "generator" and value is None):
                    arguments[name] = value
            results: list[_Value] = []
            for name in _result_names(of_type(list, node.get("outputs"))):
                results.append(_Value())
                if name is not None:
                    values[name] = results[-1]
            self._nodes.append(_Node(operation, arguments, results, stays=_writes(operation)))

    def _take_region(self, operation: str, node: Any, given: list[Any], values: dict[str, Any], depth: int) -> None:
        if depth == _MAX_DEPTH:
            raise InvalidFile(f"The program has regions more than {_MAX_DEPTH} deep.")
        arguments = [of_type(dict, one).get("arg") for one in given]
        at = 1 if operation == _NO_GRADIENTS else 4
        kind, part = _union(arguments[at]) if len(arguments) > at else ("", None)
        if kind != "as_graph":
            raise Malformed("a region has no graph")
        graph = of_type(dict, of_type(dict, part).get("graph"))
        if operation == _AUTOCAST and _union(arguments[2]) != ("as_bool", False):
            raise InvalidFile("The program switches torch.autocast on; export the model outside of it.")
        names = [_name_in(_union(one)[1], "name", "as_name") for one in of_type(list, graph.get("inputs"))]
        inside = [self._argument(one, values) for one in arguments[at + 1 :]]
        if len(names) != len(inside):
            raise Malformed("a region has other inputs than its graph")
        own = dict(zip(names, inside, strict=True))
        if operation == _AUTOCAST:
            self._nodes.append(_Node(_AUTOCAST_OFF, {}, [], stays=True))
        self._take(of_type(list, graph.get("nodes")), own, depth + 1)
        if operation == _AUTOCAST:
            self._nodes.append(_Node(_REGION_ENDS, {}, [], stays=True))
        results = [self._argument(one, own) for one in of_type(list, graph.get("outputs"))]
        named = _result_names(of_type(list, node.get("outputs")))
        for name, result in zip(named, results, strict=False):
            if name is not None:
                values[name] = result

    def _argument(self, arg: Any, values: Mapping[str, Any]) -> Any:
        """Return an argument: a plain value, a list, a value of the graph, or one of a form of its own."""
        kind, given = _union(arg)
        match kind:
            case "as_none":
                return None
            case "as_int" | "as_bool" | "as_string":
                return of_type({"as_int": int, "as_bool": bool, "as_string": str}[kind], given)
            case "as_float":
                return _float(given)
            case "as_ints" | "as_bools" | "as_strings" | "as_floats":
                return [self._argument({kind.removesuffix("s"): one}, values) for one in of_type(list, given)]
            case "as_tensor":
                return _known(values, _name_in(given, "name"))
            case "as_tensors":
                return [_known(values, _name_in(one, "name")) for one in of_type(list, given)]
            case "as_optional_tensors" | "as_sym_ints" | "as_sym_floats" | "as_sym_bools":
                each = kind.removesuffix("s")
                return [self._argument(one if each == "as_optional_tensor" else {each: one}, values)
                        for one in of_type(list, given)]  # fmt: skip
            case "as_optional_tensor":
                return self._argument(given, values)
            case "as_sym_int" | "as_sym_bool" | "as_sym_float":
                inner, number = _union(given)
                return _known(values, of_type(str, number)) if inner == "as_name" else self._argument(given, values)
            case "as_int_lists":
                return [[of_type(int, number) for number in of_type(list, one)] for one in of_type(list, given)]
            case "as_scalar_type":
                return _Special({"dtype": _type_of(given)})
            case "as_memory_format" if type(given) is int and given in _MEMORY_FORMATS:
                return _Special({"memory_format": _MEMORY_FORMATS[given]})
            case "as_layout" if given == _STRIDED:
                return None
            case "as_device":
                return _Special({"device": None})
        raise InvalidFile(f"The program's graph has an argument of the kind {kind[:40]!r}, which has no plain form.")

    def _input_names(self, placeholders: Sequence[str]) -> list[str]:
        """Return a name for each input: its key where it lies in a dictionary, or else its argument's."""
        keys = [key for key, _ in _leaves(self._spec("in_spec"), None)]
        if len(keys) != len(placeholders):
            keys = [None] * len(placeholders)
        names = [key or one for key, one in zip(keys, placeholders, strict=True)]
        return [one if names.count(name) > 1 else name for name, one in zip(names, placeholders, strict=True)]

    def _logits_place(self, n_outputs: int) -> int:
        """Return the place of the output that is named `logits`; the first without one."""
        spec = self._spec("out_spec")
        fields = _fields(spec, of_type(dict, self._module.get("treespec_namedtuple_fields") or {}))
        children = spec.get("children_spec", []) if spec else []
        if "logits" not in fields or len(fields) != len(children):
            return 0
        before = fields.index("logits")
        if children[before].get("type") is not None:
            return 0
        place = sum(len(list(_leaves(child, None))) for child in children[:before])
        return place if place < n_outputs else 0

    def _spec(self, name: str) -> dict[str, Any]:
        """Return how inputs or outputs are nested; empty where it is not told."""
        calls = of_type(list, self._module.get("module_call_graph", []))
        signature = of_type(dict, calls[0]).get("signature") if calls else None
        try:
            _, spec = json.loads(of_type(str, of_type(dict, signature or {}).get(name, "[1, {}]")))
        except (ValueError, RecursionError, TypeError):
            return {}
        return spec if isinstance(spec, dict) and _is_spec(spec, 0) else {}

    def _shaped(self, name: str) -> list[Any]:
        """Return type and dimensions of a value of the program."""
        about = of_type(dict, self._about.get(name))
        return [_type_of(about.get("dtype")), [self._size(one) for one in of_type(list, about.get("sizes"))]]

    def _size(self, size: Any) -> Any:
        kind, given = _union(size)
        if kind == "as_int":
            return of_type(int, given)
        text = of_type(str, of_type(dict, given).get("expr_str"))
        if number := _INTEGER.match(text):
            return int(number[1])
        symbol = _SYMBOL.match(text)
        found = self._ranges.get(symbol["called"] or symbol["plain"]) if symbol else None
        if found is None:
            return [2, None]
        least, most = of_type(dict, found).get("min_val"), found.get("max_val")
        bounded = type(most) is int and most < _UNBOUNDED
        return [max(least, 2) if type(least) is int else 2, most if bounded else None]


def _described(entry: Any) -> dict[str, Any]:
    match entry:
        case [str(name), str(dtype), list(shape)] if len(name) <= 200 and len(dtype) <= 20 and name.isprintable():
            return {"name": name, "dtype": dtype, "shape": _sizes(shape)}
    raise InvalidFile("The file's graph has an input that is not [name, dtype, dimensions].")


def _sizes(shape: list[Any]) -> list[int | None]:
    """Return dimensions; null for those that vary."""
    if len(shape) > _MAX_SHOWN or not all(type(size) is int or isinstance(size, list) for size in shape):
        raise InvalidFile("The file's graph has dimensions that are no sizes.")
    return [size if isinstance(size, int) else None for size in shape]


def _type_of(number: Any) -> str:
    """Return the name of one of torch's types by its number."""
    if type(number) is not int or number not in _TYPES:
        raise InvalidFile(f"The program uses torch's type number {str(number)[:20]}, which has no plain form.")
    return _TYPES[number]


def _union(value: Any) -> tuple[str, Any]:
    """Return kind and content of one of torch's unions, an object of one member."""
    match value:
        case dict() if len(value) == 1:
            [(kind, given)] = value.items()
            return str(kind), given
    raise Malformed(f"it has {str(value)[:80]!r} where an object of one member belongs")


def _name_in(value: Any, *members: str) -> str:
    found = of_type(dict, value)
    return str(of_type(str, next((found[one] for one in members if one in found), None)))


def _known(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise Malformed(f"it uses {name[:80]!r} before it is there")
    return values[name]


def _result_names(outputs: list[Any]) -> Iterator[str | None]:
    """Yield the name of each of a node's results; None for one that has none."""
    for output in outputs:
        kind, given = _union(output)
        several = isinstance(given, list)
        for one in given if several else [given]:
            match kind, one:
                case (("as_tensor" | "as_tensors"), {"name": str(name)}):
                    yield name
                case (("as_sym_int" | "as_sym_bool" | "as_sym_float" | "as_sym_ints"), {"as_name": str(name)}):
                    yield name
                case (("as_optional_tensor" | "as_optional_tensors"), {"as_tensor": {"name": str(name)}}):
                    yield name
                case _:
                    yield None


def _writes(operation: str) -> bool:
    """Return whether an operation writes into its first argument, as its name says."""
    name = operation.split(".")[1] if operation.startswith("aten.") and operation.count(".") == 2 else ""
    return name.endswith("_") and not name.endswith("__")


def _values_in(value: Any) -> Iterator[_Value]:
    if isinstance(value, _Value):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _values_in(one)


def _written(value: Any) -> Any:
    match value:
        case dict():
            return {name: _written(one) for name, one in value.items()}
        case list():
            return [_written(one) for one in value]
        case _Value():
            return {"ref": value.number}
        case _Special():
            return dict(value.form)
    return value


def _float(given: Any) -> Any:
    """Return a number; those that JSON has no form for have one of their own."""
    if given in ("Infinity", "-Infinity", "NaN"):
        return _Special({"float": str(float(given))})
    if not math.isfinite(of_type(float, given)):
        return _Special({"float": str(given)})
    return given


def _is_spec(spec: Any, depth: int) -> bool:
    return (
        depth < _MAX_DEPTH
        and isinstance(spec, dict)
        and isinstance(spec.get("children_spec", []), list)
        and all(_is_spec(child, depth + 1) for child in spec.get("children_spec", []))
    )


def _leaves(spec: Mapping[str, Any], key: str | None) -> Iterator[tuple[str | None, None]]:
    """Yield the key of each leaf, from left to right; None for one that lies in no dictionary."""
    if spec.get("type") is None:
        if "type" in spec:
            yield key, None
        return
    children = spec.get("children_spec", [])
    fields = _fields(spec, {}) if str(spec["type"]).endswith(("dict", "Dict")) else []
    keys = fields if len(fields) == len(children) else [None] * len(children)
    for child, of_child in zip(children, keys, strict=True):
        yield from _leaves(child, of_child)


def _fields(spec: Mapping[str, Any], named_tuples: Mapping[str, Any]) -> list[Any]:
    """Return the names of the members of a dictionary, a named tuple or a class of outputs; empty without any."""
    try:
        context = json.loads(spec.get("context") or "null")
    except (ValueError, RecursionError, TypeError):
        return []
    if isinstance(context, str):
        context = named_tuples.get(context)
    return context if isinstance(context, list) and all(isinstance(one, str) for one in context) else []
