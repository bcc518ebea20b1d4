"""A network that runs a graph: an interpreter over the allowed operations, node by node, without code of its own.

The tensors of the graph are the module's parameters and buffers, under their own names. Before the graph computes
anything on inputs of other sizes than before, it runs without memory, on torch's meta device, where every result is
bounded and writes are checked.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...errors import AnalysisError
from ..building import refused
from .graph import Graph, Input, Node, Ref, Size, Stored, sizes_text
from .operations import AUTOCAST_OFF, REGION_ENDS, SHRINKING, allowed
from .rules import LinearMap, is_batch_normalisation, linear_map, multiplied
from .steps import MAX_RESULT_BYTES, Step, dtype_of, narrow_type, plan_frees, storage_of

# Most multiplications of a batch: days of any machine.
_MAX_COST = 2.0**60
# The most names in a sentence, and in a list of an error's members.
_MAX_LISTED, _MAX_NAMED = 20, 200
# Shapes of inputs that are known to run.
_MAX_KNOWN = 64
# Names under which torch keeps what a weight is computed from.
_REPARAMETRISED = re.compile(r"\.parametrizations\.|(^|\.)weight_(g|v|orig)$")


class GraphLinear(nn.Module):
    """A linear map of the graph, which hooks can watch; its weight and bias are values of the graph.

    Attributes:
        name: name of the module that the network had it in, or of its weight where that is no module's `weight`.
    """

    def __init__(self, network: "ExportedNetwork", step: Step, form: LinearMap, name: str) -> None:
        super().__init__()
        # In a tuple: torch would take the network for a part of this module.
        self._network, self._step, self._form, self.name = (network,), step, form, name

    def forward(
        self, inputs: Float[Tensor, "... d"], values: list[Any], device: torch.device
    ) -> Float[Tensor, "... c"]:
        """Return the linear map of its inputs; `values` are the graph's so far."""
        result: Tensor = self._step.run_with(self._form.inputs, inputs, values, device)
        return result

    @property
    def weight(self) -> Float[Tensor, "c d ..."]:
        """The current weight; of a 1x1 convolution, with two more dimensions."""
        weight = self._network[0]._constant(self._step.node.arguments[self._form.weight].number)
        return weight.T if self._form.transposed else weight

    @property
    def bias(self) -> Float[Tensor, " c"] | None:
        """The current bias; None without one."""
        given = None if self._form.bias is None else self._step.node.arguments.get(self._form.bias)
        return self._network[0]._constant(given.number) if isinstance(given, Ref) else None

    @property
    def weight_number(self) -> int:
        """Number of the weight among the graph's values."""
        number: int = self._step.node.arguments[self._form.weight].number
        return number


class GraphNorm(nn.Module):
    """A batch normalisation of the graph, whose statistics can be recomputed; they are buffers of the network.

    Attributes:
        momentum: as of torch.nn.BatchNorm2d.
    """

    def __init__(self, network: "ExportedNetwork", node: Node) -> None:
        super().__init__()
        roles = {role: node.arguments.get(role) for role in ("running_mean", "running_var", "weight", "bias")}
        self._network = (network,)
        self._names = {
            role: network._graph.tensors[given.number].name if isinstance(given, Ref) else None
            for role, given in roles.items()
        }
        self.momentum: float | None = float(node.arguments["momentum"])
        self._eps = float(node.arguments["eps"])

    def forward(self, input: Float[Tensor, "n c ..."]) -> Float[Tensor, "n c ..."]:
        """Normalise with the running statistics; in training mode with the batch's, which enter these."""
        mean, variance, weight, bias = map(self._tensor, self._names)
        momentum = 0.0 if self.momentum is None else self.momentum
        return nn.functional.batch_norm(input, mean, variance, weight, bias, self.training, momentum, self._eps)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What two normalisations share if they are one that runs twice."""
        return (*self._names.values(), self.momentum, self._eps)

    def reset_running_stats(self) -> None:
        """Set the running statistics to those of no batch."""
        mean, variance = self._tensor("running_mean"), self._tensor("running_var")
        if mean is not None and variance is not None:
            mean.zero_()
            variance.fill_(1)

    def _tensor(self, role: str) -> Tensor | None:
        name = self._names[role]
        return None if name is None else self._network[0]._tensor(name)


class ExportedNetwork(nn.Module):
    """Runs a graph on a batch: one tensor of inputs, or several by the names of the graph's inputs.

    Its own attributes begin with an underscore: names of the graph's tensors are attributes too.

    Args:
        graph: read and bounded.

    Raises:
        AnalysisError: `invalid-architecture` for operations that are not allowed, all at once; for arguments that an
            operation does not have, training mode, or names that no module can have.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        _require_allowed(graph)
        self._graph = graph
        narrow = narrow_type(graph)
        self._dtypes = [dtype_of(one.dtype, narrow) for one in graph.inputs]
        _register_tensors(self, graph)
        self._steps = [Step(node, place, narrow) for place, node in enumerate(graph.nodes)]
        plan_frees(self._steps, graph)
        self._fixed = _fixed_values(graph)
        self._writes = any(step.writes for step in self._steps)
        # Whether sizes of results can only grow with those of the inputs.
        self._grows = not any(step.node.operation in SHRINKING for step in self._steps)
        self._linear: dict[str, GraphLinear] = {}
        self._norm_of: dict[tuple[Any, ...], GraphNorm] = {}
        self._parts: list[nn.Module | None] = [self._part(step) for step in self._steps]
        # Registered, so that recalibration finds them.
        self._norms = nn.ModuleList(self._norm_of.values())
        # Shapes of inputs on which it has run without memory.
        self._known: list[Sequence[tuple[int, ...]]] = []

    def forward(self, batch: Shaped[Tensor, "n ..."] | Mapping[str, Shaped[Tensor, "n ..."]]) -> Any:
        """Return the logits of a batch of any number of samples.

        A graph that takes a certain number of samples gets batches of it, the last of which its last sample fills up.

        Raises:
            AnalysisError: `inputs-refused` for inputs of other names, types or sizes than the graph's.
        """
        inputs = self._inputs(batch)
        _, most = self._graph.batch
        if most is None or len(inputs[0]) <= most:
            return self._logits(inputs)
        parts = zip(*(torch.split(tensor, most) for tensor in inputs), strict=True)
        return torch.cat([self._logits(list(part)) for part in parts])

    def _logits(self, inputs: list[Tensor]) -> Any:
        n, (least, _) = len(inputs[0]), self._graph.batch
        inputs = [filled_up(tensor, least) for tensor in inputs]
        # A tracer's tensors have no memory either, and its trace would have what runs here.
        traced = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if not traced:
            self._look_at([tuple(tensor.shape) for tensor in inputs])
        values, device = self._first_values(inputs), inputs[0].device
        own = {storage_of(one) for one in values if one is not None} if self._writes and not traced else set()
        # Left whatever happens: a pass that runs out of memory is tried again.
        with ExitStack() as regions:
            depth: list[ExitStack] = []
            for step, part in zip(self._steps, self._parts, strict=True):
                if part is None and step.region is None:
                    step.run(values, device, own)
                elif isinstance(part, GraphLinear):
                    step.keep(part(values[step.node.arguments[part._form.inputs].number], values, device), values)
                elif part is not None:
                    step.keep(part(values[step.node.arguments["input"].number]), values)
                elif step.region == AUTOCAST_OFF:
                    depth.append(regions.enter_context(ExitStack()))
                    depth[-1].enter_context(torch.autocast(device.type, enabled=False))
                else:
                    depth.pop().close()
        logits = values[self._graph.logits]
        return logits[:n] if n < least else logits

    def _first_values(self, inputs: Sequence[Tensor]) -> list[Any]:
        tensors = [self._tensor(stored.name) for stored in self._graph.tensors]
        return [*tensors, *inputs, *([None] * (self._graph.n_values - len(tensors) - len(inputs)))]

    def _tensor(self, name: str) -> Tensor:
        place, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self.get_submodule(place), leaf)
        return tensor

    def _constant(self, number: int) -> Tensor:
        """Return a value that depends on no input."""
        if number < len(self._graph.tensors):
            return self._tensor(self._graph.tensors[number].name)
        wanted = self._graph.before(number)
        values = self._first_values([])
        for step in self._steps:
            if step.region is None and step.node.first in wanted:
                step.run(values, self._tensor(self._graph.tensors[0].name).device, set())
        found: Tensor = values[number]
        return found

    def _inputs(self, batch: Shaped[Tensor, "n ..."] | Mapping[str, Shaped[Tensor, "n ..."]]) -> list[Tensor]:
        """Return a batch's tensors in the order of the graph's inputs, and of their types."""
        declared = self._graph.inputs
        named = {"": batch} if isinstance(batch, Tensor) else dict(batch)
        if len(declared) == len(named) == 1 and set(named) <= {"", "pixel_values", "input_ids", declared[0].name}:
            named = dict(zip([declared[0].name], named.values(), strict=True))
        if set(named) != {one.name for one in declared}:
            expected = ", ".join(one.name for one in declared)
            found = ", ".join(name or "one tensor without a name" for name in named)
            raise AnalysisError(
                "inputs-refused", f"The network was exported with the inputs {expected}; it got {found}."
            )
        return [_as_declared(named[one.name], one, dtype) for one, dtype in zip(declared, self._dtypes, strict=True)]

    def _look_at(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Run the graph without memory on inputs of these shapes, unless it has run on larger ones.

        Raises:
            AnalysisError: `inputs-refused`.
        """
        if any(_covers(known, shapes) if self._grows else list(known) == list(shapes) for known in self._known):
            return
        # On larger ones than these first, if these then cost no more: a network of texts sees a new length with nearly
        # each batch.
        larger = [
            tuple(map(_rounded_up, shape, declared.shape)) if self._grows else shape
            for shape, declared in zip(shapes, self._graph.inputs, strict=True)
        ]
        try:
            self._examined(larger)
            self._known.append(larger)
        except AnalysisError:
            try:
                self._examined(shapes)
                self._known.append(list(shapes))
            except AnalysisError as error:
                of = ", ".join(
                    f"{one.name} {list(shape)}" for one, shape in zip(self._graph.inputs, shapes, strict=True)
                )
                detail = f"The network fails on inputs of these shapes ({of}): {error.detail}"
                raise AnalysisError("inputs-refused", detail, input_shape=list(shapes[0][1:])) from error
        del self._known[:-_MAX_KNOWN]

    def _examined(self, shapes: Sequence[tuple[int, ...]]) -> list[int]:
        """Run the graph on the meta device; return the bytes of all results, in order.

        Raises:
            AnalysisError: `invalid-architecture`, as `Step.run_without_memory`; or the graph needs far too much
                time, or its logits have not the dimensions that it states.
        """
        meta = torch.device("meta")
        for one, shape, dtype in zip(self._graph.inputs, shapes, self._dtypes, strict=True):
            if (size := prod(shape) * dtype.itemsize) > MAX_RESULT_BYTES:
                raise refused(f"The graph's input {one.name!r} has {size} bytes; {MAX_RESULT_BYTES} are allowed")
        inputs = [
            torch.empty(shape, dtype=dtype, device=meta) for shape, dtype in zip(shapes, self._dtypes, strict=True)
        ]
        values = [one if one is None else one.to(meta) for one in self._first_values(inputs)]
        own = {storage_of(one) for one in values if one is not None}
        n_bytes: list[int] = []
        cost = 0.0
        # Autocast knows no meta device; it would change types, and no sizes.
        with torch.no_grad():
            for step in self._steps:
                if step.region is None:
                    of_step, multiplications = step.run_without_memory(values, own)
                    n_bytes += of_step
                    cost += multiplications
                    if cost > _MAX_COST:
                        raise refused(f"{step.where} brings the graph to {cost:.0e} multiplications a batch")
        logits = values[self._graph.logits]
        if not isinstance(logits, Tensor) or logits.ndim != len(self._graph.logits_shape):
            stated = sizes_text(self._graph.logits_shape)
            found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise refused(f"The graph's logits are {found}; it states {stated}")
        return n_bytes

    def _part(self, step: Step) -> nn.Module | None:
        """Return the module that runs a step, where hooks or recalibration may want one."""
        if is_batch_normalisation(step.node, len(self._graph.tensors)):
            norm = GraphNorm(self, step.node).eval()
            # One that runs twice is one: what it has seen counts together.
            return self._norm_of.setdefault(norm.identity, norm)
        form = linear_map(step.node, self._graph, self._fixed)
        if form is None:
            return None
        number = step.node.arguments[form.weight].number
        names = [one.name for one in self._graph.weights_of(number) or ()]
        if not names:
            return None
        part = GraphLinear(self, step, form, _module_of(names[0]))
        # Of several that share a weight, the last may be the head.
        self._linear |= dict.fromkeys((part.name, names[0]), part)
        return part


def filled_up(tensor: Shaped[Tensor, "n ..."], least: int) -> Shaped[Tensor, "m ..."]:
    """Return a tensor of at least so many samples, the last of which is there again."""
    missing = least - len(tensor)
    return tensor if missing <= 0 else torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])


def batch_bounds(module: nn.Module) -> tuple[int, int | None]:
    """Return the least and the most samples that a network takes at a time; None for any number."""
    return module._graph.batch if isinstance(module, ExportedNetwork) else (1, None)


def input_names(network: ExportedNetwork) -> list[str]:
    """Return the names of the inputs that a network takes."""
    return [one.name for one in network._graph.inputs]


def check_runs(network: ExportedNetwork) -> None:
    """Run a network's graph without memory, on as few samples as it takes.

    Raises:
        AnalysisError: `invalid-architecture`.
    """
    graph = network._graph
    least, most = graph.batch
    n = max(least, 2 if most is None else min(2, most))
    shapes = [one.shape for one in graph.inputs]
    varies = any(not isinstance(size, int) for shape in shapes for size in shape[1:])
    failed: AnalysisError | None = None
    # Where more than the number of samples varies, the least that a network needs is unknown.
    for wish in (16, 224) if varies else (16,):
        try:
            network._examined([(n, *(_chosen(size, wish) for size in shape[1:])) for shape in shapes])
            return
        except AnalysisError as error:
            failed = error
    assert failed is not None, "there is at least one wish"
    raise failed


def bytes_per_sample(
    network: ExportedNetwork, batch: Shaped[Tensor, "n ..."] | Mapping[str, Shaped[Tensor, "n ..."]]
) -> int:
    """Return the bytes that a sample adds to the largest tensor of a pass, found without memory.

    Raises:
        AnalysisError: `inputs-refused`.
    """
    shapes = [tuple(tensor.shape[1:]) for tensor in network._inputs(batch)]
    least, most = network._graph.batch
    few = max(least, 2)
    more = few + 1 if most is None else min(few + 1, most)
    network._look_at([(more, *shape) for shape in shapes])
    if more == few:
        return max(1, *network._examined([(few, *shape) for shape in shapes])) // few
    of_few, of_more = (network._examined([(n, *shape) for shape in shapes]) for n in (few, more))
    return max(1, *(larger - one for one, larger in zip(of_few, of_more, strict=True)))


def linear_maps(network: ExportedNetwork) -> dict[str, GraphLinear]:
    """Return the linear maps of a network's graph, by the names of their modules and of their weights."""
    return network._linear


def head_of(network: ExportedNetwork) -> str | None:
    """Return the name of the last linear map on the way to the logits; None without one."""
    before = network._graph.before(network._graph.logits)
    heads = [
        part.name
        for step, part in zip(network._steps, network._parts, strict=True)
        if isinstance(part, GraphLinear) and step.node.first in before
    ]
    return heads[-1] if heads else None


def multiplied_weights(network: ExportedNetwork, *, but_for: str | None) -> list[Tensor]:
    """Return the parameters that the network multiplies its activations by, in the order of their use.

    Args:
        network: it is not run.
        but_for: name of a linear map whose own parameters are left out, wherever else they are used.

    Raises:
        AnalysisError: `invalid-argument` where such a weight is reparametrised.
    """
    graph, head = network._graph, None if but_for is None else network._linear[but_for].weight_number
    left_out = set() if head is None else {one.name for one in graph.weights_of(head) or ()}
    found: dict[str, None] = {}
    for step in network._steps:
        for number in multiplied(step.node, network._fixed):
            of = graph.weights_of(number)
            if of is None:
                raise _reparametrised([one for one in graph.tensors if one.is_parameter][:1])
            sources = [one for one in of if one.name not in left_out]
            weights = [one for one in sources if one.is_parameter and len(one.shape) > 1]
            if weights:
                found[_largest(weights).name] = None
    return [network._tensor(name) for name in found]


def _largest(weights: Sequence[Stored]) -> Stored:
    """Return the weight that others scale, as those of standardised weights do.

    Raises:
        AnalysisError: `invalid-argument` where it is reparametrised, or there is none.
    """
    by_size = sorted(weights, key=lambda one: -prod(one.shape))
    several = len(by_size) > 1 and prod(by_size[0].shape) == prod(by_size[1].shape)
    if several or any(_REPARAMETRISED.search(one.name) for one in weights):
        raise _reparametrised(weights)
    return by_size[0]


def _reparametrised(weights: Sequence[Stored]) -> AnalysisError:
    names = ", ".join(one.name for one in weights)
    return AnalysisError(
        "invalid-argument",
        f"A weight of the network is computed from {names} in each pass, so zeros would not stay. Remove the "
        "reparametrisation before the network is exported.",
        argument="checkpoint_id",
        module=_module_of(weights[0].name) if weights else None,
    )


def _require_allowed(graph: Graph) -> None:
    """Refuse a graph with operations that are not on the list, and name them all."""
    depth = 0
    for node in graph.nodes:
        depth += (node.operation == AUTOCAST_OFF) - (node.operation == REGION_ENDS)
        if depth < 0:
            raise refused("The graph ends a region that it has not begun")
    if depth:
        raise refused("The graph begins a region that it does not end")
    unknown = sorted({node.operation for node in graph.nodes} - allowed())
    if unknown:
        more = f" and {len(unknown) - _MAX_LISTED} more" if len(unknown) > _MAX_LISTED else ""
        raise AnalysisError(
            "invalid-architecture",
            f"The graph uses {len(unknown)} operations that this worker does not run: "
            f"{', '.join(unknown[:_MAX_LISTED])}{more}. GET /v1/version lists those that it does.",
            operations=unknown[:_MAX_NAMED],
        )


def _register_tensors(network: ExportedNetwork, graph: Graph) -> None:
    """Give the network a tensor for each of the graph's, under its name, without initial values."""
    for stored in graph.tensors:
        *path, leaf = stored.name.split(".")
        place: nn.Module = network
        try:
            for part in path:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place._modules[part] or place
            dtype = dtype_of(stored.dtype, None)
            tensor = torch.empty(stored.shape, dtype=torch.float32 if dtype.is_floating_point else dtype)
            if stored.is_parameter and tensor.is_floating_point():
                place.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
            else:
                place.register_buffer(leaf, tensor)
        except (KeyError, TypeError) as error:
            raise refused(f"The graph's tensor {stored.name[:80]!r} has no name that a module can have") from error


def _fixed_values(graph: Graph) -> set[int]:
    """Return the numbers of the values that depend on no input."""
    fixed = set(range(len(graph.tensors)))
    for node in graph.nodes:
        if all(number in fixed for number in node.refs()):
            fixed.update(range(node.first, node.first + node.n_results))
    return fixed


def _module_of(name: str) -> str:
    """Return the module of a weight by the weight's name; the name itself where it is not named as modules name it."""
    module, computed, _ = name.partition(".parametrizations.")
    place, _, leaf = name.rpartition(".")
    if computed:
        return module
    return place if place and leaf in ("weight", "weight_v", "weight_g", "weight_orig") else name


def _as_declared(tensor: Shaped[Tensor, "n ..."], declared: Input, dtype: torch.dtype) -> Shaped[Tensor, "n ..."]:
    """Return an input in the type of the graph's.

    Raises:
        AnalysisError: `inputs-refused`.
    """
    sizes = [(size, size) if isinstance(size, int) else size for size in declared.shape[1:]]
    fits = tensor.ndim == len(declared.shape) and all(
        least <= size and (most is None or size <= most)
        for size, (least, most) in zip(tensor.shape[1:], sizes, strict=True)
    )
    if not fits or tensor.is_floating_point() != dtype.is_floating_point:
        shape = f"{str(dtype).removeprefix('torch.')} {sizes_text(declared.shape)}"
        raise AnalysisError(
            "inputs-refused",
            f"The network was exported for {declared.name} of {shape}; it got "
            f"{str(tensor.dtype).removeprefix('torch.')} {['n', *tensor.shape[1:]]}.",
            input_shape=list(tensor.shape[1:]),
            expected_shape=[size if isinstance(size, int) else None for size in declared.shape[1:]],
        )
    return tensor.to(dtype)


def _covers(known: Sequence[tuple[int, ...]], shapes: Sequence[tuple[int, ...]]) -> bool:
    pairs = [
        (one, of) for large, small in zip(known, shapes, strict=True) for one, of in zip(large, small, strict=True)
    ]
    # A size of 1 is another case: views of it are whole, and it is repeated.
    return all(one == of or (one >= of > 1) for one, of in pairs)


def _rounded_up(size: int, declared: Size) -> int:
    """Return the next power of two, within what the graph allows."""
    most = declared if isinstance(declared, int) else declared[1]
    larger = 1 << (size - 1).bit_length() if size else 0
    return larger if most is None else min(larger, most)


def _chosen(size: Size, wish: int) -> int:
    if isinstance(size, int):
        return size
    least, most = size
    return max(least, wish if most is None else min(wish, most))
