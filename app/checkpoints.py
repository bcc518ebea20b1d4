"""What is kept of a checkpoint: network, head and inputs, from its spec, its folder and the header of its file."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from app import models, schemas
from app.database import read
from app.descriptions.adapters import check_adapter
from app.descriptions.architectures import architecture_of_config, check_architecture
from app.descriptions.preprocessing import given_preprocess, preprocess_of_config
from app.errors import InvalidFile, InvalidRequest, NotFound
from app.files.foreign import ADAPTER_PREFIX, rank_of_adapter, refuse_adapter
from app.files.weights import WeightNames, weight_names
from app.offers import require_offered

if TYPE_CHECKING:
    from app.files import tensorfile


def check_before_file(engine: sa.Engine, spec: schemas.CheckpointSpec) -> None:
    """Check what of a spec can be without its file, which may take an hour to come.

    Raises:
        InvalidRequest, NotFound: as `create_checkpoint`.
    """
    base = base_of(engine, spec)
    if base is None and spec.adapter is not None:
        raise _without_base()
    if spec.adapter is not None:
        check_adapter(spec.adapter)
    if spec.architecture is not None and spec.architecture.get("family") != "exported":
        require_offered(engine, check_architecture(spec.architecture))
    if spec.preprocess is not None:
        given_preprocess(spec.preprocess)


def members_of(
    config: dict[str, Any] | None = None,
    preprocessor: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the members of a spec that a folder's descriptions stand for."""
    return {
        "architecture": None if config is None else architecture_of_config(config),
        "preprocess": preprocessor or preprocess_of_config(config or {}),
        "tokenizer": tokenizer,
        "adapter": adapter,
    }


def completed(spec: schemas.CheckpointSpec, brought: Mapping[str, Any]) -> schemas.CheckpointSpec:
    """Return a spec with what came with its file, where it says nothing itself."""
    return spec.model_copy(update={name: value for name, value in brought.items() if getattr(spec, name) is None})


def base_of(engine: sa.Engine, spec: schemas.CheckpointSpec) -> models.Checkpoint | None:
    """Return the checkpoint that a spec names as its adapter's base.

    Raises:
        NotFound: it does not exist.
        InvalidRequest: it is an adapter itself or an exported network, or the spec has a prefix.
    """
    if spec.base_id is None:
        return None
    if spec.prefix is not None:
        raise InvalidRequest("The spec has a base_id and a prefix: an adapter's names begin as PEFT has them.")
    with read(engine) as session:
        base = session.get(models.Checkpoint, spec.base_id)
    if base is None:
        raise NotFound(f"There is no checkpoint {spec.base_id!r}.")
    if base.base_id is not None:
        raise InvalidRequest(
            f"base_id names {base.name!r} ({base.id}), which is an adapter itself, of {base.base_id}. An adapter of an "
            "adapter is not taken: push it with that base, or merge the first one where torch is and push the network.",
            base_id=base.base_id,
        )
    if base.architecture["family"] == "exported":
        raise InvalidRequest(
            f"base_id names {base.name!r} ({base.id}), an exported network: it has operations in place of the layers "
            "that an adapter changes. Merge the two where torch is, and export the network again.",
            base_id=base.id,
        )
    return base


def network_columns(engine: sa.Engine, spec: schemas.CheckpointSpec, file: "tensorfile.TensorFile") -> dict[str, Any]:
    """Return what is kept of a whole network, by columns of its row."""
    if spec.adapter is not None:
        raise _without_base()
    refuse_adapter(file.tensors)
    architecture, operations = _architecture(spec, file)
    require_offered(engine, architecture, operations)
    # A graph has the file's own names.
    names = WeightNames("", {}) if operations else weight_names(file.tensors, spec.prefix)
    return {
        "n_parameters": file.n_parameters(names.ignored),
        "architecture": architecture,
        "head": spec.head,
        "prefix": names.prefix,
        "ignored": names.ignored,
        "asked_prefix": spec.prefix,
    }


def adapter_columns(
    engine: sa.Engine, spec: schemas.CheckpointSpec, file: "tensorfile.TensorFile", base: models.Checkpoint
) -> dict[str, Any]:
    """Return what is kept of an adapter, by columns of its row; it has its base's network, head and inputs.

    A description of its own is that of another head, which its file then holds.
    """
    rank = rank_of_adapter(file.tensors)
    if spec.adapter is None:
        raise InvalidRequest(
            "The spec has a base_id and no 'adapter': give it the content of adapter_config.json, or send a zip or tar "
            "of the adapter's folder.",
            missing_member="adapter",
        )
    architecture, head = base.architecture, base.head
    if spec.architecture is not None:
        architecture, head = check_architecture(spec.architecture), None
        require_offered(engine, architecture)
    return {
        "base_id": base.id,
        "adapter": {**check_adapter(spec.adapter), "rank": rank},
        "n_parameters": base.n_parameters,
        "architecture": architecture,
        "head": head if spec.head is None else spec.head,
        "prefix": ADAPTER_PREFIX,
        "ignored": {},
        "preprocess": base.preprocess,
        "tokenizer_sha256": base.tokenizer_sha256,
    }


def _without_base() -> InvalidRequest:
    return InvalidRequest("The spec has an adapter and no base_id: name the checkpoint whose weights it changes.")


def _architecture(spec: schemas.CheckpointSpec, file: "tensorfile.TensorFile") -> tuple[dict[str, Any], list[str]]:
    """Return the checked description of a checkpoint's network, and the operations of a graph; empty without one."""
    from app.files import exported

    given = spec.architecture
    if given is not None and given.get("family") != "exported":
        return check_architecture(given), []
    if exported.GRAPH in file.metadata:
        described, operations = exported.describe_graph(file.metadata[exported.GRAPH])
        return check_architecture(described), operations
    if given is not None:
        raise InvalidRequest(
            "A network of the family exported is described by the graph in its file: send what torch.export.save "
            "wrote, or a file of interplay.save_checkpoint with example_inputs. This file holds no graph."
        )
    return check_architecture(_embedded_architecture(file)), []


def _embedded_architecture(file: "tensorfile.TensorFile") -> Any:
    text = file.metadata.get("architecture")
    if text is None:
        raise InvalidRequest(
            "The spec has no 'architecture' and the file's own metadata names none. Give one of them, such as "
            '{"family": "builtin", "name": "mlp", "args": {"sizes": [64, 32, 10]}}.',
            missing_member="architecture",
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidFile("The architecture in the file's own metadata is not JSON.") from None
