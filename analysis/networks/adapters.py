"""Match the tensors of PEFT's low-rank adapters to a network that is loaded.

An adapter is a file beside the network's own: pairs of small matrices for some modules, and whole tensors that take the
place of the network's. The tensors decide which modules are adapted. Patterns of a configuration are compared as plain
names: a regular expression from a stranger is never run.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from ..errors import AnalysisError
from .naming import FLOATING, Entry, mismatch_members

#: Beginning of every name in a file of PEFT.
PREFIX = "base_model.model."
Role = Literal["a", "b", "magnitude"]
T = TypeVar("T")
# How the names of low-rank tensors end, of embeddings and of all other modules.
_OF_EMBEDDINGS: Mapping[Role, str] = {
    "a": ".lora_embedding_A", "b": ".lora_embedding_B", "magnitude": ".lora_magnitude_vector",
}  # fmt: skip
_OF_OTHERS: Mapping[Role, str] = {
    "a": ".lora_A.weight", "b": ".lora_B.weight", "magnitude": ".lora_magnitude_vector",
}  # fmt: skip
_ENDINGS = frozenset((*_OF_EMBEDDINGS.values(), *_OF_OTHERS.values()))
# Parts of PEFT's wrappers within the names of whole tensors.
_BASE_LAYER, _SAVED, _ORIGINAL = "base_layer", "modules_to_save", "original_module"


@dataclass(frozen=True)
class Adapter:
    """What of an adapter's configuration decides the merged weights, with PEFT's meaning.

    Attributes:
        r: rank of modules without one of their own, at least 1.
        alpha: numerator of the scale.
        rslora: whether the scale is alpha / sqrt(r) in place of alpha / r.
        dora: whether rows are scaled to stored magnitudes.
        rank_pattern: ranks by the end of a module's name, or by all of it after a `^`; the first that fits counts.
        alpha_pattern: alphas likewise.
        targets: ends of the names of adapted modules; None where the configuration has a pattern or nothing.
        partial: whether the configuration leaves some of these modules out.
        saved: ends of the names of modules whose tensors the file holds whole.
        bias: which biases the file holds.
    """

    r: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    targets: Sequence[str] | None = None
    partial: bool = False
    saved: Sequence[str] = ()
    bias: Literal["none", "all", "lora_only"] = "none"

    def rank(self, *names: str) -> int:
        """Return the rank of a module that has these names, the network's own first."""
        return _first_match(self._ranks, names, self.r)

    def scale(self, *names: str) -> float:
        """Return the factor of B A."""
        rank, alpha = self.rank(*names), _first_match(self._alphas, names, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    @cached_property
    def _ranks(self) -> Mapping[str, tuple[int, int]]:
        return {key: (place, value) for place, (key, value) in enumerate(self.rank_pattern.items())}

    @cached_property
    def _alphas(self) -> Mapping[str, tuple[int, float]]:
        return {key: (place, value) for place, (key, value) in enumerate(self.alpha_pattern.items())}


@dataclass(frozen=True)
class LowRank:
    """A change W + scale B A; with magnitudes, each row of the sum is scaled to its own.

    Attributes:
        names: of A (r, in), B (out, r) and, for DoRA, the magnitudes (out,) in the adapter's file.
        scale: the factor.
        transposed: whether W is stored (in, out), as embeddings and GPT-2's Conv1D are.
    """

    names: Mapping[Role, str]
    scale: float
    transposed: bool


@dataclass(frozen=True)
class Change:
    """A change of one of the network's tensors: another one in its place, a low-rank change, or both in this order."""

    whole: str | None = None
    low_rank: LowRank | None = None


@dataclass(frozen=True)
class Parts:
    """A network's parts by its own names, and the conversion of a file's names into them.

    Attributes:
        state: its tensors.
        modules: its modules.
        rename: converts a name as its library does in loading.
        absent: names of tensors that its own file lacks, so that every adapter must hold them whole.
    """

    state: Mapping[str, Tensor]
    modules: Mapping[str, nn.Module]
    rename: Callable[[str], str]
    absent: Collection[str] = ()

    def tensor(self, name: str) -> str:
        """Return the network's name of a tensor; the name itself where the network has none."""
        return name if name in self.state else self.rename(name)

    def module(self, path: str) -> str | None:
        """Return the network's name of a module, which an earlier version of its library may have called otherwise."""
        if path in self.modules:
            return path
        name = self.rename(f"{path}.weight").removesuffix(".weight")
        return name if name in self.modules else None


def supplied_shapes(header: Mapping[str, Entry]) -> dict[str, Sequence[int]]:
    """Return the shapes of whole tensors in an adapter's file, by the network's names, which its base may lack."""
    found: dict[str, Sequence[int]] = {}
    for full, entry in header.items():
        name = full.removeprefix(PREFIX)
        if name != full and _split(name)[1] not in _ENDINGS:
            found[".".join(word for word in name.split(".") if word != _SAVED)] = entry.shape
    return found


def match_adapter(
    adapter: Adapter, header: Mapping[str, Entry], parts: Parts
) -> tuple[dict[str, Change], dict[str, int]]:
    """Find what an adapter's file changes, before any tensor is read.

    Args:
        adapter: its configuration.
        header: of its file.
        parts: of the network.

    Returns:
        The changes by the network's own names; and the number of tensors that are not used, by a part of their names.

    Raises:
        AnalysisError: `checkpoint-mismatch` with the file's names that are missing, unexpected, misshaped or mistyped,
            or with the reason `adapted-module` or `conversion`.
    """
    low_rank: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    ignored: dict[str, int] = {}
    faults = _Faults(header)
    for full in sorted(header):
        name = full.removeprefix(PREFIX)
        # Some versions have DoRA's magnitudes as the weight of a module.
        path, ending = _split(name.removesuffix(".weight") if name.endswith("_magnitude_vector.weight") else name)
        if name == full:
            faults.unexpected.append(full)
        elif ending in _ENDINGS:
            low_rank.setdefault(path, {})[ending] = full
        elif copy := _unused_copy(name, header, parts):
            ignored[copy] = ignored.get(copy, 0) + 1
        elif (own := parts.tensor(_without_wrappers(name, parts))) in parts.state and own not in whole:
            whole[own] = full
            faults.compare(full, list(parts.state[own].shape), floating=parts.state[own].is_floating_point())
        else:
            faults.unexpected.append(full)
    changes = {own: Change(whole=full) for own, full in whole.items()}
    adapted: dict[str, str] = {}
    for path, tensors in low_rank.items():
        own_path = parts.module(path)
        if own_path is None or own_path in adapted:
            faults.unexpected += tensors.values()
            continue
        adapted[own_path] = path
        change = _low_rank(adapter, (own_path, path), parts.modules[own_path], tensors, faults)
        changes[f"{own_path}.weight"] = Change(whole.get(f"{own_path}.weight"), change)
    faults.missing += [PREFIX + name for name in parts.absent if name not in whole]
    _check_complete(adapter, adapted, whole, parts, faults)
    faults.check()
    return changes, ignored


@dataclass
class _Faults:
    """The tensors of a file that do not fit, by kind, as an error lists them."""

    header: Mapping[str, Entry]
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[dict[str, Any]] = field(default_factory=list)
    mistyped: list[dict[str, Any]] = field(default_factory=list)

    def compare(self, full: str, shape: list[int], *, floating: bool = True) -> None:
        """Compare a tensor of the file with the shape and the type that it must have."""
        found = self.header[full]
        if found.shape != shape:
            self.misshaped.append({"name": full, "expected": shape, "found": found.shape})
        if floating and found.dtype not in FLOATING:
            self.mistyped.append({"name": full, "expected": "float32", "found": found.dtype})

    def check(self) -> None:
        """Raise `checkpoint-mismatch` if there are any."""
        faults = {name: getattr(self, name) for name in ("missing", "unexpected", "misshaped", "mistyped")}
        if any(faults.values()):
            counts = ", ".join(f"{len(entries)} {what}" for what, entries in faults.items() if entries)
            detail = f"The adapter's {len(self.header)} tensors do not fit its base and its configuration: {counts}."
            raise AnalysisError("checkpoint-mismatch", detail, **mismatch_members(faults))


def _split(name: str) -> tuple[str, str]:
    """Return a name's module and how the name ends, if it is that of a low-rank tensor."""
    for ending in _ENDINGS:
        if name.endswith(ending):
            return name.removesuffix(ending), ending
    return name, ""


def _unused_copy(name: str, header: Mapping[str, Entry], parts: Parts) -> str | None:
    """Return the part of a name that marks a further copy of a bias, which PEFT writes and does not use; else None."""
    words = name.split(".")
    if name in parts.state:
        return None
    if _ORIGINAL in words:
        return f"*.{_ORIGINAL}."
    if _SAVED in words and PREFIX + ".".join(word for word in words if word != _SAVED) in header:
        return f"*.{_SAVED}."
    return None


def _without_wrappers(name: str, parts: Parts) -> str:
    if name in parts.state:
        return name
    return ".".join(word for word in name.split(".") if word not in (_BASE_LAYER, _SAVED))


def _low_rank(
    adapter: Adapter, names: tuple[str, str], module: nn.Module, tensors: Mapping[str, str], faults: _Faults
) -> LowRank:
    """Return the change of a module's weight; tensors that do not fit are added to the faults.

    Args:
        adapter: the configuration.
        names: of the module, the network's own and the file's.
        module: the module.
        tensors: the file's names of its low-rank tensors, by how they end.
        faults: of the file.
    """
    transposed, shapes = _expected(names[0], module, adapter.rank(*names))
    endings = _OF_EMBEDDINGS if isinstance(module, nn.Embedding) else _OF_OTHERS
    found: dict[Role, str] = {}
    for role, ending in endings.items():
        if role == "magnitude" and not adapter.dora:
            continue
        if ending in tensors:
            found[role] = tensors[ending]
            faults.compare(tensors[ending], shapes[role])
        else:
            faults.missing.append(f"{PREFIX}{names[1]}{ending}")
    faults.unexpected += [full for full in tensors.values() if full not in found.values()]
    return LowRank(found, adapter.scale(*names), transposed)


def _expected(name: str, module: nn.Module, rank: int) -> tuple[bool, dict[Role, list[int]]]:
    """Return whether a module's weight is stored (in, out), and the shapes of its low-rank tensors."""
    kind = _kind(module)
    if kind is None:
        what = "a convolution in groups" if getattr(module, "groups", 1) != 1 else f"a {type(module).__name__}"
        raise AnalysisError(
            "checkpoint-mismatch",
            f"The adapter changes {name!r}, which is {what}: a change of it cannot be merged. Linear modules, "
            "embeddings and convolutions without groups can be adapted, where the weight is a parameter of their own.",
            reason="adapted-module",
            module=name,
        )
    weight = module._parameters["weight"]
    assert weight is not None, "a module of every kind has one"
    transposed = kind in ("embedding", "conv1d-of-transformers")
    out, into, *kernel = reversed(weight.shape) if transposed else weight.shape
    ones = [1] * len(kernel)
    magnitude = [1, out, *ones] if kernel else [out]
    return transposed, {"a": [rank, into, *kernel], "b": [out, rank, *ones], "magnitude": magnitude}


def _kind(module: nn.Module) -> str | None:
    """Return the kind of a module that can be adapted; None for every other."""
    if module._parameters.get("weight") is None:
        return None
    if isinstance(module, nn.Linear):
        # Torch's attention reads the weight of its last module and never calls it, so that PEFT does not train it.
        return None if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) else "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolution" if module.groups == 1 else None
    # Of GPT-2, by its name as this room does not import transformers: linear, with a transposed weight.
    return "conv1d-of-transformers" if type(module).__name__ == "Conv1D" else None


def _check_complete(
    adapter: Adapter, adapted: Mapping[str, str], whole: Mapping[str, str], parts: Parts, faults: _Faults
) -> None:
    """Add to the faults what the configuration says that the file holds, and it does not, or the other way round.

    Args:
        adapter: the configuration.
        adapted: the file's names of adapted modules, by the network's own.
        whole: the file's names of whole tensors, by the network's own.
        parts: of the network.
        faults: of the file.
    """
    saved = tuple(adapter.saved)
    # As PEFT finds them: by the end of a name, whatever stands before it.
    kept = {name for name in parts.modules if saved and name.endswith(saved)}
    expected = [name for name in parts.state if not kept.isdisjoint(_beginnings(name))]
    if adapter.bias == "all":
        expected += [name for name in parts.state if name.rpartition(".")[2] == "bias"]
    elif adapter.bias == "lora_only":
        expected += [f"{name}.bias" for name in adapted if f"{name}.bias" in parts.state]
    for name in dict.fromkeys(expected):
        if name not in whole and name not in parts.absent:
            path, _, leaf = name.rpartition(".")
            faults.missing.append(f"{PREFIX}{path}.{_BASE_LAYER}.{leaf}" if path in adapted else PREFIX + name)
    if adapter.targets is None:
        return
    targets = frozenset(adapter.targets)
    faults.unexpected += [
        f"{PREFIX}{path}"
        for name, path in adapted.items()
        if targets.isdisjoint(_endings(name)) and targets.isdisjoint(_endings(path))
    ]
    if adapter.partial:
        return
    for name, module in parts.modules.items():
        if name in adapted or targets.isdisjoint(_endings(name)) or not kept.isdisjoint(_beginnings(f"{name}.")):
            continue
        if _kind(module) is not None:
            endings = _OF_EMBEDDINGS if isinstance(module, nn.Embedding) else _OF_OTHERS
            faults.missing.append(f"{PREFIX}{name}{endings['a']}")


def _endings(name: str) -> Iterator[str]:
    """Yield a name, and what stands behind each of its dots."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


def _beginnings(name: str) -> Iterator[str]:
    """Yield what stands before each of a name's dots."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)


def _first_match(pattern: Mapping[str, tuple[int, T]], names: Sequence[str], default: T) -> T:
    """Return the value of the first key of a pattern that fits the first name that any fits."""
    for name in names:
        found = [pattern[key] for key in (f"^{name}", *_endings(name)) if key in pattern]
        if found:
            return min(found, key=lambda entry: entry[0])[1]
    return default
