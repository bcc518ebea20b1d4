"""How many samples a pass takes at a time."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from analysis.precision import Precision, arithmetic
from analysis.probes import Inputs, Probe, each_input, first_samples

# The largest tensor of a batch stays below this. Larger blocks the C library takes from the system and gives back each
# time, page by page: WRN-28-2 took twice as long with 1,024 samples at a time as with 128.
_LARGEST_ON_CPU = 2**25
# Not measured: enough at a time for all of a GPU's cores, and little of its memory.
_LARGEST_ON_GPU = 2**29
_MOST_SAMPLES = 4096

# Bytes that a sample adds to the largest tensor: a path comes with the same network and the same inputs at every point.
_known: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], int]] = WeakKeyDictionary()


def first_batch_size(module: nn.Module, probe: Probe, *, device: torch.device, precision: Precision) -> int:
    """Samples at a time with which the largest tensor of a forward pass is just below 32 MiB, on a GPU 512 MiB.

    Args:
        module: on the device and in evaluation mode; it is called with one sample and with two.
        probe: with at least one sample.
        device: where the pass will run.
        precision: of the pass.

    Returns:
        A power of two from 1 to 4096. Of a network that fails on so few samples its inputs alone are counted: what it
        fails of is the pass's to tell.
    """
    known = _known.setdefault(module, {})
    key = (precision, *((name, tuple(shape[1:])) for name, shape in probe.input_shapes().items()))
    if key not in known:
        with torch.no_grad(), arithmetic(device, precision):
            known[key] = _bytes_per_sample(module, probe.example(device=device))
    largest = _LARGEST_ON_GPU if device.type == "cuda" else _LARGEST_ON_CPU
    fitting = min(max((largest - 1) // known[key], 1), _MOST_SAMPLES)
    # A power of two, so that halving gives whole numbers.
    return 1 << (fitting.bit_length() - 1)


def _bytes_per_sample(module: nn.Module, pair: Inputs) -> int:
    """By how much a second sample enlarges the tensor that it enlarges most; weights, and what is made of them alone,
    do not count."""
    inputs: int = max(tensor.nbytes // len(tensor) for tensor in each_input(pair))
    try:
        of_one, of_both = (_sizes(module, first_samples(pair, n)) for n in (1, 2))
    except (RuntimeError, ValueError, LookupError, AssertionError, TypeError, AttributeError):
        return max(inputs, 1)
    return max(inputs, 1, *(both - one for one, both in zip(of_one, of_both, strict=False)))


def _sizes(module: nn.Module, batch: Inputs) -> list[int]:
    sizes = _Sizes()
    with sizes:
        module(batch)
    return sizes.n_bytes


class _Sizes(TorchFunctionMode):
    """Bytes of every tensor that torch's functions and methods give, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor):
                self.n_bytes.append(each.nbytes)
        return made
