"""Compute the `data_sha256` of a probe or a feature set, which identifies its data whatever file they came in.

It is the sha256 of a JSON text with sorted keys, without spaces, in ASCII. For tensors, with safetensors' names of
types:

    {"format":"interplay-data-1","tensors":{"labels":{"dtype":"I64","sha256":"...","shape":[100]}, ...}}

where each sha256 is of the tensor's bytes in C order, little-endian. For images and texts:

    {"class_names":[...],"content":"images","format":"interplay-data-1","labels":"...","n_rows":100,"rows":"...",
     "split":null}

where `rows` is the sha256 of each row's stored bytes (texts as UTF-8), preceded by their number as eight bytes;
`labels` and `split` are that of one int64 a row, null if missing; integers are little-endian. Labels and names are
those of the probe, so an order that its spec gives is part of the data.
"""

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from app.errors import InvalidFile
from app.files import tensorfile
from app.files.datafile import Dataset
from app.files.tensorfile import BROKEN_NPZ, TensorFile

_FORMAT = "interplay-data-1"
_CHUNK_BYTES = 2**20


def hash_tensors(path: Path, file: TensorFile) -> str:
    """Hash the tensors of a checked file; its bytes are read once, chunk by chunk.

    Raises:
        InvalidFile: an npz is damaged in a way that its headers do not show.
    """
    hashed = _npz_tensors(path) if file.format == "npz" else _safetensors(path)
    tensors = {
        name: {"dtype": file.tensors[name].dtype, "shape": list(file.tensors[name].shape), "sha256": sha256}
        for name, sha256 in hashed
    }
    return _of({"tensors": tensors})


def hash_dataset(dataset: Dataset, labels: npt.NDArray[np.int64] | None, class_names: list[str] | None) -> str:
    """Hash images or texts; each row is read once.

    Args:
        dataset: provides the rows and splits.
        labels, class_names: those of the probe.

    Raises:
        InvalidFile: a row is empty, or cannot be read.
    """
    rows = hashlib.sha256()
    for _, content in dataset.read(range(dataset.n_rows)):
        rows.update(len(content).to_bytes(8, "little"))
        rows.update(content)
    described = {
        "content": dataset.content,
        "n_rows": dataset.n_rows,
        "rows": rows.hexdigest(),
        "labels": _of_integers(labels),
        "split": _of_integers(dataset.split),
        "class_names": class_names,
    }
    return _of(described)


def _of(described: dict[str, Any]) -> str:
    text = json.dumps({"format": _FORMAT, **described}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _of_integers(values: npt.NDArray[np.int64] | None) -> str | None:
    return None if values is None else hashlib.sha256(values.astype("<i8").tobytes()).hexdigest()


def _safetensors(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and sha256 of each tensor's bytes, which safetensors stores in the order to be hashed."""
    with path.open("rb") as file:
        header = tensorfile.read_header(file, path.stat().st_size)
        for name, (start, end) in header.spans.items():
            file.seek(header.data_start + start)
            hashed = hashlib.sha256()
            for chunk in _chunks(file, end - start):
                hashed.update(chunk)
            yield name, hashed.hexdigest()


def _npz_tensors(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.is_dir():
                    with archive.open(member) as file:
                        yield member.filename.removesuffix(".npy"), _of_array(file, path.parent)
    except BROKEN_NPZ as error:
        raise InvalidFile(f"The npz cannot be read: {error}.") from None


def _of_array(file: IO[bytes], folder: Path) -> str:
    """Hash an array of an npz, whatever its memory and byte order.

    An array in Fortran order is unpacked into a file without a name in `folder`, and read from there in C order.
    """
    read_header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape, is_fortran, dtype = read_header(file)
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    hashed = hashlib.sha256()
    if not is_fortran or size == 0:
        for chunk in _chunks(file, size):
            hashed.update(_little_endian(np.frombuffer(chunk, dtype)))
        return hashed.hexdigest()
    with tempfile.TemporaryFile(dir=folder) as unpacked:
        for chunk in _chunks(file, size):
            unpacked.write(chunk)
        unpacked.flush()
        array = np.memmap(unpacked, dtype, "r", shape=shape, order="F")
        for block in _blocks(array):
            hashed.update(_little_endian(block))
    return hashed.hexdigest()


def _chunks(file: IO[bytes], n_bytes: int) -> Iterator[bytes]:
    """Yield `n_bytes` bytes in chunks that do not split numbers.

    Raises:
        EOFError: the file has fewer bytes.
    """
    while n_bytes:
        wanted = min(_CHUNK_BYTES, n_bytes)
        chunk = file.read(wanted)
        if len(chunk) < wanted:  # a buffered file, as both are here, returns less only at its end
            raise EOFError("a tensor ends early")
        n_bytes -= wanted
        yield chunk


def _blocks(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Yield an array in small blocks, in C order."""
    row_bytes = array[:1].nbytes
    if row_bytes > _CHUNK_BYTES:
        for row in array:
            yield from _blocks(row)
        return
    rows = max(_CHUNK_BYTES // max(row_bytes, 1), 1)
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def _little_endian(block: npt.NDArray[Any]) -> bytes:
    return np.ascontiguousarray(block, block.dtype.newbyteorder("<")).tobytes()
