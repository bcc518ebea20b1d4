"""What every step is computed with, and the parts of reports that several kinds share."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TypeVar

import torch

from analysis.evaluation import Evaluation, EvaluationOptions
from analysis.networks.exported.network import batch_bounds
from analysis.networks.loading import LoadedNetwork, load_network
from app.schemas.reports import Subject
from workers.compute.features import FeatureCache
from workers.tasks import Checkpoint, Files, Json, Network, Task

OnProgress = Callable[[str, int, int], None]
Options = TypeVar("Options", bound=EvaluationOptions)
T = TypeVar("T")


class Held:
    """What the points of one analysis share, such as loaded networks and the probe: loaded once, then held."""

    def __init__(self) -> None:
        self._analysis_id: str | None = None
        self._value: object = None

    def get(self, analysis_id: str, kind: type[T], load: Callable[[], T]) -> T:
        """Return what is held for an analysis; load it if nothing is."""
        if self._analysis_id == analysis_id and isinstance(self._value, kind):
            return self._value
        self.clear()
        value = load()
        self._analysis_id, self._value = analysis_id, value
        return value

    def keep_only(self, analysis_id: str) -> None:
        """Free the memory that another analysis, possibly failed, still holds."""
        if self._analysis_id != analysis_id:
            self.clear()

    def clear(self) -> None:
        """Free what is held."""
        self._analysis_id, self._value = None, None


@dataclass(frozen=True)
class Context:
    """What a step is computed with.

    Attributes:
        files: paths of the step's files, and limits on them.
        device: device of all passes and of the mathematics.
        cache: cache of features.
        held: what the points of the analysis share.
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
    """Build a checkpoint's network on the device and load its weights."""
    return load_network(
        checkpoint.architecture,
        context.files.paths[checkpoint.sha256],
        head=checkpoint.head,
        device=context.device,
        prefix=checkpoint.asked_prefix,
    )


def network_facts(network: LoadedNetwork) -> Network:
    """Return the facts of a network that its checkpoint's row does not have."""
    least, _ = batch_bounds(network.module)
    filled_to = least if least > 1 else None
    return Network(head=network.head_name, filled_to=filled_to, **asdict(network.naming))


def described(checkpoint: Checkpoint, network: Network, *, n_features: int, n_classes: int) -> Subject:
    """Return a report's `subject`: the members of the row, overridden by those found when the network was loaded."""
    row = {name: value for name, value in checkpoint if name in Subject.model_fields}
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
