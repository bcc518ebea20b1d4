"""Metrics of a report: the numbers by which lists of reports are sorted and filtered."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from app.schemas.base import Kind
from app.schemas.kinds import KINDS

# Sections of a report that hold what was measured.
_SECTIONS = ("splits", "summary")


def metrics_of(kind: Kind, report: Mapping[str, Any]) -> dict[str, float]:
    """Return every metric of a report by its path, for example `splits.test.accuracy`.

    Args:
        kind: the report's kind.
        report: its content as JSON.

    Returns:
        The finite numbers of its splits and its summary, except those in lists; of a comparison the differences and
        the agreement of the predictions, as both sides have reports of their own.
    """
    return {
        path: number
        for section in _SECTIONS
        for path, number in _numbers(report.get(section), section)
        if is_metric(kind, path)
    }


def is_metric(kind: Kind, path: str) -> bool:
    """Return whether reports of a kind are sorted by the number at a path."""
    return re.fullmatch(KINDS[kind].metrics, path) is not None


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, member in value.items():
            yield from _numbers(member, f"{path}.{name}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)
