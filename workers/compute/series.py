"""What the points of a series must share: they are compared, and not mixed, so that their networks may differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.errors import AnalysisError

Known = Mapping[str, Any]


def require_comparable(points: Sequence[Known]) -> None:
    """Raise where the last of some points is of other classes or other inputs than the first.

    Args:
        points: what is known of each, in order, from computing it or from a report that there was.

    Raises:
        AnalysisError: `architectures-differ` for another number of classes; `invalid-probe` for inputs that were
            prepared otherwise.
    """
    first, last = points[0], points[-1]
    ours, theirs = (_classes(point) for point in (first, last))
    if ours != theirs:
        differing = [{"member": "n_classes", "expected": first["n_classes"], "found": last["n_classes"]}]
        raise AnalysisError(
            "architectures-differ",
            f"It has {last['n_classes']} classes where the first checkpoint has {first['n_classes']}: accuracy, MIR "
            "and HDR of the two say nothing beside each other.",
            differing=differing,
        )
    others = [what for what, seen in _inputs(last).items() if seen != _inputs(first)[what]]
    if others:
        raise AnalysisError(
            "invalid-probe",
            f"Its network sees other inputs than the first: the {' and the '.join(others)} of the two differ. Give "
            "the probe one of its own.",
        )


def _classes(point: Known) -> int | None:
    """Of language models the classes are the probe's tokens, whatever else a vocabulary has."""
    probe = point.get("probe") or {}
    return None if probe.get("next_tokens") else point["n_classes"]


def _inputs(point: Known) -> dict[str, Any]:
    probe = point.get("probe") or {}
    tokenizer = probe.get("tokenizer") or {}
    # A length that cut nothing off made no difference, and what fills up is masked.
    length = tokenizer.get("max_length") if tokenizer.get("n_truncated") else None
    return {"preprocessing": probe.get("preprocess"), "tokenizer": (tokenizer.get("sha256"), length)}
