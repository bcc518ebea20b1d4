"""Read untrusted tensor files without torch: list their content and check whether they are safe to open.

The header of a safetensors file is checked here before the library sees it: the library accepts duplicate keys and
needed 10 s and 1.9 GB for an 87 MB header of empty tensors (see the limits below). An npz is a zip of npy files;
its members' sizes are checked before one is unpacked, and pickled objects are refused.
"""

import io
import json
import math
import struct
import threading
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy
from safetensors import SafetensorError, safe_open

from app.errors import InvalidFile, Unavailable
from app.files import zips

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
MAX_RANK = 8
MAX_DIMENSION = 2**31
MAX_NAME_BYTES = 512
_MAX_NPY_HEADER_BYTES = 64 * 2**10
MAX_NPZ_MEMBERS = 100

# A header of the largest size takes some seconds and, with the objects made of it, hundreds of MB. One is read at a
# time, and at most _MOST_WAITING threads wait, as each wait holds a thread.
_LARGE_HEADER_BYTES = 2**18
_MOST_WAITING = 8
# Exceptions of zipfile and numpy for broken files; numpy reads an array's header as a Python literal.
BROKEN_NPZ = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, TypeError, SyntaxError, tokenize.TokenError,
    NotImplementedError, RuntimeError, KeyError, OverflowError, struct.error,
)  # fmt: skip

# Not parameters, although floating point and stored beside them.
_RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
FLOATING = ("F64", "F32", "F16", "BF16")
_NARROW = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2")
INTEGER = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
NUMERIC = (*FLOATING, *INTEGER, "BOOL")


@dataclass(frozen=True)
class TensorInfo:
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_floating(self) -> bool:
        return self.dtype in FLOATING + _NARROW

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorFile:
    """Names, dtypes (safetensors' words: F32, I64, ...) and shapes of the tensors of a file."""

    format: str
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def n_parameters(self, ignored: Iterable[str] = ()) -> int:
        """Return the number of elements of floating-point tensors, without normalisation layers' running statistics.

        Args:
            ignored: prefixes of further names that are not parameters.
        """
        left_out = tuple(ignored)
        return sum(
            info.n_elements
            for name, info in self.tensors.items()
            if info.is_floating and not name.endswith(_RUNNING_STATISTICS) and not name.startswith(left_out)
        )


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file; `spans` are the tensors' byte ranges, counted from `data_start`."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    spans: dict[str, tuple[int, int]]
    data_start: int


def header_bytes(entries: Mapping[str, Any]) -> bytes:
    """Return the beginning of a safetensors file: the header's length and the header, padded to align the tensors."""
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Turn:
    """Lets one thread at a time work with a large header; that thread may enter again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._counting = threading.Lock()
        self._waiting = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            with self._counting:
                if self._waiting >= _MOST_WAITING:
                    raise Unavailable("Many files with large headers come at once; try again in a few seconds.")
                self._waiting += 1
            self._lock.acquire()
            with self._counting:
                self._waiting -= 1
        try:
            yield
        finally:
            self._lock.release()


_turn = _Turn()


def in_turn(path: Path) -> AbstractContextManager[None]:
    """Limit the memory for large safetensors headers to that of one at a time, during the block.

    Args:
        path: of any file; only a file whose first bytes announce a large header waits.

    Raises:
        Unavailable: many wait already.
    """
    with path.open("rb") as file:
        start = file.read(9)
    large = begins_as_safetensors(start) and int.from_bytes(start[:8], "little") > _LARGE_HEADER_BYTES
    return _turn() if large else nullcontext()


def inspect_safetensors(path: Path) -> TensorFile:
    """Check a whole safetensors file and return its content; no tensor's bytes are read.

    Raises:
        InvalidFile: it is not safetensors, is truncated, or its header exceeds a limit.
        Unavailable: many files with large headers come at once.
    """
    _refuse_pickles(path)
    with in_turn(path):
        with path.open("rb") as opened:
            header = read_header(opened, path.stat().st_size)
        try:
            with safe_open(path, framework="np") as file:
                file.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise InvalidFile(f"The file is not complete, valid safetensors: {error}.") from None
        return TensorFile("safetensors", header.tensors, header.metadata)


def begins_as_safetensors(start: bytes) -> bool:
    """Return whether nine bytes or more are a header's length and its first brace.

    A length may be any number, also one with the first bytes of a pickle or an archive (896 or 19,280).
    """
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES


def _refuse_pickles(path: Path) -> None:
    """Refuse files of torch.save, a zip or a bare pickle, by their first bytes; they are never opened here."""
    with path.open("rb") as file:
        start = file.read(9)
    if begins_as_safetensors(start):
        return
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise InvalidFile(
            "The file is a PyTorch pickle (.pt, .pth, .ckpt, .bin) or another archive, and not safetensors. A pickle "
            "runs code when it is opened, so this service opens none. Convert it where you trust it: "
            "interplay convert FILE -o OUT.safetensors",
            command="interplay convert FILE -o OUT.safetensors",
        )


def read_header(file: BinaryIO, size_bytes: int) -> Header:
    """Return the header at the start of a safetensors file, checked against the limits.

    Args:
        file: at its start; read up to the beginning of the tensors' data.
        size_bytes: of the whole file.

    Raises:
        InvalidFile: it is not a safetensors header, is truncated, or exceeds a limit.
    """
    prefix = file.read(8)
    if len(prefix) < 8:
        raise InvalidFile(f"The file is not safetensors: it has {size_bytes} bytes, not even a header's length.")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise InvalidFile(
            f"The file is not safetensors that this service accepts: its first eight bytes announce a header of "
            f"{header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed."
        )
    if header_bytes + 8 > size_bytes:
        raise InvalidFile(
            f"The file is not complete safetensors: a header of {header_bytes} bytes is announced, "
            f"{size_bytes - 8} follow."
        )
    raw = file.read(header_bytes)
    if not raw.startswith(b"{"):
        raise InvalidFile("The file is not safetensors: its header does not start with '{'.")
    try:
        header = json.loads(raw, object_pairs_hook=_object_reader())
    except (ValueError, RecursionError) as error:
        raise InvalidFile(f"The file is not safetensors: its header is not valid JSON ({error}).") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidFile("The header's __metadata__ must map strings to strings.")
    if len(header) > MAX_TENSORS:
        raise InvalidFile(f"The file announces {len(header)} tensors; at most {MAX_TENSORS} are allowed.")
    tensors = {name: _tensor_info(name, entry) for name, entry in header.items()}
    spans = {name: (entry["data_offsets"][0], entry["data_offsets"][1]) for name, entry in header.items()}
    return Header(tensors, metadata, spans, 8 + header_bytes)


def _object_reader() -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Return a hook that makes one header's objects: it refuses duplicate keys and many more objects than tensors."""
    objects = 0

    def read(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        result = dict(pairs)
        if objects > MAX_TENSORS + 2 or len(pairs) > MAX_TENSORS + 1:
            raise ValueError(f"more than {MAX_TENSORS} tensors")
        if len(result) < len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"duplicate key {twice[:100]!r}")
        return result

    return read


def _tensor_info(name: str, entry: Any) -> TensorInfo:
    if not name.isprintable() or not name or len(name.encode()) >= MAX_NAME_BYTES:
        raise InvalidFile(
            f"A tensor's name must be printable, not empty and under {MAX_NAME_BYTES} bytes, not {name[:80]!r}."
        )
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(), int()]}:
            pass
        case _:
            raise InvalidFile(f"The header's entry of tensor {name!r} has not the form of safetensors.")
    if len(shape) > MAX_RANK:
        raise InvalidFile(f"Tensor {name!r} has {len(shape)} dimensions; at most {MAX_RANK} are allowed.")
    if not all(type(size) is int and 0 <= size < MAX_DIMENSION for size in shape):
        raise InvalidFile(f"Tensor {name!r} has the shape {shape}; every size must be below 2^31.")
    return TensorInfo(dtype, tuple(shape))


def read_values(path: Path, name: str) -> npt.NDArray[Any]:
    """Return a tensor of `NUMERIC` dtype from a file that `inspect_safetensors` accepted; BF16 as float32."""
    with safe_open(path, framework="np") as file:
        if file.get_slice(name).get_dtype() != "BF16":
            values: npt.NDArray[Any] = file.get_tensor(name)
            return values
    # NumPy has no BF16: its numbers are the upper halves of float32.
    with path.open("rb") as opened:
        header = read_header(opened, path.stat().st_size)
        begin, end = header.spans[name]
        opened.seek(header.data_start + begin)
        halves = np.frombuffer(opened.read(end - begin), "<u2").astype("<u4")
    return (halves << 16).view("<f4").reshape(header.tensors[name].shape)


_NPY_DTYPES = {
    "f2": "F16", "f4": "F32", "f8": "F64", "b1": "BOOL",
    "i1": "I8", "i2": "I16", "i4": "I32", "i8": "I64",
    "u1": "U8", "u2": "U16", "u4": "U32", "u8": "U64",
}  # fmt: skip


def inspect_npz(path: Path, *, max_bytes: int, max_ratio: float) -> TensorFile:
    """Check an npz file and return its content; only the members' headers are unpacked.

    Raises:
        InvalidFile: it is not an npz, holds pickled objects, or would unpack to more than the limits.
    """
    members = zips.members(path, MAX_NPZ_MEMBERS)
    _bound_members(members, path.stat().st_size, max_bytes, max_ratio)
    try:
        with zipfile.ZipFile(path) as archive:
            tensors = {
                member.name.removesuffix(".npy"): _npy_info(archive, member.info)
                for member in members
                if not member.is_folder
            }
    except BROKEN_NPZ as error:
        raise InvalidFile(f"The file is not a valid npz: {error}.") from None
    return TensorFile("npz", tensors, {})


def _bound_members(members: list[zips.Member], size_bytes: int, max_bytes: int, max_ratio: float) -> None:
    if len(members) > MAX_NPZ_MEMBERS:
        raise InvalidFile(f"The npz has {len(members)} members; at most {MAX_NPZ_MEMBERS} are allowed.")
    if len({member.name.removesuffix(".npy") for member in members}) != len(members):
        raise InvalidFile("The npz holds two members of the same name.")
    unpacked = sum(member.info.file_size for member in members)
    if unpacked > max_bytes:
        raise InvalidFile(f"The npz would unpack to {unpacked} bytes; at most {max_bytes} are allowed.")
    if unpacked > max_ratio * size_bytes:
        raise InvalidFile(
            f"The npz would unpack to {unpacked / size_bytes:.0f} times its size; at most {max_ratio:g} times is "
            "allowed. Save it with numpy.savez instead of savez_compressed, or as safetensors."
        )


def _npy_info(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> TensorInfo:
    with archive.open(member) as file:
        # Read no more than this: numpy would read the length that the header announces, up to 4 GiB.
        start = io.BytesIO(file.read(_MAX_NPY_HEADER_BYTES))
    version = npy.read_magic(start)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(start)
    data_bytes = member.file_size - start.tell()
    if len(shape) > MAX_RANK or not all(0 <= size < MAX_DIMENSION for size in shape):
        raise InvalidFile(
            f"The npz member {member.filename!r} has the shape {shape}; at most {MAX_RANK} dimensions fit."
        )
    if dtype.hasobject:
        raise InvalidFile(f"The npz member {member.filename!r} holds pickled objects, which this service never opens.")
    name = _NPY_DTYPES.get(dtype.str[1:], dtype.str)
    if dtype.itemsize * math.prod(shape) != data_bytes:
        raise InvalidFile(f"The npz member {member.filename!r} is cut short: {shape} does not fit {data_bytes} bytes.")
    return TensorInfo(name, tuple(shape))


def read_npz_values(path: Path, name: str) -> npt.NDArray[Any]:
    """Return one array of an npz file that `inspect_npz` accepted."""
    try:
        with np.load(path, allow_pickle=False) as file:
            values: npt.NDArray[Any] = file[name]
    except BROKEN_NPZ as error:
        raise InvalidFile(f"The npz member {name!r} cannot be read: {error}.") from None
    return values
