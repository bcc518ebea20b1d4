"""Paths to the numbers of a report, for example `splits.test.accuracy`: checked by the models, read from a report.

The existing paths are derived from the models of app/schemas/reports.py; no list of them is kept. A key of a
dictionary may contain dots; an index of a list may count from the end (`points.-1.w`).
"""

import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from app.schemas import Kind
from app.schemas.kinds import KINDS
from app.schemas.reports import PathsOf

_INDEX = re.compile(r"-?\d{1,6}")
# In listed paths, stands for a key that a model leaves open.
_ANY = "*"


class UnknownPath(ValueError):
    """A report of this kind has no number at this path; the message suggests the nearest path or another kind."""


class Undefined(Exception):
    """A report has no number at this path, or two cannot be compared; the message is a clause with the reason."""


@dataclass(frozen=True)
class _Stuck:
    """The depth up to which a path could be followed, and the names that exist there."""

    depth: int
    names: tuple[str, ...]


# An object on the way to a number, and how many names of the path lead to it.
_Above = tuple[Mapping[str, Any], int]


def require_number(kind: Kind, path: str) -> None:
    """Check that reports of a kind have a number at a path.

    Raises:
        UnknownPath: they have no number there.
    """
    found = _follow(KINDS[kind].report, path.split("."))
    if _is_number(found):
        return
    others = [name for name, other in KINDS.items() if _is_number(_follow(other.report, path.split(".")))]
    if others:
        raise UnknownPath(f"{path!r} is no path of a report of kind {kind}, but of kind {' or '.join(others)}")
    nearest = _nearest(kind, path, found)
    if isinstance(found, _Stuck):
        raise UnknownPath(f"{path!r} is no path of a report of kind {kind}; nearest is {nearest!r}")
    raise UnknownPath(f"{path!r} is {_noun(found)} in a report of kind {kind}, not a number; nearest is {nearest!r}")


@cache
def number_paths(kind: Kind) -> tuple[str, ...]:
    """Return every path to a number; `*` stands for an open key, 0 for an index."""
    return tuple(".".join(parts) for parts in _leaves(KINDS[kind].report))


def number_at(report: Mapping[str, Any], path: str) -> float:
    """Return the number at a path of a report.

    Raises:
        Undefined: it is missing or null; the reason is the report's own if it has one.
    """
    value = _read(report, path.split("."), (), ())
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Undefined("the report has no finite number there")
    return float(value)


def _read(value: Any, parts: Sequence[str], seen: tuple[str, ...], above: tuple[_Above, ...]) -> Any:
    if not parts:
        return value
    match value:
        case dict():
            above = (*above, (value, len(seen)))
            for length in range(1, len(parts) + 1):
                key = ".".join(parts[:length])
                if key in value:
                    return _defined(value[key], parts[length:], (*seen, *parts[:length]), above)
            there = ", ".join(list(value)[:20]) or "nothing"
            raise Undefined(f"the report has no {'.'.join((*seen, parts[0]))}; it has {there} there")
        case list() if _INDEX.fullmatch(parts[0]):
            index = int(parts[0])
            if not -len(value) <= index < len(value):
                raise Undefined(f"the report has {len(value)} {seen[-1] if seen else 'entries'}, none at {index}")
            return _defined(value[index], parts[1:], (*seen, parts[0]), above)
    raise Undefined(f"the report ends at {'.'.join(seen)}")


def _defined(value: Any, parts: Sequence[str], seen: tuple[str, ...], above: tuple[_Above, ...]) -> Any:
    if value is None:
        raise Undefined(f"{'.'.join(seen)} is null in the report{_reason(seen, above)}")
    return _read(value, parts, seen, above)


def _reason(seen: tuple[str, ...], above: Sequence[_Above]) -> str:
    """Return the reason of the nearest object above, for the path from it or, for an entry of a list, for the list."""
    for holder, depth in reversed(above):
        path, reasons = seen[depth:], holder.get("reasons")
        if isinstance(reasons, dict):
            names = (".".join(path[:length]) for length in range(len(path), 0, -1))
            found = next((reasons[name] for name in names if name in reasons), None)
        else:
            found = holder.get("reason") if len(path) == 1 else None
        if isinstance(found, str):
            return f" ({found})"
    return ""


def _follow(annotation: Any, parts: Sequence[str], depth: int = 0) -> Any:
    """Return the type at the end of a path, or the place where it leaves the models."""
    annotation = _bare(annotation)
    if not parts:
        return annotation
    first, rest = parts[0], parts[1:]
    match _shape(annotation):
        case "model":
            fields = _fields(annotation)
            return _follow(fields[first], rest, depth + 1) if first in fields else _Stuck(depth, tuple(fields))
        case "names":
            names, value = _names(annotation)
            return _follow(value, rest, depth + 1) if first in names else _Stuck(depth, names)
        case "paths":
            paths, value = _names(annotation)
            lengths = [length for length in range(1, len(parts) + 1) if ".".join(parts[:length]) in paths]
            tried = [_follow(value, parts[length:], depth + length) for length in lengths] or [_Stuck(depth, ())]
        case "open":
            value = get_args(annotation)[1]
            tried = [_follow(value, parts[length:], depth + length) for length in range(1, len(parts) + 1)]
        case "list":
            value = get_args(annotation)[0]
            return _follow(value, rest, depth + 1) if _INDEX.fullmatch(first) else _Stuck(depth, ("0",))
        case "union":
            tried = [_follow(member, parts, depth) for member in get_args(annotation)]
        case _:
            return _Stuck(depth, ())
    ends = [found for found in tried if not isinstance(found, _Stuck)]
    numbers = [found for found in ends if _is_number(found)]
    return (numbers or ends or [max(tried, key=lambda stuck: stuck.depth)])[0]


def _leaves(annotation: Any) -> Iterator[tuple[str, ...]]:
    annotation = _bare(annotation)
    members: Mapping[str, Any] = {}
    match _shape(annotation):
        case "model":
            members = _fields(annotation)
        case "names" | "paths":
            names, value = _names(annotation)
            members = dict.fromkeys(names, value)
        case "open":
            members = {_ANY: get_args(annotation)[1]}
        case "list":
            members = {"0": get_args(annotation)[0]}
        case "union":
            for member in get_args(annotation):
                yield from _leaves(member)
        case _ if annotation in (int, float):
            yield ()
    for name, member in members.items():
        for below in _leaves(member):
            yield (name, *below)


def _nearest(kind: Kind, path: str, found: Any) -> str:
    """Return the path that was probably meant."""
    parts, known = path.split("."), number_paths(kind)
    if isinstance(found, _Stuck):
        if _is_number(_follow(KINDS[kind].report, parts[: found.depth])):
            return ".".join(parts[: found.depth])
        # Assume that one name of it is mistyped.
        for name in difflib.get_close_matches(parts[found.depth], found.names, n=3):
            corrected = ".".join([*parts[: found.depth], name, *parts[found.depth + 1 :]])
            if _is_number(_follow(KINDS[kind].report, corrected.split("."))):
                return corrected
    last = difflib.get_close_matches(parts[-1], {leaf.rpartition(".")[2] for leaf in known}, n=1)
    alike = [leaf for leaf in known if leaf.rpartition(".")[2] in last] or known
    (nearest,) = difflib.get_close_matches(path, alike, n=1, cutoff=0.0)
    return nearest


def _is_number(found: Any) -> bool:
    """Return whether a type is a number, or may be one."""
    members = get_args(found) if _shape(found) == "union" else (found,)
    return any(_bare(member) in (int, float) for member in members)


def _bare(annotation: Any) -> Any:
    """Return the type without null and without constraints."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, types.UnionType):
            members = tuple(member for member in get_args(annotation) if member is not type(None))
            if len(members) == len(get_args(annotation)):
                return annotation
            annotation = Union[members]  # noqa: UP007 - the members are values here
        else:
            return annotation


def _shape(annotation: Any) -> str:
    origin = get_origin(annotation)
    if isinstance(annotation, type) and origin is None and issubclass(annotation, BaseModel):
        return "model"
    if origin is dict:
        key = get_args(annotation)[0]
        if _marked(key):
            return "paths"
        return "names" if get_origin(_bare(key)) is Literal else "open"
    if origin is list:
        return "list"
    return "union" if origin in (Union, types.UnionType) else "end"


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _names(annotation: Any) -> tuple[tuple[str, ...], Any]:
    """Return the keys that a dictionary may have, and the type of their values."""
    key, value = get_args(annotation)
    for mark in _marked(key):
        return tuple(".".join(parts) for parts in _leaves(mark.model)), value
    return get_args(_bare(key)), value


def _marked(key: Any) -> list[PathsOf]:
    return [mark for mark in getattr(key, "__metadata__", ()) if isinstance(mark, PathsOf)]


def _noun(annotation: Any) -> str:
    plain = {**dict.fromkeys(("model", "names", "paths", "open"), "an object"), "list": "a list"}
    if (shape := _shape(annotation)) in plain:
        return plain[shape]
    return {str: "text", bool: "true or false"}.get(annotation, "something else")
