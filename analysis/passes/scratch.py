"""Room for features that memory should not hold: files that are mapped, and gone once nobody uses them."""

import os
import tempfile
from contextvars import ContextVar
from pathlib import Path

import torch
from jaxtyping import Float32
from torch import Tensor

from ..errors import AnalysisError

#: Where the files lie; without a folder, features are in memory whatever their size. It must not be one in memory.
folder: ContextVar[Path | None] = ContextVar("folder", default=None)

# Features of at most so many bytes are in memory.
_IN_MEMORY = 2**28
_SUFFIX = ".scratch"


def rows(n: int, d: int, device: torch.device) -> Float32[Tensor, "n d"]:
    """Return room for n rows of d numbers, on the processor in a mapped file if it is much.

    Raises:
        AnalysisError: `out-of-memory` if the folder has no room.
    """
    place = folder.get()
    if device.type != "cpu" or place is None or 4 * n * d <= _IN_MEMORY:
        return torch.empty(n, d, device=device)
    place.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(_SUFFIX, dir=place)
    try:
        # Reserved first: a write into a mapped file that finds no room ends the process.
        os.posix_fallocate(descriptor, 0, 4 * n * d)
        return torch.from_file(name, shared=True, size=n * d).view(n, d)
    except OSError as error:
        detail = f"There is no room for {n} x {d} features, {4 * n * d} bytes, where a worker's files are staged."
        raise AnalysisError("out-of-memory", f"{detail} {error.strerror}.", of="host") from error
    finally:
        os.close(descriptor)
        # The mapping keeps it until the tensor goes, or the process ends.
        Path(name).unlink()
