"""Texts and labels in lines: CSV with a header, or a JSON object in each line. UTF-8."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np

from app.errors import InvalidFile
from app.files.datafile.dataset import (
    MAX_TEXT_CHARACTERS,
    USUAL_COLUMNS,
    Dataset,
    Format,
    Limits,
    choose_columns,
    in_order,
)
from app.files.datafile.values import Labels, split_number

_ROLES = ("text", "label", "split")
# Limit of a line, and of a row, which quotes may spread over many lines.
_MAX_LINE_CHARACTERS = 2**20
_MAX_COLUMNS = 1000
# Read to detect the dialect.
_SAMPLE_CHARACTERS = 2**18

Rows = Callable[[Path], Iterator[dict[str, Any]]]


def open_csv(path: Path, limits: Limits, columns: Mapping[str, str | None]) -> Dataset:
    """Open a CSV file with a header; fields are separated by commas, tabs, semicolons or bars.

    Raises:
        InvalidFile: an invalid row, by its number; a field of more than 131,072 characters.
    """
    return _open(path, "csv", partial(_csv_rows, named=columns), limits, columns)


def begins_as_csv(text: str) -> bool:
    """Return whether a text begins with a CSV header: more than one field, or a usual name of a column of texts."""
    for dialect in DIALECTS:
        with suppress(csv.Error):
            records: Iterator[list[str]] = filter(None, dialect.reader(io.StringIO(text, newline=""), strict=False))
            header = next(records, [])
            # A single column of texts has no delimiter, and is recognised by its name.
            if len(header) > 1 or (header and header[0].strip() in USUAL_COLUMNS["text"]):
                return True
    return False


def open_jsonl(path: Path, limits: Limits, columns: Mapping[str, str | None]) -> Dataset:
    """Open a file of JSON lines, each an object.

    Raises:
        InvalidFile: an invalid row, by its number.
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
        instead = "" if value is None or isinstance(value, str) else f", but {_called(value)}"
        raise InvalidFile(f"Row {row} has no text{instead}.", row=row)
    if len(value) > MAX_TEXT_CHARACTERS:
        raise InvalidFile(
            f"The text of row {row} has {len(value)} characters; at most {MAX_TEXT_CHARACTERS} are allowed.", row=row
        )
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise InvalidFile(f"The text of row {row} holds half of a surrogate pair, which is no text.", row=row) from None


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, with their line ends."""
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


def _csv_rows(path: Path, named: Mapping[str, str | None]) -> Iterator[dict[str, Any]]:
    dialect = _dialect(path, named)
    header: list[str] = []
    row, row_characters = 0, 0

    def bounded() -> Iterator[str]:
        nonlocal row_characters
        for line in _lines(path):
            row_characters += len(line)
            if row_characters > _MAX_LINE_CHARACTERS:
                what = f"Row {row}" if header else "The header"
                raise InvalidFile(f"{what} has more than {_MAX_LINE_CHARACTERS} characters.", row=row)
            yield line

    try:
        reader = dialect.reader(bounded())
        for values in reader:
            row_characters = 0
            if not values:
                continue
            if not header:
                header = [normalize("NFC", name) for name in values]
                _check_header(header)
                continue
            if len(values) != len(header):
                raise InvalidFile(
                    f"Row {row} (line {reader.line_num}) has {len(values)} fields; the header has {len(header)}, "
                    f"with {dialect.delimiter!r} between them. Fields that hold it must stand in double quotes.",
                    row=row,
                    line=reader.line_num,
                )
            yield dict(zip(header, values, strict=True))
            row += 1
    except csv.Error as error:
        raise InvalidFile(f"The CSV is malformed: {error}.") from None


@dataclass(frozen=True)
class Dialect:
    """How a CSV file separates fields; all else follows the defaults of Python's csv module."""

    delimiter: str
    skipinitialspace: bool = False

    def reader(self, lines: Iterable[str], *, strict: bool = True) -> Any:
        """Return the csv module's reader of these lines."""
        return csv.reader(lines, delimiter=self.delimiter, skipinitialspace=self.skipinitialspace, strict=strict)


#: White space after the delimiter is part of a field, unless no column is found that way.
DIALECTS = [Dialect(delimiter, skips) for skips in (False, True) for delimiter in (",", "\t", ";", "|")]


def _dialect(path: Path, named: Mapping[str, str | None]) -> Dialect:
    """Return the first dialect in which the header has the columns, and the following rows as many fields as it.

    A worker receives the names that the API found, and so finds the same dialect.
    """
    sample, n_characters, whole = [], 0, True
    for line in _lines(path):
        n_characters += len(line)
        if n_characters > _SAMPLE_CHARACTERS:
            whole = False
            break
        sample.append(line)
    best, found = (False, False), None
    for dialect in DIALECTS:
        records: list[list[str]] = []
        even = True
        try:
            records.extend(filter(None, dialect.reader(sample)))
        except csv.Error as error:
            # The sample may end within quotes.
            even = not whole and "end of data" in str(error)
        if not records or len(records[0]) < 2:
            continue
        even = even and all(len(values) == len(records[0]) for values in records)
        score = (_has_columns(records[0], named), even)
        if found is None or score > best:
            best, found = score, dialect
    return found or DIALECTS[0]


def _has_columns(header: Sequence[str], named: Mapping[str, str | None]) -> bool:
    try:
        return bool(choose_columns(header, named, _ROLES))
    except InvalidFile:
        return False


def _check_header(header: Sequence[str]) -> None:
    if not 0 < len(header) <= _MAX_COLUMNS or len(set(header)) < len(header):
        raise InvalidFile(f"The CSV's header must have 1 to {_MAX_COLUMNS} names, each once; it has {header[:20]}.")


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    row = 0
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise InvalidFile(
                f"Row {row} (line {number}) is not JSON: {error}. Each line holds one whole object.",
                row=row,
                line=number,
            ) from None
        if not isinstance(values, dict):
            raise InvalidFile(
                f"Row {row} (line {number}) is not an object of JSON but {_called(values)}.", row=row, line=number
            )
        yield values if all(map(str.isascii, values)) else _composed(values, row)
        row += 1


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is none, write null")


def _composed(values: dict[str, Any], row: int) -> dict[str, Any]:
    """Return the same values with their names in Unicode's composed form."""
    composed = {normalize("NFC", name): value for name, value in values.items()}
    if len(composed) < len(values):
        raise InvalidFile(f"Row {row} has one name twice, in two spellings of Unicode.", row=row)
    return composed


def _called(value: Any) -> str:
    """Return the name of a JSON value's type for messages."""
    match value:
        case list():
            return "an array"
        case dict():
            return "an object"
        case None | bool():
            return json.dumps(value)
    return "a string" if isinstance(value, str) else "a number"
