"""Check that the points of a series are comparable. They are compared, not mixed, so their networks may differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.errors import AnalysisError

Known = Mapping[str, Any]


def require_comparable(points: Sequence[Known]) -> None:
    """Check that the last point has the same classes and inputs as the first.

    Args:
        points: the known facts of each, in order, from computing it or from an existing report.

    Raises:
        AnalysisError: `architectures-differ` for another number of classes; `invalid-probe` for inputs that were
            prepared differently.
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
    """Return the number of classes; None for language models, whose classes are the probe's tokens."""
    probe = point.get("probe") or {}
    return None if probe.get("next_tokens") else point["n_classes"]


def _inputs(point: Known) -> dict[str, Any]:
    probe = point.get("probe") or {}
    tokenizer = probe.get("tokenizer") or {}
    # A maximum length that truncated nothing makes no difference, and padding is masked.
    length = tokenizer.get("max_length") if tokenizer.get("n_truncated") else None
    return {"preprocessing": probe.get("preprocess"), "tokenizer": (tokenizer.get("sha256"), length)}
