"""Convert a PyTorch pickle to safetensors, on the user's machine; the service itself opens no pickles.

Training scripts save more than weights: an epoch, an optimizer, averaged copies. One mapping from names to tensors is
kept; everything else is listed, so that users can see what was left out.
"""

import json
import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .distributed import METADATA, open_distributed
from .pickles import Inert, Key, Name, Reference
from .torchfiles import NoPlainTensor, NotTorchError, TensorPlan, open_torch_file

# Usual keys of the weights in training scripts' files, best first; an optimizer's state is never taken for weights.
_USUAL_KEYS = ("state_dict", "model_state_dict", "model", "network", "net", "module", "weights", "params")
_NEVER = ("optim", "sched", "scaler")
_MAX_DEPTH = 4
_LISTED = 20
_LONGEST_NAME = 200
# Common terms for types in messages.
_SAID = {
    "numpy.core.multiarray.scalar": "numpy scalar",
    "numpy._core.multiarray.scalar": "numpy scalar",
    "numpy.core.multiarray._reconstruct": "numpy array",
    "numpy._core.multiarray._reconstruct": "numpy array",
    "__builtin__.set": "set",
    "builtins.set": "set",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata": "an object, which was not opened",
}
_PLANS = TensorPlan


class ConversionError(Exception):
    """The file cannot be converted; the message says why and what to do."""


@dataclass(frozen=True)
class Weights:
    """The weights of a file, and the rest of its content.

    Attributes:
        tensors: the weights by name.
        key: their key in the file, nested keys separated by dots; empty at the top level.
        left_out: description of each other entry, by key.
        others: keys of further weights that could have been taken, for example an averaged copy.
    """

    tensors: dict[str, Shaped[Tensor, "..."]]
    key: str
    left_out: dict[str, str]
    others: list[str]


def read_weights(path: Path, *, key: str | None = None) -> Weights:
    """Return the weights in a .pt, .pth, .ckpt or .bin file, or in a folder of these.

    Nothing of the file is run: anything but tensors, texts, numbers and containers of these becomes only a name
    (`analysis.saving.pickles`).

    Args:
        path: a file of `torch.save`, in any of its forms since PyTorch 0.1.10; a folder of
            torch.distributed.checkpoint (.metadata and .distcp files); or a Hugging Face folder with pytorch_model.bin,
            in one file or in shards.
        key: key of the weights in the file, such as `ema.state_dict`. Default: the usual places.

    Returns:
        The weights, and the entries left out.

    Raises:
        ConversionError: the file is of another kind, damaged, or holds no weights (under this key).
    """
    name = path.resolve().name
    try:
        with ExitStack() as stack:
            content, n_bytes = _opened(path, stack)
            # Views repeat numbers, and tied weights count once for each name.
            return _chosen(name, content, key, most_bytes=16 * n_bytes + 2**30)
    except NotTorchError as error:
        raise ConversionError(f"{shown(name)} {error}.") from None


def write_safetensors(
    tensors: Mapping[str, Shaped[Tensor, "..."]],
    path: Path,
    *,
    architecture: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights as a checkpoint that the service accepts.

    Args:
        tensors: by name; tensors that share memory, such as tied weights, are written once each.
        path: target file.
        architecture: description of the network; if given it is embedded and need not be sent separately.
        metadata: further entries of the file's metadata.

    Raises:
        ConversionError: a tensor has no plain form, being sparse or quantised, or safetensors lacks its type.
    """
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ConversionError(f"{name!r} is sparse or quantised; write it as a plain tensor first.")
    # Copies, as views into one storage would be refused or include all of it; not on a GPU, which may be full.
    plain = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    described = {} if architecture is None else {"architecture": json.dumps(architecture)}
    about = {"format": "pt", **described, **(metadata or {})}
    part = path.with_name(f"{path.name}.part")
    try:
        save_file(plain, part, metadata=about)
        part.replace(path)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ConversionError(f"safetensors cannot hold these tensors: {' '.join(str(error).split())}.") from None
    finally:
        part.unlink(missing_ok=True)


def shown(name: str) -> str:
    """Return an untrusted name for a message: in quotes, printable, and with its middle cut out if it is long."""
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME // 2]}...{name[-_LONGEST_NAME // 4 :]}"
    return repr(name)


def _opened(path: Path, stack: ExitStack) -> tuple[Any, int]:
    """Return the content of a file or folder, and its number of bytes."""
    if not path.is_dir():
        return stack.enter_context(open_torch_file(path)), path.stat().st_size
    if (path / METADATA).is_file():
        return stack.enter_context(open_distributed(path)), sum(file.stat().st_size for file in path.iterdir())
    files = _bins(path)
    content: dict[str, Any] = {}
    for file in files:
        shard = stack.enter_context(open_torch_file(file))
        if (entries := _entries(shard)) is None:
            raise NotTorchError(f"has {shown(file.name)}, which holds no mapping from names to tensors")
        content |= entries
    return content, sum(file.stat().st_size for file in files)


def _bins(folder: Path) -> list[Path]:
    """Return the files of a Hugging Face folder that hold its weights."""
    index = folder / "pytorch_model.bin.index.json"
    if (whole := folder / "pytorch_model.bin").is_file() or not index.is_file():
        if whole.is_file():
            return [whole]
        found = ", ".join(shown(name) for name in sorted(path.name for path in folder.iterdir())[:_LISTED]) or "nothing"
        raise NotTorchError(
            f"is a folder, but neither one of torch.distributed.checkpoint ({METADATA} and .distcp files) nor one with "
            f"pytorch_model.bin; it holds {found}"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names if Path(name).name == name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise NotTorchError(f"has an index, {index.name}, that names no shards") from None
    if missing := [name for name in names if not (folder / Path(name).name).is_file()]:
        raise NotTorchError(f"lacks {shown(missing[0])}, one of {len(names)} shards that its index names")
    return files


def _chosen(name: str, content: Any, key: str | None, most_bytes: int) -> Weights:
    found = dict(_states(content))
    if key is None:
        if not found:
            raise ConversionError(_without_weights(name, content))
        key = min(found.items(), key=_rank)[0]
    elif key not in found:
        there = ", ".join(shown(place) for place in sorted(found)[:_LISTED] if place) or "nowhere but at its top"
        raise ConversionError(f"{shown(name)} holds no weights under {shown(key)}; it holds some under {there}.")
    state = found[key]
    for place, value in state.items():
        if isinstance(value, NoPlainTensor) and value.kind != "meta":
            raise ConversionError(
                f"{_place(place)} in {shown(name)} is a tensor, but {value.kind}; write it as a plain tensor first."
            )
    plans = {place: value for place, value in state.items() if isinstance(place, str) and isinstance(value, _PLANS)}
    n_bytes = sum(plan.n_bytes for plan in plans.values())
    if n_bytes > most_bytes:
        raise ConversionError(
            f"{shown(name)} is damaged: its tensors would have {n_bytes} bytes, far more than the file."
        )
    tensors = {place: plan.read() for place, plan in plans.items()}
    left_out = {
        f"{key}.{_key(place)}".lstrip("."): _kind(value) for place, value in state.items() if place not in plans
    }
    if key:
        top = key.split(".")[0]
        entries = _entries(content) or {}
        left_out |= {_key(place): _kind(value) for place, value in entries.items() if place != top}
    return Weights(tensors, key, left_out, [place for place in found if place and place != key])


def _entries(value: Any) -> dict[Any, Any] | None:
    """Return the entries of a dictionary, or of an instance of a subclass; None for anything else."""
    if isinstance(value, dict):
        return value
    return value.entries if isinstance(value, Inert) and value.entries else None


def _states(content: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield every mapping from names to tensors, with its key."""
    for key, entries in _mappings(content):
        if any(isinstance(name, str) and isinstance(value, _PLANS) for name, value in entries.items()):
            yield key, entries


def _mappings(content: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield every mapping that may hold weights, with its key; each once, the outermost first."""
    seen: set[int] = set()
    waiting = deque([("", content, 0)])
    while waiting:
        key, value, depth = waiting.popleft()
        entries = _entries(value)
        if entries is None or id(entries) in seen:
            continue
        seen.add(id(entries))
        yield key, entries
        if depth < _MAX_DEPTH:
            waiting.extend(
                (f"{key}.{name}".lstrip("."), value, depth + 1)
                for name, value in entries.items()
                if isinstance(name, str) and not name.lower().startswith(_NEVER)
            )


def _rank(entry: tuple[str, Mapping[Any, Any]]) -> tuple[int, ...]:
    """Return a sort key: the usual places first, the outermost of them; then by the most numbers."""
    key, state = entry
    *_, last = key.split(".")
    if last in _USUAL_KEYS:
        return 0, key.count("."), _USUAL_KEYS.index(last)
    return 1, -sum(math.prod(value.shape) for value in state.values() if isinstance(value, _PLANS))


def _without_weights(name: str, content: Any) -> str:
    """Return a message that says why nothing can be converted, and what to do."""
    modules = (value for value in (content, *(_entries(content) or {}).values()) if _is_module(value))
    if (module := next(modules, None)) is not None:
        return (
            f"{shown(name)} holds a whole network, an instance of {shown(module.name)}, and not its weights alone; "
            "only that class can say what they are. Where it is installed, save them: "
            "torch.save(model.state_dict(), 'weights.pt'), or with safetensors.torch.save_file."
        )
    entries = _entries(content)
    if entries is None:
        return f"{shown(name)} holds no mapping from names to tensors, but {_kind(content)}."
    for _, state in _mappings(content):
        for place, value in state.items():
            if isinstance(value, NoPlainTensor):
                return f"{shown(name)} holds no plain tensor; {_place(place)} is a {_kind(value)}."
    if not entries:
        return f"{shown(name)} holds no mapping from names to tensors, as it is empty."
    more = f" and {len(entries) - _LISTED} others" if len(entries) > _LISTED else ""
    keys = ", ".join(map(_place, [*entries][:_LISTED])) + more
    return f"{shown(name)} holds no mapping from names to tensors; its keys are {keys}."


def _is_module(value: Any) -> bool:
    return (
        isinstance(value, Inert) and isinstance(value.state, dict) and {"_parameters", "_modules"} <= set(value.state)
    )


def _kind(value: Any) -> str:
    """Return a description of an entry that was left out."""
    match value:
        case NoPlainTensor(kind="meta"):
            return f"meta tensor {_shape(value.shape)}, which has no numbers"
        case NoPlainTensor():
            return f"tensor {_shape(value.shape)}, {value.kind}"
        case Reference():
            return "storage of numbers without a shape"
        case Inert() if _is_module(value):
            return f"{value.name}, a whole network"
        case Inert():
            return _SAID.get(value.name, value.name)
        case Name():
            return value.text
        case Key():
            return _kind(value.value)
        case dict() | list() | tuple():
            return f"{type(value).__name__} of {len(value)}"
        case _ if isinstance(value, _PLANS):
            return f"tensor {_shape(value.shape)}"
    return type(value).__name__


def _shape(shape: tuple[int, ...] | None) -> str:
    return "of some shape" if shape is None else str(list(shape))


def _key(key: Any) -> str:
    """Return a key of a dictionary as text; for an object, its kind."""
    return str(key) if isinstance(key, str | int | float) else _kind(key)


def _place(key: Any) -> str:
    return shown(_key(key))
