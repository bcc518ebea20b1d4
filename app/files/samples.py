"""A few samples of a probe for its page: of each class the first ones. It runs in a process of its own.

Pictures are not decoded: they are returned as the file has them, if they begin like ones that every browser shows.
"""

import json
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from app.descriptions.labels import named_labels
from app.errors import InvalidFile, InvalidRequest
from app.files import datafile, pictures, tensordata, tensorfile, zips
from app.files.apart import bound_this_process
from app.files.datafile.values import whole_numbers
from app.files.sampling import CLASSES, MOST_SECONDS, PICTURES, Asked, Sample, Samples, is_picture, packed
from app.settings import Settings

_TEXTS, _UNLABELLED, _TEXT_CHARACTERS = 3, 10, 300
# Bytes of a picture that is shown, and of all pictures of a page; each class may fill its part of these.
_PICTURE_BYTES = 2 * 2**20
_PAGE_BYTES = 32 * 2**20
# After so long no further sample is read; those that were read are shown.
_ENOUGH_SECONDS = 5.0
# pyarrow unpacks whole pages of Parquet.
_READING_BYTES = 2 * 2**30
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?",
    "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8",
}  # fmt: skip
_BROKEN = (*tensorfile.BROKEN_NPZ, MemoryError, LookupError, struct.error, ArithmeticError)


def main() -> None:
    """Run the other process: read a task from standard input, write samples to standard output."""
    bound_this_process(_READING_BYTES)
    # The caller ends this process; this holds if the caller was ended itself.
    signal.alarm(round(MOST_SECONDS) + 5)
    task = json.load(sys.stdin)
    sys.stdout.buffer.write(packed(read(Path(task["path"]), Asked(**task["asked"]))))


def read(path: Path, asked: Asked) -> Samples:
    """Return samples of a file; what is wrong with it is their fault."""
    try:
        # The operator's limits have been checked by the process that asks.
        settings = Settings.model_construct(**asked.limits)
        return (_tensors if asked.content == "tensors" else _dataset)(path, asked, settings)
    except (InvalidFile, InvalidRequest) as error:
        return Samples([], 0, error.detail)
    except _BROKEN as error:
        return Samples([], 0, f"The file cannot be read ({type(error).__name__}).")


def _dataset(path: Path, asked: Asked, settings: Settings) -> Samples:
    dataset = datafile.open_dataset(path, asked.format, datafile.Limits.of(settings), asked.columns)
    wanted: dict[int, tuple[int | None, int]] = {row: (None, row) for row in range(min(dataset.n_rows, _UNLABELLED))}
    n_classes = 0
    if dataset.labels is not None:
        labels, _ = named_labels(dataset.labels, dataset.class_names, asked.class_names)
        wanted, n_classes = _first_rows(labels, asked.skipped, PICTURES if dataset.content == "images" else _TEXTS)
    shown: list[Sample] = []
    room = _Room(len({label for label, _ in wanted.values()}))
    started = time.monotonic()
    for row, content in _contents(dataset, sorted(wanted)):
        label, place = wanted[row]
        if content is None:
            shown.append(Sample(label, place, fault="cannot be read"))
        elif dataset.content == "images":
            shown.append(_picture(label, place, content, settings.max_image_pixels, room))
        else:
            shown.append(Sample(label, place, text=_beginning(content)))
        if time.monotonic() - started > _ENOUGH_SECONDS:
            break
    return _sorted(shown, len(wanted), n_classes)


def _first_rows(
    labels: npt.NDArray[np.int64], skipped: int, most: int
) -> tuple[dict[int, tuple[int | None, int]], int]:
    """Return by row its label and its place among the class's, for the first rows of some classes; and all classes."""
    present = np.flatnonzero(np.bincount(labels))
    wanted: dict[int, tuple[int | None, int]] = {}
    for label in present[skipped : skipped + CLASSES].tolist():
        for place, row in enumerate(np.flatnonzero(labels == label)[:most].tolist()):
            wanted[row] = (label, place)
    return wanted, len(present)


def _contents(dataset: datafile.Dataset, rows: Sequence[int]) -> Iterator[tuple[int, bytes | None]]:
    """Yield rows with their contents; None for one that cannot be read, after which reading begins again."""
    done = 0
    while done < len(rows):
        try:
            for _, content in dataset.read(rows[done:]):
                done += 1
                yield rows[done - 1], content
            return
        except InvalidFile as error:
            failed = error.members.get("row")
            # A fault of the file, and not of a row, is that of all that follow.
            after = rows.index(failed, done) + 1 if failed in rows[done:] else len(rows)
            for row in rows[done:after]:
                yield row, None
            done = after


class _Room:
    """What is left of a page's bytes, by class, so that one class of large pictures leaves room for the others."""

    def __init__(self, n_classes: int) -> None:
        self._most = max(_PICTURE_BYTES, _PAGE_BYTES // max(n_classes, 1))
        self._taken: dict[int | None, int] = {}

    def take(self, label: int | None, n_bytes: int) -> bool:
        """Return whether a class has room for so many bytes, and take it."""
        taken = self._taken.get(label, 0) + n_bytes
        if taken > self._most:
            return False
        self._taken[label] = taken
        return True


def _picture(label: int | None, place: int, content: bytes, most_pixels: int, room: _Room) -> Sample:
    if len(content) > _PICTURE_BYTES:
        return Sample(label, place, fault=f"has {len(content):,} bytes, too large to show")
    kind = pictures.media_type(content)
    if kind is None:
        return Sample(label, place, fault="is no PNG, JPEG, GIF or WebP, and not shown")
    sides = pictures.size_of(content)
    if sides is None or 0 in sides:
        return Sample(label, place, fault="is broken: it has no size")
    if sides[0] * sides[1] > most_pixels:
        return Sample(label, place, fault=f"has {sides[0]} × {sides[1]} pixels, too large to show")
    if not room.take(label, len(content)):
        return Sample(label, place, fault="is left out, as the pictures of this class are large")
    return Sample(label, place, media_type=kind, picture=content)


def _beginning(content: bytes) -> str:
    # White space is one blank: lines and tabs of a text take no room on a page.
    words = " ".join(content.decode(errors="replace")[: 20 * _TEXT_CHARACTERS].split())
    return words if len(words) <= _TEXT_CHARACTERS else f"{words[:_TEXT_CHARACTERS]}…"


def _sorted(shown: list[Sample], n_wanted: int, n_classes: int) -> Samples:
    shown.sort(key=lambda one: (-1 if one.label is None else one.label, one.place))
    late = n_wanted - len(shown)
    fault = f"{late} further samples were not read within {_ENOUGH_SECONDS:.0f} seconds." if late else ""
    return Samples(shown, n_classes, fault)


def _tensors(path: Path, asked: Asked, settings: Settings) -> Samples:
    is_npz = asked.format == "npz"
    if is_npz:
        file = tensorfile.inspect_npz(path, max_bytes=settings.max_npz_bytes, max_ratio=settings.max_npz_ratio)
    else:
        file = tensorfile.inspect_safetensors(path)
    name = next((name for name in ("inputs", "pixel_values") if name in file.tensors), None)
    if name is None or not is_picture(file.tensors[name].shape[1:]):
        return Samples([], 0)
    tensordata.require_tensor(file, "labels", tensorfile.NUMERIC, shape=(file.tensors[name].shape[0],))
    values = tensorfile.read_npz_values(path, "labels") if is_npz else tensorfile.read_values(path, "labels")
    wanted, n_classes = _first_rows(whole_numbers("labels", values), asked.skipped, PICTURES)
    tensors = (_npz_rows if is_npz else _safetensors_rows)(path, name, sorted(wanted))
    shown = []
    started = time.monotonic()
    for row, values in zip(sorted(wanted), tensors, strict=False):
        label, place = wanted[row]
        content = pictures.as_png(_levels(values))
        shown.append(Sample(label, place, media_type="image/png", picture=content))
        if time.monotonic() - started > _ENOUGH_SECONDS:
            break
    return _sorted(shown, len(wanted), n_classes)


def _levels(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return a sample as (H, W) or (H, W, 3)."""
    wide = values.astype(np.float64)
    if wide.ndim == 2:
        return wide
    return wide[0] if len(wide) == 1 else wide.transpose(1, 2, 0)


def _safetensors_rows(path: Path, name: str, rows: Sequence[int]) -> Iterator[npt.NDArray[Any]]:
    """Yield rows of a tensor; nothing else of it is read."""
    with path.open("rb") as file:
        header = tensorfile.read_header(file, path.stat().st_size)
        info = header.tensors[name]
        dtype, shape = np.dtype(_DTYPES[info.dtype]), info.shape[1:]
        row_bytes = dtype.itemsize * int(np.prod(shape))
        for row in rows:
            file.seek(header.data_start + header.spans[name][0] + row * row_bytes)
            values = np.frombuffer(file.read(row_bytes), dtype).reshape(shape)
            # NumPy has no BF16: its numbers are the upper halves of float32.
            yield (values.astype("<u4") << 16).view("<f4") if info.dtype == "BF16" else values


def _npz_rows(path: Path, name: str, rows: Sequence[int]) -> Iterator[npt.NDArray[Any]]:
    """Yield rows of an array; what lies before them is unpacked and dropped."""
    members: Mapping[str, zips.Member] = {
        member.name: member for member in zips.members(path, tensorfile.MAX_NPZ_MEMBERS)
    }
    with zipfile.ZipFile(path) as archive, archive.open(members[f"{name}.npy"].info) as file:
        read_header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        (_, *shape), by_columns, dtype = read_header(file)
        if by_columns:
            raise InvalidFile("The samples lie in the file by columns, and one cannot be read without all others.")
        start, row_bytes = file.tell(), dtype.itemsize * int(np.prod(shape))
        for row in rows:
            file.seek(start + row * row_bytes)
            yield np.frombuffer(file.read(row_bytes), dtype).reshape(shape)


if __name__ == "__main__":
    main()
