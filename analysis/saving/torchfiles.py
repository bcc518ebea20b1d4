"""Read files of torch.save without running their content; tensors become plans of where their numbers lie.

Both forms that torch writes are read: the current zip, in either byte order, and the bare pickles before 1.6. A
tensor's numbers are read on request, so that an optimizer's state beside the weights costs nothing.
"""

import io
import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from .pickles import Inert, Name, OpenFile, PickleError, Reference, read_pickle

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_MOST_PICKLE_BYTES = 2**30
_MOST_RANK = 64
_BROKEN_ZIP = (
    zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, NotImplementedError, RuntimeError, OverflowError,
    struct.error,
)  # fmt: skip
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
}  # fmt: skip
# Bytes of the parts of complex numbers, each of which is byte-swapped separately.
_PART_BYTES = {torch.complex64: 4, torch.complex128: 8}


class NotTorchError(ValueError):
    """The file is not of torch.save, or incomplete; the message is a clause that says what it is."""


@dataclass(frozen=True, eq=False)
class Storage:
    """One contiguous piece of numbers: their type, their number by the pickle, and a function that reads their bytes
    as a type."""

    dtype: torch.dtype
    n_numbers: int
    read: Callable[[torch.dtype], bytearray]


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """A tensor of a file, as a part of a storage.

    Attributes:
        dtype, shape: of the tensor.
        read: returns its numbers. Tensors of one storage share memory. Raises NotTorchError where the file lacks them.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Shaped[Tensor, "..."]]

    @property
    def n_bytes(self) -> int:
        """Size of its numbers, each counted as often as it occurs in the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class NoPlainTensor:
    """A tensor without plain numbers to read: `kind` is meta, sparse, quantised or another word."""

    kind: str
    shape: tuple[int, ...] | None = None


@contextmanager
def open_torch_file(path: Path) -> Iterator[Any]:
    """Open a file of torch.save; its tensors can be read inside the block.

    Yields:
        The result of `read_pickle`, with a `TensorPlan` or a `NoPlainTensor` for each tensor.

    Raises:
        NotTorchError: the file is of another kind, or damaged.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        yield read_torch_file(file)


def read_torch_file(file: OpenFile) -> Any:
    """Return the content of an open file as in `open_torch_file`; it must stay open while tensors are read."""
    start = file.read(512)
    file.seek(0)
    try:
        if start.startswith(b"PK"):
            return _read_zip(file)
        if start.startswith(b"\x80"):
            return _read_legacy(file)
    except PickleError as error:
        raise NotTorchError(f"is damaged: {error}") from None
    raise NotTorchError(_other_file(start))


def sizes_of(value: Any) -> tuple[int, ...] | None:
    """Return a shape or strides as a tuple; None for any other value."""
    if isinstance(value, Inert) and value.name == "torch.Size" and value.arguments:
        value = value.arguments[0]
    if not isinstance(value, list | tuple) or len(value) > _MOST_RANK:
        return None
    if not all(type(size) is int and 0 <= size < 2**48 for size in value):
        return None
    return tuple(value)


_BEGINNINGS = {
    b"\x89HDF": "is HDF5, as Keras writes it, and not a file of torch.save",
    b"GGUF": "is GGUF, whose weights are quantised for llama.cpp, and not a file of torch.save",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: git lfs pull",
    b"\x1f\x8b": "is packed with gzip: unpack it first (gunzip)",
    b"<": "is HTML or XML, perhaps a page that was saved in place of the file",
}


def _other_file(start: bytes) -> str:
    if start[8:9] == b"{":
        return "is safetensors already: push it as it is"
    if start[257:262] == b"ustar":
        return "is a tar: unpack it first; what PyTorch before 0.1.10 wrote such a PyTorch must load and save again"
    found = (words for beginning, words in _BEGINNINGS.items() if start.startswith(beginning))
    return next(found, "is not a file of torch.save, which is a zip or a pickle" if start else "is empty")


# --- the zip ----------------------------------------------------------------------------------------------------------


def _read_zip(file: OpenFile) -> Any:
    try:
        archive = zipfile.ZipFile(file)
    except (*_BROKEN_ZIP, OSError):
        raise NotTorchError("is an incomplete zip") from None
    members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    root = min(pickles, key=len).removesuffix("data.pkl") if pickles else ""
    if any(name.startswith(f"{root}code/") for name in members) or f"{root}constants.pkl" in members:
        raise NotTorchError(
            "is a TorchScript archive (torch.jit.save): it holds a compiled program around its weights. Where it is "
            "loaded, save the weights alone: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
        )
    if not pickles:
        exported = any(name.endswith(("serialized_exported_program.json", "archive_format")) for name in members)
        raise NotTorchError(
            "is an archive of torch.export, a program around its weights: save torch.export.load(FILE).state_dict()"
            if exported
            else "is a zip, but not from torch.save: it holds no data.pkl"
        )
    order = "little"
    if (name := f"{root}byteorder") in members:
        order = _member(file, archive, members[name], 16).decode("ascii", "replace")
    if order not in ("little", "big"):
        raise NotTorchError("has an unknown byte order")
    # By name and type: some kinds of tensors have storages declared as bytes.
    loaded: dict[tuple[str, torch.dtype], bytearray] = {}

    def storage(id_: Any) -> Storage | None:
        """Return the storage of a persistent id; None for other ids."""
        if (found := _announced(id_)) is None:
            return None
        key, dtype, n_numbers = found
        name = f"{root}data/{key}"

        def read(dtype: torch.dtype) -> bytearray:
            """Return the numbers of the storage, as a type."""
            if name not in members:
                raise NotTorchError(f"lacks the numbers of a tensor ({name[:200]!r} in its zip)")
            if (name, dtype) not in loaded:
                content = _member(file, archive, members[name], members[name].file_size)
                loaded[name, dtype] = _in_order(content, order, dtype)
            return loaded[name, dtype]

        return Storage(dtype, n_numbers, read)

    content = read_pickle(io.BytesIO(_member(file, archive, members[f"{root}data.pkl"], _MOST_PICKLE_BYTES)))
    return _with_tensors(content, storage)


def _member(file: OpenFile, archive: zipfile.ZipFile, info: zipfile.ZipInfo, most_bytes: int) -> bytes:
    """Return the content of a zip's member. Uncompressed members are read in place, as torch may omit the checksum."""
    if info.file_size > most_bytes or info.header_offset < 0:
        raise NotTorchError(f"is damaged: its {info.filename[:200]!r} has {info.file_size} bytes")
    try:
        if info.compress_type != zipfile.ZIP_STORED:
            # zipfile unpacks at most the announced size; the announced size is bounded by the packed size.
            if info.file_size > 1100 * info.compress_size:
                raise NotTorchError("is damaged: a member of its zip would unpack to more than it can hold")
            return archive.read(info)
        file.seek(info.header_offset)
        header = file.read(30)
        file.seek(info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26)))
        content = file.read(info.file_size) if info.file_size <= info.compress_size else b""
    except _BROKEN_ZIP:
        raise NotTorchError(f"is damaged: {info.filename[:200]!r} in its zip cannot be read") from None
    if len(content) < info.file_size or not header.startswith(b"PK\x03\x04") or info.flag_bits & 1:
        raise NotTorchError(f"is damaged: {info.filename[:200]!r} in its zip is incomplete")
    return content


def _in_order(content: bytes, order: str, dtype: torch.dtype) -> bytearray:
    """Return numbers in this machine's byte order."""
    numbers = bytearray(content)
    width = _PART_BYTES.get(dtype, dtype.itemsize)
    if order != sys.byteorder and width > 1:
        whole = len(numbers) // width * width
        np.frombuffer(numbers, f"u{width}", count=whole // width).byteswap(inplace=True)
    return numbers


# --- the bare pickles before 1.6 --------------------------------------------------------------------------------------


def _read_legacy(file: OpenFile) -> Any:
    """Read magic number, protocol, the machine's description, the content, keys of storages, and these one by one."""
    if (read_pickle(file), read_pickle(file)) != (_MAGIC, _PROTOCOL):
        raise NotTorchError(
            "is a pickle, but not from torch.save. If you trust it, load it and save the weights alone: "
            "torch.save(state_dict, 'weights.pt')"
        )
    read_pickle(file)
    references: list[Reference] = []
    content = read_pickle(file, references=references)
    announced = filter(None, (_announced(reference.id) for reference in references))
    # As in torch, the first reference to a storage decides its type.
    types = {key: dtype for key, dtype, _ in reversed([*announced])}
    spans = dict(_spans(file, read_pickle(file), types))
    loaded: dict[str, bytearray] = {}

    def storage(id_: Any) -> Storage | None:
        """Return the storage of a persistent id; None for other ids."""
        if (found := _announced(id_)) is None:
            return None
        key, dtype, n_numbers = found
        first = 0
        # A storage that is a part of another: its key, its start in numbers, and its number of them.
        match id_[5:]:
            case ((_, int() as start, int() as size),) if start >= 0 and size >= 0:
                first, n_numbers = start, size

        def read(dtype: torch.dtype) -> bytearray:
            """Return the numbers of the storage, as a type."""
            if key not in spans:
                raise NotTorchError("lacks the numbers of a tensor")
            if key not in loaded:
                start, n_bytes = spans[key]
                file.seek(start)
                loaded[key] = _in_order(file.read(n_bytes), "little", types[key])
            return loaded[key][first * dtype.itemsize :] if first else loaded[key]

        return Storage(dtype, n_numbers, read)

    return _with_tensors(content, storage)


def _spans(file: OpenFile, keys: Any, types: Mapping[str, torch.dtype]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield start and number of bytes of each storage; they are little-endian on any machine."""
    place = file.tell()
    end = file.seek(0, io.SEEK_END)
    for key in keys if isinstance(keys, list) else ():
        file.seek(place)
        head = file.read(8)
        if len(head) < 8 or not isinstance(key, str) or key not in types:
            return
        n_bytes = int.from_bytes(head, "little", signed=True) * types[key].itemsize
        if not 0 <= n_bytes <= end - place - 8:
            return
        yield key, (place + 8, n_bytes)
        place += 8 + n_bytes


# --- tensors ----------------------------------------------------------------------------------------------------------


def _announced(id_: Any) -> tuple[str, torch.dtype, int] | None:
    """Return key, type and number of numbers of a storage from its persistent id; None for other ids."""
    match id_:
        case ("storage", Name() as type_, str() as key, _, int() as n_numbers, *_) if n_numbers >= 0:
            dtype = _storage_dtype(type_)
            return None if dtype is None else (key, dtype, n_numbers)
    return None


def _storage_dtype(type_: Name) -> torch.dtype | None:
    module, _, name = type_.text.rpartition(".")
    if module.split(".")[0] != "torch" or not name.endswith("Storage"):
        return None
    return _STORAGES.get(name.removesuffix("Storage"))


def _with_tensors(content: Any, storage: Callable[[Any], Storage | None]) -> Any:
    """Return the content with plans in place of tensors. Each object is visited once, without recursion."""
    made: dict[int, tuple[Inert, Any]] = {}

    def tensor(value: Any) -> Any:
        """Return the plan of a tensor; other values as they are."""
        if isinstance(value, Inert) and value.name in _REBUILD:
            if id(value) not in made:
                made[id(value)] = value, _rebuilt(value, storage)
            return made[id(value)][1]
        return value

    content = tensor(content)
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        for held in _held(value):
            if isinstance(held, dict):
                held.update({key: tensor(member) for key, member in held.items()})
                waiting.extend(held.values())
            elif isinstance(held, list):
                held[:] = map(tensor, held)
                waiting.extend(held)
    return content


def _held(value: Any) -> Iterator[dict[Any, Any] | list[Any]]:
    """Yield the containers of an object that can be changed in place."""
    if isinstance(value, dict | list):
        yield value
    elif isinstance(value, Inert):
        yield value.entries
        yield value.items
        # A module's state is a dictionary of dictionaries of parameters.
        if isinstance(value.state, dict):
            yield value.state


def _rebuilt(value: Inert, storage: Callable[[Any], Storage | None]) -> Any:
    """Return the tensor that a call of one of torch's own functions would have made.

    Parameters and subclasses are unwrapped to the inner tensor, layer by layer.
    """
    for _ in range(8):
        kind, place = _REBUILD[value.name]
        inner = value.arguments[0] if value.arguments else None
        if kind == "wrapped":
            if value.name == "torch._tensor._rebuild_from_type_v2":
                # (function, class, its arguments, state)
                match value.arguments:
                    case (Name() as function, class_, tuple() as arguments, *_):
                        inner = Inert(function.text, arguments)
                        if inner.name not in _REBUILD and isinstance(class_, Name):
                            return NoPlainTensor(f"of the class {class_.text}")
            if not (isinstance(inner, Inert) and inner.name in _REBUILD):
                return NoPlainTensor("of an unknown kind")
            value = inner
            continue
        if kind != "plain":
            shape = value.arguments[place] if len(value.arguments) > place else None
            return NoPlainTensor(kind, sizes_of(shape))
        return _plain(value, storage)
    return NoPlainTensor("of an unknown kind")


def _plain(value: Inert, storage: Callable[[Any], Storage | None]) -> TensorPlan | NoPlainTensor:
    held, first, shape, strides, *rest = (*value.arguments, None, None, None, None)[: max(len(value.arguments), 4)]
    of = storage(held.id) if isinstance(held, Reference) else None
    sizes, steps = sizes_of(shape), sizes_of(strides)
    if of is None:
        return NoPlainTensor("of an unknown kind of numbers", sizes)
    if sizes is None or steps is None or len(sizes) != len(steps) or not isinstance(first, int):
        return NoPlainTensor("damaged", sizes)
    # torch multiplies sizes, even if one of them is 0.
    if math.prod(size or 1 for size in sizes) >= 2**62:
        return NoPlainTensor("damaged", sizes)
    if value.name.endswith("_v3"):
        # (..., requires_grad, hooks, dtype, metadata), as the storage itself is untyped
        dtype = getattr(torch, rest[2].text.removeprefix("torch."), None) if _is_name(rest, 2) else None
        if not isinstance(dtype, torch.dtype):
            return NoPlainTensor("of an unknown type", sizes)
        of = replace(of, dtype=dtype, n_numbers=of.n_numbers * of.dtype.itemsize // dtype.itemsize)
    if any(isinstance(entry, dict) and any(entry.values()) for entry in rest if _is_marked(entry)):
        return NoPlainTensor("conjugated or negated only by a mark", sizes)
    last = first + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    if first < 0 or (0 not in sizes and last >= of.n_numbers):
        return NoPlainTensor("damaged: it reaches beyond its numbers", sizes)
    return TensorPlan(of.dtype, sizes, lambda: _read(of, first, sizes, steps))


def _is_name(values: list[Any], place: int) -> bool:
    return len(values) > place and isinstance(values[place], Name)


def _is_marked(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() <= {"conj", "neg"}


def _read(of: Storage, first: int, sizes: tuple[int, ...], steps: tuple[int, ...]) -> Shaped[Tensor, "..."]:
    content = of.read(of.dtype)
    n_numbers = len(content) // of.dtype.itemsize
    if n_numbers < of.n_numbers:
        raise NotTorchError(f"lacks numbers: a tensor of {of.n_numbers} has {n_numbers} in the file")
    if not math.prod(sizes):
        return torch.empty(sizes, dtype=of.dtype)
    numbers = torch.frombuffer(content, dtype=of.dtype, count=n_numbers)
    return numbers.as_strided(sizes, steps, first)


# By the name of torch's function: the kind of tensor that it makes, and the index of the shape argument.
_REBUILD: dict[str, tuple[str, int]] = {
    "torch._utils._rebuild_tensor": ("plain", 2),
    "torch._utils._rebuild_tensor_v2": ("plain", 2),
    "torch._utils._rebuild_tensor_v3": ("plain", 2),
    "torch._utils._rebuild_parameter": ("wrapped", 0),
    "torch._utils._rebuild_parameter_with_state": ("wrapped", 0),
    "torch.nn.parameter.Parameter": ("wrapped", 0),
    "torch._tensor._rebuild_from_type_v2": ("wrapped", 0),
    "torch._utils._rebuild_meta_tensor_no_storage": ("meta", 1),
    "torch._utils._rebuild_sparse_tensor": ("sparse", 99),
    "torch._utils._rebuild_sparse_csr_tensor": ("sparse", 99),
    "torch._utils._rebuild_qtensor": ("quantised", 2),
    "torch._utils._rebuild_nested_tensor": ("nested", 99),
    "torch._utils._rebuild_wrapper_subclass": ("wrapped by a library's own class", 2),
    "torch._utils._rebuild_device_tensor_from_numpy": ("of a device that is not here", 99),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": ("of a device that is not here", 99),
}
