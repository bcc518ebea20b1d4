"""A gate's YAML file: read into what the service takes, with the lines of what it refuses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode


class GateFileError(ValueError):
    """The file is no gate; the text says where and why."""


def read_gate(path: Path) -> dict[str, Any]:
    """The gate in a file, YAML 1.2 or JSON.

    Raises:
        GateFileError: it is not YAML, not a mapping, or holds what JSON has no way to say.
    """
    try:
        gate = _yaml().load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise GateFileError(f"{path} is not text in UTF-8: {error}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise GateFileError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(gate, dict):
        raise GateFileError(f"{path} is not a gate: it has no `name` and no `checks`")
    try:
        return dict(json.loads(json.dumps(gate, allow_nan=False)))
    except ValueError:
        raise GateFileError(
            f"{path} has a number that is not finite; a bound is left out where there is none"
        ) from None
    except (TypeError, RecursionError) as error:
        raise GateFileError(f"{path} has a value that is no text, number, true, false or null: {error}") from None


def line_of(path: Path, place: Sequence[str]) -> int | None:
    """The line of a member such as ["checks", "2", "metric"], or of what holds it where it is missing."""
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


def _member(node: Node | None, name: str) -> Node | None:
    match node:
        case MappingNode():
            return next((value for key, value in node.value if key.value == name), None)
        case SequenceNode() if name.isdecimal() and int(name) < len(node.value):
            found: Node = node.value[int(name)]
            return found
    return None


def _yaml() -> YAML:
    # YAML 1.2, where 1e-3 is a number and no is text; a key that is there twice is refused.
    return YAML(typ="safe", pure=True)
