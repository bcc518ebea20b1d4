"""One pass of a network over a probe: what its classification head receives, and its logits."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from analysis.entropy import check_finite
from analysis.errors import AnalysisError
from analysis.networks import LoadedNetwork
from analysis.probes import Probe

Progress = Callable[[str, int, int], None]
"""Called with a phase (`features`, `metrics`), what is done and of how much."""
Precision = Literal["float32", "bfloat16"]
"""What a network's forward pass computes in: float32, or bfloat16 where torch.autocast takes it."""


def extract_features(
    network: LoadedNetwork,
    probe: Probe,
    *,
    device: torch.device,
    batch_size: int | None = None,
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n c"], int]:
    """What the head receives for every input of a probe, and the network's logits.

    Args:
        network: moved to the device and left in evaluation mode.
        probe: whose inputs are passed, in order.
        device: where the pass runs and where the result lies.
        batch_size: inputs at a time; None for about 16 MiB of them on a processor and 128 MiB on a GPU, at most 1024.
        precision: of the forward pass; `bfloat16` runs it under torch.autocast.
        progress: called with phase `features` after every batch.

    Returns:
        Features, logits, both float32, and the batch size of the pass: it is halved, and the pass begun again, when
        memory runs out.

    Raises:
        AnalysisError: `inputs-refused` where the network fails on inputs of this shape, `head-not-found` where the head
            is not run once or is not what gives the logits, `non-finite-values`, `out-of-memory`, `invalid-probe`.

    Numerics: float32 as the network computes, without TF32; in evaluation mode. Under autocast every value that the
        network gave in bfloat16 is kept as it is, a float32 number of 8 bits: a logit is then off by up to 1 part in
        256 of itself, and logits closer than that may be equal, of which the first is the largest.
    """
    n = len(probe.labels)
    if n == 0:
        raise AnalysisError("invalid-probe", "The probe has no samples.")
    module = _ready(network.module, device)
    size = min(batch_size or _first_batch_size(probe.inputs, device), n)
    while True:
        try:
            features, logits = _pass(module, network, probe, size, device, precision, progress)
            break
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        # Outside the handler: the error's traceback holds the tensors of the batch.
        if size == 1:
            raise AnalysisError("out-of-memory", "Memory ran out with one input at a time.", batch_size=1)
        size //= 2
        if device.type == "cuda":
            torch.cuda.empty_cache()
    # One sum over both, so that a GPU is waited for once; where it is not finite, each is looked at for itself.
    if not math.isfinite((features.sum() + logits.sum()).item()):
        check_finite("features", features)
        check_finite("logits", logits)
    return features, logits, size


def _ready(module: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device and in evaluation mode."""
    # A path comes with the same network at every point: setting what is set takes six times as long as looking.
    if any(tensor.device != device for tensor in (*module.parameters(), *module.buffers())):
        module.to(device)
    if any(part.training for part in module.modules()):
        module.eval()
    return module


def _first_batch_size(inputs: Tensor, device: torch.device) -> int:
    budget_bytes = 2**27 if device.type == "cuda" else 2**24
    input_bytes = 4 * max(math.prod(inputs.shape[1:]), 1)
    fitting = min(max(budget_bytes // input_bytes, 1), 1024)
    # A power of two, so that halving gives whole numbers.
    return 1 << (fitting.bit_length() - 1)


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The second is a processor's allocator, the third the one of pinned memory.
    told = ("not enough memory", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in told)


def _pass(
    module: nn.Module,
    network: LoadedNetwork,
    probe: Probe,
    size: int,
    device: torch.device,
    precision: Precision,
    progress: Progress | None,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n c"]]:
    n, (n_classes, n_features) = len(probe.labels), network.weight.shape
    features = torch.empty(n, n_features, device=device)
    logits = torch.empty(n, n_classes, device=device)
    received: list[Any] = []

    def receive(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        received.append(args[0] if args else kwargs.get("input"))

    handle = module.get_submodule(network.head_name).register_forward_pre_hook(receive, with_kwargs=True)
    try:
        with torch.inference_mode(), arithmetic(device, precision):
            done = 0
            for batch in probe.batches(size, device=device):
                received.clear()
                output = _forward(module, batch)
                rows = slice(done, done + len(batch))
                features[rows] = _head_input(received, network, batch)
                if not isinstance(output, Tensor) or output.shape != (len(batch), n_classes):
                    shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                    raise AnalysisError(
                        "head-not-found",
                        f"The network's output is {shape} and not the {n_classes} logits of its head "
                        f"{network.head_name!r}.",
                        head=network.head_name,
                    )
                logits[rows] = output
                done = rows.stop
                if progress:
                    progress("features", done, n)
    finally:
        handle.remove()
    return features, logits


def _forward(module: nn.Module, batch: Tensor) -> Any:
    """The network's output; what it raises about the input's shape becomes `inputs-refused`."""
    try:
        return module(batch)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and _is_out_of_memory(error)):
            raise
        shape = list(batch.shape[1:])
        raise AnalysisError(
            "inputs-refused",
            f"The network fails on inputs of shape {shape}: {str(error).strip().splitlines()[0][:500]}",
            input_shape=shape,
        ) from error


def _head_input(received: list[Any], network: LoadedNetwork, batch: Tensor) -> Tensor:
    if len(received) != 1:
        raise AnalysisError(
            "head-not-found",
            f"The head {network.head_name!r} ran {len(received)} times for one batch; expected once.",
            head=network.head_name,
        )
    value, n_features = received[0], network.weight.shape[1]
    if not isinstance(value, Tensor) or value.shape != (len(batch), n_features):
        shape = list(value.shape[1:]) if isinstance(value, Tensor) else type(value).__name__
        raise AnalysisError(
            "inputs-refused",
            f"From inputs of shape {list(batch.shape[1:])} the head {network.head_name!r} receives {shape} for each "
            f"sample; expected [{n_features}].",
            input_shape=list(batch.shape[1:]),
            head_input_shape=shape,
        )
    return value


@contextmanager
def arithmetic(device: torch.device, precision: Precision = "float32") -> Iterator[None]:
    """The same numbers in every run: on a GPU convolutions without TF32, which rounds their inputs to 10 bits, and the
    same ones each time; with `bfloat16` under autocast."""
    on_gpu, narrow = device.type == "cuda", precision == "bfloat16"
    flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False) if on_gpu else nullcontext()
    with flags, torch.autocast(device.type, dtype=torch.bfloat16) if narrow else nullcontext():
        yield
