"""Classification networks of torchvision, by their registered names; never with its weights."""

from collections.abc import Mapping
from typing import Any

import torchvision
from torch import nn

from .building import check_plain, last_linear, refused, require_classes, take_one_tensor

#: Arguments that would fetch weights or control how to.
FORBIDDEN = ("pretrained", "pretrained_backbone", "progress", "weights", "weights_backbone")


def names() -> list[str]:
    """Return the classification networks that torchvision registers."""
    return list(torchvision.models.list_models(module=torchvision.models))


def create(description: Mapping[str, Any]) -> nn.Module:
    """Build a network from `{"name": ..., "args": {...}}`: torchvision.models.get_model(name, weights=None, **args).

    Raises:
        AnalysisError: `invalid-architecture`; errors of torchvision itself, of any type.
    """
    name, args = description["name"], description["args"]
    if name not in names():
        raise refused(f"torchvision {torchvision.__version__} has no classification network {name!r}")
    if forbidden := sorted(set(args) & set(FORBIDDEN)):
        raise refused(f"The arguments {', '.join(forbidden)} are not allowed: weights come from the checkpoint")
    check_plain(args)
    require_classes(args.get("num_classes", 1000))
    builder = torchvision.models.get_model_builder(name)
    if name in ("googlenet", "inception_v3"):
        # These two warn unless told whether to sample initial weights, which takes a minute.
        args = {"init_weights": False, **args}
    return take_one_tensor(builder(weights=None, **args))


def head(network: nn.Module, description: Mapping[str, Any]) -> str | None:
    """Return the last linear module, with which torchvision's classifiers end; None if it is missing."""
    return last_linear(network)
