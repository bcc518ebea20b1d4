"""What a network takes: one tensor, or several by name."""

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor

# One tensor of inputs, or several by the names that a network's own `forward` has for them.
Inputs = Shaped[Tensor, "..."] | Mapping[str, Shaped[Tensor, "..."]]

# Names under which a probe may hold a network's inputs in place of `inputs`, one of the first two among them; the same
# list is in app/resources.py, which a test compares.
INPUT_NAMES = (
    "pixel_values", "input_ids", "attention_mask", "token_type_ids", "position_ids", "pixel_attention_mask",
    "spatial_shapes",
)  # fmt: skip


def n_samples(inputs: Inputs) -> int:
    """How many samples a batch holds."""
    return len(next(iter(named(inputs).values())))


def first_samples(inputs: Inputs, n: int) -> Inputs:
    """The first so many samples of a batch."""
    return samples(inputs, 0, n)


def copied(inputs: Inputs) -> Inputs:
    """The same batch in memory of its own."""
    return each(inputs, torch.clone)


def each_input(inputs: Inputs) -> Iterable[Shaped[Tensor, "..."]]:
    """The tensors of a batch."""
    return named(inputs).values()


def samples(inputs: Inputs, start: int, stop: int) -> Inputs:
    return each(inputs, lambda tensor: tensor[start:stop])


def each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    if isinstance(inputs, Tensor):
        return change(inputs)
    return {name: change(tensor) for name, tensor in inputs.items()}


def named(inputs: Inputs) -> Mapping[str, Shaped[Tensor, "..."]]:
    """All tensors of a batch; one alone has no name."""
    return {"": inputs} if isinstance(inputs, Tensor) else inputs
