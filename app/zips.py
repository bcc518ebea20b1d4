"""Zips from strangers: how many files one lists, looked at before the list is read, and what none of them may be."""

import stat
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from app.errors import InvalidFile

# What zipfile raises for broken files and for methods that it does not know.
BROKEN_ZIP = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError, OverflowError,
    struct.error,
)  # fmt: skip
# Of each file in the list: its entry, a name of some length, what some archivers add.
_DIRECTORY_BYTES = 256
_MAX_NAME_BYTES = 1024
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


def members(path: Path, max_members: int) -> list[zipfile.ZipInfo]:
    """What a zip lists, each with a name that stays where it is put.

    Raises:
        InvalidFile: as `bound_directory`; a path that climbs out, a link or a device, what is encrypted.
    """
    bound_directory(path, max_members)
    try:
        with zipfile.ZipFile(path) as archive:
            found = archive.infolist()
    except BROKEN_ZIP as error:
        raise InvalidFile(f"The file is not a valid zip: {error}.") from None
    for member in found:
        _check(member)
    return found


def stored_span(path: Path, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of a member begin, and how many there are.

    Raises:
        InvalidFile: it is compressed, or lies outside of the file.
    """
    name = member.filename[:200]
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise InvalidFile(
            f"{name!r} is compressed once more by the zip; store it, as `zip -0` and `interplay push probe FOLDER` do."
        )
    with path.open("rb") as file:
        file.seek(max(member.header_offset, 0))
        header = file.read(30)
    if len(header) == 30 and header.startswith(b"PK\x03\x04"):
        start = member.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        if start + member.file_size <= path.stat().st_size:
            return start, member.file_size
    raise InvalidFile(f"The zip's entry {name!r} does not lie where the list says.")


def _check(member: zipfile.ZipInfo) -> None:
    name, mode = member.filename, member.external_attr >> 16
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in path.parts[:1]:
        raise InvalidFile(f"The zip's entry {name[:200]!r} leads out of its folder.")
    if not name.isprintable() or not 0 < len(name.encode(errors="replace")) <= _MAX_NAME_BYTES:
        raise InvalidFile(f"The zip's entry {name[:200]!r} must be printable and of 1 to {_MAX_NAME_BYTES} bytes.")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise InvalidFile(f"The zip's entry {name[:200]!r} is a link or a device; only files and folders are allowed.")
    if member.flag_bits & 1:
        raise InvalidFile(f"The zip's entry {name[:200]!r} is encrypted.")
