"""Check untrusted zips: the number of files before the list is read, then each entry for forbidden properties.

A name that is valid UTF-8 is read as UTF-8, whether the zip marks it or not. Names are converted to Unicode's composed
form (NFC), as the same folder comes decomposed from a Mac.
"""

import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from app.errors import InvalidFile
from app.files import names

# Exceptions of zipfile for broken files and for unknown compression methods.
BROKEN_ZIP = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError, OverflowError,
    struct.error,
)  # fmt: skip
# For each file in the list: its entry, a name of some length, additions of some archivers.
_DIRECTORY_BYTES = 256
_UTF_8, _UNICODE_PATH = 0x800, 0x7075
_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"


@dataclass(frozen=True)
class Member:
    """A file or a folder of a zip.

    Attributes:
        name: its path, NFC; ends with / for a folder.
        place: its index in the zip's list.
        info: zipfile's record, with the name as zipfile decodes it.
    """

    name: str
    place: int
    info: zipfile.ZipInfo

    @property
    def is_folder(self) -> bool:
        return self.name.endswith("/")


def bound_directory(path: Path, max_members: int) -> None:
    """Check the size of a zip's list of files before zipfile reads it whole into memory.

    Raises:
        InvalidFile: it is not a complete zip, or lists more files than are allowed.
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
            # Python reads the zip64 record right before the locator, others where it points: both must be small.
            for place in (offset, size_bytes - len(tail) + end - 20 - 56):
                file.seek(min(max(place, 0), size_bytes))
                record = file.read(56)
                if len(record) == 56 and record.startswith(_END_64):
                    announced.append(struct.unpack_from("<QQ", record, 32))
    # In a zip64 the small numbers have all bits set.
    members, directory_bytes = (max(numbers) for numbers in zip(*(announced[1:] or announced), strict=True))
    if members > max_members or directory_bytes > max_members * _DIRECTORY_BYTES + 2**16:
        raise InvalidFile(f"The zip lists {members} files or more; at most {max_members} are allowed.")


def members(path: Path, max_members: int) -> list[Member]:
    """Return the members of a zip, none with a path that leads out of its folder.

    Raises:
        InvalidFile: as `bound_directory`; a path that leads out of the folder, a link or a device, an encrypted entry;
            two files of the same name.
    """
    bound_directory(path, max_members)
    try:
        with zipfile.ZipFile(path) as archive:
            found = archive.infolist()
    except BROKEN_ZIP as error:
        raise InvalidFile(f"The file is not a valid zip: {error}.") from None
    listed = [Member(_name(info), place, info) for place, info in enumerate(found)]
    for member in listed:
        _check(member)
    places: dict[str, Member] = {}
    for member in listed:
        first = places.setdefault(member.name, member)
        if first is not member and not member.is_folder:
            spelt = "" if first.info.filename == member.info.filename else ", in two spellings of Unicode"
            raise InvalidFile(f"The zip holds two files of the same name{spelt}: {member.name[:200]!r}.")
    return listed


def stored_span(path: Path, member: Member) -> tuple[int, int]:
    """Return the offset of a member's first byte, and the number of its bytes.

    Raises:
        InvalidFile: it is compressed, or lies outside of the file.
    """
    name, info = member.name[:200], member.info
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise InvalidFile(
            f"{name!r} is compressed once more by the zip; store it, as `zip -0` and `interplay push probe FOLDER` do."
        )
    with path.open("rb") as file:
        file.seek(max(info.header_offset, 0))
        header = file.read(30)
    if len(header) == 30 and header.startswith(b"PK\x03\x04"):
        start = info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        if start + info.file_size <= path.stat().st_size:
            return start, info.file_size
    raise InvalidFile(f"The zip's entry {name!r} does not lie where the list says.")


def _name(info: zipfile.ZipInfo) -> str:
    """Return the intended name. If the zip does not mark it as UTF-8, zipfile decodes it as cp437."""
    name = info.filename
    if not info.flag_bits & _UTF_8 and not name.isascii():
        raw = info.orig_filename.encode("cp437", errors="replace")
        # A Mac's Finder and others write UTF-8 without marking it; hardly any text of another encoding is valid UTF-8.
        name = _unicode_path(info.extra, raw) or _utf_8(raw) or name
    return normalize("NFC", name)


def _utf_8(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _unicode_path(extra: bytes, raw: bytes) -> str | None:
    """Return the UTF-8 name that Info-ZIP writes beside a name in another encoding, if its checksum matches `raw`."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and len(field) > 5 and field[1:5] == struct.pack("<L", zlib.crc32(raw)):
            return _utf_8(field[5:])
    return None


def _check(member: Member) -> None:
    name, info = member.name, member.info
    mode = info.external_attr >> 16
    if fault := names.unsafe(name):
        raise InvalidFile(f"The zip's entry {name[:200]!r} {fault}.")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise InvalidFile(f"The zip's entry {name[:200]!r} is a link or a device; only files and folders are allowed.")
    if info.flag_bits & 1:
        raise InvalidFile(f"The zip's entry {name[:200]!r} is encrypted.")
