"""Parquet in the layout of Hugging Face: a column of images or texts, one of labels, perhaps one of splits.

Nothing of a schema is unpickled: pyarrow loads no Python types from a file. But some files crash the process that
pyarrow runs in. A caller that must survive opens them in another process.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from unicodedata import normalize

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from app.errors import InvalidFile
from app.files import zips
from app.files.datafile import arrow
from app.files.datafile.dataset import MAX_IMAGE_BYTES, MAX_TEXT_CHARACTERS, Content, Dataset, Limits, choose_columns
from app.files.datafile.folders import SUFFIXES as IMAGE_SUFFIXES
from app.files.datafile.folders import is_litter
from app.files.datafile.values import Names, check_class_name, split_number, split_of_folder, whole_numbers
from app.schemas.base import MAX_CLASSES

_ROLES = ("image", "text", "label", "split")
_MAX_FOOTER_BYTES = 16 * 2**20
# Rows are unpacked in batches that stay below this even if each row is as large as its whole row group.
_BATCH_BYTES = 256 * 2**20
_MAX_BATCH_ROWS = 64
_BROKEN_PARQUET = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class Source:
    """One Parquet file, which may lie within another file.

    Attributes:
        path: the file that contains it.
        start: offset of its first byte there.
        size_bytes: its own size.
        name: its name in messages; empty if it is the only one.
        split: 0 train, 1 test, from its name; None if the name gives no split.
    """

    path: Path
    start: int
    size_bytes: int
    name: str = ""
    split: int | None = None

    def open(self, dictionary: Sequence[str] = ()) -> pq.ParquetFile:
        """Open the file memory-mapped, so that only the parts that are unpacked are read."""
        with pa.memory_map(str(self.path)) as whole:
            whole.seek(self.start)
            content = pa.BufferReader(whole.read_buffer(self.size_bytes))
        return pq.ParquetFile(content, read_dictionary=list(dictionary), pre_buffer=False)


def _own(schema: pa.Schema, column: str) -> str:
    """Return a file's own spelling of a column whose name is given in Unicode's composed form."""
    names: list[str] = schema.names
    return next(name for name in names if normalize("NFC", name) == column)


def open_parquet(path: Path, limits: Limits, columns: Mapping[str, str | None]) -> Dataset:
    """Read labels and splits of a Parquet file, or of several of one schema in a zip; images and texts are not read.

    Labels are whole numbers, booleans or names. Whole numbers take the names of a ClassLabel in the schema's
    `huggingface` metadata, if it has them; names are sorted into classes. Without a column of splits, the names of
    several files may give them (train-00000-of-00002.parquet, train/0.parquet).

    Raises:
        InvalidFile: a missing column (`columns` lists the existing ones) or one of another type; a missing label or
            split; files that differ; more rows, more bytes or a larger ratio than the limits.
    """
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    sources = _shards(path, limits) if is_zip else [Source(path, 0, path.stat().st_size)]
    try:
        return _open(path, sources, limits, columns)
    except InvalidFile:
        raise
    except _BROKEN_PARQUET as error:
        raise _broken(error) from None


def _open(path: Path, sources: Sequence[Source], limits: Limits, named: Mapping[str, str | None]) -> Dataset:
    _bound_footers(sources)
    files = [source.open() for source in sources]
    groups = [file.metadata.row_group(number) for file in files for number in range(file.num_row_groups)]
    # Count the groups' rows: nothing is read by the footer's own number of rows.
    n_rows = sum(group.num_rows for group in groups)
    limits.check_rows(n_rows)
    limits.check_unpacked("Parquet file", sum(group.total_byte_size for group in groups), path.stat().st_size)
    schema = files[0].schema_arrow
    chosen = choose_columns(schema.names, named, _ROLES)
    for source, file in zip(sources[1:], files[1:], strict=True):
        _require_same(schema, file.schema_arrow, chosen, sources[0], source)
    content = _content_of(schema, chosen)
    for role, column in chosen.items():
        if role != "image" and arrow.holds(_type(schema, column)) in ("text", "bytes"):
            _check_text_bytes(files, column, limits)
    if "split" in chosen:
        split = _coded(sources, chosen["split"], "split", split_number)
    elif sources[0].split is not None:
        by_file = [sum(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)) for file in files]
        split = np.repeat(np.array([source.split for source in sources], np.int64), by_file)
    else:
        split = None
    labels, class_names = _labels(sources, schema, chosen["label"]) if "label" in chosen else (None, None)
    return Dataset(
        format="parquet",
        content=content,
        n_rows=n_rows,
        labels=labels,
        split=split,
        class_names=class_names,
        columns={"label": None, **chosen},
        read=partial(_read, sources, chosen["image" if content == "images" else "text"], content),
    )


def is_shard(name: str) -> bool:
    """Return whether a file of a zip is a Parquet file."""
    return name.endswith(".parquet") and not is_litter(name)


def _shards(path: Path, limits: Limits) -> list[Source]:
    """Return the Parquet files of a zip, sorted by name, in the layout of Hugging Face.

    Raises:
        InvalidFile: a file that the zip compresses, images beside them, some named after splits and some not, or
            several folders that are not splits, which may hold other datasets.
    """
    members = zips.members(path, limits.members)
    images = [m.name for m in members if m.name.lower().endswith(IMAGE_SUFFIXES) and not is_litter(m.name)]
    if images:
        raise InvalidFile(f"The zip holds Parquet files and images beside them, such as {images[0][:200]!r}.")
    tables = sorted((member for member in members if is_shard(member.name)), key=lambda member: member.name)
    splits, places = [], set()
    for member in tables:
        name = PurePosixPath(member.name)
        folder, of_folder = name.parent, split_of_folder(name.parent.name)
        of_name = split_of_folder(re.split(r"[-_.0-9]", name.name, maxsplit=1)[0])
        splits.append(of_folder if of_name is None else of_name)
        places.add(folder if of_folder is None else folder.parent)
    listed = ", ".join(repr(member.name[:200]) for member in tables[:10])
    if len(places) > 1:
        raise InvalidFile(f"The zip's Parquet files lie in {len(places)} folders that are no splits: {listed}.")
    if None in splits and any(split is not None for split in splits):
        raise InvalidFile(f"Some of the zip's Parquet files are named after splits and some are not: {listed}.")
    return [
        Source(path, *zips.stored_span(path, member), name=member.name, split=split)
        for member, split in zip(tables, splits, strict=True)
    ]


def _require_same(
    schema: pa.Schema, other: pa.Schema, chosen: Mapping[str, str], first: Source, second: Source
) -> None:
    for role, column in chosen.items():
        there = [normalize("NFC", name) for name in other.names].count(column) == 1
        found = _type(other, column) if there else "no such column"
        if not there or _form(found, role) != _form(_type(schema, column), role):
            raise InvalidFile(
                f"The column {column!r} is {_type(schema, column)} in {first.name!r}, {found} in {second.name!r}."
            )
        if role == "label" and _class_label(schema, column) != _class_label(other, column):
            raise InvalidFile(f"{first.name!r} and {second.name!r} name other classes in their schemas.")


def _bound_footers(sources: Sequence[Source]) -> None:
    """Check the sizes of the files' footers before they are read whole into memory."""
    in_all = 0
    for source in sources:
        with source.path.open("rb") as file:
            file.seek(source.start + max(0, source.size_bytes - 8))
            end = file.read(8)
        footer_bytes = int.from_bytes(end[:4], "little")
        if source.size_bytes < 12 or end[4:] != b"PAR1" or footer_bytes > source.size_bytes:
            name = source.name[:200] or "The file"
            raise InvalidFile(f"{name} is not complete Parquet: its footer is missing.")
        in_all += footer_bytes
        if in_all > _MAX_FOOTER_BYTES:
            raise InvalidFile(
                f"Parquet's footers have {in_all} bytes or more; at most {_MAX_FOOTER_BYTES} are allowed."
            )


def _content_of(schema: pa.Schema, chosen: Mapping[str, str]) -> Content:
    """Return the content of the column: images or texts.

    Raises:
        InvalidFile: its type does not fit its role.
    """
    role = "image" if "image" in chosen else "text"
    type_ = _type(schema, chosen[role])
    if role == "image":
        fits = "bytes" in (arrow.holds(type_), arrow.member(type_, "bytes"))
        wanted = "bytes, or a struct with bytes and path"
    else:
        fits, wanted = arrow.holds(type_) in ("text", "bytes"), "strings"
    if not fits:
        raise InvalidFile(f"The column {chosen[role]!r} has the type {type_}; {role}s are {wanted}.")
    return "images" if role == "image" else "texts"


def _type(schema: pa.Schema, column: str) -> pa.DataType:
    return schema.field(_own(schema, column)).type


def _form(type_: pa.DataType, role: str) -> tuple[arrow.Holds, arrow.Holds]:
    """Return the part of a type that all files must share: one may store strings and another a dictionary of them."""
    held = arrow.holds(type_)
    return "text" if held == "bytes" and role != "image" else held, arrow.member(type_, "bytes")


def _check_text_bytes(files: Sequence[pq.ParquetFile], column: str, limits: Limits) -> None:
    n_bytes = sum(_chunk_bytes(file, group, column) for file in files for group in range(file.num_row_groups))
    if n_bytes > limits.text_bytes:
        raise InvalidFile(f"The column {column!r} has {n_bytes} bytes; texts may have {limits.text_bytes} in one file.")


def _chunk_bytes(file: pq.ParquetFile, group: int, column: str) -> int:
    """Return the bytes that a row group announces for a column and the columns nested in it."""
    column = _own(file.schema_arrow, column)
    metadata = file.metadata.row_group(group)
    chunks = (metadata.column(number) for number in range(metadata.num_columns))
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        # A column's name may contain dots.
        if chunk.path_in_schema == column or chunk.path_in_schema.startswith(f"{column}.")
    )


def _labels(
    sources: Sequence[Source], schema: pa.Schema, column: str
) -> tuple[npt.NDArray[np.int64], list[str] | None]:
    type_ = _type(schema, column)
    if arrow.holds(type_) in ("numbers", "booleans"):
        values = whole_numbers(column, np.concatenate([arrow.numeric(batch) for _, batch in _batches(sources, column)]))
        names = _class_label(schema, column)
        if names is not None and (values.min() < 0 or values.max() >= len(names)):
            row = int(np.flatnonzero((values < 0) | (values >= len(names)))[0])
            raise InvalidFile(
                f"The label of row {row} is {values[row]}; the schema names {len(names)} classes. -1 is how Hugging "
                "Face marks a label that is missing.",
                row=row,
            )
        return values, names
    found = Names()
    return found.finish(_coded(sources, column, "label", found.number_of))


def _class_label(schema: pa.Schema, column: str) -> list[str] | None:
    """Return the class names that Hugging Face's `datasets` writes beside a schema; None without them.

    Raises:
        InvalidFile: no names or too many, duplicates, or one that cannot be stored.
    """
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = features[_own(schema, column)]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    names = [normalize("NFC", name) for name in names]
    if not 0 < len(names) <= MAX_CLASSES or len(set(names)) < len(names):
        raise InvalidFile(f"The schema names {len(names)} classes; they must be 1 to {MAX_CLASSES}, each once.")
    for name in names:
        check_class_name(name)
    return names


def _coded(
    sources: Sequence[Source], column: str, role: str, number_of: Callable[[Any, int], int]
) -> npt.NDArray[np.int64]:
    """Return a column as numbers: `number_of` maps a value and the row of its first occurrence to a number.

    Values come as indices into a dictionary: each is unpacked and mapped once, however often it occurs.

    Raises:
        InvalidFile: a column of another type; as `_batches`; bytes that are not UTF-8.
    """
    parts = []
    for row, batch in _batches(sources, column, dictionary=True):
        if arrow.holds(batch.type) in ("struct", "other"):
            raise InvalidFile(
                f"The column {column!r} has the type {batch.type}; a {role} is a whole number, a boolean or a name."
            )
        places, values = arrow.distinct(batch)
        numbers = np.zeros(len(values), np.int64)
        # A dictionary may list values that no row uses.
        for place, first in zip(*np.unique(places, return_index=True), strict=True):
            value, at = values[place], row + int(first)
            if value is None:
                raise _no_value(at, column)
            try:
                value = value.decode() if isinstance(value, bytes) else value
            except UnicodeDecodeError:
                raise InvalidFile(f"The {role} of row {at} is bytes that are not UTF-8.", row=at) from None
            numbers[place] = number_of(value, at)
        parts.append(numbers[places])
    return np.concatenate(parts)


def _batches(sources: Sequence[Source], column: str, dictionary: bool = False) -> Iterator[tuple[int, pa.Array]]:
    """Yield a column in batches, each with its first row's number; as a dictionary if asked and possible.

    Raises:
        InvalidFile: a row has no value.
        pyarrow.ArrowInvalid: as `arrow.checked`.
    """
    row = 0
    for source in sources:
        file = source.open()
        own = _own(file.schema_arrow, column)
        if dictionary and arrow.can_be_dictionary(_type(file.schema_arrow, column)):
            file = source.open([own])
        for batch in file.iter_batches(batch_size=2**16, columns=[own], use_threads=False):
            values = arrow.checked(batch.column(own))
            missing = values.is_null()
            if missing.true_count:
                raise _no_value(row + int(np.flatnonzero(missing.to_numpy(zero_copy_only=False))[0]), column)
            yield row, values
            row += len(values)


def _no_value(row: int, column: str) -> InvalidFile:
    return InvalidFile(f"Row {row} has no value in the column {column!r}.", row=row)


def _read(sources: Sequence[Source], column: str, content: Content, rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
    wanted = np.asarray(rows, np.int64)
    start = 0
    try:
        for source in sources:
            file = source.open()
            for group in range(file.num_row_groups):
                n_rows = file.metadata.row_group(group).num_rows
                local = wanted[(wanted >= start) & (wanted < start + n_rows)] - start
                if len(local):
                    yield from _read_group(file, group, start, column, content, local)
                start += n_rows
    except InvalidFile:
        raise
    except _BROKEN_PARQUET as error:
        raise _broken(error) from None


def _read_group(
    file: pq.ParquetFile, group: int, start: int, column: str, content: Content, local: npt.NDArray[np.int64]
) -> Iterator[tuple[str, bytes]]:
    size = min(max(_BATCH_BYTES // max(_chunk_bytes(file, group, column), 1), 1), _MAX_BATCH_ROWS)
    own = _own(file.schema_arrow, column)
    done = 0
    for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=[own], use_threads=False):
        values = arrow.checked(batch.column(own))
        for row in local[slice(*np.searchsorted(local, (done, done + len(batch))))].tolist():
            yield _content(values[row - done].as_py(), content, start + row)
        done += len(batch)
        if done > local[-1]:
            return


def _content(value: Any, content: Content, row: int) -> tuple[str, bytes]:
    name = ""
    if content == "texts":
        try:
            value = arrow.as_text(value)
        except UnicodeDecodeError:
            raise InvalidFile(f"The text of row {row} is bytes that are not UTF-8.", row=row) from None
        if not value or not value.strip():
            raise InvalidFile(f"Row {row} has no text.", row=row)
        if len(value) > MAX_TEXT_CHARACTERS:
            raise InvalidFile(
                f"The text of row {row} has {len(value)} characters; at most {MAX_TEXT_CHARACTERS} are allowed.",
                row=row,
            )
        return name, value.encode()
    if isinstance(value, dict):
        path, value = value.get("path"), value["bytes"]
        name = path[:200] if isinstance(path, str) and path.isprintable() else ""
        if value is None and name:
            raise InvalidFile(
                f"Row {row} has the path {name!r} and no bytes of an image; save the dataset with the images in it.",
                row=row,
            )
    found = arrow.as_bytes(value)
    if not found:
        raise InvalidFile(f"Row {row} has no image.", row=row)
    if len(found) > MAX_IMAGE_BYTES:
        raise InvalidFile(
            f"The image of row {row} has {len(found)} bytes; an image may have {MAX_IMAGE_BYTES}.", row=row
        )
    return name, found


def _broken(error: BaseException) -> InvalidFile:
    if isinstance(error, MemoryError):
        return InvalidFile("The Parquet file takes more memory to read than there is; write it in smaller row groups.")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return InvalidFile(f"The file is not valid Parquet: {reason}.")
