"""Statistics of a series of checkpoints: correlations, and the delay of generalisation."""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import spearmanr

# The accuracy from which on a task counts as learnt.
_LEARNT = 0.99


@dataclass(frozen=True)
class Generalisation:
    """First x with train accuracy of at least 0.99, first with such test accuracy, and the delay of the latter."""

    train_at: float | None
    test_at: float | None
    delay: float | None


def spearman(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """Return Spearman's rank correlation over the checkpoints where both values are defined.

    Args:
        first: one value a checkpoint; None where undefined.
        second: likewise, as many.

    Returns:
        -1 to 1, ties by their mean rank; None with fewer than 3 checkpoints or where one of the two is constant.

    >>> spearman([1.0, 2.0, 3.0, None], [0.1, 0.4, 0.9, 0.5])
    1.0
    """
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if len(both) < 3 or any(len(set(values)) == 1 for values in zip(*both, strict=True)):
        return None
    value = float(spearmanr(*zip(*both, strict=True)).statistic)
    # Equal ranks give 0.9999999999999999 on some processors.
    return round(value, 15)


def first_reached(axis: Sequence[float], values: Sequence[float | None], least: float = _LEARNT) -> float | None:
    """Return the smallest x whose value is at least `least`, or None.

    >>> first_reached([10.0, 20.0, 30.0], [0.5, 0.995, 0.98])
    20.0
    """
    reached = [x for x, value in zip(axis, values, strict=True) if value is not None and value >= least]
    return min(reached, default=None)


def generalisation(
    axis: Sequence[float], train: Sequence[float | None], test: Sequence[float | None]
) -> Generalisation:
    """Find when a network that memorises begins to generalise.

    Args:
        axis: x of each checkpoint, such as the training step.
        train: accuracies on the train split.
        test: accuracies on the test split.

    Returns:
        The x at which each was learnt, and the delay if both were.

    Source: Power et al. 2022, "Grokking: generalization beyond overfitting on small algorithmic datasets".
    """
    train_at, test_at = first_reached(axis, train), first_reached(axis, test)
    delay = None if train_at is None or test_at is None else test_at - train_at
    return Generalisation(train_at, test_at, delay)
