"""A zip of class folders with images: cat/1.png, or train/cat/1.png and test/cat/1.png."""

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from app.datafile.dataset import MAX_CLASSES, MAX_IMAGE_BYTES, Dataset, Limits, check_class_name, split_of_folder
from app.errors import InvalidFile

_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".gif", ".webp", ".tif", ".tiff")
# What file managers leave beside images.
_LITTER = ("__MACOSX", "Thumbs.db", "desktop.ini")
_BROKEN_ZIP = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError, OverflowError,
    struct.error,
)  # fmt: skip
_MAX_NAME_BYTES = 1024
# Of each file in the list: its entry, a name of some length, what some archivers add.
_DIRECTORY_BYTES = 256
_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"


def is_npz(path: Path, limits: Limits) -> bool:
    """Whether a zip holds .npy files alone; only its list of files is read.

    Raises:
        InvalidFile: it is no complete zip, or lists more files than the limits.
    """
    _bound_directory(path, limits.members)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [member.filename for member in archive.infolist() if not member.is_dir()]
    except _BROKEN_ZIP as error:
        raise InvalidFile(f"The file is not a valid zip: {error}.") from None
    return all(name.endswith(".npy") for name in names)


def open_folders(path: Path, limits: Limits, _: Mapping[str, str | None]) -> Dataset:
    """Classes and splits from the folders of a zip; classes are sorted by name, rows by class, split and path.

    Raises:
        InvalidFile: a path that climbs out, a link, a class without images, files that are no images, other levels of
            folders; more files, bytes or a larger ratio than the limits.
    """
    _bound_directory(path, limits.members)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except _BROKEN_ZIP as error:
        raise InvalidFile(f"The file is not a valid zip: {error}.") from None
    for member in members:
        _check(member)
    limits.check_unpacked("zip", sum(member.file_size for member in members), path.stat().st_size)
    names = [member.filename for member in members if not _is_litter(member.filename)]
    if len(set(names)) < len(names):
        raise InvalidFile("The zip holds two files of the same name.")
    images, folders = _sorted_out(names)
    rows = sorted((name_of_class, split or 0, name) for name, (split, name_of_class) in images.items())
    classes = sorted({name_of_class for name_of_class, _, _ in rows})
    _check_classes(classes, folders - {PurePosixPath(name).parts[:-1] for name in images})
    limits.check_rows(len(rows))
    numbers = {name: number for number, name in enumerate(classes)}
    return Dataset(
        format="imagefolder",
        content="images",
        n_rows=len(rows),
        labels=np.array([numbers[name] for name, _, _ in rows], np.int64),
        split=None if next(iter(images.values()))[0] is None else np.array([split for _, split, _ in rows], np.int64),
        class_names=classes,
        columns=None,
        read=lambda chosen: _read(path, [rows[row][2] for row in chosen], chosen),
    )


def _bound_directory(path: Path, max_members: int) -> None:
    """Bound a zip's list of files before zipfile reads it, whole, into memory."""
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


def _check(member: zipfile.ZipInfo) -> None:
    name, mode = member.filename, member.external_attr >> 16
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in path.parts[:1]:
        raise InvalidFile(f"The zip's entry {name[:200]!r} leads out of its folder.")
    if not name.isprintable() or len(name.encode(errors="replace")) > _MAX_NAME_BYTES:
        raise InvalidFile(f"The zip's entry {name[:200]!r} must be printable and of at most {_MAX_NAME_BYTES} bytes.")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise InvalidFile(f"The zip's entry {name[:200]!r} is a link or a device; only files and folders are allowed.")
    if member.flag_bits & 1:
        raise InvalidFile(f"The zip's entry {name[:200]!r} is encrypted.")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InvalidFile(f"The zip's entry {name[:200]!r} is neither stored nor deflated.")
    if member.file_size > MAX_IMAGE_BYTES:
        raise InvalidFile(
            f"The zip's entry {name[:200]!r} has {member.file_size} bytes; an image may have {MAX_IMAGE_BYTES}."
        )


def _is_litter(name: str) -> bool:
    return any(part.startswith(".") or part in _LITTER for part in PurePosixPath(name).parts)


def _sorted_out(names: Sequence[str]) -> tuple[dict[str, tuple[int | None, str]], set[tuple[str, ...]]]:
    """Split and class of each image, and the folders that the zip lists; those that hold all the rest are left out."""
    files = [name for name in names if not name.endswith("/")]
    images = [name for name in files if name.lower().endswith(_SUFFIXES)]
    if not images:
        raise InvalidFile(f"The zip holds no images ({', '.join(_SUFFIXES)}).")
    common = PurePosixPath(os.path.commonpath([PurePosixPath(name).parent for name in images])).parts
    depths = {len(PurePosixPath(name).parts) for name in images}
    if len(depths) > 1 or depths == {1}:
        raise _other_levels(images)
    [depth] = depths
    # dataset/cat/1.png and dataset/train/cat/1.png: what all share is no class, unless it is a split.
    skipped = len(common) if len(common) <= depth - 2 else depth - 2
    if skipped and split_of_folder(common[skipped - 1]) is not None and depth - skipped == 2:
        skipped -= 1
    levels = depth - skipped
    others = set(files).difference(images)
    strangers = [name for name in files if name in others and len(PurePosixPath(name).parts) == depth]
    if strangers:
        raise InvalidFile(
            f"{len(strangers)} files beside the images are none, such as {strangers[0][:200]!r}; class folders hold "
            f"{', '.join(_SUFFIXES)} alone."
        )
    found = {}
    for name in images:
        parts = PurePosixPath(name).parts[skipped:]
        split = split_of_folder(parts[0]) if levels == 3 else None
        if levels not in (2, 3) or (levels == 3 and split is None):
            raise _other_levels(images)
        found[name] = (split, parts[-2])
    listed = {PurePosixPath(name).parts for name in names if name.endswith("/")}
    return found, {parts for parts in listed if len(parts) == depth - 1}


def _other_levels(images: Sequence[str]) -> InvalidFile:
    return InvalidFile(
        "Images must lie in class folders (cat/1.png), or these in folders named after splits (train/cat/1.png, "
        f"test/cat/1.png), all at one depth; the zip holds {', '.join(repr(name[:200]) for name in images[:3])}."
    )


def _check_classes(classes: Sequence[str], empty_folders: set[tuple[str, ...]]) -> None:
    if empty := sorted("/".join(parts) for parts in empty_folders):
        raise InvalidFile(
            f"{len(empty)} class folders hold no images: {', '.join(map(repr, empty[:20]))}.", folders=empty[:20]
        )
    for name in classes:
        check_class_name(name)
    if len(classes) > MAX_CLASSES:
        raise InvalidFile(f"The zip has {len(classes)} class folders; at most {MAX_CLASSES} are allowed.")


def _read(path: Path, names: Sequence[str], rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for row, name in zip(rows, names, strict=True):
            try:
                # No more comes than the size that was checked, whatever the packed bytes hold.
                content = archive.read(name)
            except _BROKEN_ZIP as error:
                raise InvalidFile(f"Row {row} ({name}) cannot be read from the zip: {error}.", row=row) from None
            yield name, content
