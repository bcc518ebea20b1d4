"""Choose the batch size of a pass."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import AnalysisError
from ..networks.exported.network import ExportedNetwork, batch_bounds, bytes_per_sample
from ..probes.inputs import Inputs, copied, each_input, first_samples
from ..probes.probe import Probe
from .precision import Precision, arithmetic

# Limit for the largest tensor of a batch. The C library requests larger blocks from the system and returns them each
# time, page by page: WRN-28-2 took twice as long with 1,024 samples at a time as with 128.
_LARGEST_ON_CPU = 2**25
# Not measured: enough for all of a GPU's cores, and little of its memory.
_LARGEST_ON_GPU = 2**29
_MOST_SAMPLES = 4096
# As a share of the largest logit: the same inputs give the same logits, except for a GPU's order of additions.
_SAME_AGAIN = 1e-3

# Bytes that a sample adds to the largest tensor: a path passes the same network and the same inputs at every point.
_known: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], int]] = WeakKeyDictionary()


def first_batch_size(module: nn.Module, probe: Probe, *, device: torch.device, precision: Precision) -> int:
    """Return the batch size at which the largest tensor of a forward pass is below 32 MiB, on a GPU 512 MiB.

    Args:
        module: on the device and in evaluation mode; it is called with one sample and twice with two.
        probe: with at least one sample.
        device: where the pass will run.
        precision: of the pass.

    Returns:
        A power of two from 1 to 4096, within what the graph of an exported network takes. For a network that fails on
        so few samples, only its inputs are counted; the pass reports the failure.

    Raises:
        AnalysisError: `invalid-architecture` where the same two samples give other logits the second time.
    """
    least, most = batch_bounds(module)
    if least == most:
        return least
    known = _known.setdefault(module, {})
    key = (precision, *((name, tuple(shape[1:])) for name, shape in probe.input_shapes().items()))
    if key not in known:
        with torch.no_grad(), arithmetic(device, precision):
            pair = probe.example(device=device)
            known[key] = (
                bytes_per_sample(module, pair)
                if isinstance(module, ExportedNetwork)
                else _bytes_per_sample(module, pair)
            )
    largest = _LARGEST_ON_GPU if device.type == "cuda" else _LARGEST_ON_CPU
    fitting = min(max((largest - 1) // known[key], 1), _MOST_SAMPLES)
    # A power of two, so that halving gives whole numbers.
    return max(min(1 << (fitting.bit_length() - 1), most or _MOST_SAMPLES), least)


def _bytes_per_sample(module: nn.Module, pair: Inputs) -> int:
    """Return the most bytes that a second sample adds to a tensor; weights, and tensors made only of them, do not
    count."""
    inputs: int = max(tensor.nbytes // len(tensor) for tensor in each_input(pair))
    try:
        # Copies: the pass detects a network that writes into its inputs.
        of_one, _ = _sizes(module, copied(first_samples(pair, 1)))
        of_both, logits = _sizes(module, copied(pair))
        again = module(copied(pair))
    except (RuntimeError, ValueError, LookupError, AssertionError, TypeError, AttributeError):
        return max(inputs, 1)
    _require_same(logits, again)
    return max(inputs, 1, *(both - one for one, both in zip(of_one, of_both, strict=False)))


def _require_same(logits: Any, again: Any) -> None:
    """Refuse randomness in evaluation mode, which changes every number of a report each time."""
    if not isinstance(logits, Tensor) or logits.shape != again.shape:
        return
    difference, largest = float((again - logits).abs().max()), float(logits.abs().max())
    # Comparisons with non-finite values are false; the pass reports these.
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
    """Records the bytes of every tensor that torch's functions and methods return, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor):
                self.n_bytes.append(each.nbytes)
        return made
