"""How a measure is read from a split of a report, and why it is not defined; pages read it too, without Altair."""

from collections.abc import Mapping
from typing import Any

#: Measures at sample level with global centring.
OF_INTERPLAY = ("mir", "hdr", "mutual_information", "entropy_features", "entropy_head", "entropy_joint")
_REASONS = {"zero_entropy": "all directions coincide", "no_directions": "no vector has a direction"}


def read(split: Mapping[str, Any], measure: str) -> tuple[float | None, str]:
    """Return a measure of an evaluated split, and the reason if it is not defined."""
    field, found = "accuracy" if measure == "error" else measure, split
    for name in within(measure):
        found = found[name]
    if found[field] is None:
        return None, reason_of(found, field)
    return (1 - found[field] if measure == "error" else found[field]), ""


def within(measure: str) -> tuple[str, ...]:
    """Return where in a split a measure stands."""
    if measure in OF_INTERPLAY:
        return "interplay", "sample", "global"
    return ("collapse",) if measure.startswith("nc") else ()


def reason_of(found: Mapping[str, Any], field: str) -> str:
    return in_words(found["reasons"].get(field))


def in_words(reason: str | None) -> str:
    return _REASONS.get(reason or "", (reason or "no reason is given").replace("_", " "))
