"""Check that labels are the numbers of classes."""

from typing import Any

from jaxtyping import Integer
from torch import Tensor

from ..errors import AnalysisError, Kind


def check_labels(labels: Integer[Tensor, " n"], n_classes: int, kind: Kind) -> None:
    """Check that there are labels, and that all lie in 0 to n_classes - 1.

    Args:
        labels: one a sample.
        n_classes: number of classes, such as the rows of a head.
        kind: kind of the error; the caller knows whether an argument, a probe or a feature set is at fault.

    Raises:
        AnalysisError: of this kind; `argument` names the labels of an `invalid-argument`, else `n_classes`,
            `lowest_label` and `highest_label` give the numbers.
    """
    if len(labels) == 0:
        members: dict[str, Any] = {"argument": "labels"} if kind == "invalid-argument" else {}
        raise AnalysisError(kind, "There are no samples.", **members)
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= n_classes:
        numbers = {"n_classes": n_classes, "lowest_label": lowest, "highest_label": highest}
        members = {"argument": "labels"} if kind == "invalid-argument" else numbers
        raise AnalysisError(
            kind,
            f"The labels run from {lowest} to {highest}; for {n_classes} classes they must be 0 to {n_classes - 1}.",
            **members,
        )
