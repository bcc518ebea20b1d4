"""What every step is computed with, and the parts of reports that several kinds share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TypeVar

import torch
from safetensors import safe_open

from analysis.evaluation import Evaluation, EvaluationOptions
from analysis.networks.adapters import Adapter, supplied_shapes
from analysis.networks.adapting import Adaptable
from analysis.networks.exported.network import batch_bounds
from analysis.networks.loading import LoadedNetwork, header_of, load_network
from app import schemas
from app.schemas.reports import Subject
from workers.compute.features import FeatureCache
from workers.tasks import Checkpoint, Files, Json, Network, Task

OnProgress = Callable[[str, int, int], None]
Options = TypeVar("Options", bound=EvaluationOptions)
T = TypeVar("T")


class Held:
    """What the points of an analysis share, such as loaded networks and the probe: loaded once, then held.

    There is one value of each type for an analysis. A worker goes from one analysis to another and back, so those of
    other analyses are held too, as far as the limit allows; the one that was worked for longest ago goes first.

    Args:
        max_bytes: most bytes of tensors that are held for other analyses than the current one.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        # By analysis, in the order of their last use.
        self._values: dict[str, dict[type, object]] = {}

    def get(self, analysis_id: str, kind: type[T], load: Callable[[], T]) -> T:
        """Return the value of a type that is held for an analysis; load it if none is."""
        values = self._values.setdefault(analysis_id, {})
        value = values.get(kind)
        if not isinstance(value, kind):
            value = load()
            values[kind] = value
        return value

    def drop(self, analysis_id: str, kind: type) -> None:
        """Free the value of a type of an analysis."""
        self._values.get(analysis_id, {}).pop(kind, None)

    def begin(self, analysis_id: str) -> None:
        """Make an analysis the current one, and free what is held for others beyond the limit."""
        self._values[analysis_id] = self._values.pop(analysis_id, {})
        others = {id_: n_bytes(values) for id_, values in self._values.items() if id_ != analysis_id}
        for id_ in list(others):
            if sum(others.values()) > self._max_bytes or not others[id_]:
                del self._values[id_], others[id_]

    def keep_only(self, analysis_id: str) -> bool:
        """Free what is held for other analyses; return whether there was any."""
        others = [id_ for id_ in self._values if id_ != analysis_id]
        for id_ in others:
            del self._values[id_]
        return bool(others)

    def forget(self, analysis_id: str) -> None:
        """Free what is held for an analysis, which is finished."""
        self._values.pop(analysis_id, None)


def n_bytes(value: object) -> int:
    """Return the bytes of all tensors that a value refers to, each storage once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    pending = [value]
    while pending:
        one = pending.pop()
        if id(one) in seen or isinstance(one, str | bytes | int | float | type):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, torch.nn.Module):
            pending += [*one.parameters(), *one.buffers()]
        elif isinstance(one, Mapping):
            pending += one.values()
        elif isinstance(one, Sequence):
            pending += one
        else:
            pending += getattr(one, "__dict__", {}).values()
    return sum(storages.values())


@dataclass(frozen=True)
class Context:
    """What a step is computed with.

    Attributes:
        files: paths of the step's files, and limits on them.
        device: device of all passes and of the mathematics.
        cache: cache of features.
        held: what the points of an analysis share.
        provenance: members of `provenance` that reports of all kinds share.
        on_progress: called with phase, done and total as the work proceeds.
    """

    files: Files
    device: torch.device
    cache: FeatureCache
    held: Held
    provenance: Json
    on_progress: OnProgress


def options_of(kind: type[Options], task: Task) -> Options:
    """Return the options of a task that the mathematics takes, as its own type."""
    return kind(**{field.name: getattr(task.options, field.name) for field in fields(kind)})


def load(context: Context, checkpoint: Checkpoint) -> LoadedNetwork:
    """Build a checkpoint's network on the device and load its weights; an adapter's are merged into its base's."""
    if checkpoint.base is None:
        return _load_root(context, checkpoint)
    return put_on(context, checkpoint, adaptable(context, checkpoint))


def adaptable(context: Context, checkpoint: Checkpoint) -> Adaptable:
    """Load the network of a checkpoint, or of an adapter's base, for adapters to be put on."""
    return Adaptable(_load_root(context, checkpoint), checkpoint.architecture)


def put_on(context: Context, checkpoint: Checkpoint, network: Adaptable) -> LoadedNetwork:
    """Change a network to that of a checkpoint, which is its base or one of its base's adapters."""
    if checkpoint.base is None or checkpoint.adapter is None:
        return network.take_off(context.files.paths[checkpoint.sha256])
    paths = context.files.paths
    return network.put_on(mathematical(checkpoint.adapter), paths[checkpoint.sha256], paths[checkpoint.base.sha256])


def mathematical(given: schemas.Adapter) -> Adapter:
    """Return an adapter's configuration as the mathematics takes it."""
    return Adapter(
        r=given.r,
        alpha=given.lora_alpha,
        rslora=given.use_rslora,
        dora=given.use_dora,
        rank_pattern=given.rank_pattern,
        alpha_pattern=given.alpha_pattern,
        targets=given.target_modules,
        partial=given.partial,
        saved=given.modules_to_save,
        bias=given.bias,
    )


def _load_root(context: Context, checkpoint: Checkpoint) -> LoadedNetwork:
    """Load the network of a checkpoint, or of an adapter's base."""
    root, supplied = checkpoint.base or checkpoint, None
    if checkpoint.base is not None:
        with safe_open(context.files.paths[checkpoint.sha256], framework="pt") as file:
            supplied = supplied_shapes(header_of(file))
    return load_network(
        checkpoint.architecture,
        context.files.paths[root.sha256],
        head=checkpoint.head,
        device=context.device,
        prefix=root.asked_prefix,
        supplied=supplied,
    )


def network_facts(network: LoadedNetwork) -> Network:
    """Return the facts of a network that its checkpoint's row does not have."""
    least, _ = batch_bounds(network.module)
    filled_to = least if least > 1 else None
    return Network(head=network.head_name, filled_to=filled_to, **asdict(network.naming))


def described(checkpoint: Checkpoint, network: Network, *, n_features: int, n_classes: int) -> Subject:
    """Return a report's `subject`: the members of the row, overridden by those found when the network was loaded."""
    row = {name: value for name, value in checkpoint if name in Subject.model_fields}
    if checkpoint.base is not None:
        row["base"] = checkpoint.base.model_dump(include={"id", "name", "sha256"})
    found = {
        name: value for name, value in network if name in Network.model_fields and name in network.model_fields_set
    }
    return Subject(**{"kind": "checkpoint", **row, **found, "n_features": n_features, "n_classes": n_classes})


def splits_of(evaluation: Evaluation) -> Json:
    """Return the report's `splits` section."""
    return {name: asdict(split) for name, split in evaluation.splits.items()}


def dtype_name(tensor: torch.Tensor) -> str:
    """Return a dtype as reports name it, such as `float32`."""
    return str(tensor.dtype).removeprefix("torch.")
