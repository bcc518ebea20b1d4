"""Save a model from a training script as a checkpoint file that the service accepts."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from torch import Tensor, nn

from ..networks.exported.network import ExportedNetwork
from ..networks.loading import load_network
from .conversion import ConversionError, write_safetensors
from .exporting import check_same_logits, export_model
from .models import unwrapped


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    architecture: Mapping[str, Any] | None = None,
    *,
    example_inputs: Any = None,
    dynamic_shapes: dict[str, Any] | tuple[Any, ...] | list[Any] | None = None,
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
        example_inputs: for a model of any class: what it is called with, some samples at least: one tensor, a tuple of
            positional arguments, or a dictionary of named ones. The model is exported, and its graph takes the place of
            a description.
        dynamic_shapes: with example_inputs, as of torch.export. Default: any number of samples, and any length of texts
            (whole numbers of two dimensions); other dimensions stay those of the example.
        head: module name of the classification head, or name of its weight, for the check. Default: the family's own;
            of a graph the last linear map on the way to the logits.
        check: build the network from its description or its graph and load the file into it, as a worker would; a graph
            must also give the model's logits on the example. It takes memory for a second copy of the model, and needs
            the family's library. Without a description nothing is checked.

    Returns:
        The path.

    Raises:
        ConversionError: an entry of the model's state has no plain form: it is sparse, quantised, sharded, without
            memory, or not a tensor; or the model cannot be exported, with the reason and the line of its code.
        AnalysisError: the check failed: `invalid-architecture`, `checkpoint-mismatch`, `head-not-found`,
            `non-finite-values`, or `family-unavailable` where it cannot be made here.

    Numerics: weights keep their type. Memory: a copy of the weights, on the processor.
    """
    path = Path(path)
    plain = unwrapped(model)
    if example_inputs is not None:
        if architecture is not None:
            raise ConversionError("Give an architecture or example_inputs, not both: either describes the network.")
        _write_exported(plain, path, example_inputs, dynamic_shapes, head if check else None, check=check)
        return path
    description = _own_architecture(plain) if architecture is None else dict(architecture)
    with _replacing(path) as staged:
        write_safetensors(_tensors(plain), staged, architecture=description)
        if check and description is not None:
            load_network(description, staged, head=head, device="cpu")
    return path


def _write_exported(
    model: nn.Module, path: Path, example_inputs: Any, dynamic_shapes: Any, head: str | None, *, check: bool
) -> None:
    exported = export_model(model, example_inputs, dynamic_shapes=dynamic_shapes)
    text = json.dumps(exported.graph, separators=(",", ":"))
    with _replacing(path) as staged:
        write_safetensors(exported.tensors, staged, metadata={"graph": text})
        if check:
            network = load_network({"family": "exported", "graph": text}, staged, head=head, device="cpu")
            assert isinstance(network.module, ExportedNetwork), "its family makes no other"
            check_same_logits(model, network.module, example_inputs)


def write_feature_file(tensors: Mapping[str, Shaped[Tensor, "..."]], path: Path) -> None:
    """Write tensors as safetensors; the file appears under its name once it is complete."""
    with _replacing(path) as staged:
        write_safetensors(tensors, staged)


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
