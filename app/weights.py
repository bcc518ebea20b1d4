"""Names of a checkpoint's tensors as training leaves them: wrappers before each, other tensors beside them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# What libraries put before every name: DataParallel and DDP, torch.compile, Lightning modules, dumps of whole states.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "network.", "net.", "state_dict.")
# Tensors that training keeps beside the weights: an optimizer's state, averaged copies, losses with parameters.
_BESIDE = (
    "optimizer.", "optimizers.", "optimizer_state.", "optim.", "lr_scheduler.", "scheduler.", "scaler.",
    "ema.", "ema_model.", "model_ema.", "module_ema.", "ema_state_dict.", "swa_model.", "averaged_model.",
)  # fmt: skip


@dataclass(frozen=True)
class WeightNames:
    """What stands before every weight's name, and how many tensors are no weights, by how their names begin."""

    prefix: str
    ignored: dict[str, int]


def weight_names(names: Iterable[str]) -> WeightNames:
    """Tell weights from what training keeps beside them, by names alone.

    A prefix is what all weights share, however many wrappers deep. Where everything looks like an averaged copy, it is
    the weights. A network whose own names begin like a wrapper's keeps them: whoever loads it compares.

    >>> weight_names(["module.head.weight", "module.head.bias", "optimizer.0.exp_avg"])
    WeightNames(prefix='module.', ignored={'optimizer.': 1})
    """
    every = list(names)
    weights = [name for name in every if not name.startswith(_BESIDE)]
    ignored = Counter(beginning for name in every for beginning in _BESIDE if name.startswith(beginning))
    if not weights:
        weights, ignored = every, Counter()
    prefix = ""
    while wrapper := next((one for one in (*_WRAPPERS, *_BESIDE) if _all_begin(weights, prefix + one)), None):
        prefix += wrapper
    return WeightNames(prefix, dict(sorted(ignored.items())))


def _all_begin(names: list[str], beginning: str) -> bool:
    """Whether something is left of every name behind it."""
    return bool(names) and all(name.startswith(beginning) and name != beginning for name in names)
