"""Export a model of any class as a graph that is data, in the form of `networks.exported.graph`.

`torch.export` traces the model; this module writes down what it found: operations by name, their arguments, and the
tensors that they use. Nothing of the model's code comes along.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument

from ..networks.exported.network import ExportedNetwork, input_names
from ..networks.exported.operations import AUTOCAST_OFF, REGION_ENDS, allowed
from .conversion import ConversionError
from .models import evaluating

# Arguments that say how memory is laid out, or what library the machine had, not what is computed.
_OF_MACHINE = ("layout", "pin_memory", "cudnn_enable", "cudnn_enabled")
# Operations that only check what is known, or compute nothing.
_CHECKS = re.compile(r"aten\.(_assert_\w+|sym_constrain_range\w*|_functional_assert\w*|_functional_sym_constrain\w*)\.")
_NO_GRADIENTS, _AUTOCAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"
_ARGUMENTS = "abcdefgh"
# A size that export takes for unbounded.
_UNBOUNDED = 2**31
_MAX_LISTED = 20
# Logits of a graph and of its model are equal but for the order of sums, where a model has faster ways in evaluation.
_SAME_LOGITS = 1e-4
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*\n\s*(?P<code>[^\n]+)')


@dataclass(frozen=True)
class Exported:
    """A model as data.

    Attributes:
        graph: in the form of `networks.exported.graph`.
        tensors: those of the model that the graph uses, by its names.
    """

    graph: dict[str, Any]
    tensors: dict[str, Shaped[Tensor, "..."]]


def export_model(
    model: nn.Module, example_inputs: Any, *, dynamic_shapes: dict[str, Any] | tuple[Any, ...] | list[Any] | None = None
) -> Exported:
    """Return a model's graph and its tensors.

    Args:
        model: any class; it is exported in evaluation mode, and its mode is restored.
        example_inputs: what the model is called with: one tensor, a tuple of its positional arguments, or a dictionary
            of its named ones; at least two samples, or one that is taken twice.
        dynamic_shapes: as of torch.export. Default: any number of samples, and any length of texts, which are whole
            numbers of two dimensions; other dimensions are those of the example.

    Raises:
        ConversionError: the model cannot be exported; the message says why, and at which line of its code.
    """
    if not hasattr(Dim, "AUTO"):
        raise ConversionError(f"Exporting a model needs torch 2.6 or later; this is {torch.__version__}.")
    args, kwargs = _arguments(example_inputs)
    shapes = _varying(args, kwargs) if dynamic_shapes is None else dynamic_shapes
    try:
        with torch.no_grad(), evaluating(model), warnings.catch_warnings():
            # torch warns of its own workings, which users cannot change.
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        # torch raises errors of a dozen types, and the model's own code may raise any.
        raise ConversionError(_why(error)) from error
    return from_program(program)


def from_program(program: ExportedProgram) -> Exported:
    """Return the graph and the tensors of a program of torch.export.

    Raises:
        ConversionError: it uses operations or objects that a graph of data cannot have; the message names them all.
    """
    writer = _Writer(program)
    results = writer.take(program.graph, writer.placeholders(program.graph))
    if writer.unknown:
        listed = "; ".join(f"{name} {where}".strip() for name, where in list(writer.unknown.items())[:_MAX_LISTED])
        n = f"{len(writer.unknown)} operation{'s' if len(writer.unknown) > 1 else ''}"
        raise ConversionError(f"The model uses {n} that the service does not run: {listed}.")
    [output] = [node for node in program.graph.nodes if node.op == "output"]
    place = _logits_place(program.call_spec.out_spec, len(results))
    return writer.exported(results[place], output.args[0][place])


def check_same_logits(model: nn.Module, network: ExportedNetwork, example_inputs: Any) -> None:
    """Check that a graph gives a model's logits on its example.

    Args:
        model: that was exported; it is run in evaluation mode, and its mode is restored.
        network: of the graph, with the model's weights, on the processor.
        example_inputs: as of `export_model`.

    Raises:
        ConversionError: the logits differ by more than 1e-4 of the largest, as those of a model that is random do.
    """
    args, kwargs = _arguments(example_inputs)
    with torch.no_grad(), evaluating(model):
        output = model(*args, **kwargs)
    leaves = [one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    with torch.no_grad():
        found = network({name: one.cpu() for name, one in zip(input_names(network), leaves, strict=True)})
    expected = _logits_of(output).detach().cpu().float()
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if difference > _SAME_LOGITS * largest:
        raise ConversionError(
            f"The graph gives logits that differ from the model's by {difference:.3g} on the example: something in the "
            "model is random in evaluation mode, or depends on what it computed before."
        )


def _logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: the tensor of this name, or the first."""
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    found = torch.utils._pytree.tree_leaves(output)[0] if named is None else named
    assert isinstance(found, Tensor), "its graph has logits"
    return found


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and named arguments; a single sample is taken twice, so that the number of samples may vary."""
    doubled = torch.utils._pytree.tree_map_only(
        Tensor, lambda one: torch.cat([one, one]) if one.ndim and len(one) == 1 else one, example_inputs
    )
    match doubled:
        case Tensor():
            return (doubled,), {}
        case tuple() | list():
            return tuple(doubled), {}
        case Mapping():
            return (), dict(doubled)
    raise ConversionError(
        "example_inputs must be a tensor, a tuple of positional arguments or a dictionary of named ones, not "
        f"{type(example_inputs).__name__}."
    )


def _varying(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the dimensions that may vary: the number of samples, and the length of texts."""

    def of(one: Any) -> Any:
        """Return those of one argument."""
        if not isinstance(one, Tensor) or not one.ndim:
            return None
        text = one.ndim == 2 and not one.is_floating_point() and one.dtype != torch.bool
        return {0: Dim.AUTO, 1: Dim.AUTO} if text else {0: Dim.AUTO}

    shapes = torch.utils._pytree.tree_map(of, (args, kwargs), is_leaf=lambda one: isinstance(one, Tensor))
    # One tuple for all of *args, or the names of the arguments: torch takes either, and a model may have both.
    return shapes[1] if not args else shapes[0] if not kwargs else _by_position(shapes)


def _by_position(shapes: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Any, ...]:
    return (*shapes[0], *shapes[1].values())


@dataclass
class _Value:
    """A value while the graph is written: what it came from, and its number at last."""

    number: int = -1


@dataclass
class _Entry:
    """A node while the graph is written."""

    operation: str
    arguments: dict[str, Any]
    results: list[_Value]
    stays: bool = False


class _Writer:
    """Collects the nodes of a program's graph, and writes those that the logits need."""

    def __init__(self, program: ExportedProgram) -> None:
        self.unknown: dict[str, str] = {}
        self._program = program
        self._entries: list[_Entry] = []
        self._tensors: list[tuple[str, Tensor, bool, _Value]] = []
        self._inputs: list[tuple[str, fx.Node, _Value]] = []
        self._ranges = {str(symbol): found for symbol, found in program.range_constraints.items()}

    def take(self, graph: fx.Graph, values: dict[fx.Node, Any]) -> Any:
        """Take the nodes of a graph, or of a region of it, whose inputs have values; return what it gives."""
        for node in graph.nodes:
            if node.op == "call_function":
                values[node] = self._call(node, values)
            elif node.op == "output":
                return _resolved(node.args[0], values)
        return []

    def exported(self, logits: Any, node: Any) -> Exported:
        """Return the graph of what the logits need, and the tensors that it uses.

        Args:
            logits: the value of the program's output that is the logits.
            node: of this output.
        """
        if not isinstance(logits, _Value) or not isinstance(node.meta.get("val"), Tensor):
            raise ConversionError("The model's output must be a tensor of logits, or hold one as `logits`.")
        needed = {id(logits)}
        kept: list[_Entry] = []
        for entry in reversed(self._entries):
            if entry.stays or any(id(one) in needed for one in entry.results):
                kept.append(entry)
                needed.update(id(one) for one in _values_in(list(entry.arguments.values())))
        kept.reverse()
        kept = _without_empty_regions(kept)
        tensors = [one for one in self._tensors if id(one[3]) in needed]
        numbered = [one[3] for one in tensors] + [one[2] for one in self._inputs] + [v for e in kept for v in e.results]
        for number, value in enumerate(numbered):
            value.number = number
        graph = {
            "version": 1,
            "tensors": [
                [name, "parameter" if is_parameter else "buffer", _dtype_name(tensor.dtype), list(tensor.shape)]
                for name, tensor, is_parameter, _ in tensors
            ],
            "inputs": [
                [name, _dtype_name(node.meta["val"].dtype), self._shape(node)] for name, node, _ in self._inputs
            ],
            "nodes": [[one.operation, _written(one.arguments), len(one.results)] for one in kept],
            "logits": [logits.number, self._shape(node)],
        }
        return Exported(graph, {name: tensor for name, tensor, _, _ in tensors})

    def placeholders(self, graph: fx.Graph) -> dict[fx.Node, Any]:
        """Return the values of a program's inputs: its tensors, those of the user, and constants."""
        values: dict[fx.Node, Any] = {}
        places = [node for node in graph.nodes if node.op == "placeholder"]
        names = _input_names(self._program)
        known: dict[tuple[Any, ...], _Value] = {}
        for node, spec in zip(places, self._program.graph_signature.input_specs, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                if isinstance(spec.arg, ConstantArgument):
                    values[node] = spec.arg.value
                elif isinstance(spec.arg, TensorArgument):
                    values[node] = _Value()
                    self._inputs.append((names[node.name], node, values[node]))
                else:
                    raise ConversionError(f"The model's input {node.name!r} is no tensor: only tensors can vary.")
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                tensor = _tensor_of(self._program, str(spec.target))
                # A tensor with several names, such as tied embeddings, is one.
                same = (
                    tensor.untyped_storage()._cdata,
                    tensor.storage_offset(),
                    tensor.shape,
                    tensor.stride(),
                    tensor.dtype,
                )
                values[node] = known.setdefault(same, _Value())
                if all(values[node] is not value for *_, value in self._tensors):
                    self._tensors.append((str(spec.target), tensor, spec.kind == InputKind.PARAMETER, values[node]))
            else:
                raise ConversionError(f"The model holds {spec.target!r}, an object that is no tensor.")
        return values

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        name = _operation_name(node)
        if name == "_operator.getitem":
            whole, index = node.args
            return _resolved(whole, values)[index]
        if _CHECKS.match(name):
            return None
        if name in (_NO_GRADIENTS, _AUTOCAST):
            return self._region(name, node, values)
        if name not in allowed():
            self.unknown.setdefault(name, _line_of(node.meta.get("stack_trace")))
        arguments = {
            key: _resolved(value, values)
            for key, value in _named_arguments(node).items()
            if key not in _OF_MACHINE and not (key == "generator" and value is None)
        }
        found = node.meta.get("val")
        results = [_Value() for _ in (found if isinstance(found, tuple | list) else [found])]
        self._entries.append(_Entry(name, arguments, results, stays=_writes(name)))
        return results if isinstance(found, tuple | list) else results[0]

    def _region(self, name: str, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Take the nodes of a region as nodes of the graph itself."""
        if name == _NO_GRADIENTS:
            _, part, *given = node.args
        else:
            _, _, enabled, _, part, *given = node.args
            if enabled:
                self.unknown.setdefault("torch.autocast", "switches itself on; export the model outside of it")
        assert isinstance(part, fx.Node), "a region's graph is a part of the program's module"
        graph = getattr(part.graph.owning_module, str(part.target)).graph
        places = [one for one in graph.nodes if one.op == "placeholder"]
        inner = {one: _resolved(value, values) for one, value in zip(places, given, strict=True)}
        if name == _AUTOCAST:
            self._entries.append(_Entry(AUTOCAST_OFF, {}, [], stays=True))
        results = self.take(graph, inner)
        if name == _AUTOCAST:
            self._entries.append(_Entry(REGION_ENDS, {}, [], stays=True))
        return results

    def _shape(self, node: fx.Node) -> list[Any]:
        return [self._size(size) for size in node.meta["val"].shape]

    def _size(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        if size.node.expr.is_Integer:
            return int(size.node.expr)
        found = self._ranges.get(str(size.node.expr))
        if found is None:
            return [2, None]
        upper = int(found.upper) if found.upper.is_Integer and found.upper < _UNBOUNDED else None
        return [max(int(found.lower), 2), upper]


def _operation_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target._name)
    module = getattr(target, "__module__", "")
    return f"{module}.{getattr(target, '__name__', target)}"


def _writes(operation: str) -> bool:
    """Return whether an operation writes into its first argument, as its name says."""
    name = operation.split(".")[1] if operation.startswith("aten.") else ""
    return name.endswith("_") and not name.endswith("__")


def _named_arguments(node: fx.Node) -> dict[str, Any]:
    """Return a node's arguments by the names of the operation's own form."""
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema.arguments
        return {one.name: value for one, value in zip(schema, node.args, strict=False)} | dict(node.kwargs)
    return dict(zip(_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)


def _resolved(value: Any, values: dict[fx.Node, Any]) -> Any:
    """Return an argument with values in place of nodes."""
    if isinstance(value, fx.Node):
        return values[value]
    if isinstance(value, tuple | list):
        return [_resolved(one, values) for one in value]
    return value


def _values_in(value: Any) -> Iterator[_Value]:
    if isinstance(value, _Value):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _values_in(one)


def _written(value: Any) -> Any:
    """Return an argument in the form of a graph."""
    match value:
        case dict():
            return {name: _written(one) for name, one in value.items()}
        case list():
            return [_written(one) for one in value]
        case _Value():
            return {"ref": value.number}
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case torch.dtype():
            return {"dtype": _dtype_name(value)}
        case torch.memory_format():
            return {"memory_format": str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": None}
        case None | bool() | int() | float() | str():
            return value
    raise ConversionError(f"The model's graph holds a {type(value).__name__}, which has no form as data.")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensor_of(program: ExportedProgram, name: str) -> Tensor:
    found = program.state_dict.get(name, program.constants.get(name))
    if not isinstance(found, Tensor):
        raise ConversionError(f"The model holds {name!r}, an object that is no tensor.")
    if found.is_meta or isinstance(found, torch._subclasses.fake_tensor.FakeTensor):
        raise ConversionError(f"{name!r} is on the meta device: it has a shape and no values.")
    return found.detach()


def _without_empty_regions(entries: list[_Entry]) -> list[_Entry]:
    """Leave out regions in which nothing is left."""
    kept: list[_Entry] = []
    for entry in entries:
        if entry.operation == REGION_ENDS and kept and kept[-1].operation == AUTOCAST_OFF:
            kept.pop()
        else:
            kept.append(entry)
    return kept


def _input_names(program: ExportedProgram) -> dict[str, str]:
    """Return a name for each input of the user: its key where it lies in a dictionary, or else its argument's."""
    placeholders = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    numbers = torch.utils._pytree.tree_unflatten(list(range(len(placeholders))), program.call_spec.in_spec)
    keys: dict[int, str] = {}
    for path, number in torch.utils._pytree.tree_flatten_with_path(numbers)[0]:
        last = getattr(path[-1], "key", None)
        if isinstance(last, str):
            keys[number] = last
    names = [keys.get(number, name) for number, name in enumerate(placeholders)]
    return {
        placeholder: placeholder if names.count(name) > 1 else name
        for placeholder, name in zip(placeholders, names, strict=True)
    }


def _logits_place(spec: Any, n_outputs: int) -> int:
    """Return the place of the output that is named `logits`; the first without one."""
    output = torch.utils._pytree.tree_unflatten(list(range(n_outputs)), spec)
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, int) else 0


def _line_of(stack_trace: str | None) -> str:
    """Return the line of the model's own code in a trace, as `at net.py:12: x = x.nonzero()`; "" if it is unknown."""
    frames = [(m["file"], m["line"], m["code"].strip()) for m in _FRAME.finditer(f"{stack_trace or ''}\n")]
    own = [frame for frame in frames if not _is_of_torch(frame[0])] or frames
    return "at {}:{}: {}".format(Path(own[-1][0]).name, *own[-1][1:]) if own else ""


def _is_of_torch(file: str) -> bool:
    parts = Path(file).parts
    return "torch" in parts and ("site-packages" in parts or "dist-packages" in parts)


def _why(error: BaseException) -> str:
    """Return in plain words why torch cannot export a model, and at which line of its code."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[0][:300] if lines else type(error).__name__
    where = _line_of(text[text.find("User code:") :] if "User code:" in text else None) or _raised_at(error)
    depends = "data-dependent" in text or "DataDependent" in type(error).__name__ or ".item()" in text
    what = "its computation depends on values of a tensor, as `if x.sum() > 0` does" if depends else said
    return f"The model cannot be exported: {what}{f' ({where})' if where else ''}."


def _raised_at(error: BaseException) -> str:
    """Return the last line of the model's own code from which an error came."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        if not _is_of_torch(file) and Path(file) != Path(__file__) and Path(file).is_file():
            code = Path(file).read_text(errors="replace").splitlines()[line - 1].strip()
            found = f"at {Path(file).name}:{line}: {code}"
        trace = trace.tb_next
    return found
