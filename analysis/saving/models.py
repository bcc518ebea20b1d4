"""Models as training scripts have them: inside wrappers, and in training mode."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside any wrappers of DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode; each part gets its previous mode back, frozen parts too."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
