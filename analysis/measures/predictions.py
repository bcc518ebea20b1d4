"""A network's predictions for each sample, and their quality: loss, confidence, calibration."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

#: Equal bins of the top probability, for the calibration error and the reliability diagram.
CALIBRATION_BINS = 15
# Most logits converted to float64 at a time: 32 MiB.
_CHUNK_NUMBERS = 2**22


@dataclass(frozen=True)
class Predictions:
    """Predictions by sample.

    Attributes:
        predicted: the class with the largest logit; of equal ones the first.
        confidence: its probability.
        loss: the cross-entropy of the sample's label.
    """

    predicted: Int64[Tensor, " n"]
    confidence: Float64[Tensor, " n"]
    loss: Float64[Tensor, " n"]

    @classmethod
    def room(cls, n: int, device: torch.device) -> "Predictions":
        """Return room for the predictions of so many samples, for `put`.

        Made before the parts: what stays, between large blocks that go, would keep the system from having these back.
        """
        numbers = torch.empty(2, n, dtype=torch.float64, device=device)
        return cls(torch.empty(n, dtype=torch.int64, device=device), *numbers)

    def put(self, rows: slice, found: "Predictions") -> None:
        """Store the predictions of some samples."""
        self.predicted[rows], self.confidence[rows], self.loss[rows] = found.predicted, found.confidence, found.loss

    def take(self, rows: Int64[Tensor, " m"] | slice) -> "Predictions":
        """Return only the predictions of these samples, in their order; of a slice views."""
        return Predictions(self.predicted[rows], self.confidence[rows], self.loss[rows])

    def to(self, device: torch.device) -> "Predictions":
        """Return the predictions on a device."""
        return Predictions(self.predicted.to(device), self.confidence.to(device), self.loss.to(device))


def predictions_of(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Predictions:
    """Return the predictions that follow from logits.

    Args:
        logits: one sample a row.
        labels: 0 to c - 1.

    Numerics: float64, some rows at a time, so that no float64 copy of all logits is made.
    """
    found, size = Predictions.room(len(logits), logits.device), rows_at_a_time(logits.shape[1])
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        part, target = logits[rows], labels[rows]
        # From the logits: log-probabilities are equal if logits are closer than 1e-16.
        largest = part.max(dim=1).indices
        logarithms = part.double().log_softmax(dim=1)
        confidence = logarithms.gather(1, largest[:, None])[:, 0].exp()
        loss = -logarithms.gather(1, target.long()[:, None])[:, 0]
        found.put(rows, Predictions(largest, confidence, loss))
    return found


def rows_at_a_time(n_classes: int) -> int:
    """Return the number of rows of so many logits that may be copied at a time."""
    return max(_CHUNK_NUMBERS // n_classes, 1)


def bins_of(confidence: Float64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """Return the number of each sample's bin (k/15, (k+1)/15] of the top probability; 0 is in the first."""
    return (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1


def calibration_gaps(
    confidence: Float64[Tensor, " n"], correct: Bool[Tensor, " n"]
) -> tuple[Int64[Tensor, " n"], Float64[Tensor, " bins"]]:
    """Return each sample's bin (k/15, (k+1)/15] of the top probability, and by bin the sum of correct - confidence."""
    bins = bins_of(confidence)
    # On the processor: a GPU adds to a bin in any order, so the last digit would differ from run to run.
    gaps = torch.zeros(CALIBRATION_BINS, dtype=confidence.dtype)
    gaps.index_add_(0, bins.cpu(), (correct.double() - confidence).cpu())
    return bins, gaps.to(confidence.device)


def calibration_error(confidence: Float64[Tensor, " n"], correct: Bool[Tensor, " n"]) -> float:
    """Return the expected calibration error: the gaps of all bins, weighted by their samples."""
    return float(calibration_gaps(confidence, correct)[1].abs().sum()) / len(confidence)
