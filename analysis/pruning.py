"""Magnitude pruning of a network, sparsity by sparsity, in place."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from analysis.errors import AnalysisError
from analysis.networks import LoadedNetwork

Scope = Literal["global", "layerwise"]
#: What is pruned where nothing else is asked for.
SPARSITIES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
# Accuracy within a point of that at sparsity 0 is as good.
_TOLERATED = 0.01


class Pruning:
    """A network whose weights of least magnitude are set to zero.

    Prunable are the weights of linear and convolutional modules; biases, embeddings and normalisation stay, and the
    head unless it is included. A weight that several modules share is one weight: with a head that is tied to the input
    embedding both are pruned.

    Args:
        network: from here on it is what is pruned.
        scope: `global` takes the least of all prunable weights together, `layerwise` the same share of each.
        include_head: whether the head's weights are prunable.

    Raises:
        AnalysisError: `invalid-argument` where nothing is prunable.

    Numerics: memory for a second copy of the prunable weights. Exactly floor(s n) of n weights are pruned; of equal
        ones those that come first.

    Source: Han et al. 2015, "Learning both weights and connections for efficient neural networks".
    """

    def __init__(self, network: LoadedNetwork, scope: Scope, *, include_head: bool = False) -> None:
        self.network, self.scope = network, scope
        kinds = (nn.Linear, nn.modules.conv._ConvNd)
        prunable: dict[int, Any] = {
            id(module.weight): module.weight
            for name, module in network.module.named_modules()
            # Conv1D is a linear module of transformers, in GPT-2, which has its weight transposed.
            if (isinstance(module, kinds) or type(module).__name__ == "Conv1D")
            and (include_head or name != network.head_name)
        }
        self.weights: list[Tensor] = [weight.detach() for weight in prunable.values()]
        if not self.weights:
            detail = "Beside its head the network has no linear or convolutional weights."
            raise AnalysisError("invalid-argument", detail, argument="include_head")
        self.originals = [weight.clone() for weight in self.weights]

    @property
    def n_prunable(self) -> int:
        """How many weights can be pruned."""
        return sum(weight.numel() for weight in self.weights)

    def prune_to(self, sparsity: float) -> int:
        """Set the least weights to zero, from the whole network anew.

        Args:
            sparsity: share of the prunable weights, 0 to below 1.

        Returns:
            How many were set to zero.

        Raises:
            AnalysisError: `invalid-argument` for another sparsity.
        """
        if not 0 <= sparsity < 1:
            raise AnalysisError("invalid-argument", f"A sparsity is in [0, 1), not {sparsity}.", argument="sparsity")
        flat = [weight.flatten() for weight in self.originals]
        groups = [torch.cat(flat)] if self.scope == "global" else flat
        pruned = [_without_least(group, int(sparsity * len(group))) for group in groups]
        parts = torch.split(torch.cat(pruned), [len(part) for part in flat])
        for weight, part in zip(self.weights, parts, strict=True):
            weight.copy_(part.view_as(weight))
        return sum(int(sparsity * len(group)) for group in groups)


def _without_least(weights: Tensor, count: int) -> Tensor:
    if count == 0:
        return weights
    magnitudes = weights.abs()
    threshold = magnitudes.kthvalue(count).values
    below = magnitudes < threshold
    ties = (magnitudes == threshold).nonzero()[: count - int(below.sum()), 0]
    kept = torch.where(below, 0.0, weights)
    kept[ties] = 0.0
    return kept


def knee(sparsities: Sequence[float], accuracies: Sequence[float]) -> float:
    """The largest sparsity whose accuracy is within 1 point of that at sparsity 0.

    Args:
        sparsities: 0 among them.
        accuracies: of each, 0 to 1.

    Returns:
        The sparsity; accuracies below it may still be lower.

    >>> knee([0.0, 0.5, 0.9], [0.95, 0.945, 0.7])
    0.5
    """
    whole = dict(zip(sparsities, accuracies, strict=True))[0.0]
    # Rounding of the difference must not decide: 0.95 - 0.94 is a little more than 0.01 in floating point.
    return max(s for s, accuracy in zip(sparsities, accuracies, strict=True) if whole - accuracy <= _TOLERATED + 1e-12)
