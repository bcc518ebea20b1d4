"""From the description of an architecture and a safetensors file to a network that is ready to run.

A description is `{"family": ..., "name": ..., "args": {...}}`. The network is built on torch's meta device, where
tensors have shapes and no memory, and compared with the file's header before a byte of weights is read: what a
description can make us allocate is bounded by what the file holds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float32, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from analysis.errors import AnalysisError
from analysis.networks import builtin

# A family is a module with BUILDERS (name -> function of keyword arguments) and HEADS (name -> module name).
FAMILIES: Mapping[str, ModuleType] = {"builtin": builtin}

# Names in one list of an error's members; the true number stands beside it.
_MAX_LISTED = 20

# safetensors' words for what may fill a floating-point parameter.
_FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_INTEGER = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")

# Counts batches in training; evaluation never reads it, and averaged or converted checkpoints lose or change it.
_BATCH_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class LoadedNetwork:
    """A network in evaluation mode, without gradients, in float32.

    Attributes:
        module: takes inputs (n, ...), gives logits (n, c).
        head_name: module name of the classification head; what it receives are the features.
        weight: the head's rows.
        bias: the head's bias, where it has one.
    """

    module: nn.Module
    head_name: str
    weight: Float32[Tensor, "c d"]
    bias: Float32[Tensor, " c"] | None


def build(architecture: Mapping[str, Any], *, device: torch.device | str = "meta") -> nn.Module:
    """Build a network from its description.

    Args:
        architecture: family, name and the arguments of the family's builder.
        device: `meta` gives shapes without memory; elsewhere parameters are initialised from torch's global generator.

    Returns:
        The network, in training mode.

    Raises:
        AnalysisError: `invalid-architecture`.
    """
    family, name, args = _parse(architecture)
    builder = family.BUILDERS[name]
    try:
        with torch.device("meta"):
            network: nn.Module = builder(**args)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        # Without memory or a device in play, whatever torch refuses is the description's fault.
        raise AnalysisError("invalid-architecture", f"The arguments of {name!r} are refused: {error}") from error
    if torch.device(device).type != "meta":
        with torch.device(device):
            network = builder(**args)
    return network


def expected_tensors(architecture: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters and persistent buffers, which a checkpoint has to hold.

    Raises:
        AnalysisError: `invalid-architecture`.
    """
    return {name: tuple(tensor.shape) for name, tensor in build(architecture).state_dict().items()}


def load_network(
    architecture: Mapping[str, Any], path: Path, *, head: str | None, device: torch.device | str
) -> LoadedNetwork:
    """Build the described network and fill it from a safetensors file.

    Args:
        architecture: see `build`.
        path: safetensors; names and shapes must be the network's. `num_batches_tracked` may be missing.
        head: module name of the classification head, a linear module. Default: the family's own.
        device: where the network goes.

    Returns:
        The network in evaluation mode and its head.

    Raises:
        AnalysisError: `invalid-architecture`; `head-not-found` with the candidates; `checkpoint-mismatch` with the
            names that are missing, unexpected, misshaped or mistyped, at most 20 each, and their numbers;
            `non-finite-values` with the first tensor's name and the number of such tensors; `out-of-memory`.

    Numerics: floating-point tensors of any width become float32, integer buffers keep their values; a float64 value
    too large for float32 counts as not finite. Tensors are read one at a time.
    """
    network = build(architecture)
    head_name = _head_name(network, _default_head(architecture) if head is None else head)
    wanted = network.state_dict()
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _compare(wanted, file)
            tensors = _read(wanted, file, torch.device(device))
    except torch.OutOfMemoryError as error:
        raise AnalysisError("out-of-memory", f"The network's weights do not fit the memory of {device}.") from error
    except SafetensorError as error:
        raise AnalysisError(
            "checkpoint-mismatch", f"The file is not complete, valid safetensors: {error}.", reason="unreadable"
        ) from None
    network.load_state_dict(tensors, assign=True)
    _require_memory(network)
    network.eval().requires_grad_(False)
    linear = network.get_submodule(head_name)
    assert isinstance(linear, nn.Linear), "_head_name has seen to it"
    bias: Tensor | None = linear.bias
    return LoadedNetwork(network, head_name, linear.weight.detach(), None if bias is None else bias.detach())


def _parse(architecture: Mapping[str, Any]) -> tuple[ModuleType, str, dict[str, Any]]:
    match dict(architecture):
        case {"family": str(family), "name": str(name), "args": dict(args), **others} if not others:
            pass
        case _:
            raise AnalysisError(
                "invalid-architecture", "A description has the members family and name, texts, and args, an object."
            )
    if family not in FAMILIES:
        raise AnalysisError("invalid-architecture", f"The family must be one of {', '.join(FAMILIES)}, not {family!r}.")
    if name not in (names := FAMILIES[family].BUILDERS):
        raise AnalysisError("invalid-architecture", f"The name must be one of {', '.join(names)}, not {name!r}.")
    return FAMILIES[family], name, args


def _default_head(architecture: Mapping[str, Any]) -> str:
    family, name, _ = _parse(architecture)
    head: str = family.HEADS[name]
    return head


def _head_name(network: nn.Module, name: str) -> str:
    candidates = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if name not in candidates:
        raise AnalysisError(
            "head-not-found",
            f"The head must be a linear module of the network ({', '.join(candidates[:_MAX_LISTED])}), not {name!r}.",
            candidates=candidates,
        )
    return name


def _compare(wanted: Mapping[str, Shaped[Tensor, "..."]], file: Any) -> None:
    """Names, shapes and kinds of number of a file's header against the network's, before any tensor is read."""
    found = set(file.keys())
    missing = [name for name in wanted if name not in found and not name.endswith(_BATCH_COUNTER)]
    unexpected = sorted(found - set(wanted))
    misshaped, mistyped = [], []
    for name, tensor in wanted.items():
        if name not in found:
            continue
        header = file.get_slice(name)
        shape, dtype = list(header.get_shape()), header.get_dtype()
        if shape != list(tensor.shape):
            misshaped.append({"name": name, "expected": list(tensor.shape), "found": shape})
        if dtype not in _allowed(name, tensor):
            mistyped.append({"name": name, "expected": str(tensor.dtype).removeprefix("torch."), "found": dtype})
    lists = {"missing": missing, "unexpected": unexpected, "misshaped": misshaped, "mistyped": mistyped}
    if any(lists.values()):
        counts = ", ".join(f"{len(entries)} {what}" for what, entries in lists.items() if entries)
        raise AnalysisError(
            "checkpoint-mismatch",
            f"Of the {len(wanted)} tensors of the architecture and the {len(found)} of the file: {counts}.",
            **{what: entries[:_MAX_LISTED] for what, entries in lists.items()},
            **{f"n_{what}": len(entries) for what, entries in lists.items()},
        )


def _allowed(name: str, tensor: Shaped[Tensor, "..."]) -> tuple[str, ...]:
    if tensor.is_floating_point():
        return _FLOATING
    return (*_INTEGER, *_FLOATING) if name.endswith(_BATCH_COUNTER) else _INTEGER


def _read(wanted: Mapping[str, Shaped[Tensor, "..."]], file: Any, device: torch.device) -> dict[str, Tensor]:
    found = set(file.keys())
    tensors: dict[str, Tensor] = {}
    broken: list[str] = []
    for name, expected in wanted.items():
        if name not in found:
            tensors[name] = torch.zeros(expected.shape, dtype=expected.dtype, device=device)
            continue
        # A copy, even where the type stays: what the file is mapped to must not outlive the file.
        dtype = torch.float32 if expected.is_floating_point() else expected.dtype
        tensor = file.get_tensor(name).to(dtype=dtype, device=device, copy=True)
        # A sum is finite only where every term is, and needs no memory; where it is not, each term is looked at.
        if expected.is_floating_point() and not (
            math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())
        ):
            broken.append(name)
        tensors[name] = tensor
    if broken:
        raise AnalysisError(
            "non-finite-values",
            f"Tensor {broken[0]!r} of the checkpoint holds NaN or infinity (as float32); so do "
            f"{len(broken) - 1} others.",
            tensor=broken[0],
            n_tensors=len(broken),
        )
    return tensors


def _require_memory(network: nn.Module) -> None:
    """A buffer that no checkpoint holds stays on the meta device unless its family has rebuilt it: a bug of ours."""
    on_meta = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if on_meta:
        raise RuntimeError(f"buffers without memory after loading: {on_meta}")
