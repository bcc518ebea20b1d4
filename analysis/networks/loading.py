"""Load a network that is ready to run from the description of its architecture and a safetensors file.

A description is `{"family": ..., "name": ..., "args": {...}}`, `{"family": "transformers", "config": {...}}`, or
`{"family": "exported", "graph": ...}` where the file holds the graph of the network. The network is built on torch's
meta device, where tensors have shapes and no memory, and compared with the file's header before a byte of weights is
read: the memory that a description can make us allocate is bounded by the file's content. Then it is built again with
memory, so that its own constructor makes tensors that no file holds, such as tables of positions.

The description's family is a module beside this one; `family` says what it offers.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import AnalysisError
from . import custom
from .building import Bounded, ConstantsOnCpu, WithoutInitialisation
from .exported.network import ExportedNetwork, linear_maps
from .family import Family, Listed, OfGraphs, OwnLoading
from .naming import Entry, Naming, Same, match_names
from .ties import Ties

# Each family is the module of this name beside this one. A library's family also has the name of its package, and of
# the extra that brings it.
FAMILIES = ("builtin", "transformers", "timm", "torchvision", "custom", "exported")

# Default number of tensors, the most that a file's header has.
_MOST_TENSORS = 100_000

# The most names in one list of an error's members, which also give the true number.
_MAX_LISTED = 20


@dataclass(frozen=True)
class LoadedNetwork:
    """A network in evaluation mode, without gradients, in float32.

    Attributes:
        module: takes a batch, gives logits (n, c). A batch is one tensor of inputs (n, ...), or a mapping of several by
            the network's own names.
        head_name: module name of the classification head, a linear module; its inputs are the features.
        predicts_tokens: whether it is a causal language model: its logits (n, t, c) are of the token that follows each
            of t tokens, its head is the output embedding, and c is its vocabulary.
        naming: its file's names of its tensors, and the file's other tensors.
        stored: the file's name of each of its tensors, by the network's own name; not of counters that a file may lack.
    """

    module: nn.Module
    head_name: str
    predicts_tokens: bool = False
    naming: Naming = field(default_factory=Naming)
    stored: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def head(self) -> nn.Module:
        """The classification head."""
        if isinstance(self.module, ExportedNetwork):
            return linear_maps(self.module)[self.head_name]
        return self.module.get_submodule(self.head_name)

    @property
    def weight(self) -> Float32[Tensor, "c d"]:
        """The head's current rows: reparametrised ones change with each pass, or each time they are read."""
        weight = self.head.weight
        assert isinstance(weight, Tensor), "a head is a linear module"
        # A 1x1 convolution's rows are its weights without the two spatial dimensions of size 1.
        return weight.detach().float().flatten(1)

    @property
    def bias(self) -> Float32[Tensor, " c"] | None:
        """The head's current bias; None without one."""
        bias = self.head.bias
        return bias.detach().float() if isinstance(bias, Tensor) else None

    def weights_changed(self) -> None:
        """Clear the values that parts cached from weights for evaluation mode; call it after writing to weights."""
        forget(self._keeping)

    @cached_property
    def _keeping(self) -> list[nn.Module]:
        return parts_that_keep(self.module)


def parts_that_keep(module: nn.Module) -> list[nn.Module]:
    """Return parts with their own `train`, such as those that cache values computed from weights.

    LeViT's, TinyViT's and EfficientViT's attention compute their biases once in evaluation mode.
    """
    return [part for part in module.modules() if type(part).train is not nn.Module.train]


def forget(parts: Iterable[nn.Module]) -> None:
    """Clear the parts' cached values by switching their mode to training and back."""
    for part in parts:
        part.train()
        part.eval()


def available_families() -> list[str]:
    """Return the families whose packages are installed; none is imported, and an import may still fail (`names_of`)."""
    here = {"builtin": True, "custom": bool(custom.names()), "exported": True}
    return [name for name in FAMILIES if here.get(name) or (name not in here and importlib.util.find_spec(name))]


def names_of(family: str) -> list[str]:
    """Import a family, and list the names of its networks; empty where descriptions have no name or take any.

    Raises:
        AnalysisError: `family-unavailable` with the library's own message where it cannot be imported.
    """
    module = _imported(family)
    if isinstance(module, OwnLoading):
        try:
            module.try_imports()
        except Exception as error:
            _failed[family] = _unavailable(family, error)
            raise _failed[family] from error
    return list(module.names()) if isinstance(module, Listed) else []


def build(
    architecture: Mapping[str, Any], *, device: torch.device | str = "meta", n_tensors: int = _MOST_TENSORS
) -> nn.Module:
    """Build a network from its description.

    Args:
        architecture: the family and its description of the network.
        device: `meta` gives shapes without memory; elsewhere parameters are initialised from torch's global generator.
        n_tensors: of the file that the network will be compared with; a network that needs far more is not built.

    Returns:
        The network, in training mode.

    Raises:
        AnalysisError: `invalid-architecture`; `family-unavailable` where the family's package is missing here.
    """
    network, _ = _build_on_meta(architecture, n_tensors)
    return network if torch.device(device).type == "meta" else _create(architecture, device)


def expected_tensors(architecture: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the parameters and persistent buffers, which a checkpoint must hold.

    Raises:
        AnalysisError: `invalid-architecture`.
    """
    return {name: tuple(tensor.shape) for name, tensor in build(architecture).state_dict().items()}


def load_network(
    architecture: Mapping[str, Any],
    path: Path,
    *,
    head: str | None,
    device: torch.device | str,
    prefix: str | None = None,
    supplied: Mapping[str, Sequence[int]] | None = None,
) -> LoadedNetwork:
    """Build the described network and fill it from a safetensors file.

    Args:
        architecture: see `build`.
        path: safetensors; shapes must be the network's, and names the network's or those under which the family's
            library saves it. `num_batches_tracked` may be missing, and so may all but one name of a shared tensor.
        head: module name of the classification head, a linear module. Default: the family's own.
        device: target device of the network.
        prefix: prefix of the weights' names in the file, such as `ema_model.`. Default: the one place of the file that
            holds all of the network's tensors.
        supplied: shapes of tensors that an adapter supplies, by the network's names: the file may lack those of them
            that the network has in this shape, and they are 0.

    Returns:
        The network in evaluation mode and its head.

    Raises:
        AnalysisError: `invalid-architecture`; `family-unavailable`; `head-not-found` with the candidates;
            `checkpoint-mismatch` with the names that are missing, unexpected, misshaped or mistyped, at most 20 each,
            and their numbers, or with a reason: `ambiguous`, `conversion`, `tied`, `unreadable`; `non-finite-values`
            with the first tensor's name and the number of such tensors; `out-of-memory`.

    Numerics: floating-point tensors of any width become float32, integer buffers keep their values; a float64 value
    too large for float32 counts as not finite. Tensors are read one at a time.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            architecture = _whole(architecture, file.metadata())
            template, bounds = _build_on_meta(architecture, len(file.keys()))
            head_name = _head_name(template, architecture, head)
            family = _family(architecture)
            ties = Ties.of(template, family)
            stored, naming = match_names(
                template, family, header_of(file), ties, prefix=prefix, same=_same(file), supplied=supplied
            )
            bounds.check_largest({name: tuple(tensor.shape) for name, tensor in template.state_dict().items()})
            tensors = _read(template.state_dict(), stored, file, torch.device(device))
    except torch.OutOfMemoryError as error:
        raise AnalysisError("out-of-memory", f"The network's weights do not fit the memory of {device}.") from error
    except SafetensorError as error:
        raise AnalysisError(
            "checkpoint-mismatch", f"The file is not complete, valid safetensors: {error}.", reason="unreadable"
        ) from None
    # Parameters take only address space here, no memory: each is replaced before it is written to.
    with WithoutInitialisation():
        network = _create(architecture, "cpu")
    untied = ties.untied(tensors)
    network.load_state_dict(tensors, assign=True)
    ties.tie(network, but_for=untied)
    network.to(device).eval().requires_grad_(False)
    _require_memory(network)
    predicts_tokens = isinstance(family, OwnLoading) and family.predicts_tokens(network)
    return LoadedNetwork(network, head_name, predicts_tokens, replace(naming, untied=untied), stored)


def renaming_of(network: nn.Module, architecture: Mapping[str, Any]) -> Callable[[str], str]:
    """Return a function that converts a name of a saved file into the network's own, as its library's loading does."""
    family = _family(architecture)
    return family.stored_names(network) if isinstance(family, OwnLoading) else str


def build_like(architecture: Mapping[str, Any], like: nn.Module) -> nn.Module | None:
    """Build a network in evaluation mode with unset weights, to be called with those of another.

    Args:
        architecture: see `build`.
        like: the other network; its device is used.

    Returns:
        The network; None where its tensors differ from the other's, or it cannot be built.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in like.state_dict().items()}
    try:
        template, bounds = _build_on_meta(architecture, len(wanted))
        if {name: tuple(tensor.shape) for name, tensor in template.state_dict().items()} != wanted:
            return None
        bounds.check_largest(wanted)
        with WithoutInitialisation():
            network = _create(architecture, "cpu")
    except AnalysisError:
        return None
    return network.to(next(like.parameters()).device).eval().requires_grad_(False)


def words_of(error: BaseException) -> str:
    """Return type and first line of the root error, which libraries wrap in others."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:500]}" if said else type(error).__name__


def _build_on_meta(architecture: Mapping[str, Any], n_tensors: int) -> tuple[nn.Module, Bounded]:
    bounds = Bounded(n_tensors)
    # Our own builders bound their depth themselves; the counter makes torch load its compiler, 1.2 s and 800 modules.
    # A graph bounds itself, without memory too.
    counted = nullcontext() if architecture.get("family") in ("builtin", "exported") else bounds
    with counted, WithoutInitialisation():
        try:
            return _create(architecture, "meta"), bounds
        except AnalysisError as error:
            # Without a cause we refused it ourselves; a cause may be a library that read values on meta.
            if error.__cause__ is None:
                raise
        return _create(architecture, "meta", constants=ConstantsOnCpu()), bounds


def _create(
    architecture: Mapping[str, Any],
    device: torch.device | str,
    constants: AbstractContextManager[Any] | None = None,
) -> nn.Module:
    family = _family(architecture)
    try:
        with torch.device(device), constants or nullcontext():
            network = family.create(architecture)
    except AnalysisError:
        raise
    except ImportError as error:
        raise _unavailable(architecture["family"], error) from error
    except MemoryError:
        raise AnalysisError("out-of-memory", "The network's own constants do not fit the memory.") from None
    except Exception as error:
        # Any error of a library about the arguments is the description's fault.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
        raise AnalysisError("invalid-architecture", f"The description is refused: {reason}") from error
    return network


def _whole(architecture: Mapping[str, Any], metadata: Mapping[str, str] | None) -> Mapping[str, Any]:
    """Return a description with what the file of the weights holds of it."""
    family = _family(architecture)
    return family.described(architecture, metadata or {}) if isinstance(family, OfGraphs) else architecture


def _family(architecture: Mapping[str, Any]) -> Family:
    """Import and return the module of a description's family; most workers never need most families.

    Raises:
        AnalysisError: `invalid-architecture` for a description of another form; `family-unavailable`.
    """
    match dict(architecture):
        case {"family": "transformers", "config": dict(), **others} if not others:
            family = "transformers"
        case {"family": "exported", "graph": str() | dict(), **others}:
            family = "exported"
        case {"family": str(family), "name": str(), "args": dict(), **others} if not others:
            pass
        case _:
            raise AnalysisError(
                "invalid-architecture",
                "A description must have the members family and name, both strings, and args, an object; in the family "
                "transformers, the members family and config, an object.",
            )
    if family not in FAMILIES or (family, "config" in architecture) == ("transformers", False):
        raise AnalysisError("invalid-architecture", f"The family must be one of {', '.join(FAMILIES)}, not {family!r}.")
    return _imported(family)


# Errors of failed imports by family: a second attempt costs as much, and may fail by leftovers of the first.
_failed: dict[str, AnalysisError] = {}


def _imported(family: str) -> Family:
    if family in _failed:
        known = _failed[family]
        raise AnalysisError(known.kind, known.detail, **known.members) from known
    try:
        module = importlib.import_module(f".{family}", __package__)
    except Exception as error:
        # torchvision raises RuntimeError if torch has another version than it needs; a missing library raises OSError.
        _failed[family] = _unavailable(family, error)
        raise _failed[family] from error
    assert isinstance(module, Family), "every name of FAMILIES is a module that mypy has compared with Family"
    return module


def _unavailable(family: str, error: Exception) -> AnalysisError:
    if isinstance(error, ModuleNotFoundError) and error.name == family:
        reason = f"it is not installed. Install it there with `pip install 'interplay-server[{family}]'`"
    else:
        reason = (
            f"importing it fails with {words_of(error)}. It must fit the worker's torch {torch.__version__}: install a "
            "version of it that does"
        )
    return AnalysisError(
        "family-unavailable",
        f"This worker has no networks of the family {family!r}: {reason}; GET /v1/version lists what each worker has.",
        family=family,
        extra=family,
        error=words_of(error),
    )


def _head_name(network: nn.Module, architecture: Mapping[str, Any], asked: str | None) -> str:
    """Return the requested head, or else the family's own."""
    family = _family(architecture)
    if isinstance(family, OfGraphs):
        candidates = family.linear_maps(network)
    else:
        candidates = [name for name, module in network.named_modules() if _is_linear(module)]
    name = family.head(network, architecture) if asked is None else asked
    if name not in candidates:
        what = f"not {name!r}" if name is not None else "and this one does not end with one"
        raise AnalysisError(
            "head-not-found",
            f"The head must be a linear module of the network ({', '.join(candidates[:_MAX_LISTED])}), {what}.",
            candidates=candidates,
        )
    return str(name)


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is linear, or a convolution that is linear in the channels of one position."""
    if isinstance(module, nn.Conv2d):
        return (module.kernel_size, module.stride, module.padding, module.groups) == ((1, 1), (1, 1), (0, 0), 1)
    return isinstance(module, nn.Linear)


def header_of(file: Any) -> dict[str, Entry]:
    """Return type and shape of each tensor of an opened file."""
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    return {name: Entry(one.get_dtype(), list(one.get_shape())) for name, one in slices.items()}


def _same(file: Any) -> Same:
    """Return a function that tells whether two tensors of an opened file are equal."""

    def same(one: str, other: str) -> bool:
        """Return whether two tensors of the file have the same type, and equal bytes."""
        # By their bytes: torch cannot compare every type of a file, and NaN equals nothing.
        first, second = file.get_tensor(one), file.get_tensor(other)
        if first.dtype != second.dtype:
            return False
        return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (first, second)))

    return same


def _read(
    wanted: Mapping[str, Shaped[Tensor, "..."]], stored: Mapping[str, str], file: Any, device: torch.device
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    broken: list[str] = []
    for name, expected in wanted.items():
        if name not in stored:
            tensors[name] = torch.zeros(expected.shape, dtype=expected.dtype, device=device)
            continue
        # A copy, even where the type stays: tensors mapped to the file must not outlive it.
        dtype = torch.float32 if expected.is_floating_point() else expected.dtype
        tensor = file.get_tensor(stored[name]).to(dtype=dtype, device=device, copy=True)
        if expected.is_floating_point() and not is_finite(tensor):
            broken.append(name)
        tensors[name] = tensor
    if broken:
        raise AnalysisError(
            "non-finite-values",
            f"The checkpoint holds NaN or infinity, as float32, in {broken[0]!r} and {len(broken) - 1} other tensors."
            if len(broken) > 1
            else f"The checkpoint holds NaN or infinity, as float32, in {broken[0]!r}.",
            tensor=broken[0],
            n_tensors=len(broken),
        )
    return tensors


def is_finite(tensor: Shaped[Tensor, "..."]) -> bool:
    """Return whether a tensor holds neither NaN nor infinity."""
    # A sum is finite only if every term is, and needs no memory; if it is not finite, each term is checked.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _require_memory(network: nn.Module) -> None:
    """Check that all buffers have memory after the second build; one without memory is a bug of ours."""
    on_meta = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if on_meta:
        raise RuntimeError(f"buffers without memory after loading: {on_meta}")
