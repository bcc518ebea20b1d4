"""How many samples a pass takes at a time."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from analysis.errors import AnalysisError
from analysis.passes.precision import Precision, arithmetic
from analysis.probes.inputs import Inputs, copied, each_input, first_samples
from analysis.probes.probe import Probe

# The largest tensor of a batch stays below this. Larger blocks the C library takes from the system and gives back each
# time, page by page: WRN-28-2 took twice as long with 1,024 samples at a time as with 128.
_LARGEST_ON_CPU = 2**25
# Not measured: enough at a time for all of a GPU's cores, and little of its memory.
_LARGEST_ON_GPU = 2**29
_MOST_SAMPLES = 4096
# Of the largest logit: the same inputs give the same logits but for the order in which a GPU may add.
_SAME_AGAIN = 1e-3

# Bytes that a sample adds to the largest tensor: a path comes with the same network and the same inputs at every point.
_known: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], int]] = WeakKeyDictionary()


def first_batch_size(module: nn.Module, probe: Probe, *, device: torch.device, precision: Precision) -> int:
    """Samples at a time with which the largest tensor of a forward pass is just below 32 MiB, on a GPU 512 MiB.

    Args:
        module: on the device and in evaluation mode; it is called with one sample and twice with two.
        probe: with at least one sample.
        device: where the pass will run.
        precision: of the pass.

    Returns:
        A power of two from 1 to 4096. Of a network that fails on so few samples its inputs alone are counted: what it
        fails of is the pass's to tell.

    Raises:
        AnalysisError: `invalid-architecture` where the same two samples give other logits the second time.
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
        # Copies: what a network writes into its inputs is for the pass to see.
        of_one, _ = _sizes(module, copied(first_samples(pair, 1)))
        of_both, logits = _sizes(module, copied(pair))
        again = module(copied(pair))
    except (RuntimeError, ValueError, LookupError, AssertionError, TypeError, AttributeError):
        return max(inputs, 1)
    _require_same(logits, again)
    return max(inputs, 1, *(both - one for one, both in zip(of_one, of_both, strict=False)))


def _require_same(logits: Any, again: Any) -> None:
    """What is random in evaluation mode makes of every number of a report another one each time."""
    if not isinstance(logits, Tensor) or logits.shape != again.shape:
        return
    difference, largest = float((again - logits).abs().max()), float(logits.abs().max())
    # What is not finite compares with nothing, and is for the pass to name.
    if difference > _SAME_AGAIN * largest:
        raise AnalysisError(
            "invalid-architecture",
            f"The network gives logits that differ by {difference:.3g} for the same two samples: something in it is "
            "random in evaluation mode, as F.dropout is without training=self.training.",
            difference=difference,
        )


def _sizes(module: nn.Module, batch: Inputs) -> tuple[list[int], Any]:
    sizes = _Sizes()
    with sizes:
        output = module(batch)
    return sizes.n_bytes, output


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
