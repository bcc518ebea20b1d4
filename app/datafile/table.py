"""Parquet in the layout of Hugging Face: a column of images or texts, one of labels, perhaps one of splits.

Nothing of a schema is unpickled: pyarrow loads no Python types from a file.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from app.datafile.dataset import (
    MAX_CLASSES,
    MAX_IMAGE_BYTES,
    MAX_TEXT_CHARACTERS,
    Content,
    Dataset,
    Limits,
    check_class_name,
    choose_columns,
    finish_labels,
    split_number,
)
from app.errors import InvalidFile

_ROLES = ("image", "text", "label", "split")
_MAX_FOOTER_BYTES = 16 * 2**20
# Rows that are unpacked in one go: as many as stay below this even where each is as large as its whole row group.
_BATCH_BYTES = 256 * 2**20
_MAX_BATCH_ROWS = 64
_BROKEN_PARQUET = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError)

# A page may announce up to 2 GiB; not many at once.
_unpacking = threading.BoundedSemaphore(2)


def open_parquet(path: Path, limits: Limits, columns: Mapping[str, str | None]) -> Dataset:
    """Labels and splits of a Parquet file; images and texts are not read.

    Labels are integers, with the names of a ClassLabel in the schema's `huggingface` metadata where it has them, or
    names, whose classes are sorted.

    Raises:
        InvalidFile: no such column (`columns` lists what there is) or one of another type; a label or split that is
            missing; more rows, bytes or a larger ratio than the limits.
    """
    with _unpacking:
        try:
            return _open(path, limits, columns)
        except InvalidFile:
            raise
        except _BROKEN_PARQUET as error:
            raise _broken(error) from None


def _open(path: Path, limits: Limits, named: Mapping[str, str | None]) -> Dataset:
    _bound_footer(path)
    with _file(path) as file:
        n_rows = file.metadata.num_rows
        limits.check_rows(n_rows)
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        limits.check_unpacked("Parquet file", sum(group.total_byte_size for group in groups), path.stat().st_size)
        schema = file.schema_arrow
        chosen = choose_columns(schema.names, named, _ROLES)
        content = _content_of(schema, chosen)
        if content == "texts":
            _check_text_bytes(file, chosen["text"], limits)
        split = None if "split" not in chosen else _splits(file, chosen["split"])
        labels, class_names = _labels(path, schema, chosen["label"]) if "label" in chosen else (None, None)
    return Dataset(
        format="parquet",
        content=content,
        n_rows=n_rows,
        labels=labels,
        split=split,
        class_names=class_names,
        columns={"label": None, **chosen},
        read=partial(_read, path, chosen["image" if content == "images" else "text"], content),
    )


def _file(path: Path, dictionary: Sequence[str] = ()) -> pq.ParquetFile:
    # Buffered, so that a row group is read as it is unpacked and not as a whole.
    return pq.ParquetFile(path, read_dictionary=list(dictionary), buffer_size=2**20, pre_buffer=False)


def _bound_footer(path: Path) -> None:
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size_bytes - 8))
        end = file.read(8)
    footer_bytes = int.from_bytes(end[:4], "little")
    if size_bytes < 12 or end[4:] != b"PAR1" or footer_bytes > size_bytes:
        raise InvalidFile("The file is not complete Parquet: its footer is missing.")
    if footer_bytes > _MAX_FOOTER_BYTES:
        raise InvalidFile(f"The Parquet footer has {footer_bytes} bytes; at most {_MAX_FOOTER_BYTES} are allowed.")


def _content_of(schema: pa.Schema, chosen: Mapping[str, str]) -> Content:
    """What the column holds.

    Raises:
        InvalidFile: it is of another type than images' or texts'.
    """
    role = "image" if "image" in chosen else "text"
    type_ = schema.field(chosen[role]).type
    if role == "image":
        fits = _is_binary(type_) or (
            pa.types.is_struct(type_) and any(f.name == "bytes" and _is_binary(f.type) for f in type_)
        )
        wanted = "bytes, or a struct with bytes and path"
    else:
        fits, wanted = _is_string(type_), "strings"
    if not fits:
        raise InvalidFile(f"The column {chosen[role]!r} has the type {type_}; {role}s are {wanted}.")
    return "images" if role == "image" else "texts"


def _is_binary(type_: pa.DataType) -> bool:
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def _is_string(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        return _is_string(type_.value_type)
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


def _check_text_bytes(file: pq.ParquetFile, column: str, limits: Limits) -> None:
    n_bytes = sum(_chunk_bytes(file, group, column) for group in range(file.num_row_groups))
    if n_bytes > limits.text_bytes:
        raise InvalidFile(f"The column {column!r} has {n_bytes} bytes; texts may have {limits.text_bytes} in one file.")


def _chunk_bytes(file: pq.ParquetFile, group: int, column: str) -> int:
    """Bytes that a row group announces for a column and what is nested in it."""
    metadata = file.metadata.row_group(group)
    chunks = (metadata.column(number) for number in range(metadata.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)


def _labels(path: Path, schema: pa.Schema, column: str) -> tuple[npt.NDArray[np.int64], list[str] | None]:
    type_ = schema.field(column).type
    if pa.types.is_integer(type_):
        with _file(path) as file:
            values = np.concatenate([_integers(batch.column(0), column, row) for row, batch in _batches(file, column)])
        names = _class_label(schema, column)
        if names is not None and (values.min() < 0 or values.max() >= len(names)):
            row = int(np.flatnonzero((values < 0) | (values >= len(names)))[0])
            raise InvalidFile(
                f"The label of row {row} is {values[row]}; the schema names {len(names)} classes. -1 is how Hugging "
                "Face marks a label that is missing.",
                row=row,
            )
        return values, names
    if not _is_string(type_):
        raise InvalidFile(f"The column {column!r} has the type {type_}; labels are integers or names.")
    places, numbers = [], dict[str, int]()
    # Names come as places in a dictionary: each is looked at once, however often it occurs.
    with _file(path, [column]) as file:
        for row, batch in _batches(file, column):
            encoded = batch.column(0).dictionary_encode()
            _require_all(encoded, column, row)
            local = encoded.indices.to_numpy(zero_copy_only=False)
            names = encoded.dictionary.to_pylist()
            global_places = np.zeros(len(names), np.int64)
            # A dictionary may list names that no row has.
            for place, first in zip(*np.unique(local, return_index=True), strict=True):
                if not names[place]:
                    raise InvalidFile(f"Row {row + int(first)} has no label.", row=row + int(first))
                check_class_name(names[place])
                global_places[place] = numbers.setdefault(names[place], len(numbers))
            if len(numbers) > MAX_CLASSES:
                raise InvalidFile(f"The labels are more than {MAX_CLASSES} different names.")
            places.append(global_places[local])
    return finish_labels(np.concatenate(places), list(numbers))


def _class_label(schema: pa.Schema, column: str) -> list[str] | None:
    """The names that Hugging Face's `datasets` writes beside a schema.

    Raises:
        InvalidFile: names that are no texts, or twice the same.
    """
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = features[column]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    if not 0 < len(names) <= MAX_CLASSES or len(set(names)) < len(names):
        raise InvalidFile(f"The schema names {len(names)} classes; they must be 1 to {MAX_CLASSES}, each once.")
    for name in names:
        check_class_name(name)
    return names


def _splits(file: pq.ParquetFile, column: str) -> npt.NDArray[np.int64]:
    parts = []
    for row, batch in _batches(file, column):
        encoded = batch.column(0).dictionary_encode()
        _require_all(encoded, column, row)
        places = encoded.indices.to_numpy(zero_copy_only=False)
        values = encoded.dictionary.to_pylist()
        numbers = np.zeros(len(values), np.int64)
        # Those that occur alone, each with the first row that it occurs in.
        for place, first in zip(*np.unique(places, return_index=True), strict=True):
            numbers[place] = split_number(values[place], row + int(first))
        parts.append(numbers[places])
    return np.concatenate(parts)


def _batches(file: pq.ParquetFile, column: str) -> Iterator[tuple[int, pa.RecordBatch]]:
    row = 0
    for batch in file.iter_batches(batch_size=2**16, columns=[column], use_threads=False):
        yield row, batch
        row += len(batch)


def _integers(values: pa.Array, column: str, first_row: int) -> npt.NDArray[np.int64]:
    _require_all(values, column, first_row)
    integers: npt.NDArray[np.int64] = values.cast(pa.int64()).to_numpy()
    return integers


def _require_all(values: pa.Array, column: str, first_row: int) -> None:
    if values.null_count:
        row = first_row + int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise InvalidFile(f"Row {row} has no value in the column {column!r}.", row=row)


def _read(path: Path, column: str, content: Content, rows: Sequence[int]) -> Iterator[tuple[str, bytes]]:
    wanted = np.asarray(rows, np.int64)
    try:
        with _file(path) as file:
            start = 0
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
    done = 0
    for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=[column], use_threads=False):
        values = batch.column(0)
        for row in local[(local >= done) & (local < done + len(batch))].tolist():
            yield _content(values[row - done].as_py(), content, start + row)
        done += len(batch)
        if done > local[-1]:
            return


def _content(value: Any, content: Content, row: int) -> tuple[str, bytes]:
    name = ""
    if content == "texts":
        if not isinstance(value, str) or not value.strip():
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
    if not value:
        raise InvalidFile(f"Row {row} has no image.", row=row)
    if len(value) > MAX_IMAGE_BYTES:
        raise InvalidFile(
            f"The image of row {row} has {len(value)} bytes; an image may have {MAX_IMAGE_BYTES}.", row=row
        )
    return name, value


def _broken(error: BaseException) -> InvalidFile:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return InvalidFile(f"The file is not valid Parquet: {reason}.")
