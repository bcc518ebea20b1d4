"""Number types and arithmetic of a network's forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]
"""float32, or bfloat16 where torch.autocast takes it."""


@contextmanager
def arithmetic(device: torch.device, precision: Precision = "float32") -> Iterator[None]:
    """Make every run give the same numbers: on a GPU, use deterministic convolutions without TF32, which rounds their
    inputs to 10 bits; with `bfloat16`, run under autocast."""
    on_gpu, narrow = device.type == "cuda", precision == "bfloat16"
    flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False) if on_gpu else nullcontext()
    with flags, torch.autocast(device.type, dtype=torch.bfloat16) if narrow else nullcontext():
        yield
