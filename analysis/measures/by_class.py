"""Predictions by class and by confidence: the accuracy of each class, what it is confused with, and reliability."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from .predictions import CALIBRATION_BINS, bins_of

#: Confusions that are listed one by one; a report holds no more, whatever the number of classes.
MOST_CONFUSIONS = 1000


@dataclass(frozen=True)
class Confusion:
    """Samples of one class for which the same other class is predicted.

    Attributes:
        label: the samples' class.
        predicted: the predicted class; None for a token of a language model that is no class.
        n_samples: at least 1.
    """

    label: int
    predicted: int | None
    n_samples: int


@dataclass(frozen=True)
class ByClass:
    """Predictions by class, in the order of the class counts.

    Attributes:
        accuracy: share of a class's samples that are predicted as it (recall); None for a class without samples.
        predicted_counts: samples of any class that are predicted as it.
        confusions: the largest, in falling order of samples, then by label and predicted class.
        n_confused_otherwise: wrongly predicted samples whose confusions are not listed.
    """

    accuracy: list[float | None]
    predicted_counts: list[int]
    confusions: list[Confusion]
    n_confused_otherwise: int


@dataclass(frozen=True)
class ReliabilityBin:
    """Samples whose predicted class has a probability in (low, high].

    Attributes:
        low: lower edge; the lowest bin includes it.
        high: upper edge.
        n_samples: samples of the bin.
        confidence: mean probability of the predicted class; None without samples.
        accuracy: share of correct predictions; None without samples.
    """

    low: float
    high: float
    n_samples: int
    confidence: float | None
    accuracy: float | None


def by_class(
    predicted: Int64[Tensor, " n"],
    labels: Int64[Tensor, " n"],
    n_classes: int,
    *,
    most: int = MOST_CONFUSIONS,
) -> ByClass:
    """Count predictions by class.

    Args:
        predicted: 0 to n_classes - 1, or -1 for what is no class.
        labels: 0 to n_classes - 1.
        n_classes: number of classes.
        most: the largest number of confusions to list.

    Returns:
        Counts, which are exact.

    Numerics: integers; time n log n, memory n.
    """
    predicted, labels = predicted.cpu(), labels.cpu()
    right = predicted == labels
    counts = torch.bincount(labels, minlength=n_classes)
    hits = torch.bincount(labels[right], minlength=n_classes)
    # Of -1, which is no class, a place of its own before all others.
    pairs, sizes = torch.unique(labels[~right] * (n_classes + 1) + predicted[~right] + 1, return_counts=True)
    largest = torch.argsort(sizes, descending=True, stable=True)[:most]
    confusions = [
        Confusion(pair // (n_classes + 1), pair % (n_classes + 1) - 1 if pair % (n_classes + 1) else None, size)
        for pair, size in zip(pairs[largest].tolist(), sizes[largest].tolist(), strict=True)
    ]
    return ByClass(
        accuracy=[hit / count if count else None for hit, count in zip(hits.tolist(), counts.tolist(), strict=True)],
        predicted_counts=torch.bincount(predicted[predicted >= 0], minlength=n_classes).tolist(),
        confusions=confusions,
        n_confused_otherwise=int(sizes.sum()) - sum(confusion.n_samples for confusion in confusions),
    )


def reliability(confidence: Float64[Tensor, " n"], correct: Bool[Tensor, " n"]) -> list[ReliabilityBin]:
    """Return the reliability diagram: accuracy and mean confidence by the bins of the calibration error.

    Args:
        confidence: probability of each sample's predicted class.
        correct: whether it is the sample's class.

    Returns:
        The bins in rising order. The calibration error is the mean of |accuracy - confidence|, weighted by their
        samples.

    Numerics: float64, summed on the processor in the order of the samples.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2.
    """
    bins, confidence, correct = bins_of(confidence).cpu(), confidence.cpu(), correct.cpu()
    counts = torch.bincount(bins, minlength=CALIBRATION_BINS).tolist()
    hits = torch.bincount(bins[correct], minlength=CALIBRATION_BINS).tolist()
    sums = torch.zeros(CALIBRATION_BINS, dtype=confidence.dtype).index_add_(0, bins, confidence).tolist()
    return [
        ReliabilityBin(
            low=k / CALIBRATION_BINS,
            high=(k + 1) / CALIBRATION_BINS,
            n_samples=counts[k],
            confidence=sums[k] / counts[k] if counts[k] else None,
            accuracy=hits[k] / counts[k] if counts[k] else None,
        )
        for k in range(CALIBRATION_BINS)
    ]
