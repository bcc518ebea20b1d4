"""A feature set: penultimate features, labels and the classification head."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from ..measures.entropy import check_finite
from ..measures.predictions import Predictions, predictions_of, rows_at_a_time

#: Numbers of the splits in a set's `split`.
SPLITS = {"train": 0, "test": 1}


def rows_of_splits(split: Integer[Tensor, " n"] | None, n: int) -> dict[str, Int64[Tensor, " _"]]:
    """Return the rows of `all` samples and of each split that has samples, in order, on the processor.

    Args:
        split: numbers of SPLITS, on any device; None for a set without splits.
        n: number of samples.
    """
    rows = {"all": torch.arange(n)}
    if split is not None:
        rows |= {name: (split.cpu() == number).nonzero()[:, 0] for name, number in SPLITS.items()}
    return {name: chosen for name, chosen in rows.items() if len(chosen)}


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a language model that are classes: those that occur as labels.

    Attributes:
        tokens: token id of each class, in rising order.
        size: number of tokens of the network, over all of which it predicts.
    """

    tokens: Int64[Tensor, " c"]
    size: int


@dataclass(frozen=True)
class FeatureSet:
    """Features, labels and classification head, extracted elsewhere or by a network's pass over a probe.

    Floating-point tensors share one type: float64 where the file holds any float64, float32 otherwise.

    Attributes:
        features: inputs of the head.
        labels: 0 .. c - 1.
        head: rows of the classification head.
        head_bias: its bias.
        logits: the network's own, if uploaded; otherwise features @ head.T + head_bias in float64.
        split: 0 train, 1 test; None where the set has no splits.
        predictions: in place of logits, where logits would be too large to keep.
        vocabulary: of a language model; its head is restricted to the classes, and -1 predicted for any other token.
    """

    features: Float[Tensor, "n d"]
    labels: Integer[Tensor, " n"]
    head: Float[Tensor, "c d"]
    head_bias: Float[Tensor, " c"] | None
    logits: Float[Tensor, "n c"] | None
    split: Integer[Tensor, " n"] | None
    predictions: Predictions | None = None
    vocabulary: Vocabulary | None = None

    def to(self, device: torch.device) -> "FeatureSet":
        """Return the set with features, labels, head, logits and predictions on a device; split and vocabulary stay."""
        on_device = {name: getattr(self, name) for name in ("features", "labels", "head", "head_bias", "logits")}
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device) for name, tensor in on_device.items()
        }
        return replace(self, **moved, predictions=None if self.predictions is None else self.predictions.to(device))

    def network_logits(self) -> Float[Tensor, "n c"]:
        """Return the network's own logits, or else those from features, head and bias, always in float64."""
        return self._logits(slice(None))

    def network_predictions(self) -> Predictions:
        """Return the network's predictions: the stored ones, or from its logits, some rows at a time.

        Raises:
            AnalysisError: `non-finite-values` in the logits.
        """
        if self.predictions is not None:
            return self.predictions
        found = Predictions.room(len(self.labels), self.labels.device)
        # Features become float64 too, so the wider of the two determines how many rows fit.
        for rows in torch.split(torch.arange(len(self.labels)), rows_at_a_time(max(self.head.shape))):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            logits = self._logits(part)
            check_finite("logits", logits)
            found.put(part, predictions_of(logits, self.labels[part]))
        return found

    def take(self, rows: Int64[Tensor, " m"] | slice) -> "FeatureSet":
        """Return only the samples of these rows, in their order; of a slice views."""
        return replace(
            self,
            features=self.features[rows],
            labels=self.labels[rows],
            logits=None if self.logits is None else self.logits[rows],
            split=None if self.split is None else self.split[rows],
            predictions=None if self.predictions is None else self.predictions.take(rows),
        )

    def _logits(self, rows: slice) -> Float[Tensor, "m c"]:
        if self.logits is not None:
            return self.logits[rows]
        logits = self.features[rows].double() @ self.head.double().T
        return logits if self.head_bias is None else logits + self.head_bias.double()
