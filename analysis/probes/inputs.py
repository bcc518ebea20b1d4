"""The inputs of a network: one tensor, or several by name."""

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor

# One tensor of inputs, or several by their names in the network's own `forward`.
Inputs = Shaped[Tensor, "..."] | Mapping[str, Shaped[Tensor, "..."]]

# Names of a network's inputs that a probe may hold in place of `inputs`, including one of the first two; a test
# compares this list with the one in app/files/probedata.py.
INPUT_NAMES = (
    "pixel_values", "input_ids", "attention_mask", "token_type_ids", "position_ids", "pixel_attention_mask",
    "spatial_shapes",
)  # fmt: skip


#: Beginning of the names of inputs that a network names by itself, such as `inputs.words`.
OWN_INPUT = "inputs."


def n_samples(inputs: Inputs) -> int:
    """Return the number of samples of a batch."""
    return len(next(iter(named(inputs).values())))


def first_samples(inputs: Inputs, n: int) -> Inputs:
    """Return the first n samples of a batch."""
    return samples(inputs, 0, n)


def copied(inputs: Inputs) -> Inputs:
    """Return a copy of a batch."""
    return each(inputs, torch.clone)


def each_input(inputs: Inputs) -> Iterable[Shaped[Tensor, "..."]]:
    """Return the tensors of a batch."""
    return named(inputs).values()


def samples(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Return the samples from start up to stop."""
    return each(inputs, lambda tensor: tensor[start:stop])


def each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Return the inputs with each tensor changed."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    return {name: change(tensor) for name, tensor in inputs.items()}


def named(inputs: Inputs) -> Mapping[str, Shaped[Tensor, "..."]]:
    """Return all tensors of a batch by name; a single tensor has the empty name."""
    return {"": inputs} if isinstance(inputs, Tensor) else inputs
