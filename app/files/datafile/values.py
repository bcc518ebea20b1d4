"""Values of labels and splits, in files of every format: whole numbers, booleans, names.

A whole number is the same class however it is stored: 1, 1.0, true, "1" and "1.0" are class 1. Names are compared in
Unicode's composed form (NFC): the same word from a Mac and from Linux is one class.
"""

import re
from typing import Any
from unicodedata import normalize

import numpy as np
import numpy.typing as npt

from app.errors import InvalidFile
from app.schemas.base import MAX_CLASSES

MAX_CLASS_NAME_CHARACTERS = 200

_SPLITS = {
    **dict.fromkeys(("train", "training"), 0),
    **dict.fromkeys(("test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"), 1),
}
_BOOLEANS = {"false": 0, "true": 1}
# A control character would end up in terminals, and half of a surrogate pair is not text.
_STORABLE = re.compile(r"[^\x00-\x1f\ud800-\udfff]+\Z")
_INTEGER = re.compile(r"[+-]?[0-9]+\Z", re.ASCII)
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\Z", re.ASCII)
# Spellings of a missing number or of an overflow.
_NO_NUMBER = re.compile(r"[+-]?(nan|inf|infinity)\Z", re.IGNORECASE | re.ASCII)


def whole_numbers(name: str, values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return integers, booleans and whole floating-point numbers as int64; -0.0 is 0.

    Args:
        name: of the tensor or the column, for messages.
        values: of any numeric type, one dimension.

    Raises:
        InvalidFile: a value is a fraction, NaN, infinite or beyond 64 bits; names the row of the first.
    """
    if values.dtype.kind == "f":
        wide = values.astype(np.float64)
        # Values must be below 2^63, which a float can hold and an int64 cannot.
        wrong = ~((wide == np.floor(wide)) & (np.abs(wide) < 2.0**63))
    elif values.dtype.kind == "u" and values.dtype.itemsize == 8:
        wrong = values >= 2**63
    else:
        return values.astype(np.int64)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise InvalidFile(f"{name!r} is {values[row]} in row {row}; expected whole numbers below 2^63.", row=row)
    return values.astype(np.int64)


class Names:
    """Numbers labels that are names as they come; at the end by sorted order, or by the numbers that they spell."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._first_rows: list[int] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def number_of(self, name: str, row: int) -> int:
        """Return a name's index among the names seen so far; surrounding white space is stripped.

        Raises:
            InvalidFile: it is empty or cannot be stored, or there are too many.
        """
        name = normalize("NFC", name.strip())
        if not name:
            raise InvalidFile(f"Row {row} has no label.", row=row)
        if name not in self._numbers:
            check_class_name(name)
            if len(self._numbers) >= MAX_CLASSES:
                raise InvalidFile(f"The labels are more than {MAX_CLASSES} different names.")
            self._numbers[name] = len(self._numbers)
            self._first_rows.append(row)
        return self._numbers[name]

    def finish(self, places: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], list[str] | None]:
        """Return labels from each row's index: numbers if all names are, else indices of sorted names, and the names.

        Raises:
            InvalidFile: all names are numbers and one is not whole; as names they would have another order.
        """
        names = list(self._numbers)
        if all(name.lower() in _BOOLEANS for name in names):
            return np.array([_BOOLEANS[name.lower()] for name in names], np.int64)[places], None
        kinds = [bool(_NUMBER.match(name)) for name in names]
        if any(kinds) and all(number or _NO_NUMBER.match(name) for number, name in zip(kinds, names, strict=True)):
            spelled = [self._spelled(name, row) for name, row in zip(names, self._first_rows, strict=True)]
            return np.array(spelled, np.int64)[places], None
        order = sorted(names)
        numbers = {name: number for number, name in enumerate(order)}
        return np.array([numbers[name] for name in names], np.int64)[places], order

    def _spelled(self, name: str, row: int) -> int:
        number = int(name) if _INTEGER.match(name) else float(name)
        if not _fits(number):
            raise InvalidFile(
                f"The labels are numbers, and that of row {row} is {name!r}; labels are whole numbers or names.",
                row=row,
            )
        return int(number)


class Labels:
    """Collects the labels of rows, which must be all numbers, all booleans, or all names."""

    def __init__(self) -> None:
        self._values: list[int] = []
        self._names = Names()
        self._kind = ""

    def add(self, value: Any, row: int) -> None:
        """Add one row's label: a whole number, a boolean or a name.

        Raises:
            InvalidFile: it is missing, none of these, or of another kind than those of other rows.
        """
        if value is None:
            raise InvalidFile(f"Row {row} has no label.", row=row)
        kind = "names" if isinstance(value, str) else "booleans" if isinstance(value, bool) else "numbers"
        if kind != "names" and not (isinstance(value, int | float) and _fits(value)):
            raise InvalidFile(
                f"The label of row {row} is {str(value)[:80]!r}; expected a whole number or a name.", row=row
            )
        self._kind = self._kind or kind
        if kind != self._kind:
            raise InvalidFile(
                f"The label of row {row} is {str(value)[:80]!r}; those of other rows are {self._kind}.", row=row
            )
        self._values.append(self._names.number_of(value, row) if isinstance(value, str) else int(value))

    def finish(self) -> tuple[npt.NDArray[np.int64], list[str] | None]:
        """Return the labels, and the class names if the labels were names that are not all numbers."""
        values = np.array(self._values, np.int64)
        return self._names.finish(values) if self._names else (values, None)


def _fits(number: float) -> bool:
    """Return whether a number is whole and fits 64 bits."""
    # Every comparison with NaN is false.
    return -(2**63) <= number < 2**63 and number == int(number)


def check_class_name(name: str) -> None:
    """Raise InvalidFile for a name that cannot be stored or shown."""
    if len(name) > MAX_CLASS_NAME_CHARACTERS or not _STORABLE.match(name):
        raise InvalidFile(
            f"A class is named {name[:80]!r}; names have at most {MAX_CLASS_NAME_CHARACTERS} characters, no control "
            "characters and no halves of surrogate pairs."
        )


def split_number(value: Any, row: int) -> int:
    """Return 0 for train, 1 for test, from a name, a number or a boolean, or from a text that spells one.

    Raises:
        InvalidFile: it is none of these.
    """
    number = None
    if isinstance(value, str):
        word = value.strip().lower()
        number = _SPLITS.get(word, _BOOLEANS.get(word))
        value = float(word) if number is None and _NUMBER.match(word) else value
    if number is None and value in (0, 1):
        number = int(value)
    if number is None:
        raise InvalidFile(
            f"The split of row {row} is {str(value)[:80]!r}; expected one of {', '.join(_SPLITS)}, or 0 (false) for "
            "train and 1 (true) for test.",
            row=row,
        )
    return number


def split_of_folder(name: str) -> int | None:
    """Return 0 or 1 for a folder that is named after a split, else None."""
    return _SPLITS.get(name.lower())
