"""Names of a checkpoint's tensors as training leaves them: wrappers before each, other tensors beside them.

What is told here, at an upload, is a guess, by names alone. A worker builds the network and decides by what that names
(analysis/networks/naming.py); the checkpoint then says what it found.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# What libraries put before every name: DataParallel and DDP, torch.compile, FSDP, Lightning modules and its strategies,
# PEFT, dumps of whole states.
_WRAPPERS = (
    "module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.",
    "base_model.model.", "model.", "network.", "net.", "state_dict.",
)  # fmt: skip
# Tensors that training keeps beside the weights: an optimizer's state, averaged copies, losses with parameters, counts.
_BESIDE = (
    "optimizer.", "optimizers.", "optimizer_state.", "optim.", "lr_scheduler.", "scheduler.", "scaler.",
    "ema.", "ema_model.", "model_ema.", "module_ema.", "ema_state_dict.", "swa_model.", "averaged_model.",
    "criterion.", "loss.", "loss_fn.", "metrics.", "n_averaged", "initted", "step",
)  # fmt: skip


@dataclass(frozen=True)
class WeightNames:
    """What stands before every weight's name, and how many tensors are no weights, by how their names begin."""

    prefix: str
    ignored: dict[str, int]


def weight_names(names: Iterable[str], asked: str | None = None) -> WeightNames:
    """Tell weights from what training keeps beside them, by names alone.

    A prefix is what all weights share, however many wrappers deep. Where everything looks like an averaged copy, it is
    the weights.

    Args:
        names: of a file's tensors.
        asked: the prefix, where somebody has named it.

    >>> weight_names(["module.head.weight", "module.head.bias", "optimizer.0.exp_avg"])
    WeightNames(prefix='module.', ignored={'optimizer.': 1})
    >>> weight_names(["model.head.weight", "ema_model.head.weight"], "ema_model.")
    WeightNames(prefix='ema_model.', ignored={'model.': 1})
    """
    every = list(names)
    if asked is not None:
        others = Counter(_first_part(name) for name in every if not name.startswith(asked))
        return WeightNames(asked, dict(sorted(others.items())))
    beside = {name: beginning for name in every if (beginning := _beside(name)) is not None}
    weights = [name for name in every if name not in beside]
    if not weights:
        # What looks like an averaged copy is the weights, and counts are beside it.
        beside = {name: beginning for name, beginning in beside.items() if not beginning.endswith(".")}
        weights = [name for name in every if name not in beside]
    prefix = ""
    while wrapper := next((one for one in (*_WRAPPERS, *_BESIDE) if _all_begin(weights, prefix + one)), None):
        prefix += wrapper
    return WeightNames(prefix, dict(sorted(Counter(beside.values()).items())))


def _beside(name: str) -> str | None:
    """How the name of a tensor begins that training keeps beside the weights; None of others."""
    return next((one for one in _BESIDE if name == one or (one.endswith(".") and name.startswith(one))), None)


def _first_part(name: str) -> str:
    first, dot, _ = name.partition(".")
    return first + dot


def _all_begin(names: list[str], beginning: str) -> bool:
    """Whether something is left of every name behind it."""
    return (
        beginning.endswith(".")
        and bool(names)
        and all(name.startswith(beginning) and name != beginning for name in names)
    )
