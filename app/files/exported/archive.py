"""Read the archive of an exported program: its graph, and its weights as one safetensors file that holds the graph.

The archive is a zip. `models/model.json` has the graph, which `graphs` turns into ours. `data/weights` and
`data/constants` have a list of tensors each, and their bytes in members of their own. Sample inputs are a pickle, which
is never opened.
"""

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from app.errors import InvalidFile
from app.files import zips
from app.files.archives import Written
from app.files.exported.graphs import GRAPH, Malformed, StoredAs, graph_of, graph_text, of_type
from app.files.tensorfile import MAX_DIMENSION, MAX_RANK, MAX_TENSORS, header_bytes

# Limits of a JSON member: its bytes, its objects and lists, and the entries of these. The most of a real one are traces
# of code, which are not kept.
_MAX_JSON_BYTES, _MAX_CONTAINERS, _MAX_ENTRIES = 48 * 2**20, 1_000_000, 3_000_000
_MAX_MEMBERS = 2 * MAX_TENSORS
_COPY_BYTES = 2**20
# Most bytes of a tensor that is gathered from scattered places; others are copied as they lie.
_MAX_GATHERED_BYTES = 2**32

# Types by torch's numbers: their names in safetensors, and their bytes.
_TYPES: Mapping[int, tuple[str, int]] = {
    1: ("U8", 1), 2: ("I8", 1), 3: ("I16", 2), 4: ("I32", 4), 5: ("I64", 8), 6: ("F16", 2), 7: ("F32", 4),
    8: ("F64", 8), 12: ("BOOL", 1), 13: ("BF16", 2),
}  # fmt: skip
_STRIDED = 7
_BROKEN = (*zips.BROKEN_ZIP, KeyError)


@dataclass(frozen=True)
class _Payload:
    """Where a tensor's bytes lie: elements of a member of the zip."""

    member: zipfile.ZipInfo
    dtype: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.sizes) * _TYPES[self.dtype][1]

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            if size not in (0, 1) and stride != expected:
                return 0 in self.sizes
            expected *= size
        return True


@dataclass(frozen=True)
class Program:
    """An exported program: its graph, and where each tensor's bytes lie."""

    graph: dict[str, Any]
    payloads: dict[str, _Payload] = field(repr=False)


def is_exported_program(path: Path) -> bool:
    """Return whether a file is an archive of torch.export.

    Raises:
        InvalidFile: an incomplete zip, or one that lists too many files.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    zips.bound_directory(path, _MAX_MEMBERS)
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except _BROKEN:
        return False
    # The second was written by torch before 2.9.
    return "archive_format" in names or "serialized_exported_program.json" in archive.namelist()


def read_program(path: Path) -> Program:
    """Read an archive's graph and the places of its tensors; no tensor's bytes are read.

    Raises:
        InvalidFile: it is broken, of another version of torch, or holds what is no data: pickled weights or constants,
            objects of the user's own classes.
    """
    zips.bound_directory(path, _MAX_MEMBERS)
    try:
        with zipfile.ZipFile(path) as archive:
            return _program(archive)
    except InvalidFile:
        raise
    except Malformed as error:
        raise InvalidFile(f"The archive's graph is not as torch.export writes it: {error}.") from None
    except _BROKEN as error:
        raise InvalidFile(f"The archive of the exported program cannot be read: {str(error)[:200]}.") from None


def write_program(path: Path, program: Program, target: Written) -> None:
    """Write the tensors of an archive as one safetensors file that holds the graph.

    Raises:
        InvalidFile: a tensor's bytes are missing, or lie outside of its member.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", GRAPH: graph_text(program.graph)}}
    offset = 0
    for name, payload in program.payloads.items():
        span = [offset, offset + payload.n_bytes]
        entries[name] = {"dtype": _TYPES[payload.dtype][0], "shape": list(payload.sizes), "data_offsets": span}
        offset = span[1]
    target.write(header_bytes(entries))
    try:
        with zipfile.ZipFile(path) as archive:
            for name, payload in program.payloads.items():
                _copy(archive, name, payload, target)
    except _BROKEN as error:
        raise InvalidFile(f"The archive of the exported program cannot be read: {str(error)[:200]}.") from None


def _program(archive: zipfile.ZipFile) -> Program:
    members = _members(archive)
    models = [name for name in members if name.startswith("models/") and name.endswith(".json")]
    if models != ["models/model.json"]:
        which = "several programs" if len(models) > 1 else "no program in the form of torch 2.9 or later"
        raise InvalidFile(f"The archive holds {which}. Save one program with torch.export.save, of torch 2.9 or later.")
    if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
        raise InvalidFile("The archive's tensors are not in little-endian order.")
    model = _json(archive, members["models/model.json"])
    version = of_type(dict, of_type(dict, model).get("schema_version")).get("major")
    if version != 8:
        raise InvalidFile(
            f"The archive's graph has version {version} of torch's form; version 8 is read (torch 2.9 on)."
        )
    tensors: dict[str, _Payload] = {}
    for folder, listed in (("weights", "model_weights_config"), ("constants", "model_constants_config")):
        config = members.get(f"data/{folder}/{listed}.json")
        if config is not None:
            tensors |= _payloads(_json(archive, config), folder, members)
    same = {name: (id(one.member), one.dtype, one.sizes, one.strides, one.offset) for name, one in tensors.items()}
    graph = graph_of(model, {name: StoredAs(one.dtype, one.sizes, same[name]) for name, one in tensors.items()})
    return Program(graph, {name: tensors[name] for name, *_ in graph["tensors"]})


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return an archive's members by their names below its one folder."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        folder, _, name = info.filename.partition("/")
        name = name or folder
        if name in members:
            raise InvalidFile(f"The archive holds two members named {name[:200]!r}.")
        members[name] = info
    return members


def _json(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    name = info.filename[:200]
    if info.file_size > _MAX_JSON_BYTES:
        raise InvalidFile(f"{name!r} has {info.file_size} bytes; at most {_MAX_JSON_BYTES} are read.")
    with archive.open(info) as file:
        text = file.read(_MAX_JSON_BYTES)
    # Counted first: a list of empty lists takes thirty times its text's memory.
    if text.count(b"{") + text.count(b"[") > _MAX_CONTAINERS or text.count(b",") > _MAX_ENTRIES:
        raise InvalidFile(f"{name!r} holds more than {_MAX_CONTAINERS} objects and lists, or {_MAX_ENTRIES} entries.")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidFile(f"{name!r} is not JSON.") from None


def _payloads(config: Any, folder: str, members: Mapping[str, zipfile.ZipInfo]) -> dict[str, _Payload]:
    """Return the places of tensors, by name, from the list in an archive's folder."""
    found: dict[str, _Payload] = {}
    for name, entry in of_type(dict, of_type(dict, config).get("config")).items():
        match entry:
            case {"path_name": str(path), "use_pickle": False, "tensor_meta": dict(about)}:
                pass
            case {"use_pickle": True}:
                raise InvalidFile(
                    f"The archive holds {name[:200]!r} as a pickle, which this service never opens. Make it a plain "
                    "tensor, no subclass and not quantised, before the model is exported."
                )
            case _:
                raise InvalidFile(
                    f"The archive holds {name[:200]!r}, an object of a class of its own; only tensors are data."
                )
        dtype, sizes = about.get("dtype"), _numbers(about.get("sizes"))
        strides, [offset] = _numbers(about.get("strides")), _numbers([about.get("storage_offset")])
        if type(dtype) is not int or dtype not in _TYPES or about.get("layout") != _STRIDED:
            raise InvalidFile(f"The tensor {name[:200]!r} is of a type or layout that has no plain form.")
        if len(sizes) != len(strides) or len(sizes) > MAX_RANK or max((*sizes, 0)) >= MAX_DIMENSION:
            raise InvalidFile(f"The tensor {name[:200]!r} has the shape {str(sizes)[:100]}.")
        member = members.get(f"data/{folder}/{path}")
        if member is None:
            raise InvalidFile(f"The archive lacks the bytes of {name[:200]!r}.")
        found[name] = _Payload(member, dtype, sizes, strides, offset)
        _check_span(name, found[name])
    return found


def _check_span(name: str, payload: _Payload) -> None:
    """Check that a tensor's elements lie within its member, and that their copy is no larger than all of it."""
    if 0 in payload.sizes:
        return
    width = _TYPES[payload.dtype][1]
    last = payload.offset + sum(
        (size - 1) * stride for size, stride in zip(payload.sizes, payload.strides, strict=True)
    )
    if (last + 1) * width > payload.member.file_size:
        raise InvalidFile(f"The tensor {name[:200]!r} ends beyond its {payload.member.file_size} bytes.")
    if payload.n_bytes > payload.member.file_size or (
        not payload.is_contiguous and payload.n_bytes > _MAX_GATHERED_BYTES
    ):
        raise InvalidFile(f"The tensor {name[:200]!r} is a view of few bytes many times; make it contiguous first.")


def _numbers(entries: Any) -> tuple[int, ...]:
    """Return plain numbers, each in torch's form of a size that is known."""
    found = [of_type(dict, entry).get("as_int") for entry in of_type(list, entries)]
    if not all(type(number) is int and 0 <= number < 2**53 for number in found):
        raise Malformed("a tensor has sizes that are no numbers")
    return tuple(int(number) for number in found if number is not None)


def _copy(archive: zipfile.ZipFile, name: str, payload: _Payload, target: Written) -> None:
    """Write a tensor's elements in their order."""
    width = _TYPES[payload.dtype][1]
    with archive.open(payload.member) as member:
        if payload.is_contiguous:
            _copy_bytes(member, name, payload.offset * width, payload.n_bytes, target)
            return
        whole = np.frombuffer(member.read(), np.dtype(f"V{width}"))
    steps = [stride * width for stride in payload.strides]
    view = np.lib.stride_tricks.as_strided(whole[payload.offset :], payload.sizes, steps, writeable=False)
    target.write(np.ascontiguousarray(view).tobytes())


def _copy_bytes(member: Any, name: str, start: int, n_bytes: int, target: Written) -> None:
    member.seek(start)
    while n_bytes and (chunk := member.read(min(_COPY_BYTES, n_bytes))):
        target.write(chunk)
        n_bytes -= len(chunk)
    if n_bytes:
        raise InvalidFile(f"The tensor {name[:200]!r} ends {n_bytes} bytes early.")
