"""Parts of uploads that clients send straight into a bucket: an object each, until a resource is made of all of them.

obstore signs requests for whole objects, not for the parts of S3's own uploads in parts. So each part is an object
below `parts/`, written as a whole or not at all. Whoever makes the resource reads them once, in order, into the staged
file of the upload, which is hashed as it comes; all that follows is as with any other upload.
"""

from contextlib import suppress
from datetime import timedelta

import obstore
from obstore.store import S3Store

from app.staging import PartialFile, StorageUnavailable, reaching_storage
from app.storage import Storage

_PLACE = "parts"
# Large enough that a thousand URLs do for most files, small enough that one in flight is no loss.
_LEAST_BYTES, _FEWEST = 16 * 2**20, 1000
# How long a signed request may begin.
_SIGNED_SECONDS = 3600.0
_CHUNK_BYTES = 8 * 2**20


def part_bytes_of(storage: Storage, size_bytes: int) -> int | None:
    """Return the size of the parts of a file; None if the storage is none that signs requests."""
    if not isinstance(storage.store, S3Store) or not size_bytes:
        return None
    return max(_LEAST_BYTES, -(-size_bytes // _FEWEST))


def extents(size_bytes: int, part_bytes: int) -> list[tuple[int, int]]:
    """Return the offset and the size of each part of a file."""
    return [(start, min(part_bytes, size_bytes - start)) for start in range(0, size_bytes, part_bytes)]


def missing(storage: Storage, id_: str, size_bytes: int, part_bytes: int) -> list[int]:
    """Return the numbers, from 0, of an upload's parts that the bucket does not have in their size.

    Raises:
        StorageUnavailable: the bucket does not answer.
    """
    with reaching_storage():
        found = {
            (entry["path"].rpartition("/")[2], entry["size"])
            for entries in obstore.list(storage.store, prefix=f"{_PLACE}/{id_}")
            for entry in entries
        }
    wanted = enumerate(extents(size_bytes, part_bytes))
    return [number for number, (_, size) in wanted if (_name(number), size) not in found]


def signed(storage: Storage, id_: str, numbers: list[int]) -> list[str]:
    """Return for each part the URL to which one PUT may bring it within an hour."""
    assert isinstance(storage.store, S3Store)
    paths = [_path(id_, number) for number in numbers]
    with reaching_storage():
        return list(obstore.sign(storage.store, "PUT", paths, timedelta(seconds=_SIGNED_SECONDS)))


def fetch(storage: Storage, id_: str, size_bytes: int, part_bytes: int, file: PartialFile) -> None:
    """Write all parts, in order, to an empty file.

    Raises:
        StorageUnavailable: the bucket does not answer, or a part has changed meanwhile.
    """
    for number, (offset_bytes, size) in enumerate(extents(size_bytes, part_bytes)):
        with reaching_storage():
            for chunk in obstore.get(storage.store, _path(id_, number)).stream(min_chunk_size=_CHUNK_BYTES):
                file.write(bytes(chunk))
        if file.size_bytes != offset_bytes + size:
            raise StorageUnavailable(f"part {number} of upload {id_} has changed")


def remove(storage: Storage, id_: str) -> None:
    """Remove all parts of an upload."""
    with reaching_storage():
        for entries in obstore.list(storage.store, prefix=f"{_PLACE}/{id_}"):
            for entry in entries:
                with suppress(FileNotFoundError):
                    obstore.delete(storage.store, entry["path"])


def ids(storage: Storage) -> set[str]:
    """Return the ids of uploads of which the bucket has parts."""
    if not isinstance(storage.store, S3Store):
        return set()
    with reaching_storage():
        found = obstore.list_with_delimiter(storage.store, prefix=_PLACE)["common_prefixes"]
    return {path.rstrip("/").rpartition("/")[2] for path in found}


def _name(number: int) -> str:
    return f"{number:05d}"


def _path(id_: str, number: int) -> str:
    return f"{_PLACE}/{id_}/{_name(number)}"
