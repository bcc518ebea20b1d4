"""Names of a checkpoint's tensors after training: with prefixes of wrappers, and other tensors beside the weights.

The result here, at an upload, is a guess from names alone. A worker builds the network and decides by its names
(analysis/networks/naming.py); the checkpoint then shows the worker's result.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# Prefixes that libraries add to every name: DataParallel and DDP, torch.compile, FSDP, Lightning modules and its
# strategies, PEFT, dumps of whole states.
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
    """The prefix of all weights' names, and the number of other tensors by the beginning of their names."""

    prefix: str
    ignored: dict[str, int]


def weight_names(names: Iterable[str], asked: str | None = None) -> WeightNames:
    """Distinguish weights from other tensors that training keeps beside them, by names alone.

    The prefix is shared by all weights, however many wrappers deep. If all tensors look like an averaged copy, they are
    the weights.

    Args:
        names: of a file's tensors.
        asked: the prefix, if the user gave one.

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
        # Tensors that look like an averaged copy are the weights, and counts are beside them.
        beside = {name: beginning for name, beginning in beside.items() if not beginning.endswith(".")}
        weights = [name for name in every if name not in beside]
    prefix = ""
    while wrapper := next((one for one in (*_WRAPPERS, *_BESIDE) if _all_begin(weights, prefix + one)), None):
        prefix += wrapper
    return WeightNames(prefix, dict(sorted(Counter(beside.values()).items())))


def _beside(name: str) -> str | None:
    """Return the beginning of a name that training keeps beside the weights; None for other names."""
    return next((one for one in _BESIDE if name == one or (one.endswith(".") and name.startswith(one))), None)


def _first_part(name: str) -> str:
    first, dot, _ = name.partition(".")
    return first + dot


def _all_begin(names: list[str], beginning: str) -> bool:
    """Return whether every name begins with `beginning` and continues after it."""
    return (
        beginning.endswith(".")
        and bool(names)
        and all(name.startswith(beginning) and name != beginning for name in names)
    )
