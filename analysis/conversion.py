"""From a PyTorch pickle to safetensors, on the machine of whoever trusts the pickle; the service itself opens none.

Training scripts save more than weights: an epoch, an optimizer, averaged copies. What is kept is one mapping from names
to tensors; everything else is named, so that nobody has to wonder where it went.
"""

import json
import pickle
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors.torch import save_file
from torch import Tensor

# Where training scripts keep the weights, most telling first; an optimizer's state is never taken for them.
_USUAL_KEYS = ("state_dict", "model_state_dict", "model", "network", "net", "module", "weights", "params")
_NEVER = ("optim", "sched", "scaler")
_MAX_DEPTH = 4


class ConversionError(Exception):
    """The file cannot be converted; the message says why and what to do."""


@dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
        tensors: the weights by name.
        key: where they were in the file, with dots between; empty at its top.
        left_out: what else was there by key, and what it is.
        others: keys of further weights that could have been taken, such as an averaged copy.
    """

    tensors: dict[str, Shaped[Tensor, "..."]]
    key: str
    left_out: dict[str, str]
    others: list[str]


def read_weights(path: Path, *, key: str | None = None) -> Weights:
    """The weights in a .pt, .pth, .ckpt or .bin file.

    Args:
        path: what `torch.save` wrote; read with `weights_only=True`, so that no code of the file runs.
        key: where in the file the weights are, such as `ema.state_dict`. Default: the usual places.

    Returns:
        The weights, and what was left out.

    Raises:
        ConversionError: it is no such file, it needs code to be opened, or holds no weights (there).
    """
    try:
        with warnings.catch_warnings():
            # Of an unusual pickle protocol: either it can be read, or an error says that it cannot.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path.name} holds Python objects that need their code, and running a file's code is what `weights_only` "
            "prevents. Where it was trained, save the weights alone: torch.save(model.state_dict(), ...), or with "
            f"safetensors.torch.save_file. PyTorch says: {_first_line(error)}"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConversionError(f"{path.name} is not a complete file of torch.save: {_first_line(error)}") from None
    if isinstance(content, torch.nn.Module):  # weights_only lets through what was registered as safe
        content = content.state_dict()
    found = dict(_states(content))
    if key is None:
        if not found:
            raise ConversionError(f"{path.name} holds no mapping from names to tensors{_keys(content)}.")
        key = min(found.items(), key=_rank)[0]
    elif key not in found:
        there = ", ".join(repr(name) for name in found if name) or "nowhere but at its top"
        raise ConversionError(f"{path.name} holds no weights under {key!r}; it holds some under {there}.")
    state = found[key]
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    left_out = {f"{key}.{name}".lstrip("."): _kind(value) for name, value in state.items() if name not in tensors}
    if key and isinstance(content, Mapping):
        top = key.split(".")[0]
        left_out |= {str(name): _kind(value) for name, value in content.items() if name != top}
    return Weights(tensors, key, left_out, [name for name in found if name != key])


def write_safetensors(
    tensors: Mapping[str, Shaped[Tensor, "..."]], path: Path, *, architecture: Mapping[str, Any] | None = None
) -> None:
    """Write weights as a checkpoint that the service takes.

    Args:
        tensors: by name; those that share memory, as tied weights do, are written once each.
        path: where to.
        architecture: description of the network; embedded where given, so that it need not be sent apart.

    Raises:
        ConversionError: a tensor has no plain form, being sparse or quantised.
    """
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ConversionError(f"{name!r} is sparse or quantised; write it as a plain tensor first.")
    # Copies, as views into one storage would be refused or drag the whole of it along; not on a GPU, which may be full.
    plain = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    metadata = {"format": "pt"} | ({} if architecture is None else {"architecture": json.dumps(architecture)})
    save_file(plain, path, metadata=metadata)


def _states(content: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with names whose values are tensors, by where it is."""
    if not isinstance(content, Mapping) or depth > _MAX_DEPTH:
        return
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    if any(isinstance(value, Tensor) for value in named.values()):
        yield key, named
    for name, value in named.items():
        if not name.lower().startswith(_NEVER):
            yield from _states(value, f"{key}.{name}".lstrip("."), depth + 1)


def _rank(entry: tuple[str, Mapping[str, Any]]) -> tuple[int, ...]:
    """The usual places first, the outermost of them; without one whatever holds the most numbers."""
    key, state = entry
    *_, last = key.split(".")
    if last in _USUAL_KEYS:
        return 0, key.count("."), _USUAL_KEYS.index(last)
    return 1, -sum(value.numel() for value in state.values() if isinstance(value, Tensor))


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, Mapping | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def _keys(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f", but {_kind(content)}"
    return f"; its keys are {', '.join(map(repr, list(content)[:20]))}" if content else ", as it is empty"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
