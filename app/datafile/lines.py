"""Texts and labels in lines: CSV with a header, or an object of JSON in each line. UTF-8."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from app.datafile.dataset import (
    MAX_TEXT_CHARACTERS,
    USUAL_COLUMNS,
    Dataset,
    Format,
    Labels,
    Limits,
    choose_columns,
    in_order,
    split_number,
)
from app.errors import InvalidFile

DELIMITERS = (b",", b"\t", b";")
_ROLES = ("text", "label", "split")
# Of a line, and of a row, which quotes may spread over many lines.
_MAX_LINE_CHARACTERS = 2**20
_MAX_COLUMNS = 1000

Rows = Callable[[Path], Iterator[dict[str, Any]]]


def open_csv(path: Path, limits: Limits, columns: Mapping[str, str | None]) -> Dataset:
    """A CSV file with a header, its delimiter the first of , tab ; that the header has.

    Raises:
        InvalidFile: what does not fit, by its row; a field of more than 131,072 characters.
    """
    return _open(path, "csv", _csv_rows, limits, columns)


def open_jsonl(path: Path, limits: Limits, columns: Mapping[str, str | None]) -> Dataset:
    """Lines of JSON, each an object.

    Raises:
        InvalidFile: what does not fit, by its row.
    """
    return _open(path, "jsonl", _json_rows, limits, columns)


def _open(path: Path, format: Format, rows: Rows, limits: Limits, named: Mapping[str, str | None]) -> Dataset:
    size_bytes = path.stat().st_size
    if size_bytes > limits.text_bytes:
        raise InvalidFile(f"The file has {size_bytes} bytes; texts may have {limits.text_bytes} in one file.")
    chosen: dict[str, str] = {}
    labels, splits, n_rows = Labels(), [], 0
    for row, values in enumerate(rows(path)):
        if not row:
            chosen = choose_columns(list(values), named, _ROLES)
        n_rows += 1
        if n_rows > limits.rows:
            limits.check_rows(n_rows)
        if "label" in chosen:
            labels.add(values.get(chosen["label"]), row)
        if "split" in chosen:
            splits.append(split_number(values.get(chosen["split"]), row))
        elif late := values.keys() & set(USUAL_COLUMNS["split"]):
            raise InvalidFile(f"Row {row} has a {late.pop()!r}; row 0 has none.", row=row)
        _text(values.get(chosen["text"]), row)
    limits.check_rows(n_rows)
    numbers, class_names = labels.finish()
    return Dataset(
        format=format,
        content="texts",
        n_rows=n_rows,
        labels=numbers if "label" in chosen else None,
        split=np.array(splits, np.int64) if "split" in chosen else None,
        class_names=class_names,
        columns={"label": None, **chosen},
        read=partial(_read, path, rows, chosen["text"]),
    )


def _read(path: Path, rows: Rows, column: str, chosen: Sequence[int]) -> Iterator[tuple[str, bytes]]:
    return in_order((("", _text(values.get(column), row)) for row, values in enumerate(rows(path))), chosen)


def _text(value: Any, row: int) -> bytes:
    if not isinstance(value, str) or not value.strip():
        raise InvalidFile(f"Row {row} has no text.", row=row)
    if len(value) > MAX_TEXT_CHARACTERS:
        raise InvalidFile(
            f"The text of row {row} has {len(value)} characters; at most {MAX_TEXT_CHARACTERS} are allowed.", row=row
        )
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise InvalidFile(f"The text of row {row} holds half of a surrogate pair, which is no text.", row=row) from None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, with their ends."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        number = 0
        try:
            while line := file.readline(_MAX_LINE_CHARACTERS + 1):
                number += 1
                if len(line) > _MAX_LINE_CHARACTERS:
                    raise InvalidFile(f"Line {number} has more than {_MAX_LINE_CHARACTERS} characters.", line=number)
                yield line
        except UnicodeDecodeError as error:
            raise InvalidFile(f"The file is not UTF-8 after line {number}: {error.reason}.", line=number + 1) from None


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    lines = _lines(path)
    header_line = next(lines, "")
    delimiter = next((d.decode() for d in DELIMITERS if d.decode() in header_line), ",")
    try:
        header = next(csv.reader([header_line], delimiter=delimiter, strict=True), [])
        _check_header(header)
        row, row_characters = 0, 0

        def bounded() -> Iterator[str]:
            nonlocal row_characters
            for line in lines:
                row_characters += len(line)
                if row_characters > _MAX_LINE_CHARACTERS:
                    raise InvalidFile(f"Row {row} has more than {_MAX_LINE_CHARACTERS} characters.", row=row)
                yield line

        reader = csv.reader(bounded(), delimiter=delimiter, strict=True)
        for values in reader:
            row_characters = 0
            if not values:
                continue
            if len(values) != len(header):
                raise InvalidFile(
                    f"Row {row} (line {reader.line_num + 1}) has {len(values)} fields; the header has {len(header)}.",
                    row=row,
                    line=reader.line_num + 1,
                )
            yield dict(zip(header, values, strict=True))
            row += 1
    except csv.Error as error:
        raise InvalidFile(f"The CSV is malformed: {error}.") from None


def _check_header(header: Sequence[str]) -> None:
    if not 0 < len(header) <= _MAX_COLUMNS or len(set(header)) < len(header):
        raise InvalidFile(f"The CSV's header must have 1 to {_MAX_COLUMNS} names, each once; it has {header[:20]}.")


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    row = 0
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidFile(f"Row {row} (line {number}) is not JSON: {error}.", row=row, line=number) from None
        if not isinstance(values, dict):
            raise InvalidFile(f"Row {row} (line {number}) is not an object of JSON.", row=row, line=number)
        yield values
        row += 1
