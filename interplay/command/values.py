"""Parse and check the values of options."""

import difflib
import json
import math
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from cyclopts import Token

from interplay.calls.fetching import source_of


class UsageError(Exception):
    """The arguments are well-formed but cannot be used; the text is a sentence for the user.

    Attributes:
        option: the option at fault; None if it is not a single one.
    """

    def __init__(self, text: str, option: str | None = None) -> None:
        self.option = option
        super().__init__(text)


def metadata_of(entries: Sequence[str] | None) -> dict[str, Any] | None:
    """Return KEY=VALUE entries as metadata, where a value that is JSON keeps its type; None without entries."""
    return {key: _parsed(value) for key, value in map(pair, entries or ())} or None


def pair(entry: str, option: str = "--metadata", form: str = "KEY=VALUE") -> tuple[str, str]:
    """Split an entry of the form KEY=VALUE.

    Raises:
        UsageError: it has no key or no separator.
    """
    key, separator, value = entry.partition("=")
    if not key or not separator:
        raise UsageError(f"{entry!r} is not of the form {form}", option)
    return key, value


def values_by_key(entries: Sequence[str] | None) -> dict[str, list[str]]:
    """Return KEY=VALUE entries of a filter: of each key all values, as text."""
    found: dict[str, list[str]] = {}
    for key, text in map(pair, entries or ()):
        found.setdefault(key, []).append(text)
    return found


def columns_of(entries: Sequence[str] | None) -> dict[str, str | None] | None:
    """Return the entries of --column: the column of each role, None where there is none; None without entries."""
    return {
        role: name or None for role, name in (pair(entry, "--column", "ROLE=NAME") for entry in entries or ())
    } or None


def existing_or_source(_type: Any, tokens: Sequence[Token]) -> Path | str:
    """Convert an option's text to a path, as `existing` does; what is an address of a file elsewhere stays a text."""
    return source_of(tokens[0].value) or existing(_type, tokens)


def existing(_type: Any, tokens: Sequence[Token]) -> Path:
    """Convert an option's text to the path of a file or folder; of a mistyped one, say what could be meant."""
    text = tokens[0].value
    path = Path(text)
    if text and path.exists():
        return path
    if source_of(text):
        raise ValueError(
            f"{text!r} is no file here; `interplay push checkpoint` or `push probe` has the service fetch it"
        )
    nearest = _nearest(path) if text else None
    if nearest is None:
        raise ValueError(f"{text!r} does not exist")
    again = [str(nearest) if word == text else word for word in sys.argv[1:]]
    raise ValueError(f"{text!r} does not exist; did you mean: interplay {shlex.join(again)}")


def existing_file(type_: Any, tokens: Sequence[Token]) -> Path:
    """Convert an option's text to the path of a file, as `existing` does."""
    path = existing(type_, tokens)
    if path.is_dir():
        raise ValueError(f"{tokens[0].value!r} is a folder, not a file")
    return path


def _nearest(path: Path) -> Path | None:
    """Return what is called most like a path, in its folder or, if that is missing, in the nearest one above it."""
    while not path.parent.is_dir():
        if path.parent == path:
            return None
        path = path.parent
    try:
        # Of numbered files another number is another file, not a mistyped one.
        names = [entry.name for entry in path.parent.iterdir() if _letters(entry.name) != _letters(path.name)]
    except OSError:
        return None
    found = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
    return path.with_name(found[0]) if found else None


def _letters(name: str) -> str:
    return "".join(char for char in name if not char.isdigit())


def json_object(option: str, text: str | None) -> dict[str, Any] | None:
    """Return the JSON object that an option holds, or that is in the file which it names.

    Raises:
        UsageError: it is not a JSON object.
    """
    value = json_value(option, text)
    if value is not None and not isinstance(value, dict):
        raise UsageError("must be a JSON object", option)
    return value


def json_value(option: str, text: str | None) -> Any:
    """Return the JSON that an option holds, or that is in the file which it names.

    Raises:
        UsageError: it is neither JSON nor a file with JSON.
    """
    if text is None:
        return None
    source = text
    if not text.lstrip().startswith(("{", "[")):
        try:
            source = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UsageError(f"{text!r} is neither JSON nor a readable file: {reason}", option) from None
    try:
        return json.loads(source, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not valid JSON: {error}", option) from None


def stem(path: Path) -> str:
    """Return a file's name without its suffix; for a folder its own name, also for `.`."""
    return path.resolve().name if path.is_dir() else path.stem


def whole(_type: Any, tokens: Sequence[Token]) -> int:
    """Convert an option's text to an integer; cyclopts itself would round 1.5 to 2."""
    text = tokens[0].value
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an integer") from None


def instant(_type: Any, tokens: Sequence[Token]) -> datetime:
    """Convert an option's text to a time."""
    text = tokens[0].value
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a time such as 2026-01-31T12:00") from None


def finite(_type: Any, value: Any) -> None:
    """Check that the numbers of an option are finite: JSON cannot carry NaN and infinity."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{number} is not a finite number")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_not_json)
    except ValueError:
        return text


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
