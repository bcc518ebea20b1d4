"""Read a gate's YAML file into the service's form, and find the lines of members that the service refuses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

# The largest gate, 10,000 checks, is below these limits; an alias counts each time it is expanded.
_MAX_FILE_BYTES = 16 * 2**20
_MAX_VALUES = 500_000
_MAX_CHARACTERS = 32 * 2**20


class GateFileError(ValueError):
    """The file is not a gate; the text says where and why."""


def read_gate(path: Path) -> dict[str, Any]:
    """Return the gate in a file, YAML 1.2 or JSON.

    Aliases and merged mappings are expanded, up to the largest size of a gate.

    Raises:
        GateFileError: it is not YAML, not a mapping, holds a value that JSON cannot express, or aliases without end.
    """
    size_bytes = path.stat().st_size
    if size_bytes > _MAX_FILE_BYTES:
        raise GateFileError(f"{path} has {size_bytes} bytes; the limit is {_MAX_FILE_BYTES}")
    try:
        yaml = _yaml()
        node = yaml.compose(path.read_text(encoding="utf-8"))
        _require_bounded(node, path)
        gate = None if node is None else yaml.constructor.construct_document(node)
    except GateFileError:
        raise
    except UnicodeDecodeError as error:
        raise GateFileError(f"{path} is not text in UTF-8: {error}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise GateFileError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(gate, dict):
        raise GateFileError(f"{path} is not a gate: it has no `name` and no `checks`")
    try:
        return dict(json.loads(json.dumps(gate, allow_nan=False)))
    except ValueError:
        raise GateFileError(f"{path} has a number that is not finite; omit a bound that does not apply") from None
    except (TypeError, RecursionError) as error:
        raise GateFileError(f"{path} has a value that is not text, a number, true, false or null: {error}") from None


def line_of(path: Path, place: Sequence[str]) -> int | None:
    """Return the line of a member such as ["checks", "2", "metric"]; of its parent if it is missing."""
    try:
        node: Node | None = _yaml().compose(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError):
        return None
    line: int | None = None if node is None else node.start_mark.line + 1
    for name in place:
        node = _member(node, name)
        if node is None:
            break
        line = node.start_mark.line + 1
    return line


def _require_bounded(node: Node | None, path: Path) -> None:
    """Raise GateFileError if aliases, which take a few bytes each, expand to more than a gate can hold."""
    values, characters = _expanded(node, {}, path)
    if values > _MAX_VALUES or characters > _MAX_CHARACTERS:
        # The counts themselves may be too long to print.
        values, characters = min(values, 10**15), min(characters, 10**15)
        raise GateFileError(
            f"{path} has aliases that expand to {values:.3g} values or more and {characters:.3g} characters; the "
            f"limits are {_MAX_VALUES} and {_MAX_CHARACTERS}"
        )


def _expanded(node: Node | None, known: dict[int, tuple[int, int] | None], path: Path) -> tuple[int, int]:
    """Return the number of values and characters of a node with its aliases expanded.

    Args:
        node: as the composer gives it, where an alias is the same object as the node that it names.
        known: results by a node's identity, so that each node is counted once; None for nodes still being counted.
        path: for messages.

    Raises:
        GateFileError: a node contains itself.
    """
    if node is None:
        return 0, 0
    if id(node) in known:
        counted = known[id(node)]
        if counted is None:
            raise GateFileError(f"{path}, line {node.start_mark.line + 1}: the value of this anchor contains itself")
        return counted
    known[id(node)] = None
    parts: list[Node] = []
    match node:
        case MappingNode():
            parts = [part for pair in node.value for part in pair]
        case SequenceNode():
            parts = node.value
    sizes = [_expanded(part, known, path) for part in parts]
    own = 0 if parts else len(node.value)
    known[id(node)] = total = 1 + sum(size for size, _ in sizes), own + sum(length for _, length in sizes)
    return total


def _member(node: Node | None, name: str) -> Node | None:
    match node:
        case MappingNode():
            return next((value for key, value in node.value if key.value == name), None)
        case SequenceNode() if name.isdecimal() and int(name) < len(node.value):
            found: Node = node.value[int(name)]
            return found
    return None


def _yaml() -> YAML:
    # YAML 1.2, where 1e-3 is a number and `no` is text; a duplicate key is refused.
    return YAML(typ="safe", pure=True)
