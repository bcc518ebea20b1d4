"""Zips from strangers: how many files one lists, looked at before the list is read."""

import struct
import zipfile
import zlib
from pathlib import Path

from app.errors import InvalidFile

# What zipfile raises for broken files and for methods that it does not know.
BROKEN_ZIP = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError, OverflowError,
    struct.error,
)  # fmt: skip
# Of each file in the list: its entry, a name of some length, what some archivers add.
_DIRECTORY_BYTES = 256
_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"


def bound_directory(path: Path, max_members: int) -> None:
    """Bound a zip's list of files before zipfile reads it, whole, into memory.

    Raises:
        InvalidFile: it is no complete zip, or lists more files than are allowed.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size_bytes - 2**16 - 64))
        tail = file.read()
        end = tail.rfind(_END)
        if end < 0 or len(tail) - end < 22:
            raise InvalidFile("The file is not a complete zip: the end of its list of files is missing.")
        announced = [struct.unpack_from("<HL", tail, end + 10)]
        if end >= 20 and tail[end - 20 : end - 16] == _LOCATOR_64:
            (offset,) = struct.unpack_from("<Q", tail, end - 12)
            # Python looks for the large numbers right before the locator, others where it points: both must be small.
            for place in (offset, size_bytes - len(tail) + end - 20 - 56):
                file.seek(min(max(place, 0), size_bytes))
                record = file.read(56)
                if len(record) == 56 and record.startswith(_END_64):
                    announced.append(struct.unpack_from("<QQ", record, 32))
    # In a zip with large numbers the small ones are all ones.
    members, directory_bytes = (max(numbers) for numbers in zip(*(announced[1:] or announced), strict=True))
    if members > max_members or directory_bytes > max_members * _DIRECTORY_BYTES + 2**16:
        raise InvalidFile(f"The zip lists {members} files or more; at most {max_members} are allowed.")
