"""Read folders of torch.distributed.checkpoint: join the parts of each tensor from many processes.

`.metadata`, a pickle, lists the parts of each tensor and their positions in the .distcp files. Each part is a file of
torch.save within the file. All are read as plain data: nothing of them is run.
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from .pickles import Inert, Key, Name, PickleError, read_pickle
from .torchfiles import NotTorchError, TensorPlan, read_torch_file, sizes_of

METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint.metadata"


@contextmanager
def open_distributed(folder: Path) -> Iterator[dict[str, Any]]:
    """Open a folder of torch.distributed.checkpoint; its tensors can be read inside the block.

    Yields:
        Nested dictionaries, as they were saved, with a `TensorPlan` for each tensor; other objects stay unopened.

    Raises:
        NotTorchError: the folder is of another kind, damaged, or packed by an extension.
        OSError: the folder cannot be read.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _state(read_pickle(file))
    except PickleError as error:
        raise NotTorchError(f"is damaged: of its {METADATA}, {error}") from None
    entries, places = metadata.get("state_dict_metadata"), metadata.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise NotTorchError(f"has a {METADATA} that is not from torch.distributed.checkpoint")
    where = _where(folder, places)
    paths = metadata.get("planner_data")
    content: dict[str, Any] = {}
    for name, entry in entries.items():
        if isinstance(name, str) and isinstance(entry, Inert):
            held = _tensor(name, entry, where) if entry.name == f"{_MODULE}.TensorStorageMetadata" else entry
            _put(content, paths.get(name) if isinstance(paths, dict) else None, name, held)
    yield content


@dataclass(frozen=True)
class _Part:
    """A part of a tensor: its offsets in the tensor, its shape, and the position of its bytes."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    start: int
    n_bytes: int


def _where(folder: Path, places: dict[Any, Any]) -> dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]]:
    """Return file, first byte and number of bytes of each part, by the tensor's name and the part's offsets in it."""
    found = {}
    for index, place in places.items():
        of, at = _state(index), _state(place)
        name, offset = of.get("fqn"), sizes_of(of.get("offset"))
        file, start, n_bytes = at.get("relative_path"), at.get("offset"), at.get("length")
        if offset is None or not isinstance(name, str):
            continue
        if not (isinstance(file, str) and isinstance(start, int) and isinstance(n_bytes, int)):
            raise NotTorchError(f"is damaged: its {METADATA} lacks the place of a part")
        if at.get("transform_descriptors"):
            raise NotTorchError("is packed by an extension of torch.distributed.checkpoint; load and save it without")
        if Path(file).name != file:
            raise NotTorchError(f"is damaged: its {METADATA} leads out of the folder")
        found[name, offset] = folder / file, start, n_bytes
    return found


def _tensor(name: str, entry: Inert, where: dict[tuple[str, tuple[int, ...]], tuple[Path, int, int]]) -> TensorPlan:
    state = _state(entry)
    shape, dtype, chunks = sizes_of(state.get("size")), _dtype(state.get("properties")), state.get("chunks")
    if shape is None or dtype is None or not isinstance(chunks, list):
        raise NotTorchError(f"is damaged: its {METADATA} does not describe {name[:200]!r}")
    parts = []
    for chunk in map(_state, chunks):
        offsets, sizes = sizes_of(chunk.get("offsets")), sizes_of(chunk.get("sizes"))
        if offsets is None or sizes is None or len(offsets) != len(shape) or len(sizes) != len(shape):
            raise NotTorchError(f"is damaged: its {METADATA} has parts of {name[:200]!r} that do not fit it")
        if (name, offsets) not in where:
            raise NotTorchError(f"lacks a part of {name[:200]!r}")
        if any(first + size > whole for first, size, whole in zip(offsets, sizes, shape, strict=True)):
            raise NotTorchError(f"is damaged: a part of {name[:200]!r} reaches beyond it")
        parts.append(_Part(offsets, sizes, *where[name, offsets]))
    if sum(math.prod(part.shape) for part in parts) != math.prod(shape) or len({p.offsets for p in parts}) < len(parts):
        raise NotTorchError(f"lacks a part of {name[:200]!r}: copy the .distcp files of all processes into one folder")
    return TensorPlan(dtype, shape, lambda: _joined(name, dtype, shape, parts))


def _joined(name: str, dtype: torch.dtype, shape: tuple[int, ...], parts: list[_Part]) -> Shaped[Tensor, "..."]:
    tensor = torch.zeros(shape, dtype=dtype)
    for part in parts:
        read = _read(part)
        if not isinstance(read, TensorPlan) or read.shape != part.shape or read.dtype != dtype:
            raise NotTorchError(f"is damaged: {part.file.name} holds another part of {name[:200]!r} than expected")
        place = tuple(slice(first, first + size) for first, size in zip(part.offsets, part.shape, strict=True))
        tensor[place] = read.read()
    return tensor


def _read(part: _Part) -> Any:
    if not part.file.is_file():
        raise NotTorchError(f"lacks {part.file.name}: copy the .distcp files of all processes into one folder")
    if part.start < 0 or not 0 <= part.n_bytes <= part.file.stat().st_size - part.start:
        raise NotTorchError(f"is damaged: {part.file.name} is cut short")
    with part.file.open("rb") as file:
        file.seek(part.start)
        return read_torch_file(io.BytesIO(file.read(part.n_bytes)))


def _put(content: dict[str, Any], path: Any, name: str, held: Any) -> None:
    """Put an entry back at its nested place, which saving flattened to one name, such as model.layer.weight."""
    steps = path if isinstance(path, tuple) and path and all(isinstance(step, str) for step in path) else (name,)
    for step in steps[:-1]:
        content = content.setdefault(step, {})
        if not isinstance(content, dict):
            raise NotTorchError(f"is damaged: {name[:200]!r} lies within a tensor")
    content[steps[-1]] = held


def _state(value: Any) -> dict[Any, Any]:
    if isinstance(value, Key):
        value = value.value
    return value.state if isinstance(value, Inert) and isinstance(value.state, dict) else {}


def _dtype(properties: Any) -> torch.dtype | None:
    """Return the type in a tensor's properties, whose state is a tuple that begins with it."""
    match properties:
        case Inert(state=(Name() as named, *_)) | Inert(state={"dtype": Name() as named}):
            pass
        case _:
            return None
    dtype = getattr(torch, named.text.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else None
