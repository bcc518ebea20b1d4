"""A zip of class folders with images: cat/1.png, or train/cat/1.png and test/cat/1.png."""

import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from app.errors import InvalidFile
from app.files import zips
from app.files.datafile.dataset import MAX_IMAGE_BYTES, Dataset, Limits
from app.files.datafile.values import check_class_name, split_of_folder
from app.schemas.base import MAX_CLASSES

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".gif", ".webp", ".tif", ".tiff")
# Files that file managers leave beside images.
_LITTER = ("__MACOSX", "Thumbs.db", "desktop.ini")


def open_folders(path: Path, limits: Limits, _: Mapping[str, str | None]) -> Dataset:
    """Read classes and splits from the folders of a zip; sort classes by name, and rows by class, split and path.

    Raises:
        InvalidFile: a path that leads out of the zip, a link, a class without images, files that are not images,
            other levels of folders; more files, more bytes or a larger ratio than the limits.
    """
    members = zips.members(path, limits.members)
    for member in members:
        _check(member)
    limits.check_unpacked("zip", sum(member.info.file_size for member in members), path.stat().st_size)
    places = {member.name: member.place for member in members if not is_litter(member.name)}
    images, folders = _sorted_out(list(places))
    rows = sorted((name_of_class, split or 0, name) for name, (split, name_of_class) in images.items())
    classes = sorted({name_of_class for name_of_class, _, _ in rows})
    if all(split_of_folder(name) is not None for name in classes):
        raise InvalidFile(f"The folders {', '.join(classes)} are splits; within each there must be class folders.")
    _check_classes(classes, folders - {_parts(name)[:-1] for name in images})
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
        read=partial(_read, path, [(name, places[name]) for _, _, name in rows]),
    )


def _check(member: zips.Member) -> None:
    name, info = member.name[:200], member.info
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InvalidFile(f"The zip's entry {name!r} is neither stored nor deflated.")
    if info.file_size > MAX_IMAGE_BYTES:
        raise InvalidFile(f"The zip's entry {name!r} has {info.file_size} bytes; an image may have {MAX_IMAGE_BYTES}.")


def is_litter(name: str) -> bool:
    """Return whether a file is hidden, or one that file managers leave beside images."""
    return any(part.startswith(".") or part in _LITTER for part in _parts(name))


def _parts(name: str) -> tuple[str, ...]:
    """Return the parts of a relative path, as pathlib does, which takes seconds for a hundred thousand files."""
    return tuple(part for part in name.split("/") if part not in ("", "."))


def _sorted_out(names: Sequence[str]) -> tuple[dict[str, tuple[int | None, str]], set[tuple[str, ...]]]:
    """Return each image's split and class, and the class folders that the zip lists, without enclosing folders."""
    files = [name for name in names if not name.endswith("/")]
    images = [name for name in files if name.lower().endswith(SUFFIXES)]
    if not images:
        raise InvalidFile(f"The zip holds no images ({', '.join(SUFFIXES)}).")
    common = PurePosixPath(os.path.commonpath([name.rpartition("/")[0] for name in images])).parts
    depths = {len(_parts(name)) for name in images}
    if len(depths) > 1 or depths == {1}:
        raise _other_levels(images)
    [depth] = depths
    # dataset/cat/1.png, dataset/train/cat/1.png: folders that all images share are skipped, unless one is a split.
    skipped = len(common) if len(common) <= depth - 2 else depth - 2
    if skipped and split_of_folder(common[skipped - 1]) is not None and depth - skipped == 2:
        skipped -= 1
    levels = depth - skipped
    others = set(files).difference(images)
    strangers = [name for name in files if name in others and len(_parts(name)) == depth]
    if strangers:
        raise InvalidFile(
            f"{len(strangers)} files beside the images are none, such as {strangers[0][:200]!r}; class folders hold "
            f"{', '.join(SUFFIXES)} alone."
        )
    found = {}
    for name in images:
        parts = _parts(name)[skipped:]
        split = split_of_folder(parts[0]) if levels == 3 else None
        if levels not in (2, 3) or (levels == 3 and split is None):
            raise _other_levels(images)
        found[name] = (split, parts[-2])
    listed = {_parts(name) for name in names if name.endswith("/")}
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


def _read(path: Path, files: Sequence[tuple[str, int]], rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        listed = archive.infolist()
        for row in rows:
            name, place = files[row]
            try:
                # zipfile returns no more than the size that was checked, whatever the packed bytes hold.
                content = archive.read(listed[place])
            except zips.BROKEN_ZIP as error:
                raise InvalidFile(f"Row {row} ({name}) cannot be read from the zip: {error}.", row=row) from None
            yield name, content
