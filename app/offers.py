"""The networks that workers report they can build: checked when a checkpoint arrives, without loading the libraries.

The list is that of the living workers, or else of the last one that reported. Without any report a description is
accepted as it is, and its analysis may fail.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from app.database import read
from app.errors import InvalidRequest
from app.models import Worker

# Families that have a fixed list of names.
_NAMED = ("timm", "torchvision")
_NEAREST = 3
_LISTED = 20


def require_offered(engine: sa.Engine, architecture: Mapping[str, Any], operations: Sequence[str] = ()) -> None:
    """Raise if a description names a network that no worker's library has, or a graph has operations that none runs.

    Args:
        engine: the engine of the workers' table.
        architecture: a description of any family.
        operations: of a network that is a graph.

    Raises:
        InvalidRequest: the name is unknown; `nearest` lists the nearest known names.
    """
    if operations:
        _require_operations(operations, _names(engine, architecture["family"]))
    family, name = architecture["family"], architecture.get("name")
    if family not in _NAMED or not isinstance(name, str):
        return
    known = _names(engine, family)
    if not known or name in known:
        return
    # For a name with a tag, such as resnet18.a1_in1k, check the part before the tag first.
    plain, _, tag = name.partition(".")
    of_name = [one for one in known if one.startswith(f"{plain}.")] if tag and plain in known else []
    nearest = [plain, *_nearest(name, of_name)] if of_name else _nearest(name, known)
    advice = f"The nearest: {', '.join(nearest)}" if nearest else "None of its names is near"
    what = f"{family} has no network {name!r}" if not of_name else f"{family} knows no weights {tag!r} of {plain!r}"
    raise InvalidRequest(f"architecture.name: {what}. {advice}.", nearest=nearest)


def _require_operations(operations: Sequence[str], known: list[str]) -> None:
    unknown = sorted(set(operations) - set(known)) if known else []
    if unknown:
        more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
        raise InvalidRequest(
            f"The network's graph uses operations that no worker runs: {', '.join(unknown[:_LISTED])}{more}. Rewrite "
            "what needs them, or send features of the network instead (interplay.capture_features).",
            operations=unknown[:_LISTED],
        )


def _nearest(name: str, known: list[str]) -> list[str]:
    by_lower = {one.lower(): one for one in known}
    return [by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, _NEAREST)]


def _names(engine: sa.Engine, family: str) -> list[str]:
    """Return the names of all living workers together; else those of the last worker that reported."""
    told = sa.select(Worker.networks).where(Worker.networks.is_not(None), Worker.untried.is_not(None))
    last = told.order_by(Worker.heartbeat_at.desc()).limit(1)
    with read(engine) as session:
        lists = [found[family] for found in session.scalars(told.where(Worker.ended_at.is_(None))) if family in found]
        if not lists:
            lists = [found[family] for found in session.scalars(last) if family in found]
    return sorted({name for names in lists for name in names})
