"""Read a Hugging Face folder: the network's description, and its weights in one file or in shards.

It comes in a zip or a tar, or lies where the service fetches it. Nothing is unpacked under a name that the archive
chose. The weights are rewritten as one safetensors file that holds the tensors of all shards. The service keeps this
file, so the code behind this module handles one form.
"""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import tempfile
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby, pairwise
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, cast

from app.errors import InvalidFile, first_line
from app.files import names, tensorfile
from app.files.foreign import is_adapter_config, refuse_foreign_folder
from app.files.tensorfile import Header
from app.files.zips import BROKEN_ZIP, bound_directory

MAX_MEMBERS = 10_000
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Files of a folder that describe its network and its inputs.
DESCRIPTIONS = ("config.json", "preprocessor_config.json", "tokenizer.json", "adapter_config.json")
# Descriptions are read whole; an index names every tensor.
_MAX_JSON_BYTES = 32 * 2**20
_COPY_BYTES = 2**20
# Limit of members listed to recognise a file of torch.save, which has one for each tensor.
_MOST_LISTED = 2 * tensorfile.MAX_TENSORS
# Limit for long names and similar headers, which tarfile reads in one go, whatever their size.
_MAX_TAR_HEADER_BYTES = 2**20
_BROKEN = (*BROKEN_ZIP, tarfile.TarError, lzma.LZMAError, KeyError)
_ZIP = b"PK\x03\x04"
# By the first bytes of a file.
_UNPACK: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


class Written(Protocol):
    """Target that weights are written to."""

    def write(self, data: bytes, /) -> object: ...


@dataclass(frozen=True)
class Member:
    """A file of the folder: its size in bytes, and how to open it."""

    size: int
    open: Callable[[], BinaryIO]


@dataclass(frozen=True)
class Extent:
    """A range of bytes of a shard."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Folder:
    """The files of a folder that the service uses.

    Attributes:
        config: config.json, if it exists.
        preprocessor: preprocessor_config.json, likewise.
        tokenizer: tokenizer.json, likewise.
        adapter: adapter_config.json of an adapter's folder; None for a network's.
        shards: safetensors files by name, in the order in which their tensors are written.
        weight_map: the shard to which the index assigns each tensor; None without an index.
    """

    config: dict[str, Any] | None
    preprocessor: dict[str, Any] | None
    tokenizer: dict[str, Any] | None
    adapter: dict[str, Any] | None
    shards: dict[str, Member]
    weight_map: dict[str, str] | None


def is_archive(path: Path) -> bool:
    """Return whether the file is a zip or a tar, plain or compressed; not a zip that torch.save wrote.

    Raises:
        InvalidFile: an incomplete zip, or one that lists too many files.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if tensorfile.begins_as_safetensors(start):
        return False
    if start.startswith(_ZIP):
        bound_directory(path, _MOST_LISTED)
        try:
            with zipfile.ZipFile(path) as archive:
                return not any(name.endswith("/data.pkl") for name in archive.namelist()[:100])
        except _BROKEN:
            return False
    return start.startswith(tuple(_UNPACK)) or start[257:262] == b"ustar"


@contextmanager
def open_folder(path: Path, *, max_bytes: int, of_adapter: bool = False) -> Iterator[Folder]:
    """Open an archive; its members can be read inside the block.

    Args:
        path: a file that `is_archive` accepts. During the block a compressed tar is unpacked beside it, without a name.
        max_bytes: limit for all members together, unpacked; for a compressed tar, for the whole tar.
        of_adapter: whether an adapter's folder is wanted, and not a network's.

    Raises:
        InvalidFile: a member leads out of the archive or is a link, members are too many or too large, weights are
            missing, shards that the index names are missing, or the archive is broken.
    """
    with path.open("rb") as file:
        start = file.read(8)
    with ExitStack() as stack:
        try:
            if start.startswith(_ZIP):
                members = _zip_members(path, stack)
            else:
                unpack = next((unpack for mark, unpack in _UNPACK.items() if start.startswith(mark)), None)
                tar = _unpacked(path, unpack, stack, max_bytes) if unpack else stack.enter_context(path.open("rb"))
                members = _tar_members(tar, stack)
            collected = _collected(members, max_bytes)
            folder = folder_of(collected, of_adapter=of_adapter)
        except _BROKEN as error:
            raise InvalidFile(f"The archive cannot be read: {first_line(error)}.") from None
        yield folder


def folder_of(members: Mapping[PurePosixPath, Member], *, of_adapter: bool) -> Folder:
    """Return what the service uses of these files; it reads the descriptions among them.

    Raises:
        InvalidFile: see `open_folder`.
    """
    return _adapter_folder(members) if of_adapter else _network_folder(members)


def write_weights(folder: Folder, target: Written) -> None:
    """Write the tensors of all shards as one safetensors file; copy a single shard unchanged.

    Raises:
        InvalidFile: see `merged`.
    """
    beginning, extents = merged(folder)
    target.write(beginning)
    for name, of_shard in groupby(extents, lambda extent: extent.name):
        _copy(name, folder.shards[name], [*of_shard], target)


def merged(folder: Folder) -> tuple[bytes, list[Extent]]:
    """Return the one safetensors file of all shards' tensors: its beginning, and the ranges of shards that follow.

    A single shard is taken as it is. If several shards hold a name, the index decides which tensor is taken.

    Raises:
        InvalidFile: a shard is broken, two hold a name that the index does not, or index and shards do not agree.
    """
    headers = {name: _shard(name, member) for name, member in folder.shards.items()}
    _check_index(folder, headers)
    if len(folder.shards) == 1:
        return b"", [Extent(name, 0, member.size) for name, member in folder.shards.items()]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    extents: list[Extent] = []
    offset = 0
    for name, header in headers.items():
        elsewhere = {tensor for tensor in header.tensors if (folder.weight_map or {}).get(tensor, name) != name}
        if twice := sorted((set(header.tensors) - elsewhere) & set(entries)):
            raise InvalidFile(f"Two shards hold the tensor {twice[0]!r}; the second is {name!r}.", tensor=twice[0])
        cuts = _cuts(name, header, elsewhere)
        ends, left_out = [end for _, end in cuts], [0, *accumulate(end - begin for begin, end in cuts)]
        for tensor, info in header.tensors.items():
            if tensor not in elsewhere:
                shift = offset - left_out[bisect_right(ends, header.spans[tensor][0])]
                span = [shift + end for end in header.spans[tensor]]
                entries[tensor] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": span}
        size, start = folder.shards[name].size, header.data_start
        begins = [start, *(start + end for end in ends)]
        kept = zip(begins, [*(start + begin for begin, _ in cuts), size], strict=True)
        extents += [Extent(name, begin, end) for begin, end in kept if begin < end]
        offset += size - start - left_out[-1]
    return tensorfile.header_bytes(entries), extents


def _cuts(name: str, header: Header, elsewhere: Collection[str]) -> list[tuple[int, int]]:
    """Return the byte ranges of a shard's tensors that the index assigns to another shard, in their order."""
    if not elsewhere:
        return []
    spans = sorted((*header.spans[tensor], tensor) for tensor in header.tensors)
    for (_, end, _), (begin, _, tensor) in pairwise(spans):
        if begin < end:
            raise InvalidFile(f"In {name!r}: tensor {tensor!r} begins within another.", file=name)
    return [(begin, end) for begin, end, tensor in spans if tensor in elsewhere]


def _shard(name: str, member: Member) -> Header:
    try:
        with member.open() as file:
            header = tensorfile.read_header(file, member.size)
    except InvalidFile as error:
        raise InvalidFile(f"In {name!r}: {error.detail}", file=name) from None
    except _BROKEN as error:
        raise InvalidFile(f"{name!r} in the folder cannot be read: {first_line(error)}.", file=name) from None
    data_bytes = member.size - header.data_start
    if any(not 0 <= begin <= end <= data_bytes for begin, end in header.spans.values()):
        raise InvalidFile(
            f"{name!r} is cut short: a tensor would end beyond its {data_bytes} bytes of data.", file=name
        )
    return header


def _copy(name: str, member: Member, extents: Sequence[Extent], target: Written) -> None:
    """Copy these ranges of a member, in their order."""
    at, left = 0, 0
    try:
        with member.open() as file:
            for extent in extents:
                _skip(file, extent.begin - at)
                at, left = extent.end, extent.end - extent.begin
                while left and (chunk := file.read(min(_COPY_BYTES, left))):
                    target.write(chunk)
                    left -= len(chunk)
                if left:
                    break
    except _BROKEN as error:
        raise InvalidFile(f"{name!r} in the folder cannot be read: {first_line(error)}.", file=name) from None
    if left:
        raise InvalidFile(f"{name!r} in the folder ends {left} bytes early.", file=name)


def _skip(file: BinaryIO, n_bytes: int) -> None:
    while n_bytes and (chunk := file.read(min(_COPY_BYTES, n_bytes))):
        n_bytes -= len(chunk)


def _check_index(folder: Folder, headers: Mapping[str, Header]) -> None:
    if folder.weight_map is None:
        return
    wrong = sorted(tensor for tensor, shard in folder.weight_map.items() if tensor not in headers[shard].tensors)
    if wrong:
        raise InvalidFile(
            f"The index names {len(wrong)} tensors that are not in the shard it gives for them, first {wrong[0]!r}.",
            missing=wrong[:20],
        )


def _network_folder(members: Mapping[PurePosixPath, Member]) -> Folder:
    adapters = sorted((path for path in members if is_adapter_config(path)), key=lambda path: len(path.parts))
    inside = {path.name: members[path] for path in adapters[:1]}
    refuse_foreign_folder(members, _json(inside, adapters[0].name) if adapters else None)
    weights = [path for path in members if path.suffix == ".safetensors"]
    if not weights:
        pickled = sorted(str(path) for path in members if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".distcp"))
        source = "FOLDER" if any(name.endswith(".distcp") for name in pickled) else "FILE"
        advice = f"; of {pickled[0]} it opens none: interplay convert {source} -o OUT.safetensors" if pickled else ""
        raise InvalidFile(f"The folder holds no safetensors file{advice}.", members=sorted(map(str, members))[:20])
    configs = [path for path in members if path.name == "config.json"]
    root = _outermost(configs or weights)
    inside = {path.name: member for path, member in members.items() if path.parent == root}
    names, weight_map = _shards(inside)
    return Folder(
        config=_json(inside, "config.json"),
        preprocessor=_json(inside, "preprocessor_config.json"),
        tokenizer=_json(inside, "tokenizer.json"),
        adapter=None,
        shards={name: inside[name] for name in names},
        weight_map=weight_map,
    )


def _adapter_folder(members: Mapping[PurePosixPath, Member]) -> Folder:
    """Return the outermost folder with an adapter_config.json; a network beside the adapter is left out."""
    configs = [path for path in members if is_adapter_config(path)]
    if not configs:
        raise InvalidFile(
            "The spec has a base_id, and the folder holds no adapter_config.json: it is no adapter as PEFT saves it. "
            "A whole network has no base: leave base_id out.",
            members=sorted(map(str, members))[:20],
        )
    root = _outermost(configs)
    inside = {path.name: member for path, member in members.items() if path.parent == root}
    if ADAPTER_WEIGHTS not in inside:
        pickled = (
            " The service opens no pickle: interplay convert FOLDER/adapter_model.bin -o FOLDER/" + ADAPTER_WEIGHTS
        )
        advice = pickled if "adapter_model.bin" in inside else ""
        raise InvalidFile(f"The adapter's folder holds no {ADAPTER_WEIGHTS}.{advice}", members=sorted(inside)[:20])
    return Folder(
        config=None,
        preprocessor=_json(inside, "preprocessor_config.json"),
        tokenizer=_json(inside, "tokenizer.json"),
        adapter=_json(inside, configs[0].name),
        shards={ADAPTER_WEIGHTS: inside[ADAPTER_WEIGHTS]},
        weight_map=None,
    )


def _outermost(paths: Iterable[PurePosixPath]) -> PurePosixPath:
    """Return the outermost folder that describes a network; others may lie below it."""
    folders = sorted({path.parent for path in paths}, key=lambda folder: (len(folder.parts), folder))
    beside = [str(folder) for folder in folders if len(folder.parts) == len(folders[0].parts)]
    if len(beside) > 1:
        raise InvalidFile(
            f"There are {len(beside)} folders of checkpoints side by side, {', '.join(beside[:20])}; send one.",
            folders=beside[:20],
        )
    return folders[0]


def _shards(inside: Mapping[str, Member]) -> tuple[list[str], dict[str, str] | None]:
    """Return the names of the files that hold the weights, and the index's weight map if they are found by an index.

    The order is that of the libraries: one file under its usual name, and an index only without it.
    """
    if "model.safetensors" in inside:
        # Other files beside it hold other content, for example an optimizer's state.
        return ["model.safetensors"], None
    indexes = sorted(name for name in inside if name.endswith(".safetensors.index.json"))
    indexes = [name for name in indexes if name == "model.safetensors.index.json"] or indexes
    files = sorted(name for name in inside if name.endswith(".safetensors"))
    if len(indexes) == 1:
        weight_map = _weight_map(indexes[0], inside[indexes[0]])
        names = sorted(set(weight_map.values()))
        if absent := [name for name in names if name not in inside]:
            raise InvalidFile(
                f"The index names {len(absent)} shards that the folder does not hold, first {absent[0]!r}.",
                missing=absent[:20],
            )
        return names, weight_map
    if len(files) != 1:
        raise InvalidFile(
            f"The folder holds {len(files)} safetensors files and no model.safetensors.index.json that says "
            "how they belong together.",
            files=files[:20],
        )
    return files, None


def shards_of_index(name: str, text: bytes) -> list[str]:
    """Return the names of the shards of an index, which lie beside it.

    Raises:
        InvalidFile: it is no index, or a shard lies elsewhere.
    """
    shards = sorted(set(_weight_map(name, Member(len(text), partial(io.BytesIO, text))).values()))
    if elsewhere := [shard for shard in shards if names.unsafe(shard) or "/" in shard]:
        raise InvalidFile(f"{name!r} names a shard that does not lie beside it: {elsewhere[0][:200]!r}.")
    if len(shards) > MAX_MEMBERS:
        raise InvalidFile(f"{name!r} names {len(shards)} shards; at most {MAX_MEMBERS} are fetched.")
    return shards


def _weight_map(name: str, member: Member) -> dict[str, str]:
    index = _json({name: member}, name)
    weight_map = None if index is None else index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InvalidFile(f"{name!r} has no weight_map from tensors to files.")
    if len(weight_map) > tensorfile.MAX_TENSORS:
        raise InvalidFile(f"{name!r} names {len(weight_map)} tensors; at most {tensorfile.MAX_TENSORS} are allowed.")
    return weight_map


def _json(members: Mapping[str, Member], name: str) -> dict[str, Any] | None:
    if name not in members:
        return None
    member = members[name]
    if member.size > _MAX_JSON_BYTES:
        raise InvalidFile(f"{name!r} has {member.size} bytes; at most {_MAX_JSON_BYTES} are read.")
    with member.open() as file:
        text = file.read(_MAX_JSON_BYTES)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidFile(f"{name!r} in the folder is not JSON.") from None
    if not isinstance(value, dict):
        raise InvalidFile(f"{name!r} in the folder is not a JSON object.")
    return value


def _zip_members(path: Path, stack: ExitStack) -> Iterator[tuple[str, Member | None]]:
    bound_directory(path, MAX_MEMBERS)
    archive = stack.enter_context(zipfile.ZipFile(path))
    for info in archive.infolist():
        # The upper half of a zip's external attributes is the file's mode on Unix; 0xA000 is a link.
        if (info.external_attr >> 16) & 0xF000 == 0xA000:
            raise _refused(info.filename, "is a link")
        yield (
            info.filename,
            None if info.filename.endswith("/") else Member(info.file_size, partial(_opened_zip, archive, info)),
        )


def _opened_zip(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> BinaryIO:
    return cast(BinaryIO, archive.open(info))


def _unpacked(path: Path, unpack: Callable[[Path], Any], stack: ExitStack, max_bytes: int) -> BinaryIO:
    """Unpack a compressed tar once, since seeking back in a compressed one unpacks it again from its start."""
    file = stack.enter_context(tempfile.TemporaryFile(dir=path.parent))  # noqa: SIM115
    with unpack(path) as packed:
        while chunk := packed.read(_COPY_BYTES):
            file.write(chunk)
            if file.tell() > max_bytes:
                raise _bomb(max_bytes)
    file.seek(0)
    return cast(BinaryIO, file)


class _Bounded:
    """Limits each read of a tar while `listing`: tarfile reads the size that a header announces, 8 GiB or less."""

    def __init__(self, file: BinaryIO) -> None:
        self.tell, self.seek, self._file = file.tell, file.seek, file
        self.listing = True

    def read(self, n_bytes: int = -1) -> bytes:
        if self.listing and not 0 <= n_bytes <= _MAX_TAR_HEADER_BYTES:
            raise InvalidFile(
                f"The tar announces a header of {n_bytes} bytes; at most {_MAX_TAR_HEADER_BYTES} are read."
            )
        return self._file.read(n_bytes)


def _tar_members(file: BinaryIO, stack: ExitStack) -> Iterator[tuple[str, Member | None]]:
    bounded = _Bounded(file)
    archive = stack.enter_context(tarfile.TarFile(fileobj=cast(BinaryIO, bounded)))
    for info in archive:
        if info.issym() or info.islnk():
            raise _refused(info.name, "is a link")
        if not (info.isfile() or info.isdir()) or info.size < 0:
            raise _refused(info.name, "is neither a file nor a folder")
        yield info.name, Member(info.size, partial(_opened_tar, archive, info)) if info.isfile() else None
    bounded.listing = False


def _opened_tar(archive: tarfile.TarFile, info: tarfile.TarInfo) -> BinaryIO:
    file = archive.extractfile(info)
    assert file is not None, "it is a file"
    return cast(BinaryIO, file)


def _collected(members: Iterable[tuple[str, Member | None]], max_bytes: int) -> dict[PurePosixPath, Member]:
    """Return files by path. Count members as they come, folders too, to detect a bomb before its list is complete."""
    found: dict[PurePosixPath, Member] = {}
    unpacked = 0
    for number, (name, member) in enumerate(members, 1):
        path = PurePosixPath(name)
        if fault := names.unsafe(name):
            raise _refused(name, fault)
        if number > MAX_MEMBERS:
            raise InvalidFile(f"The archive has more than {MAX_MEMBERS} members.")
        if member is None:
            continue
        if path in found:
            raise _refused(name, "is there twice")
        found[path] = member
        unpacked += member.size
        if unpacked > max_bytes:
            raise _bomb(max_bytes)
    return found


def _bomb(max_bytes: int) -> InvalidFile:
    return InvalidFile(f"The archive would unpack to more than {max_bytes} bytes.", limit_bytes=max_bytes)


def _refused(name: str, why: str) -> InvalidFile:
    return InvalidFile(f"The archive's member {name[:200]!r} {why}.", member=name[:200])
