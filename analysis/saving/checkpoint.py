"""Save a model from a training script as a checkpoint file that the service accepts."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from torch import Tensor, nn

from ..networks.loading import load_network
from .conversion import ConversionError, write_safetensors


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    architecture: Mapping[str, Any] | None = None,
    *,
    head: str | None = None,
    check: bool = True,
) -> Path:
    """Write a model's weights, and the description of its network, as one safetensors file that the service accepts.

    Wrappers (DistributedDataParallel, DataParallel, torch.compile) are taken off. The file appears under its name only
    once it is complete and checked, so a process that watches for new checkpoints never finds a partial file.

    Args:
        model: on any device and in any mode; it is not changed.
        path: target file; an existing one is replaced.
        architecture: description of the network, which goes into the file. Default: for a model of transformers its
            own configuration; for any other none, and the upload must supply one.
        head: module name of the classification head, for the check. Default: the family's own.
        check: build the network from its description and load the file into it, as a worker would. It takes memory for
            a second copy of the model, and needs the family's library. Without a description nothing is checked.

    Returns:
        The path.

    Raises:
        ConversionError: an entry of the model's state has no plain form: it is sparse, quantised, sharded, without
            memory, or not a tensor.
        AnalysisError: the check failed: `invalid-architecture`, `checkpoint-mismatch`, `head-not-found`,
            `non-finite-values`, or `family-unavailable` where it cannot be made here.

    Numerics: weights keep their type. Memory: a copy of the weights, on the processor.
    """
    path = Path(path)
    plain = unwrapped(model)
    description = _own_architecture(plain) if architecture is None else dict(architecture)
    with _replacing(path) as staged:
        write_safetensors(_tensors(plain), staged, architecture=description)
        if check and description is not None:
            load_network(description, staged, head=head, device="cpu")
    return path


def write_feature_file(tensors: Mapping[str, Shaped[Tensor, "..."]], path: Path) -> None:
    """Write tensors as safetensors; the file appears under its name once it is complete."""
    with _replacing(path) as staged:
        write_safetensors(tensors, staged)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside any wrappers of DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a model under plain names, without the prefixes of compiled parts."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConversionError(
                f"{name!r} of the model's state is a {type(value).__name__}; a checkpoint holds only tensors."
            )
        if value.is_meta:
            raise ConversionError(f"{name!r} is on the meta device: it has a shape and no values.")
        if hasattr(value, "full_tensor"):
            raise ConversionError(
                f"{name!r} is sharded over processes; gather it first, with get_model_state_dict and full_state_dict."
            )
        tensors[name.replace("_orig_mod.", "")] = value
    return tensors


def _own_architecture(model: nn.Module) -> dict[str, Any] | None:
    """Return the description of a model of transformers, from its own configuration; None for other models."""
    config = getattr(model, "config", None)
    if not (hasattr(config, "to_json_string") and hasattr(config, "model_type")):
        return None
    assert config is not None
    own = json.loads(config.to_json_string())
    return {"family": "transformers", "config": {**own, "architectures": [type(model).__name__]}}


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside the file; it is renamed at the end of the block, and removed if the block fails."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield staged
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
