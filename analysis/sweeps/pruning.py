"""Magnitude pruning of a network, sparsity by sparsity, in place."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import AnalysisError
from ..networks.exported.network import ExportedNetwork, multiplied_weights
from ..networks.loading import LoadedNetwork

Scope = Literal["global", "layerwise"]
#: Default sparsities.
SPARSITIES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
# Beside the weight of its output, which is a separate linear module.
_OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# Accuracy within one point of that at sparsity 0 counts as equal.
_TOLERATED = 0.01


class Pruning:
    """A network whose weights of least magnitude are set to zero.

    The weights of linear, convolutional and attention modules are prunable. Biases, embeddings, normalisation and
    weights in a library's own modules (the experts of a mixture) are not, nor is the head, with all modules that share
    its weight, unless it is included. A weight that several modules share is one weight: if the head is tied to the
    input embedding, both are pruned.

    Args:
        network: pruned in place.
        scope: `global` prunes the least of all prunable weights together, `layerwise` the same share of each.
        include_head: whether the head's weights are prunable.

    Raises:
        AnalysisError: `invalid-argument` where nothing is prunable, or a weight is reparametrised.

    Numerics: memory for a second copy of the prunable weights. Exactly floor(s n) of n weights are pruned; among
        equal ones the first.

    Source: Han et al. 2015, "Learning both weights and connections for efficient neural networks".
    """

    def __init__(self, network: LoadedNetwork, scope: Scope, *, include_head: bool = False) -> None:
        self.network, self.scope = network, scope
        self.weights = _prunable(network, include_head)
        self.originals = [weight.clone() for weight in self.weights]

    @property
    def n_prunable(self) -> int:
        """Number of weights that can be pruned."""
        return sum(weight.numel() for weight in self.weights)

    def prune_to(self, sparsity: float) -> int:
        """Set the least weights to zero, starting from the original weights.

        Args:
            sparsity: share of the prunable weights, 0 to below 1.

        Returns:
            The number of weights set to zero.

        Raises:
            AnalysisError: `invalid-argument` for another sparsity.
        """
        if not 0 <= sparsity < 1:
            raise AnalysisError(
                "invalid-argument", f"A sparsity must be in [0, 1), not {sparsity}.", argument="sparsity"
            )
        flat = [weight.flatten() for weight in self.originals]
        groups = [torch.cat(flat)] if self.scope == "global" else flat
        pruned = [_without_least(group, _share(sparsity, len(group))) for group in groups]
        parts = torch.split(torch.cat(pruned), [len(part) for part in flat])
        for weight, part in zip(self.weights, parts, strict=True):
            weight.copy_(part.view_as(weight))
        self.network.weights_changed()
        return sum(_share(sparsity, len(group)) for group in groups)


def knee(sparsities: Sequence[float], accuracies: Sequence[float]) -> float:
    """Return the largest sparsity whose accuracy is within 1 point of that at sparsity 0.

    Args:
        sparsities: including 0.
        accuracies: one for each, 0 to 1.

    Returns:
        The sparsity; accuracies below it may still be lower.

    >>> knee([0.0, 0.5, 0.9], [0.95, 0.945, 0.7])
    0.5
    """
    whole = dict(zip(sparsities, accuracies, strict=True))[0.0]
    # Rounding of the difference must not matter: 0.95 - 0.94 is a little more than 0.01 in floating point.
    return max(s for s, accuracy in zip(sparsities, accuracies, strict=True) if whole - accuracy <= _TOLERATED + 1e-12)


def _prunable(network: LoadedNetwork, include_head: bool) -> list[Tensor]:
    """Return each prunable weight once, in the order of the modules; of a graph, in the order of their use."""
    if isinstance(network.module, ExportedNetwork):
        found = multiplied_weights(network.module, but_for=None if include_head else network.head_name)
    else:
        found = list(_weights_of_modules(network, include_head).values())
    if not found:
        detail = "The network has no linear or convolutional weights except its head; include_head prunes the head."
        raise AnalysisError("invalid-argument", detail, argument="include_head")
    return [weight.detach() for weight in found]


def _weights_of_modules(network: LoadedNetwork, include_head: bool) -> dict[int, Tensor]:
    """Return the prunable weights of a network of modules, by identity."""
    head = network.head._parameters.get("weight")
    found: dict[int, Tensor] = {}
    for name, module in network.module.named_modules():
        if name == network.head_name and not include_head:
            continue
        for own in _weight_names(module):
            weight = module._parameters.get(own)
            if weight is None:
                raise AnalysisError(
                    "invalid-argument",
                    f"The weight of {name!r} is recomputed in each pass (weight_norm, spectral_norm, a mask of "
                    "torch.nn.utils.prune), so zeros would not stay. Remove the reparametrisation and save the network "
                    "again.",
                    argument="checkpoint_id",
                    module=name,
                )
            if include_head or weight is not head:
                found[id(weight)] = weight
    return found


def _weight_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's own weights that multiply its inputs."""
    if isinstance(module, nn.MultiheadAttention):
        return tuple(name for name in _OF_ATTENTION if getattr(module, name) is not None)
    # Conv1D is a linear module of transformers with a transposed weight, in GPT-2.
    linear = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or type(module).__name__ == "Conv1D"
    return ("weight",) if linear else ()


def _share(sparsity: float, n: int) -> int:
    """Return floor(s n) for the decimal s: 0.29 of 100 is 29, though the float nearest to 0.29 falls short of it."""
    return int(Fraction(repr(sparsity)) * n)


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
